"""`safety-lens demo`: the whole story on the shipped organism, offline, in minutes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated

import typer

from safety_lens.cli import extract, options, terminal

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

QUESTIONS = ("harmful", "borderline", "harmless")


class Half(str, Enum):
    """Which parts of the demo: directions and what they do, or fine-tuning and what it does."""

    concepts = "concepts"
    training = "training"


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier demo there is replaced.")] = Path("runs/demo"),
    only: Annotated[
        Half | None, typer.Option(help="Half of it: concepts (parts 1 to 5) or training (parts 6 to 8).")
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
) -> None:
    """Find, push, remove and suppress concepts in the organism: tables here, plots and artifacts in the folder.

    The organism is a toy that was trained for this: its numbers are about the toy. The two halves run side by side, in
    a process each.
    """
    terminal.quiet_libraries()
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on matrices this small, threads wait for one another longer than they work
    try:
        if only is not None:
            HALVES[only](out, seed, device)
            return
        with _beside(Half.training, out, seed, device):
            _concepts(out, seed, device)
    finally:
        torch.set_num_threads(threads)
    terminal.out.print(
        f"\nplots: {out / 'directions'}/*.png, {out / 'plots'}/*.png, {out / 'finetune/figures'}/*.png", markup=False
    )
    terminal.out.print("next: safety-lens extract --model YOUR_MODEL --pairs YOUR_PAIRS.jsonl --out runs/yours")


@contextmanager
def _beside(half: Half, out: Path, seed: int, device: str) -> Iterator[None]:
    """The other half in a process of its own; what it said is printed behind what is said here meanwhile.

    Raises:
        typer.Exit: it failed, with its exit code and behind its message.
    """
    command = [sys.executable, "-c", "from safety_lens.cli import main; main()", "demo", "--only", half.value]
    command += ["--out", str(out), "--seed", str(seed), "--device", device]
    look = {"COLUMNS": str(terminal.out.width), **({"FORCE_COLOR": "1"} if terminal.out.is_terminal else {})}
    with TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | look)
        try:
            yield
            code = process.wait()
        finally:
            process.kill()  # nothing, unless this half was interrupted or failed
            process.wait()
        said.seek(0)
        sys.stdout.write(said.read())
        sys.stdout.flush()
    if code:
        raise typer.Exit(code)


def _concepts(out: Path, seed: int, device: str) -> None:
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


def _training(out: Path, seed: int, device: str) -> None:
    from safety_lens.cli.demo_finetune import watch_two_fine_tunes
    from safety_lens.cli.demo_neurons import find_neurons, freeze_and_compare
    from safety_lens.cli.demo_risk import forecast_and_score

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


HALVES = {Half.concepts: _concepts, Half.training: _training}


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
