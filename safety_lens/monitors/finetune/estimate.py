"""What a run will take: computed from sizes and the speed of this machine, or measured from two real steps.

Computed: 4 floating operations per weight and token for adapters (forward, and backward to the activations), 6 for full
fine-tuning, 2 more with gradient checkpointing, at a fixed share of the matrix multiplication rate measured here.
Activations: 17 values per token, block and unit of width (Korthikanti et al. 2022, arXiv:2205.05198, eq. 1, without the
attention scores, which fused kernels do not keep). Both are rough: a factor of two either way is to be expected.
"""

import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from safety_lens.data.labelled import Labelled
from safety_lens.errors import ModelError
from safety_lens.loading.hub import first_line, parse_device, parse_dtype, read_settings, read_tokenizer, resolve
from safety_lens.log import NAN
from safety_lens.models import load_hf
from safety_lens.monitors.finetune.config import RunConfig
from safety_lens.monitors.finetune.freezing import freeze_named, named_groups
from safety_lens.monitors.finetune.protecting import protect
from safety_lens.monitors.finetune.run import Prepared, prepare, tokens_of
from safety_lens.monitors.finetune.training import quantization_of, trainer, training_arguments, with_trained_weights
from safety_lens.monitors.finetune.watch import monitor_settings
from safety_lens.monitors.monitor import Monitor

EFFICIENCY = 0.4
"""Share of the bare matrix multiplication rate that training reaches."""
ACTIVATIONS = 17
"""Values that a block keeps for the backward pass, per token and unit of width."""


@dataclass(frozen=True)
class Estimate:
    """How much a run will take.

    steps: optimizer steps. tokens: of a step, padding included. parameters, trained: counts. seconds: of training,
    without measurements. watching: seconds of the monitor's baseline and measurements, NaN where not measured. memory:
    parts of the peak in bytes, by name. basis: "computed" or "measured", in words.
    """

    steps: int
    tokens: int
    parameters: int
    trained: int
    seconds: float
    memory: dict[str, int]
    basis: str
    watching: float = NAN
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())


def computed(config: RunConfig) -> Estimate:
    """An estimate from sizes alone: the data and the tokenizer are read, no weight is.

    Raises:
        DataError, ModelError: as the run itself would.
    """
    ready = prepare(config)
    rows, notes = _rows(ready)
    steps, tokens = _steps(rows, config)
    hf = _empty(config)
    parameters = sum(p.numel() for p in hf.parameters())
    live = with_trained_weights(hf, config.model_copy(update={"tuning": _unquantised(config)}))
    trained = sum(p.numel() for p in live.parameters() if p.requires_grad)
    factor = (6 if config.tuning.method == "full" else 4) + (2 if config.training.gradient_checkpointing else 0)
    dtype = _dtype(config, hf)
    rate = matmul_rate(int(hf.config.hidden_size), dtype, parse_device(config.device))
    seconds = steps * factor * parameters * tokens / (rate * EFFICIENCY)
    basis = (
        f"computed: {factor} operations per weight and token at {EFFICIENCY:g} of {rate / 1e9:.0f} GFLOP/s; rough, and"
        " too low for models under 100 M weights: --measure"
    )
    memory = _memory(config, hf.config, live, parameters, trained, rows, dtype)
    return Estimate(steps, tokens, parameters, trained, seconds, memory, basis, notes=notes)


def measured(config: RunConfig) -> Estimate:
    """An estimate from three real steps of this run on its longest rows, in a temporary folder, and one measurement.

    Raises:
        DataError, ModelError: as the run itself would.
    """
    ready = prepare(config)
    rows, notes = _rows(ready)
    steps, tokens = _steps(rows, config)
    dtype = parse_dtype(config.dtype)
    hf, tokenizer = load_hf(
        config.model, dtype=dtype, device=config.device, quantization=quantization_of(config.tuning, dtype)
    )
    parameters = sum(p.numel() for p in hf.parameters())
    groups = named_groups(config.tuning.freeze, hf)
    live = with_trained_weights(hf, config)
    frozen, _ = freeze_named(live, groups)
    held = [*([frozen.callback()] if frozen else []), *_protected(config, live, tokenizer, rows)]
    trained = sum(p.numel() for p in live.parameters() if p.requires_grad)
    longest = sorted(rows, key=lambda row: -len(row.ids))[: 3 * _step_rows(config)]
    device = parse_device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        clock = _Clock()
        trial = config.model_copy(update={"out": Path(folder), "training": _short(config)})
        _reset_peak(device)
        trainer(live, longest, training_arguments(trial), tokenizer, [clock, *held]).train()
    per_token = min(clock.seconds) / _padded(longest[: _step_rows(config)])
    basis = f"measured: {min(clock.seconds):.3g} s for a step of the longest rows, scaled by tokens"
    seconds, memory = steps * per_token * tokens, _peak(device)
    watching = _watched(ready, live, tokenizer, steps, seconds)
    return Estimate(steps, tokens, parameters, trained, seconds, memory, basis, watching, notes)


def _protected(config: RunConfig, live: Any, tokenizer: Any, rows: Sequence[Labelled]) -> tuple[TrainerCallback, ...]:
    """The penalty's part of a step; which rows are risky is not asked."""
    every_row = config.protect.model_copy(update={"drop_risky": 0.0})
    return protect(config.model_copy(update={"protect": every_row}), live, tokenizer, rows).callbacks


