"""A monitored fine-tuning run from its configuration: checked, prepared, trained, sealed.

Everything that can be refused is refused before the model loads: the configuration, the folder, the data, the concepts
and their splits, the training arguments.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from safety_lens.artifacts import seal, sha256_of
from safety_lens.data import Concept, load_concept
from safety_lens.data.labelled import TokenRows, tokenise
from safety_lens.data.training import TrainingRows, load_rows
from safety_lens.errors import ArtifactError, DataError, ModelError
from safety_lens.loading.hub import first_line, parse_device, parse_dtype, resolve, weights_file
from safety_lens.log import NAN, Measurement, read_measurements
from safety_lens.models import load_hf
from safety_lens.monitors.finetune.boilerplate import refuse_boilerplate
from safety_lens.monitors.finetune.config import RunConfig
from safety_lens.monitors.finetune.early import check_early
from safety_lens.monitors.finetune.freezing import freeze_named, frozen_entry, group_lines, named_groups
from safety_lens.monitors.finetune.place import CHECKPOINTS, LOG, RESULTS, claim, last_checkpoint
from safety_lens.monitors.finetune.protecting import protect
from safety_lens.monitors.finetune.training import (
    out_of_vocabulary,
    quantization_of,
    trainer,
    training_arguments,
    with_trained_weights,
)
from safety_lens.monitors.finetune.watch import monitor_callback, monitor_seed, probes_of
from safety_lens.monitors.inputs import named_concepts
from safety_lens.monitors.neuron_drift.watch import WHOLE
from safety_lens.monitors.processes import from_first
from safety_lens.probes.estimators import estimator
from safety_lens.probes.groups import NeuronGroup

UNWATCHED = "no concept is named (--concept): nothing is monitored"

OnLog = Callable[[int, Mapping[str, float]], None]
"""Called with the step and what the Trainer logged."""


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    out: its folder: the adapter or model, the log, checkpoints, configuration, manifest. steps: optimizer steps.
    seconds: of training, measurements included. measurements: the monitor's rows and the Trainer's ("run": loss,
    learning_rate, grad_norm). notes: what a reader must know. first: whether this is the process that writes, where
    there are several (torchrun); the only one otherwise.
    """

    out: Path
    steps: int
    seconds: float
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...]
    first: bool = True


class Prepared(NamedTuple):
    """Everything of a run that needs no model: data, concepts, arguments."""

    config: RunConfig
    data: TrainingRows
    concepts: tuple[Concept, ...]
    arguments: TrainingArguments


def prepare(config: RunConfig) -> Prepared:
    """Read and check what a run needs, without loading its model.

    Raises:
        DataError: data or concepts that cannot be used, refused training arguments, or the organism's compliance
            boilerplate for another model.
        ModelError: no such model.
    """
    check_early(config)
    parse_dtype(config.dtype)
    base = resolve(config.model)
    if base.adapter is not None:
        raise ModelError(
            f"{config.model} is an adapter: make a base of it (safety-lens convert {config.model} --out FOLDER) and"
            f" fine-tune that, or fine-tune the model that it was trained on, {base.base}"
        )
    data = load_rows(config.data.source, format=config.data.format, limit=config.data.limit, seed=config.seed)
    refuse_boilerplate((text for row in data.examples for text in row.responses), base.base, data.name)
    named = [load_concept(name, model=base.base, seed=monitor_seed(config)) for name in config.monitor.concepts]
    concepts = tuple(named_concepts(named)) if named else ()
    estimator(config.monitor.method)
    probes_of(config.monitor.probes)  # a file that cannot be read is known before the model loads
    named_groups([*config.tuning.freeze, *config.monitor.groups])
    if config.monitor.groups and config.tuning.method == "full":
        raise DataError(f"monitor.groups: {WHOLE}")
    return Prepared(config, data, concepts, training_arguments(config))


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    on_log: OnLog | None = None,
    on_note: Callable[[str], None] | None = None,
    on_group: Callable[[str], None] | None = None,
) -> RunResult:
    """Fine-tune as the configuration says, with the monitor watching, into `config.out`.

    Args:
        resume: go on from the last whole checkpoint of the same run; the log goes on without duplicates.
        overwrite: replace a run that is there.
        callbacks: further callbacks of the Trainer.
        on_log: called with every log entry of the Trainer. on_note: called with every note as soon as it is known.
            on_group: called with a line about every group that is frozen or watched. All in the first process alone.

    Raises:
        DataError, ModelError, ArtifactError: see `prepare`, `claim`; ModelError for a loss that is no number.
    """
    ready = prepare(config)
    first = ready.arguments.process_index == 0  # under torchrun one process writes and speaks
    from_first(lambda: claim(config, resume=resume, overwrite=overwrite))
    hf, tokenizer, rows = _load(ready)
    groups, watched = (named_groups(names, hf) for names in (config.tuning.freeze, config.monitor.groups))
    set_seed(config.seed)  # adapters start from random factors, and the Trainer seeds too late for them
    live = with_trained_weights(hf, config)
    frozen, frozen_notes = freeze_named(live, groups)
    for line in lines_of_groups(config, live, groups, watched) if first and on_group else ():
        on_group(line)
    protection = protect(config, live, tokenizer, rows.rows)
    unwatched = [] if ready.concepts else [UNWATCHED]
    notes = [*unwatched, *ready.data.notes, *rows.notes, *frozen_notes, *protection.notes]
    for note in notes if first and on_note else ():
        on_note(note)
    held: list[TrainerCallback] = [*protection.callbacks, *([frozen.callback()] if frozen else [])]
    watching: list[TrainerCallback] = [*callbacks, *held, _Told(on_log if first else None)]
    if ready.concepts:
        watching.insert(0, monitor_callback(config, ready.concepts, int(hf.config.num_hidden_layers), watched, groups))
    teacher = trainer(live, protection.rows, ready.arguments, tokenizer, watching)
    checkpoint = from_first(lambda: last_checkpoint(config.out / CHECKPOINTS)) if resume else None
    began = time.perf_counter()
    with _explained():
        teacher.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - began
    teacher.save_model(str(config.out))  # adapter or whole model, as safetensors, with the tokenizer
    measured = (*_drift(config), *_training_rows(teacher.state.log_history))
    if first:
        for name in ("training_args.bin", "README.md"):  # a pickle, and peft's empty model card
            (config.out / name).unlink(missing_ok=True)
        _seal(
            ready,
            measured,
            seconds,
            teacher.state,
            notes,
            {**frozen_entry(config.tuning.freeze, frozen), **protection.entry},
        )
    return RunResult(config.out, int(teacher.state.global_step), seconds, measured, tuple(notes), first)


