"""The demo's neurons: which weights refusal depends on, what the model does without them, a page, and freezing them."""

from pathlib import Path

from safety_lens.cli import terminal
from safety_lens.cli.demo_finetune import planned
from safety_lens.cli.drift_source import report_drift
from safety_lens.cli.neurons_ablate import ablate
from safety_lens.cli.neurons_identify import identify
from safety_lens.cli.neurons_page import page

SIZES = "0.003"
EXAMPLES, PROMPTS, DRAWS = 64, 24, 20


def find_neurons(out: Path, *, seed: int = 0, device: str = "auto") -> None:
    """Groups of weights, their ablation beside matched random ones, and a page of the neurons; into `out`."""
    weights, units = out / "weights", out / "units"
    identify(out=weights, sizes=SIZES, n_examples=EXAMPLES, overwrite=True, seed=seed, device=device)
    shown = [f"set-difference-{size}" for size in SIZES.split(",")]
    ablate(
        groups=weights, group=shown, draws=DRAWS, n_prompts=PROMPTS, out=out / "ablation", overwrite=True,
        seed=seed, device=device,
    )  # fmt: skip
    terminal.err.print("MLP neurons of the same kind, for the page")
    identify(out=units, unit="neuron", n_examples=EXAMPLES, overwrite=True, seed=seed, device=device)
    page(
        out=out / "neurons.html", groups=[units], group=["set-difference", "random"], concept=["refusal"],
        score=["gradient"], title="Neurons that refusals depend on", seed=seed, device=device,
    )  # fmt: skip


def freeze_and_compare(out: Path, free: Path, *, seed: int = 0, device: str = "auto") -> list[Path]:
    """The compliance run again with the group frozen, and with a random one, beside the free run; gives the figures."""
    from safety_lens.monitors.finetune.run import run

    runs = {"frozen": "set-difference", "random frozen": "random"}
    for name, group in runs.items():
        terminal.err.print(f"fine-tuning on compliance data with the group {group} frozen")
        config = planned(
            "compliance", out / name, seed=seed, device=device, tuning__freeze=[f"{out / 'weights'}:{group}"],
            monitor__concepts=["refusal"],
        )  # fmt: skip
        run(config, overwrite=True)
    return report_drift([free, *(out / name for name in runs)], out / "figures")
