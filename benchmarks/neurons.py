"""Speed and memory of SNIP scores against a loop over examples and against one pass per layer.

A random 100 M-parameter Llama in float32, 64 examples of 20 to 72 tokens, every linear map of every block.

- loop: one example at a time through the Hugging Face model, one backward pass for all blocks, |gradient| added up.
- one pass per layer: the procedure of Wei et al.'s published code, which opens one block after the other for gradients
  and runs all examples through the whole model for each. Every example costs the same in it whatever the others are, so
  it is timed on every 8th example (by length) and multiplied; --full runs all.

Sides take turns within each repeat; a ratio is the median over repeats of the ratio within a repeat. Memory is the peak
of resident memory above the loaded model, in a fresh process.

Run: python benchmarks/neurons.py [--threads 2] [--repeats 3] [--full] [--out FILE]
"""

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from figures import Report
from loading import MIB, Peak
from models import llama_100m
from torch import Tensor
from transformers import LlamaForCausalLM

from safety_lens.forced import Continuation
from safety_lens.loading.homes import homes
from safety_lens.models import load_model
from safety_lens.probes.attribution import snip_scores
from safety_lens.probes.gradients import example_batches

EXAMPLES, PROMPT, RESPONSE, EVERY = 64, (12, 40), (8, 32), 8
OURS, LOOP, WEI = "ours", "one-pass loop, one example at a time", "one pass per layer"
Grads = dict[str, Tensor]


def make_examples(n: int = EXAMPLES, seed: int = 0) -> list[Continuation]:
    rng = random.Random(seed)

    def ids(bounds: tuple[int, int]) -> tuple[int, ...]:
        return tuple(rng.randrange(5, 32000) for _ in range(rng.randint(*bounds)))

    return [Continuation(ids(PROMPT), ids(RESPONSE)) for _ in range(n)]


def linear_weights(hf: LlamaForCausalLM, layer: int | None = None) -> dict[str, torch.nn.Parameter]:
    where = {home.module: name for name, home in homes(hf).items()}
    within = "" if layer is None else f"model.layers.{layer}."
    return {
        where[name]: module.weight for name, module in hf.named_modules() if name in where and name.startswith(within)
    }


