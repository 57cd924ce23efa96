"""Drift that is already on disk, for `report` and the demo: logs, runs, and artifacts of `monitor`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safety_lens.errors import ArtifactError

if TYPE_CHECKING:
    from safety_lens.log import Measurement

LOG = "drift.jsonl"


def holds_drift(source: Path) -> bool:
    """Whether a path is a drift log, the folder of a fine-tuning run, or an artifact of `monitor`."""
    return source.suffix == ".jsonl" or (source / LOG).is_file() or _kind(source) in ("finetune", "monitor")


def read_runs(sources: Sequence[Path]) -> "dict[str, list[Measurement]]":
    """Name of each run → its rows. A log that is still being written is read up to its last whole line.

    Raises:
        ArtifactError: a source without drift.
    """
    from safety_lens.artifacts import load_artifact
    from safety_lens.monitors.drift_log import read_log
    from safety_lens.monitors.saved import run_names

    runs: dict[str, list[Measurement]] = {}
    for name, source in zip(run_names(sources), sources, strict=True):
        if source.suffix == ".jsonl":
            runs[name.removesuffix(".jsonl")] = read_log(source)
        elif (source / LOG).is_file():
            runs[name] = read_log(source / LOG)
        elif _kind(source) == "monitor":
            runs |= by_run(load_artifact(source, kind="monitor").measurements)
        else:
            raise ArtifactError(
                f"{source} holds no drift: give a drift.jsonl, a run of `finetune`, or a `monitor` artifact"
            )
    return runs


def by_run(rows: "Sequence[Measurement]") -> "dict[str, list[Measurement]]":
    """Rows whose subject is `RUN:subject`, apart by run and with their own subjects again."""
    from dataclasses import replace

    runs: dict[str, list[Measurement]] = {}
    for row in rows:
        name, _, subject = row.subject.rpartition(":")
        runs.setdefault(name, []).append(replace(row, subject=subject))
    return runs


def report_drift(sources: Sequence[Path], out: Path, *, pdf: bool = False) -> list[Path]:
    """Tables on the terminal and figures in a folder: what `report` does with drift.

    Raises:
        ArtifactError: no drift there, or the folder cannot be written.
    """
    from safety_lens.cli import terminal
    from safety_lens.report.drift_tables import show_runs

    runs = read_runs(sources)
    written = draw(runs, out, pdf)
    for part in show_runs(runs):
        terminal.out.print(part)
    return written


def draw(runs: "dict[str, list[Measurement]]", out: Path, pdf: bool) -> list[Path]:
    """The figures of these runs.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    from safety_lens.report.drift_plots import draw_runs
    from safety_lens.report.neuron_drift_plots import draw_neuron_drift

    try:
        written = draw_runs(runs, out, pdf=pdf)
        for name, rows in runs.items():
            written += draw_neuron_drift(rows, out / name if len(runs) > 1 else out, name, pdf=pdf)
        return written
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def _kind(source: Path) -> str | None:
    import json

    from safety_lens.artifacts import MANIFEST

    try:
        found = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("kind") if isinstance(found, dict) else None