def _watched(ready: Prepared, live: Any, tokenizer: Any, steps: int, training: float) -> float:
    """Seconds of the monitor: one baseline and one measurement, timed; measurements within the budget."""
    if not ready.concepts:
        return NAN
    watch = Monitor(
        live, ready.concepts, tokenizer=tokenizer, **monitor_settings(ready.config, live.config.num_hidden_layers)
    )
    times = [time.perf_counter()]
    for work in (watch.baseline, lambda: watch.measure(1)):
        work()
        times.append(time.perf_counter())
    later = (times[2] - times[1]) * math.ceil(steps / ready.config.monitor.every)
    budget = ready.config.monitor.budget
    return times[1] - times[0] + (later if budget is None else min(later, budget * training))


def _rows(ready: Prepared) -> tuple[Sequence[Labelled], tuple[str, ...]]:
    found = resolve(ready.config.model)
    tokenizer = read_tokenizer(found.base)
    if tokenizer is None:
        raise ModelError(f"{ready.config.model} has no tokenizer: put its files into the folder")
    rows, share = tokens_of(ready, tokenizer), ready.config.protect.drop_risky
    later = [f"drop_risky will leave out {share:.0%} of the rows: this counts all of them"] if share else []
    return rows.rows, (*ready.data.notes, *rows.notes, *later)


def _step_rows(config: RunConfig) -> int:
    return config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps


def _steps(rows: Sequence[Labelled], config: RunConfig) -> tuple[int, int]:
    """Optimizer steps of the run, and mean tokens of one, padding included."""
    training = config.training
    per_epoch = math.ceil(
        math.ceil(len(rows) / training.per_device_train_batch_size) / training.gradient_accumulation_steps
    )
    steps = training.max_steps if training.max_steps > 0 else math.ceil(per_epoch * training.num_train_epochs)
    order = random.Random(config.seed).sample(list(rows), len(rows))
    size = training.per_device_train_batch_size
    padded = sum(_padded(order[i : i + size]) for i in range(0, len(order), size))
    return steps, max(1, padded // max(1, per_epoch))


def _padded(rows: Sequence[Labelled]) -> int:
    return max((len(row.ids) for row in rows), default=0) * len(rows)


def _empty(config: RunConfig) -> PreTrainedModel:
    """The model's structure without any weight."""
    base = resolve(config.model).base
    settings = read_settings(base)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the configuration of {base}: {first_line(error)}") from error


def _unquantised(config: RunConfig) -> Any:
    method = "lora" if config.tuning.method == "qlora" else config.tuning.method
    return config.tuning.model_copy(update={"method": method})


def _dtype(config: RunConfig, hf: PreTrainedModel) -> torch.dtype:
    if config.training.bf16 or config.tuning.method == "qlora":
        return torch.bfloat16
    if config.training.fp16:
        return torch.float16
    return parse_dtype(config.dtype) or getattr(hf.config, "dtype", None) or torch.float32


def matmul_rate(width: int, dtype: torch.dtype, device: torch.device, tokens: int = 512) -> float:
    """Floating operations per second of a block's matrix multiplication, measured here for a fifth of a second."""
    x, weight = (
        torch.ones(tokens, width, dtype=dtype, device=device),
        torch.ones(width, 4 * width, dtype=dtype, device=device),
    )
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.2:
        float((x @ weight)[0, 0])  # reading one number waits for the device
        done += 1
    return done * 2.0 * tokens * width * 4 * width / (time.perf_counter() - began)


def _memory(
    config: RunConfig,
    shape: Any,
    live: nn.Module,
    parameters: int,
    trained: int,
    rows: Sequence[Labelled],
    dtype: torch.dtype,
) -> dict[str, int]:
    wide = dtype.itemsize
    stored = {"qlora": {"nf4": 0.55, "int8": 1.05}[config.tuning.quantization]}.get(
        config.tuning.method, (parse_dtype(config.dtype) or getattr(shape, "dtype", None) or torch.float32).itemsize
    )
    longest = max(len(row.ids) for row in rows) * config.training.per_device_train_batch_size
    blocks = int(shape.num_hidden_layers)
    kept = blocks + ACTIVATIONS if config.training.gradient_checkpointing else blocks * ACTIVATIONS
    memory = {
        "weights": int(parameters * stored),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": longest * int(shape.hidden_size) * kept * wide,
        "logits": longest * int(shape.vocab_size) * (wide + 8),
    }
    if config.monitor.concepts:
        memory["monitor"] = _folded(live) * wide
    return memory


def _folded(live: nn.Module) -> int:
    """Entries of the matrices that the monitor keeps merged copies of; none for full fine-tuning."""
    if not isinstance(live, PeftModel):
        return 0
    return sum(
        m.get_base_layer().weight.numel()
        for m in live.modules()
        if hasattr(m, "lora_A") and hasattr(m, "get_base_layer")
    )


class _Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def _short(config: RunConfig) -> Any:
    more = {**config.training.more, "save_strategy": "no"}
    return config.training.model_copy(update={"max_steps": 3, "report_to": [], "more": more})


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> dict[str, int]:
    if device.type == "cuda":
        return {"peak on the device": int(torch.cuda.max_memory_allocated(device))}
    import resource  # there is none on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux
    return {
        "peak of the process, Python and libraries included": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    }
