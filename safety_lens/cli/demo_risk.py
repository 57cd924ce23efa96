"""The demo's forecast: made from the plan of a run alone, set beside what the monitor measured in that run."""

from collections.abc import Sequence
from pathlib import Path

from safety_lens.cli import terminal
from safety_lens.cli.risk import risk


def forecast_and_score(out: Path, runs: Sequence[Path], *, seed: int = 0, device: str = "auto") -> None:
    """Forecast runs of the demo from their configuration and score the forecasts with their logs."""
    for run in runs:
        terminal.out.print(f"planned: {run.name}", markup=False)
        risk(
            score=[run], rehearse=5, n_safety=32, batches=4, seed=seed, device=device, out=out / run.name,
            overwrite=True,
        )  # fmt: skip