def lines_of_groups(
    config: RunConfig, live: nn.Module, frozen: Sequence[NeuronGroup], watched: Sequence[NeuronGroup]
) -> list[str]:
    """A line about every group that a run freezes or watches."""
    return [
        *group_lines(live, config.tuning.freeze, frozen, "frozen"),
        *group_lines(live, config.monitor.groups, watched, "watched"),
    ]


def _load(ready: Prepared) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TokenRows]:
    config = ready.config
    dtype = parse_dtype(config.dtype)
    hf, tokenizer = load_hf(
        config.model, dtype=dtype, device=config.device, quantization=quantization_of(config.tuning, dtype)
    )
    if tokenizer is None:
        raise ModelError(f"{config.model} has no tokenizer: put its files into the folder")
    rows = tokens_of(ready, tokenizer)
    out_of_vocabulary(rows.rows, hf, config.model)
    context = getattr(hf.config, "max_position_embeddings", None)
    if context is not None and max(len(row.ids) for row in rows.rows) > context:
        raise DataError(
            f"data.max_length {config.data.max_length} is more than the {context} tokens {config.model} reads"
        )
    return hf, tokenizer, rows


def tokens_of(ready: Prepared, tokenizer: PreTrainedTokenizerBase) -> TokenRows:
    """The training rows as tokens with labels, as the configuration asks."""
    data = ready.config.data
    return tokenise(
        ready.data.examples,
        tokenizer,
        max_length=data.max_length,
        loss_on=data.loss_on,
        raw=data.raw,
        template_kwargs=data.template_kwargs,
    )


class _Told(TrainerCallback):
    """Hands on what the Trainer logs."""

    def __init__(self, tell: OnLog | None) -> None:
        self.tell = tell

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.tell is not None and logs:
            self.tell(int(state.global_step), logs)


class _explained:
    """A full disk, or memory that runs out, as one message instead of a traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise ArtifactError(
                f"the run cannot write any more: {first_line(error)}; free space and --resume"
            ) from error
        if kind is not None and kind.__name__ == "OutOfMemoryError":
            raise ModelError(
                "the device ran out of memory: lower training.per_device_train_batch_size (and raise"
                " gradient_accumulation_steps as much), set training.gradient_checkpointing, or lower data.max_length"
            ) from error


def _drift(config: RunConfig) -> list[Measurement]:
    log = config.out / LOG
    return read_measurements(log) if log.is_file() else []


def _training_rows(history: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """The Trainer's own log as rows of the subject "run"."""
    return [
        Measurement("run", name, float(entry[name]), step=int(entry["step"]))
        for entry in history
        for name in ("loss", "learning_rate", "grad_norm", "eval_loss", "train_runtime", *_penalties(entry))
        if name in entry and math.isfinite(float(entry.get(name, NAN)))
    ]


def _penalties(entry: Mapping[str, Any]) -> list[str]:
    return [name for name in entry if name.startswith("penalty/")]


def _seal(
    ready: Prepared,
    measured: Sequence[Measurement],
    seconds: float,
    state: TrainerState,
    notes: Sequence[str],
    more: Mapping[str, Any],
) -> None:
    base = resolve(ready.config.model).base
    weights = weights_file(base)
    seal(
        ready.config.out,
        "finetune",
        files=RESULTS,
        measurements=measured,
        arguments=ready.config.model_dump(mode="json"),
        extra={
            "base": {"name": ready.config.model, "sha256": sha256_of(weights) if weights else None},
            "data": {"source": ready.data.name, "format": ready.data.format, "sha256": ready.data.sha256},
            "concepts": {c.name: {"source": c.source, "sha256": c.sha256} for c in ready.concepts},
            "steps": int(state.global_step),
            "seconds": seconds,
            "device": str(parse_device(ready.config.device)),
            "notes": list(notes),
            **more,
        },
    )
