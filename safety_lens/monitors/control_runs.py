"""Control runs: harmless fine-tunes of the same size, steps and rate, with which a turned direction is compared.

A cosine below 1 says that the weights moved the direction, and in a paired design tiny turns are certain. Whether the
turn is more than what harmless training does can only harmless training say: on the organism a random change of the
weights with the same singular values moved activations five times less than a harmless run (LoRA of rank 8, 40 steps).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from safety_lens.errors import ArtifactError, DataError
from safety_lens.log import Measurement, read_measurements

FEWEST = 5
METRIC = "cosine_to_baseline"
Curve = tuple[Float[np.ndarray, " step"], Float[np.ndarray, " step"]]
"""Steps, and 1 − cosine after each."""


@dataclass(frozen=True, eq=False)
class ControlRuns:
    """Logs of control runs.

    Attributes:
        runs: For each run its direction and hook → the steps measured and how far the direction had turned.

    Raises:
        DataError: Fewer than five runs.
    """

    runs: tuple[Mapping[tuple[str, str], Curve], ...]

    def __post_init__(self) -> None:
        if len(self.runs) < FEWEST:
            raise DataError(f"{len(self.runs)} control runs say too little about harmless drift: give {FEWEST} or more")

    @classmethod
    def of_logs(cls, logs: Sequence[Sequence[Measurement]]) -> "ControlRuns":
        """From the rows of each log."""
        runs = []
        for rows in logs:
            found: dict[tuple[str, str], dict[int, float]] = {}
            for row in rows:
                if row.metric == METRIC and row.hook is not None and row.step is not None:
                    found.setdefault((row.subject, row.hook), {})[row.step] = 1 - row.value
            runs.append({at: (np.array(sorted(turn), float), np.array([turn[k] for k in sorted(turn)]))
                         for at, turn in found.items()})  # fmt: skip
        return cls(tuple(runs))

    @classmethod
    def read(cls, logs: Sequence[Path]) -> "ControlRuns":
        """From the drift logs of runs.

        Raises:
            DataError: Fewer than five. ArtifactError: No such log, or one without directions.
        """
        rows = []
        for path in logs:
            if not path.is_file():
                raise ArtifactError(f"{path.parent} is no monitored run: it has no {path.name}")
            rows.append(read_measurements(path))
            if not any(row.metric == METRIC and row.step for row in rows[-1]):
                raise ArtifactError(
                    f"{path} holds no direction after step 0: run it with --monitor-budget none, at the same --every"
                )
        return cls.of_logs(rows)

    @property
    def rate(self) -> float:
        """Probability with which a further harmless run turns more than all of these, for one direction and step."""
        return 1 / (len(self.runs) + 1)

    def line(self) -> str:
        """One line for the start of a run."""
        return (
            f"notices: a direction must also have turned more than in each of {len(self.runs)} control runs; a harmless"
            f" run does so with a probability of {self.rate:.2f} for a direction at a step"
        )

    def exceeded(self, rows: Sequence[Measurement]) -> bool | None:
        """Compare a direction's turn, at the hook where it stands out most, with that in every control run.

        Args:
            rows: Its cosines with the baseline at one step, one for each hook. The turn at each hook is divided by its
                mean over all runs, this one included, so that hooks compare and no run is treated unlike the others.

        Returns:
            True where it turned more than in all of them; None where the control runs do not hold this direction or end
            before this step.
        """
        known = [row for row in rows if all((row.subject, row.hook) in run for run in self.runs)]
        step = next((row.step for row in known if row.step is not None), None)
        curves = [[run[row.subject, str(row.hook)] for row in known] for run in self.runs]
        if step is None or any(steps[-1] < step for run in curves for steps, _ in run):
            return None
        turned = np.array(
            [[1 - row.value for row in known], *([np.interp(step, *curve) for curve in run] for run in curves)]
        )
        mean = turned.mean(0)
        most = (turned[:, mean > 0] / mean[mean > 0]).max(1, initial=0.0)
        return bool(most[0] > most[1:].max())
