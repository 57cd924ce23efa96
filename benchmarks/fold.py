"""What one fold costs: a 100 M-parameter random Llama with rank-16 LoRA, against rebuilding the hooked model.

Run: python benchmarks/fold.py [--threads 2] [--repeats 7] [--out FILE]
"""

import argparse
import copy
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from figures import Report
from loading import MIB, Peak
from models import llama_100m
from peft import LoraConfig, PeftModel, get_peft_model
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedModel

from safety_lens.folding import LoraFolder, Shadow
from safety_lens.loading.architectures import settings, weights
from safety_lens.models import load_model

TARGETS = {
    "all seven projections": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "q and v": ["q_proj", "v_proj"],
}
PLAIN = "no adapter"


def adapted(targets: list[str]) -> PeftModel:
    """The 100 M model with a rank-16 adapter whose effect is not zero."""
    live = get_peft_model(llama_100m(), LoraConfig(r=16, lora_alpha=32, target_modules=targets)).eval()
    push(live)
    return live


def push(live: PeftModel) -> None:
    """Move the factors, as a step of training does."""
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


def merged(live: PeftModel) -> PreTrainedModel:
    return copy.deepcopy(live).merge_and_unload()


def rebuilt(hf: PreTrainedModel, processed: bool) -> HookedTransformer:
    """TransformerLens' own model with its own loading; processed: folded norms and centred weights, its default."""
    fields = {**settings(hf), "model_name": "llama", "init_weights": False, "dtype": torch.float32, "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(HookedTransformerConfig.from_dict({**fields, "tokenizer_name": None}))
    state = {name: tensor.contiguous() for name, tensor in weights(hf, model.cfg).items()}
    state |= {name: torch.zeros_like(p) for name, p in model.named_parameters() if name not in state}
    model.load_and_process_state_dict(
        state,
        fold_ln=processed,
        center_writing_weights=processed,
        center_unembed=processed,
        fold_value_biases=processed,
    )
    return model


def seconds(run: Callable[[], object]) -> float:
    gc.collect()
    started = time.perf_counter()
    kept = run()
    took = time.perf_counter() - started
    del kept
    return took


def compare(report: Report, name: str, repeats: int) -> None:
    """Each way takes its turn within each repeat; a ratio is the median of ratios within a repeat."""
    live = adapted(TARGETS[name])
    model = load_model(live, check=False)
    folder = LoraFolder(model, live)
    ways = {
        "fold": folder.fold,
        "views": lambda: load_model(merged(live), check=False),
        "rebuild": lambda: rebuilt(merged(live), processed=False),
        "processed": lambda: rebuilt(merged(live), processed=True),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        push(live)
        took = {way: seconds(run) for way, run in ways.items()}
        if repeat:  # the first round warms up
            for way, value in took.items():
                times[way].append(value)
    folder.fold()
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        gap = float((model(tokens) - live(input_ids=tokens).logits).abs().max())
    few = name == "q and v"
    ratios = {way: statistics.median(a / b for a, b in zip(times[way], times["fold"], strict=True)) for way in ways}
    report.add(f"{name}: fold, milliseconds", 1000 * statistics.median(times["fold"]))
    report.add(f"{name}: deep copy + merge_and_unload + rebuild, times a fold", ratios["rebuild"], 100 if few else 15)
    report.add(f"{name}: the same with TransformerLens' processing, times a fold", ratios["processed"], 50)
    report.add(f"{name}: deep copy + merge_and_unload + our views, times a fold", ratios["views"])
    report.add(f"{name}: largest logit difference from live peft", gap, 1e-4, most=True)


def memory(name: str, streamed: bool) -> dict[str, float]:
    """Resident memory that a hooked model and its folder add to a model in this process, in MiB."""
    live = adapted(TARGETS[name]) if name in TARGETS else llama_100m()
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        live(input_ids=tokens)  # the first forward allocates thread buffers that are no cost of folding
    with Peak() as watch, torch.no_grad():
        model = load_model(live, check=False, stream=streamed)
        folder = LoraFolder(model, live) if not streamed else None
        if folder is not None:
            folder.fold()
        model(tokens, stop_at_layer=model.cfg.n_layers)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that the allocator keeps is nobody's
    held = watch.process.memory_info().rss
    adapted_bytes = Shadow(live).owned_bytes
    return {
        "peak": (watch.top - watch.start) / MIB,
        "extra": (held - watch.start) / MIB,
        "adapted": adapted_bytes / MIB,
        "block": Shadow(live, streamed=True).owned_bytes / MIB,
    }


def in_fresh_process(name: str, streamed: bool, threads: int) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--threads",
        str(threads),
        "--memory",
        name,
        *(["--stream"] if streamed else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def add_memory(report: Report, name: str, threads: int) -> None:
    """What the adapter costs: above what a hooked model of views costs by itself (code, tables, buffers of threads)."""
    whole, one = (in_fresh_process(name, streamed, threads) for streamed in (False, True))
    floor = in_fresh_process(PLAIN, False, threads)["extra"]
    report.add(f"{name}: adapted matrices, MiB", whole["adapted"])
    report.add(
        f"{name}: extra memory above {floor:.0f} without an adapter, MiB",
        whole["extra"] - floor,
        whole["adapted"] * 1.02,
        most=True,
    )
    report.add(f"{name}: one block of them, MiB", one["block"])
    report.add(f"{name}: extra memory of stream=True, MiB", one["extra"])
    report.add(f"{name}: peak of stream=True, with a forward, MiB", one["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", choices=[*TARGETS, PLAIN])
    parser.add_argument("--stream", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(memory(options.memory, options.stream)))
        return
    report = Report()
    for name in TARGETS:
        compare(report, name, options.repeats)
        add_memory(report, name, options.threads)
    print(f"llama 100M, float32, rank 16, {options.threads} threads, {options.repeats} repeats")
    report.show()
    if options.out:
        options.out.write_text(json.dumps(report.rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