def add_sizes(hf: LlamaForCausalLM, rows: Sequence[Continuation], sums: Grads, layer: int | None) -> None:
    """|gradient| of every row's own loss, for the weights of one block or of all."""
    hf.requires_grad_(False)
    weights = linear_weights(hf, layer)
    for weight in weights.values():
        weight.requires_grad_(True)
    for row in rows:
        tokens = torch.tensor([[*row.prompt, *row.tokens]])
        labels = tokens.clone()
        labels[0, : len(row.prompt)] = -100
        hf(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            sums[name] += weight.grad.abs_()
            weight.grad = None
    hf.requires_grad_(False)


def empty_sums(hf: LlamaForCausalLM) -> Grads:
    return {name: torch.zeros_like(weight) for name, weight in linear_weights(hf).items()}


def loop(hf: LlamaForCausalLM, rows: Sequence[Continuation]) -> Grads:
    sums = empty_sums(hf)
    add_sizes(hf, rows, sums, None)
    return {name: (sums[name] * weight.abs()).detach() / len(rows) for name, weight in linear_weights(hf).items()}


def pass_per_layer(hf: LlamaForCausalLM, rows: Sequence[Continuation]) -> Grads:
    sums = empty_sums(hf)
    for layer in range(hf.config.num_hidden_layers):
        add_sizes(hf, rows, sums, layer)
    return {name: (sums[name] * weight.abs()).detach() / len(rows) for name, weight in linear_weights(hf).items()}


def compare(report: Report, repeats: int, full: bool) -> None:
    hf, rows = llama_100m(), make_examples()
    model = load_model(hf, check=False)
    by_length = sorted(rows, key=lambda row: len(row.prompt) + len(row.tokens))
    some = rows if full else by_length[EVERY // 2 :: EVERY]
    times: dict[str, list[float]] = {OURS: [], LOOP: [], WEI: []}
    found: dict[str, Grads] = {}
    for repeat in range(repeats + 1):
        for name in times:
            gc.collect()
            started = time.perf_counter()
            if name == OURS:
                found[name] = snip_scores(model, rows).values
            else:
                part = rows if name == LOOP else some if repeat else some[:1]
                found[name] = (loop if name == LOOP else pass_per_layer)(hf, part)
            took = (time.perf_counter() - started) * (len(rows) / len(some) if name == WEI else 1)
            if repeat:  # the first round warms up
                times[name].append(took)
            print(f"{repeat or 'warm-up'} of {repeats}: {name} {took:.1f} s", file=sys.stderr, flush=True)
    ratio = {n: statistics.median(a / b for a, b in zip(times[n], times[OURS], strict=True)) for n in times}
    n_layers = hf.config.num_hidden_layers
    for name, taken in times.items():
        report.add(f"seconds: {name}", statistics.median(taken))
    report.add(f"speed: {LOOP} / ours", ratio[LOOP], 1.7)
    report.add(f"speed: {WEI} / ours", ratio[WEI], 0.8 * n_layers)
    report.add(
        "scores: largest difference from the loop, of the largest score", gap(found[OURS], found[LOOP]), 1e-5, most=True
    )
    if full:
        report.add("scores: the same from one pass per layer", gap(found[OURS], found[WEI]), 1e-5, most=True)


def gap(mine: Grads, theirs: Grads) -> float:
    return max(float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


# --- memory ---------------------------------------------------------------------------------------------------------


def largest_batch(rows: Sequence[Continuation], model: object) -> list[Continuation]:
    batches = [[rows[i] for i in batch] for batch in example_batches(model, rows, "auto")]
    return max(batches, key=lambda batch: len(batch) * max(len(r.prompt) + len(r.tokens) for r in batch))


def activations(hf: LlamaForCausalLM, batch: Sequence[Continuation]) -> int:
    """Bytes that one training step of the Hugging Face model keeps for its backward pass, weights not counted."""
    width = max(len(r.prompt) + len(r.tokens) for r in batch)
    tokens = torch.tensor([[*r.prompt, *r.tokens, *[0] * (width - len(r.prompt) - len(r.tokens))] for r in batch])
    labels = torch.full_like(tokens, -100)
    for b, row in enumerate(batch):
        start, end = len(row.prompt), len(row.prompt) + len(row.tokens)
        labels[b, start:end] = tokens[b, start:end]
    weights = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    hf.requires_grad_(False)
    for weight in linear_weights(hf).values():
        weight.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hf(input_ids=tokens, labels=labels, use_cache=False)
    hf.requires_grad_(False)
    return sum(kept.values())


def memory() -> dict[str, float]:
    """MiB: peak above the loaded model, the sums, and the activations of the largest micro-batch."""
    hf, rows = llama_100m(), make_examples()
    model = load_model(hf, check=False)
    snip_scores(model, rows[:1], layers=[0])  # buffers of threads and one-off tables are no cost of scoring
    gc.collect()
    with Peak() as watch:
        scores = snip_scores(model, rows)
    peak, sums = watch.top - watch.start, scores.numel * 4
    return {"peak": peak / MIB, "sums": sums / MIB, "activations": activations(hf, largest_batch(rows, model)) / MIB}


def add_memory(report: Report, threads: int) -> None:
    command = [sys.executable, __file__, "--threads", str(threads), "--memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    report.add("memory: sums (float32, every scored weight), MiB", found["sums"])
    report.add("memory: activations of the largest micro-batch in a training step, MiB", found["activations"])
    limit = found["sums"] + 1.5 * found["activations"]
    report.add("memory: peak above the loaded model, MiB", found["peak"], limit, most=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="time one pass per layer on all examples")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(memory()))
        return
    report = Report()
    compare(report, options.repeats, options.full)
    add_memory(report, options.threads)
    print(f"llama 100M, float32, {EXAMPLES} examples, {options.threads} threads, {options.repeats} repeats")
    report.show()
    if options.out:
        options.out.write_text(json.dumps(report.rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
