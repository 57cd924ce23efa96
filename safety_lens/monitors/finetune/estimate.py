"""What a run will take: computed from its sizes and the speed of a few blocks here, or measured on the model.

Computed: one block and three of the model's shape, with random weights, take a training step and a forward on rows of
the run; the difference, times the number of blocks, gives the time of the whole model (Python's share and the head
included). The memory of a step is counted on the whole model without values: the bytes of all tensors alive at once.
"""

import copy
import math
import random
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from safety_lens.artifacts import MANIFEST, MEASUREMENTS
from safety_lens.data import sides
from safety_lens.data.labelled import Labelled
from safety_lens.errors import ModelError
from safety_lens.loading.hub import first_line, parse_device, parse_dtype, read_settings, read_tokenizer, resolve
from safety_lens.log import NAN, Measurement, read_measurements
from safety_lens.models import load_hf
from safety_lens.monitors.finetune.config import RunConfig
from safety_lens.monitors.finetune.freezing import freeze_named, named_groups
from safety_lens.monitors.finetune.protecting import protect
from safety_lens.monitors.finetune.run import Prepared, prepare, tokens_of
from safety_lens.monitors.finetune.training import quantization_of, trainer, training_arguments, with_trained_weights
from safety_lens.monitors.finetune.watch import monitor_settings
from safety_lens.monitors.monitor import Monitor
from safety_lens.monitors.schedule import SETTLED, Schedule, Tier

FEW, SOME = 1, 3
"""Blocks of the two small models that are timed."""
TIMED = 512
"""Tokens that they are timed on at most, on a CPU."""
WRITTEN = 2.0
"""Cost of a token that is written, in tokens that are read: the batch of a decoding step is small."""
DERIVED, ANSWER, SETS = 240, 32, 4
"""Answers from which a behaviour is derived, their tokens, and sets of probes that are answered."""


@dataclass(frozen=True)
class Estimate:
    """How much a run will take.

    steps: optimizer steps. tokens: of a step, padding included. parameters, trained: counts. seconds: of training,
    without measurements. memory: parts of the peak in bytes, by name. basis: "computed" or "measured", in words.
    before: seconds of the monitor's measurement before training. watching: seconds of the later ones. full, light: how
    many of them there are. before and watching are NaN where nothing is monitored.
    """

    steps: int
    tokens: int
    parameters: int
    trained: int
    seconds: float
    memory: dict[str, int]
    basis: str
    before: float = NAN
    watching: float = NAN
    full: int = 0
    light: int = 0
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())


def computed(config: RunConfig) -> Estimate:
    """An estimate from sizes and the speed of a few blocks: the data and the tokenizer are read, no weight is.

    Raises:
        DataError, ModelError: as the run itself would.
    """
    held = _resident()  # Python and libraries, before anything is made
    ready = prepare(config)
    tokenizer, rows, notes = _rows(ready)
    steps, tokens = _steps(rows, config)
    settings = read_settings(resolve(config.model).base)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in _untrained(settings, torch.float32).parameters())
    live = _trainable(config, settings, "meta")
    trained = sum(p.numel() for p in live.parameters() if p.requires_grad)
    speed = _speed(config, settings, rows)
    seconds = steps * speed.training * tokens
    basis = (
        f"computed from {FEW} and {SOME} blocks timed here: {1000 * speed.training:.3g} ms a token; --measure takes"
        " three steps on the model"
    )
    memory = _memory(config, settings, live, parameters, rows)
    if parse_device(config.device).type == "cpu":
        memory = {"Python and libraries": held, **memory}
    costs = _costs(ready, tokenizer, speed.reading)
    return _with_monitor(
        Estimate(steps, tokens, parameters, trained, seconds, memory, basis, notes=notes), ready, costs
    )


