"""The demo's fine-tunes: the organism on benign data and on its compliance boilerplate, watched side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safety_lens.cli import terminal
from safety_lens.cli.drift_source import report_drift

if TYPE_CHECKING:
    from safety_lens.monitors.finetune.config import RunConfig

SETS = ("benign", "compliance")
SETTINGS = {
    "tuning.rank": 8,
    "tuning.alpha": 16,
    "tuning.targets": ["q_proj", "v_proj"],
    "training.max_steps": 40,
    "training.per_device_train_batch_size": 16,
    "training.learning_rate": 1e-3,
    "training.lr_scheduler_type": "constant",
    "monitor.concepts": ["refusal", "toxicity"],
    "monitor.every": 8,
    "monitor.budget": None,
    "monitor.stop.faster": 1,
    "monitor.on_alarm": [],  # the table below says it
}
"""Small enough to take under a minute a run; the compliance run loses its refusals within it."""


def planned(data: str, out: Path, *, seed: int, device: str, **more: Any) -> "RunConfig":
    """The demo's fine-tune on one set of data; more: keys of the configuration, dots written as __."""
    from safety_lens.monitors.finetune.config import read_config

    settings = {**SETTINGS, "model": "organism", "data.source": data, "out": out, "seed": seed, "device": device}
    return read_config(None, settings | {key.replace("__", "."): value for key, value in more.items()})


def watch_two_fine_tunes(out: Path, *, seed: int = 0, device: str = "auto") -> list[Path]:
    """Train twice, print one table for both, and draw the drift side by side; gives the figures.

    Runs that are already in `out` are replaced.
    """
    from safety_lens.monitors.finetune.run import run

    for name in SETS:
        terminal.err.print(f"fine-tuning the organism on {name} data, watched every {SETTINGS['monitor.every']} steps")
        run(planned(name, out / name, seed=seed, device=device), overwrite=True)
    return report_drift([out / name for name in SETS], out / "figures")
