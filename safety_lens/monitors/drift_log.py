"""The drift log: JSON lines that only grow, survive a kill at any byte, and continue where a resumed run continues.

Every measurement is appended as one block and flushed to the disk. A run that was killed may leave a torn last line,
and rows of steps after its last checkpoint: on resume the line is cut off and those steps are measured again.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safety_lens.errors import ArtifactError
from safety_lens.log import Measurement, read_measurements

HEADLINE = (
    *("cosine_to_baseline", "cosine_cv", "auroc_fixed", "auroc_current", "direction_norm", "retained_signal"),
    *("d_prime_fixed", "d_prime_current", "balanced_accuracy", "reliability"),
)


class Repaired(NamedTuple):
    """What opening a log had to cut: a torn last line, and rows of steps that will be measured again."""

    torn: bool
    again: int


class DriftLog:
    """An append-only file of measurement rows; one process writes it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows: list[Measurement] = []

    def open(self, step: int) -> Repaired:
        """Make the file fit to continue after `step`; `rows` then holds what is in it.

        A run that starts at step 0 never writes into another run's log: an existing one is moved aside, to
        `<name>.<number>`. The file is made here, so that a place that cannot be written is known before training.

        Raises:
            ArtifactError: the place cannot be written, or a line before the last is not a measurement.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self._cut_torn_line()
            rows = read_measurements(self.path) if self.path.exists() else []
            kept = [row for row in rows if row.step is not None and row.step <= step]
            if step == 0 and rows:
                self.path.rename(_free_name(self.path))
                kept, rows = [], []
            elif len(kept) < len(rows):
                self._rewrite(kept)
            with self.path.open("a", encoding="utf-8"):
                pass
        except OSError as error:
            raise ArtifactError(
                f"cannot write the drift log {self.path}: {error.strerror or error}; choose another log"
            ) from error
        self.rows = kept
        return Repaired(torn, len(rows) - len(kept))

    def append(self, rows: Sequence[Measurement]) -> None:
        """Add the rows of one measurement, on the disk when this returns.

        Raises:
            ArtifactError: they cannot be written (disk full, folder gone).
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(row.to_json() + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ArtifactError(f"cannot write the drift log {self.path}: {error.strerror or error}") from error
        self.rows += rows

    def steps(self) -> set[int]:
        """The steps that are measured."""
        return {row.step for row in self.rows if row.step is not None and row.metric != "error"}

    def _cut_torn_line(self) -> bool:
        if not self.path.exists():
            return False
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return False
        with self.path.open("r+b") as file:
            file.truncate(whole)
            file.flush()
            os.fsync(file.fileno())
        return True

    def _rewrite(self, rows: Sequence[Measurement]) -> None:
        beside = self.path.with_name(f".{self.path.name}.tmp")
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(row.to_json() + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)


def _free_name(path: Path) -> Path:
    number = 1
    while (name := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return name


def read_log(path: str | Path) -> list[Measurement]:
    """The rows of a drift log, also of one that is being written: a torn last line is left out, not an error.

    Raises:
        ArtifactError: no such file, or a line before the last that is not a measurement.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ArtifactError(f"cannot read the drift log {path}: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(content[: content.rfind("\n") + 1].split("\n")[:-1], 1):
        try:
            rows.append(Measurement.from_row(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path}, line {number}: not a measurement row ({error})") from error
    return rows


def write_csv(path: str | Path) -> Path | None:
    """Write `csv_view` of a log next to it, as `<name>.csv`; None where the log has no rows of a direction.

    Raises:
        ArtifactError: no such log, or the table cannot be written.
    """
    table = Path(path).with_suffix(".csv")
    if not any(row.metric == "cosine_to_baseline" for row in read_log(path)):
        return None
    try:
        table.write_text(csv_view(path), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot write {table}: {error.strerror or error}") from error
    return table


def csv_view(path: str | Path, hook: str | None = None) -> str:
    """The log as a table with one row per (step, concept), all concepts at one and the same hook.

    hook: one of the log; by default the headline hook that the log's "run" rows name. Columns: step, concept, method,
    hook, the seed metrics and their relatives, every `cross_*` cosine that the concept's rows hold, and the behaviour
    and level of that step. Empty where a number is unknown or was not measured.

    Raises:
        ArtifactError: no such file, or no rows at this hook.
    """
    rows = read_log(path)
    at = hook or next((row.hook for row in rows if row.subject == "run" and row.metric == "headline"), None)
    shown = [row for row in rows if row.hook == at and not row.subject.startswith(("behaviour/", "run"))]
    if not shown:
        known = sorted({row.hook for row in rows if row.hook})
        raise ArtifactError(f"{path} has no rows at {at!r}; hooks in it: {', '.join(known) or 'none'}")
    crossed = sorted({row.metric for row in shown if row.metric.startswith("cross_")})
    shared = {(r.step, f"{r.subject.split('/')[-1]}_{r.metric}"): r.value for r in rows if _once_a_step(r)}
    columns = sorted({name for _, name in shared})
    cells: dict[tuple[int, str], dict[str, float]] = {}
    for row in shown:
        cells.setdefault((row.step or 0, row.subject), {})[row.metric] = row.value
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["step", "concept", "method", "hook", *HEADLINE, *crossed, *columns])
    for (step, subject), found in sorted(cells.items()):
        values = [found.get(metric) for metric in (*HEADLINE, *crossed)] + [shared.get((step, c)) for c in columns]
        writer.writerow([step, *subject.rsplit("/", 1), at, *(_cell(value) for value in values)])
    return out.getvalue()


def _once_a_step(row: Measurement) -> bool:
    if row.subject.startswith("behaviour/"):
        return not row.metric.startswith("token_kl_at_")
    return row.subject == "run" and row.metric in ("level", "seconds")


def _cell(value: float | None) -> str:
    return "" if value is None or value != value else repr(value)