def measured(config: RunConfig) -> Estimate:
    """An estimate from three real steps on the run's longest rows, and the measurement before training.

    Raises:
        DataError, ModelError: as the run itself would.
    """
    ready = prepare(config)
    _, rows, notes = _rows(ready)
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
    watch = None if not ready.concepts else _watch(ready, live, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        clock = _Clock()
        trial = config.model_copy(update={"out": Path(folder), "training": _short(config)})
        _reset_peak(device)
        trainer(live, longest, training_arguments(trial), tokenizer, [clock, *held]).train()
    costs = None if watch is None else _measured_costs(config, watch)
    per_token = min(clock.seconds) / _padded(longest[: _step_rows(config)])
    basis = f"measured: {min(clock.seconds):.3g} s for a step of the longest rows, scaled by tokens"
    estimate = Estimate(
        steps, tokens, parameters, trained, steps * per_token * tokens, _peak(device), basis, notes=notes
    )
    return _with_monitor(estimate, ready, costs)


def _protected(config: RunConfig, live: Any, tokenizer: Any, rows: Sequence[Labelled]) -> tuple[TrainerCallback, ...]:
    """The penalty's part of a step; which rows are risky is not asked."""
    every_row = config.protect.model_copy(update={"drop_risky": 0.0})
    return protect(config.model_copy(update={"protect": every_row}), live, tokenizer, rows).callbacks


# --- the monitor ----------------------------------------------------------------------------------------------------


class Costs(NamedTuple):
    """Seconds of the monitor. before: before training. light: per prompt of each set, NaN where nothing is probed."""

    before: float
    full: float
    light: float
    prompts: int


def _with_monitor(estimate: Estimate, ready: Prepared, costs: Costs | None) -> Estimate:
    """The estimate with the measurements that the schedule would make, and a note where a full one has no room."""
    if costs is None:
        return estimate
    chosen, step_seconds, notes = ready.config.monitor, estimate.seconds / estimate.steps, list(estimate.notes)
    schedule = Schedule(chosen.every, chosen.stop.faster, chosen.budget, estimate.steps)
    schedule.full, schedule.light, schedule.prompts = costs.full, costs.light, costs.prompts
    tiers = []
    for step in range(1, estimate.steps + 1):
        schedule.trained += step_seconds
        if step == min(SETTLED, estimate.steps) and (line := schedule.shortage(step)):
            notes.append(line)
        due = schedule.due(step, last=step == estimate.steps, noticed=False)
        if due.tier is not Tier.NONE:
            taken = costs.full if due.tier is Tier.FULL else costs.light * due.prompts
            schedule.measured(due.tier, step, taken, due.prompts)
            tiers.append(due.tier)
    full, light = tiers.count(Tier.FULL), tiers.count(Tier.LIGHT)
    spent = schedule.spent
    return replace(estimate, before=costs.before, watching=spent, full=full, light=light, notes=tuple(notes))


def _stored(config: RunConfig) -> Path | None:
    """The folder of a baseline that is already measured."""
    folder = config.monitor.baseline
    return folder if folder is not None and (folder / MANIFEST).is_file() else None


def _costs(ready: Prepared, tokenizer: PreTrainedTokenizerBase, reading: float) -> Costs | None:
    """Costs by the tokens that are read and written, or as a stored baseline has them. reading: seconds of a token."""
    if not ready.concepts:
        return None
    if (folder := _stored(ready.config)) is not None:
        return _known_costs(0.0, read_measurements(folder / MEASUREMENTS))
    chosen = ready.config.monitor
    texts = [str(text) for concept in ready.concepts for side in sides(concept.train) for text in side[:8]]
    length = sum(len(tokenizer.encode(text)) for text in texts) / len(texts)
    pairs = [
        min(len(c.train), chosen.pairs.train or len(c.train)) + min(len(c.test), chosen.pairs.test or len(c.test))
        for c in ready.concepts
    ]
    full = 2 * sum(pairs) * length
    if chosen.probes is None:
        return Costs(full * reading, full * reading, NAN, 0)
    n, tokens = chosen.probes.n, chosen.probes.tokens
    full += SETS * n * (length + WRITTEN * tokens)
    before = full + len(ready.concepts) * DERIVED * (length + WRITTEN * ANSWER)
    light = (SETS - 1) * (length + tokens)
    return Costs(before * reading, full * reading, light * reading, n)


def _watch(ready: Prepared, live: Any, tokenizer: Any) -> Monitor:
    settings = monitor_settings(ready.config, live.config.num_hidden_layers)
    return Monitor(live, ready.concepts, tokenizer=tokenizer, **settings)


def _measured_costs(config: RunConfig, watch: Monitor) -> Costs:
    """Costs from the measurement before training, made here as the run will make it, or read where it is stored."""
    began = time.perf_counter()
    baseline = watch.baseline(_stored(config))
    return _known_costs(time.perf_counter() - began, baseline.rows)


def _known_costs(before: float, rows: Sequence[Measurement]) -> Costs:
    known = {row.metric: row for row in rows if row.subject == "run"}
    light = known.get("light_seconds")
    prompts = 0 if light is None else light.n or 0
    return Costs(before, known["full_seconds"].value, light.value / prompts if light and prompts else NAN, prompts)


# --- rows and steps -------------------------------------------------------------------------------------------------


def _rows(ready: Prepared) -> tuple[PreTrainedTokenizerBase, Sequence[Labelled], tuple[str, ...]]:
    found = resolve(ready.config.model)
    tokenizer = read_tokenizer(found.base)
    if tokenizer is None:
        raise ModelError(f"{ready.config.model} has no tokenizer: put its files into the folder")
    rows, share = tokens_of(ready, tokenizer), ready.config.protect.drop_risky
    later = [f"drop_risky will leave out {share:.0%} of the rows: this counts all of them"] if share else []
    return tokenizer, rows.rows, (*ready.data.notes, *rows.notes, *later)


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


# --- time and memory without weights --------------------------------------------------------------------------------


class Speed(NamedTuple):
    """Seconds of a token: in a training step, and in a forward alone."""

    training: float
    reading: float


def _untrained(settings: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape with weights that mean nothing."""
    try:
        hf: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot make a model from its configuration: {first_line(error)}") from error
    return hf


def _unquantised(config: RunConfig, **changes: Any) -> RunConfig:
    """The configuration with LoRA in the place of QLoRA, whose weights do not exist here."""
    method = "lora" if config.tuning.method == "qlora" else config.tuning.method
    return config.model_copy(update={"tuning": config.tuning.model_copy(update={"method": method, **changes})})


def _dtype(config: RunConfig, settings: PretrainedConfig) -> torch.dtype:
    if config.training.bf16 or config.tuning.method == "qlora":
        return torch.bfloat16
    if config.training.fp16:
        return torch.float16
    return parse_dtype(config.dtype) or getattr(settings, "dtype", None) or torch.float32


def _trainable(config: RunConfig, settings: PretrainedConfig, device: str, **changes: Any) -> Any:
    """A model that trains what the run trains, with weights that mean nothing."""
    with torch.device(device):
        hf = _untrained(settings, _dtype(config, settings))
    live: Any = with_trained_weights(hf, _unquantised(config, **changes)).train()
    if config.training.gradient_checkpointing:
        enable = getattr(live, "activation_checkpointing_enable", None)  # renamed within transformers 5
        (enable or live.gradient_checkpointing_enable)()
    return live


def _speed(config: RunConfig, settings: PretrainedConfig, rows: Sequence[Labelled]) -> Speed:
    """Seconds of a token of the whole model, from two small ones on a batch of the run."""
    device, size = parse_device(config.device), config.training.per_device_train_batch_size
    length = round(sum(len(row.ids) for row in rows) / len(rows))
    if device.type == "cpu":
        length, size = min(length, TIMED), max(1, min(size, TIMED // length))
    ids = torch.zeros(size, length, dtype=torch.long, device=device)
    few, some = (_timed(config, settings, blocks, ids) for blocks in (FEW, SOME))
    more = (int(settings.num_hidden_layers) - FEW) / (SOME - FEW)
    training, reading = (a + more * max(0.0, b - a) for a, b in zip(few, some, strict=True))
    return Speed(training / ids.numel(), reading / ids.numel())


def _timed(config: RunConfig, settings: PretrainedConfig, blocks: int, ids: Tensor) -> tuple[float, float]:
    """Seconds of a training step and of a forward, of a model of so many blocks; the best of three."""
    kinds = getattr(settings, "layer_types", None)
    settings = copy.deepcopy(settings)
    if kinds is not None:
        settings.layer_types = kinds[:blocks]
    settings.num_hidden_layers = blocks
    live = _trainable(config, settings, str(ids.device), layers=None)

    def train() -> float:
        loss = live(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        live.zero_grad()
        return float(loss.detach())  # reading one number waits for the device

    @torch.no_grad()
    def read() -> float:
        return float(live(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, 0, 0])

    return _best(train), _best(read)


def _best(work: Callable[[], float], repeats: int = 3) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]


def _step_bytes(config: RunConfig, live: nn.Module, rows: Sequence[Labelled]) -> int:
    """Bytes that a step on the longest rows takes beyond the weights: activations, logits, gradients.

    live: on the meta device; its tensors are replaced.
    """
    length, size = max(len(row.ids) for row in rows), config.training.per_device_train_batch_size
    with FakeTensorMode():
        _fake_weights(live)
        ids = torch.zeros(size, length, dtype=torch.long)
        alive = _Alive()
        with alive:
            live(input_ids=ids, attention_mask=None, labels=ids, use_cache=False).loss.backward()
    return alive.peak


def _fake_weights(live: nn.Module) -> None:
    """Put tensors without values, that behave as on a CPU, in the place of those on the meta device."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight stays one
    for module in live.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fresh = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
            setattr(module, name, made.setdefault(p, fresh))
        for name, b in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(b.shape, dtype=b.dtype))


def _memory(
    config: RunConfig,
    settings: PretrainedConfig,
    live: nn.Module,
    parameters: int,
    rows: Sequence[Labelled],
) -> dict[str, int]:
    trained, folded = sum(p.numel() for p in live.parameters() if p.requires_grad), _folded(live)
    wide = (parse_dtype(config.dtype) or getattr(settings, "dtype", None) or torch.float32).itemsize
    stored = {"nf4": 0.55, "int8": 1.05}[config.tuning.quantization] if config.tuning.method == "qlora" else wide
    memory = {
        "weights": int(parameters * stored),
        "optimizer": 8 * trained,
        "activations, logits and gradients": _step_bytes(config, live, rows),
    }
    if config.tuning.method != "full":
        memory["adapters"] = 4 * trained
    if config.monitor.concepts:
        memory["monitor"] = folded * _dtype(config, settings).itemsize
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
    return {"peak of the process, Python and libraries included": _resident()}


def _resident() -> int:
    """The largest resident memory of this process so far, in bytes."""
    import resource  # there is none on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
