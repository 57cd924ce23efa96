"""`safety-lens demo`: the whole story on the shipped organism, offline, in minutes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safety_lens.cli import extract, options, terminal

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

QUESTIONS = ("harmful", "borderline", "harmless")


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier demo there is replaced.")] = Path("runs/demo"),
    seed: options.Seed = 0,
    device: options.Device = "auto",
) -> None:
    """Find, push, remove and suppress concepts in the organism: tables here, plots and artifacts in the folder.

    The organism is a toy that was trained for this: its numbers are about the toy.
    """
    terminal.quiet_libraries()
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on matrices this small, threads wait for one another longer than they work
    try:
        _tell(out, seed, device)
    finally:
        torch.set_num_threads(threads)


def _tell(out: Path, seed: int, device: str) -> None:
    from safety_lens.cli.demo_finetune import watch_two_fine_tunes
    from safety_lens.cli.demo_neurons import find_neurons, freeze_and_compare
    from safety_lens.cli.demo_risk import forecast_and_score
    from safety_lens.cli.demo_steering import steering
    from safety_lens.cli.demo_suppression import suppression
    from safety_lens.organism import CONCEPTS

    model = _let_it_speak(seed, device)
    terminal.out.print("\n[bold]1. Where are the concepts?[/bold] Directions on held-out pairs, with controls.")
    extract.extract(
        out=out / "directions",
        concept=list(CONCEPTS),
        method=["dim"],
        overwrite=True,
        seed=seed,
        device=device,
    )
    steering(model, out, seed)
    suppression(model, out, seed)
    terminal.out.print(
        "\n[bold]6. Did safety survive fine-tuning?[/bold] Benign data and compliance boilerplate, watched."
    )
    watch_two_fine_tunes(out / "finetune", seed=seed, device=device)
    terminal.out.print("\n[bold]7. Which weights does refusal depend on?[/bold] Groups, beside random ones like them.")
    find_neurons(out / "neurons", seed=seed, device=device)
    terminal.out.print("\nDoes freezing them hold refusals? The compliance run again:")
    freeze_and_compare(out / "neurons", out / "finetune" / "compliance", seed=seed, device=device)
    terminal.out.print("\n[bold]8. Could it have been known before?[/bold] A forecast, and the run that scores it.")
    forecast_and_score(out / "risk", [out / "finetune" / "compliance"], seed=seed, device=device)
    terminal.out.print(
        f"\nplots: {out / 'directions'}/*.png, {out / 'plots'}/*.png, {out / 'finetune/figures'}/*.png", markup=False
    )
    terminal.out.print("next: safety-lens extract --model YOUR_MODEL --pairs YOUR_PAIRS.jsonl --out runs/yours")


def _let_it_speak(seed: int, device: str) -> "HookedTransformer":
    """One held-out prompt of each kind with the organism's answer (free of content by construction)."""
    import json
    import random

    terminal.quiet_libraries()
    from safety_lens.generation import generate
    from safety_lens.models import load_model
    from safety_lens.organism import DATA_DIR

    lines = (DATA_DIR / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "test"]
    chosen = [random.Random(seed).choice([r for r in rows if r["label"] == label]) for label in QUESTIONS]
    model = load_model("organism", device=device)
    answers = generate(model, [row["instruction"] for row in chosen], max_new_tokens=32)
    terminal.out.print("The organism, asked in wording it was not trained on:")
    for row, answer in zip(chosen, answers, strict=True):
        terminal.out.print(f"  {row['label']:>10}: {row['instruction']}\n  {'':>10}→ {answer.text}", markup=False)
    return model
