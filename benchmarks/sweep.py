"""The sweep engine against one `generate` call per cell, and plain generation against Hugging Face's.

Run: python benchmarks/sweep.py [--quick] [--repeats 3] [--threads 2] [--out FILE]
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from figures import Report, ratio
from models import llama_100m
from transformer_lens import HookedTransformer
from transformers import LlamaForCausalLM
from workload import make_tokenizer, make_work

from safety_lens.artifacts import versions
from safety_lens.generation import generate
from safety_lens.interventions.scorers import Completion
from safety_lens.interventions.steering import steer
from safety_lens.interventions.sweeping.engine import sweep
from safety_lens.interventions.sweeping.plan import Controls, Decoding
from safety_lens.models import hooks_at, load_model
from safety_lens.probes.directions import Direction

ENGINE, LOOP, HF, OURS = "engine", "one generate call per cell", "HF generate", "our generate"
COEFFS = (-0.4, -0.3, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4)
BATCH, PROMPT, NEW = 32, 32, 64


class Length:
    """A scorer that costs nothing: how many characters an answer has."""

    name = "length"

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        return np.array([float(len(c.text)) for c in completions])


def directions(model: HookedTransformer, layers: Sequence[int]) -> list[Direction]:
    """Random directions, as long as the activations of a small model are."""
    g = torch.Generator().manual_seed(0)
    hooks = hooks_at(model, layers=layers)
    return [Direction("random", hook, torch.randn(model.cfg.d_model, generator=g), "dim") for hook in hooks]


def by_cell(model: HookedTransformer, found: Sequence[Direction], prompts: Sequence[str], how: Decoding) -> list[str]:
    """What the engine replaces: the baseline, then every cell by itself."""
    options = {"max_new_tokens": how.max_new_tokens, "temperature": how.temperature, "ignore_eos": how.ignore_eos}
    cells = [[], *(steer(direction, coeff) for direction in found for coeff in COEFFS)]
    return [row.text for hooks in cells for row in generate(model, prompts, hooks=hooks, raw=how.raw, **options)]


def in_one(model: HookedTransformer, found: Sequence[Direction], prompts: Sequence[str], how: Decoding) -> list[str]:
    """The same cells by the engine, with its identity check, scores and statistics."""
    result = sweep(
        model, found, prompts, scorers=[Length()], coeffs=COEFFS, controls=Controls(0), decoding=how
    )  # fmt: skip
    return [str(record["text"]) for record in result.records]


def taken(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, taking turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, call in work.items():
            started = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def engine(
    report: Report, name: str, model: HookedTransformer, prompts: Sequence[str], how: Decoding, layers: Sequence[int],
    repeats: int, target: float | None,
) -> None:  # fmt: skip
    found = directions(model, layers)
    said: dict[str, list[str]] = {}
    work = {
        ENGINE: lambda: said.__setitem__(ENGINE, in_one(model, found, prompts, how)),
        LOOP: lambda: said.__setitem__(LOOP, by_cell(model, found, prompts, how)),
    }
    seconds = taken(work, repeats)
    rows, cells = len(said[LOOP]), 1 + len(found) * len(COEFFS)
    equal = sum(a == b for a, b in zip(said[ENGINE], said[LOOP], strict=True)) / rows
    report.add(f"{name}: {cells} cells of {len(prompts)} prompts, loop / engine", ratio(seconds, LOOP, ENGINE), target)
    report.add(f"{name}: share of equal texts among {rows} rows", equal, 1.0)
    report.add(f"{name}: rows per second, engine", rows / min(seconds[ENGINE]))


def against_hf(report: Report, hf: LlamaForCausalLM, model: HookedTransformer, batch: int, repeats: int) -> None:
    """Greedy, equal lengths, every row to the full length: nothing but the decode loop is compared."""
    ids = torch.randint(5, 32000, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    texts = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]
    said: dict[str, object] = {}

    def theirs() -> None:
        with torch.no_grad():
            out = hf.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
            )
        said[HF] = out[:, PROMPT:].tolist()

    def ours() -> None:
        rows = generate(model, texts, max_new_tokens=NEW, ignore_eos=True, batch_size=batch, raw=True)
        said[OURS] = [list(row.tokens) for row in rows]

    seconds = taken({HF: theirs, OURS: ours}, repeats)
    same = [a == b for a, b in zip(said[HF], said[OURS], strict=True)]  # type: ignore[call-overload]
    report.add(f"llama 100M, batch {batch}: HF generate / ours, {NEW} tokens", ratio(seconds, HF, OURS), 1.0)
    report.add(f"llama 100M, batch {batch}: tokens per second, ours", batch * NEW / min(seconds[OURS]))
    report.add(f"llama 100M, batch {batch}: tokens per second, HF", batch * NEW / min(seconds[HF]))
    report.add(f"llama 100M, batch {batch}: share of rows with HF's tokens", sum(same) / batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part of the work, to see that it runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    report = Report()
    organism = load_model("organism", check=False)
    questions = [f"How do I {verb} a {thing}?" for verb in ("build", "paint") for thing in ("chair", "house", "cup")]
    layers = [2, 5] if asked.quick else range(organism.cfg.n_layers)
    engine(report, "organism", organism, questions, Decoding(24), layers, asked.repeats, 4.0)
    hf = llama_100m()
    model = load_model(hf, tokenizer=make_tokenizer(), check=False)
    texts = make_work().texts[:4]
    how = Decoding(8 if asked.quick else 24, ignore_eos=True, raw=True)
    engine(report, "llama 100M", model, texts, how, [6] if asked.quick else [3, 6, 9], asked.repeats, None)
    for batch in (4,) if asked.quick else (1, 8, BATCH):
        against_hf(report, hf, model, batch, asked.repeats)
    report.show()
    if asked.out:
        content = {"rows": report.rows, "versions": versions(), "threads": asked.threads}
        asked.out.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
