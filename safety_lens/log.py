"""Measurement rows: the one long format in which everything measured is written.

NaN means unknown and is null on disk; it is never 0 and never left out.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safety_lens.errors import ArtifactError

NAN = float("nan")


@dataclass(frozen=True)
class Measurement:
    """One number: what of what, its interval, and where it was taken.

    subject: what was measured ("refusal/dim"). metric: its name ("auroc"). value, low, high: NaN where unknown.
    n: examples behind it. hook, split, step, seed, coeff (strength of an edit): None where they do not apply. note: a
    remark in plain words.
    """

    subject: str
    metric: str
    value: float
    low: float = NAN
    high: float = NAN
    n: int | None = None
    hook: str | None = None
    split: str | None = None
    step: int | None = None
    seed: int | None = None
    note: str | None = None
    coeff: float | None = None

    def to_json(self) -> str:
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return json.dumps(row, ensure_ascii=False)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Measurement":
        known = {f.name for f in fields(cls)}
        if unknown := set(row) - known:
            raise ArtifactError(f"a measurement row has unknown fields {sorted(unknown)}; known are {sorted(known)}")
        if missing := {"subject", "metric", "value"} - set(row):
            raise ArtifactError(f"a measurement row lacks {sorted(missing)}")
        numbers = {k: NAN if row.get(k) is None else float(row[k]) for k in ("value", "low", "high")}
        return cls(**{**row, **numbers})


def write_measurements(path: Path, rows: Iterable[Measurement]) -> None:
    """Write rows as JSON lines, flushed to the disk before returning."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(row.to_json() + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def read_measurements(path: Path) -> list[Measurement]:
    """Read rows back; null becomes NaN.

    Raises:
        ArtifactError: a line is not a measurement; the message carries file and line.
    """
    rows = []
    with path.open(encoding="utf-8", newline="\n") as file:  # not splitlines: U+2028 in a name is no end of a line
        for number, line in enumerate(file, 1):
            try:
                rows.append(Measurement.from_row(json.loads(line)))
            except (ValueError, TypeError) as error:  # ArtifactError and JSONDecodeError are ValueErrors
                raise ArtifactError(f"{path}, line {number}: not a measurement row ({error})") from error
    return rows
