"""The demo's forecast: made from a run's plan alone, set beside what the monitor measured in that run."""

from pathlib import Path

from safety_lens.cli import terminal
from safety_lens.cli.risk import risk


def forecast_and_score(out: Path, runs: Path, *, seed: int = 0, device: str = "auto") -> None:
    """Forecast each of the demo's runs from its configuration and score it with its log."""
    for run in sorted(path for path in runs.iterdir() if (path / "config.yaml").is_file()):
        terminal.out.print(f"\nplanned: {run.name}", markup=False)
        risk(
            score=[run], rehearse=5, n_safety=32, batches=4, seed=seed, device=device, out=out / run.name,
            overwrite=True,
        )  # fmt: skip
