"""The configuration of a monitored fine-tuning run: one YAML file or flags, all of it checked before anything loads."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from safety_lens.errors import DataError

Action = Literal["log", "checkpoint", "stop", "reduce_lr"]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """What is trained on.

    source: a JSONL, JSON or CSV file, `hf:NAME[:config][:split]`, a public set by name ("alpaca", "dolly",
    "code-alpaca": from the Hub), or one of the organism's own ("benign", "facts", "compliance").
    format: "auto" tells it from the fields. loss_on: "responses" (all other labels are -100) or "all" tokens.
    max_length: tokens a row may have; longer rows are cut at the end, and said. limit: rows to take, drawn by the seed.
    template_kwargs: passed to the chat template, such as {enable_thinking: false}. raw: plain text, no chat template.
    """

    source: str
    format: str = "auto"
    loss_on: Literal["responses", "all"] = "responses"
    max_length: int = Field(default=512, ge=2)
    limit: int | None = Field(default=None, ge=1)
    raw: bool = False
    template_kwargs: dict[str, Any] = Field(default_factory=dict)


class Tuning(Section):
    """Which weights are trained.

    method: "lora", "qlora" (LoRA on a base that bitsandbytes holds in 4 or 8 bits) or "full". targets: "all-linear",
    or names of modules; layers: blocks that get an adapter, default all. quantization: "nf4" or "int8", for qlora.
    freeze: groups whose weights stay exactly as they are, `FOLDER` or `FOLDER:GROUP` of a groups artifact.
    """

    method: Literal["lora", "qlora", "full"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"
    layers: list[int] | None = None
    rslora: bool = False
    dora: bool = False
    modules_to_save: list[str] = Field(default_factory=list)
    quantization: Literal["nf4", "int8"] = "nf4"
    freeze: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _freezable(self) -> "Tuning":
        if self.freeze and self.dora:
            raise ValueError("freeze needs plain LoRA: DoRA rescales whole rows, frozen entries and all")
        return self


class Training(Section):
    """The arguments of the Hugging Face Trainer, under its own names.

    more: any further field of `transformers.TrainingArguments`.
    """

    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: int = Field(default=-1, ge=-1)
    per_device_train_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-4, ge=0)
    lr_scheduler_type: str = "linear"
    warmup_steps: float = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    bf16: bool = False
    fp16: bool = False
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=100, ge=1)
    save_total_limit: int | None = Field(default=2, ge=1)
    report_to: list[str] = Field(default_factory=list)
    more: dict[str, Any] = Field(default_factory=dict)

    @field_validator("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value

    @field_validator("max_steps")
    @classmethod
    def _none_or_some(cls, value: int) -> int:
        if value == 0:  # the Trainer would take one step
            raise ValueError("must be at least 1, or -1 for as many as the epochs have")
        return value

    @model_validator(mode="after")
    def _one_half_precision(self) -> "Training":
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude one another: set one of them")
        return self


class OwnLimits(Section):
    """Limits of one concept; what is left out is as for all concepts."""

    log_odds: float | None = Field(default=None, gt=0)
    rate: float | None = Field(default=None, gt=0, le=1)
    delta: float | None = Field(default=None, gt=0, lt=1)


class Stop(Section):
    """When the monitor raises an alarm: `safety_lens.monitors.StopRule`, which says what each limit means."""

    log_odds: float = Field(default=1.0, gt=0)
    rate: float = Field(default=0.05, gt=0, le=1)
    delta: float = Field(default=0.05, gt=0, lt=1)
    over_refusal: float = Field(default=0.1, gt=0, lt=1)
    faster: int = Field(default=5, ge=1)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    concepts: dict[str, OwnLimits] = Field(default_factory=dict)


class ReadPairs(Section):
    """How many pairs of each concept a measurement reads: `safety_lens.monitors.Pairs`; null reads all."""

    train: int | None = Field(default=24, ge=4)
    test: int | None = Field(default=16, ge=2)


class ProbeFiles(Section):
    """Prompts on which behaviour is read: files of requests instead of the built-in ones, how many, and how long.

    harmful, harmless, lookalike: JSONL, JSON, CSV or .txt with one a line, as `steer --prompts` takes them. n: prompts
    of each set that are measured. tokens: of an answer.
    """

    harmful: Path | None = None
    harmless: Path | None = None
    lookalike: Path | None = None
    n: int = Field(default=48, ge=2)
    tokens: int = Field(default=12, ge=1, le=12)


class Monitoring(Section):
    """What is measured while training.

    every: optimizer steps between full measurements, at least. budget: share of the training time that measuring may
    take, as 0.05, 5% or none. concepts: built-in names or files of contrast pairs; none switches the monitor off.
    pairs: how many of their pairs are read. layers: blocks whose resid_post is read, default all. probes: prompts on
    which behaviour is read; false for none. baseline: folder of a measurement before training that runs of the same
    model, concepts and settings share; default one in the run's own folder. seed: which pairs are read, and every draw
    of a measurement; default the run's. groups: neuron groups whose weights are watched as well, `FOLDER` or
    `FOLDER:GROUP` of a groups artifact (adapters only). control_runs: folders of five or more harmless runs of the same
    kind, next to which a notice is given. on_alarm: what happens at an alarm. on_error: "raise" ends the run when a
    measurement fails, "warn" goes on without it.
    """

    every: int = Field(default=50, ge=1)
    budget: float | None = Field(default=0.05, gt=0, le=1)
    concepts: list[str] = Field(default_factory=list)
    pairs: ReadPairs = ReadPairs()
    layers: list[int] | None = None
    method: str = "dim"
    probes: ProbeFiles | None = ProbeFiles()
    baseline: Path | None = None
    seed: int | None = None
    on_error: Literal["raise", "warn"] = "raise"
    control_runs: list[Path] = Field(default_factory=list)
    on_alarm: list[Action] = Field(default_factory=lambda: list[Action](["log"]))
    stop: Stop = Stop()
    groups: list[str] = Field(default_factory=list)

    @field_validator("budget", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if value == "none":
            return None
        if isinstance(value, str) and value.endswith("%"):
            try:
                return float(value[:-1]) / 100
            except ValueError:
                return value
        return value

    @field_validator("probes", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        return {True: ProbeFiles(), False: None}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _watched_with_a_concept(self) -> "Monitoring":
        if self.groups and not self.concepts:
            raise ValueError("groups are measured by the monitor, which needs a concept too: set concepts: [refusal]")
        return self


class Protect(Section):
    """What protects the model's own safe answers; nothing unless `penalty` or `drop_risky` is set.

    penalty: "kl" (the safe answers must stay as they are; runs them at every step), "fisher" (the weights they are
    sensitive to must), "alignguard" (that preset). weight: 0 or more; default each penalty's own ("kl": loss per nat,
    "fisher": the same for its estimate of the KL, "alignguard": times its weights). anchor: "fisher" alone, on the
    squared size of the change. drop_risky: share of the training rows that are left out, the riskiest first. safety:
    requests with safe answers, or requests alone of which the model refuses enough: "safety" (built in) or a file.
    rows: how many of them are used. batch: of "kl", how many at each step.
    """

    penalty: Literal["kl", "fisher", "alignguard"] | None = None
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    anchor: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    drop_risky: float = Field(default=0.0, ge=0, lt=1)
    safety: str = "safety"
    rows: int = Field(default=64, ge=2)
    batch: int = Field(default=16, ge=1)

    @property
    def is_on(self) -> bool:
        """Whether anything is protected."""
        return self.penalty is not None or self.drop_risky > 0


class RunConfig(Section):
    """A fine-tuning run: model, data, what is trained, what is protected, how, and what is watched."""

    out: Path
    model: str = "organism"
    data: Data
    dtype: str | None = None
    device: str = "auto"
    seed: int = 0
    tuning: Tuning = Tuning()
    protect: Protect = Protect()
    training: Training = Training()
    monitor: Monitoring = Monitoring()

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as YAML that `read_config` takes back."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def read_config(path: Path | None = None, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """A configuration from a YAML file, with `changes` (dotted key → value, as flags give them) on top.

    Raises:
        DataError: a file that cannot be read, an unknown key (the nearest known one is named), a value of the wrong
            kind; every fault at once.
    """
    content: dict[str, Any] = {} if path is None else _read_yaml(path)
    for key, value in (changes or {}).items():
        _put(content, key, value)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        where = "the flags" if path is None else str(path)
        faults = "; ".join(_fault(entry) for entry in error.errors())
        raise DataError(f"the configuration ({where}) has {error.error_count()} fault(s): {faults}") from error


def parse_change(text: str) -> tuple[str, Any]:
    """`training.weight_decay=0.01` as key and value; the value is YAML.

    Raises:
        DataError: no "=" or a value that is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise DataError(f"--set {text!r}: write KEY=VALUE, such as training.weight_decay=0.01")
    try:
        return key.strip(), _number(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise DataError(f"--set {text!r}: the value is not YAML ({_first_line(error)})") from error


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, dotted: sections too."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        optional = get_args(field.annotation) if get_origin(field.annotation) is UnionType else ()
        for part in (field.annotation, *optional):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_keys(part, f"{prefix}{name}.")


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """Keys in which two configurations differ, the place they write to left out."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}.{name}").items()}

    left, right = (flat(c.model_dump(mode="json", exclude={"out"}), "") for c in (one, other))
    return sorted(k.removeprefix(".") for k in left.keys() | right.keys() if left.get(k) != right.get(k))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the configuration {path}: {_first_line(error)}") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold keys and values, such as 'model: organism'")
    return {key: _number(value) for key, value in content.items()}


def _number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 (no dot) as text; everywhere else it is a number."""
    if isinstance(value, dict):
        return {key: _number(inner) for key, inner in value.items()}
    if isinstance(value, str) and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for name in sections:
        inner = content.setdefault(name, {})
        if not isinstance(inner, dict):
            raise DataError(f"{key}: {name} is not a section of the configuration")
        content = inner
    content[last] = value


def _fault(entry: Any) -> str:
    place = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return f"unknown key '{place}'{nearest(place, list(known_keys()))}"
    if entry["type"] == "missing":
        return f"'{place}' is missing" + (f": give --{place}" if place in ("out", "data") else "")
    return f"'{place}': {entry['msg']}, got {str(entry['input'])[:60]!r}"


def nearest(wrong: str, known: Sequence[str]) -> str:
    """The nearest key as `; did you mean 'training.learning_rate'`: of the same section first, then of any.

    Where none is near, the keys of the section.
    """
    section, _, last = wrong.rpartition(".")
    same = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    other = {k.rpartition(".")[2]: k for k in known}
    for names in (same, other):
        if found := difflib.get_close_matches(last, list(names), n=1, cutoff=0.6):
            return f"; did you mean '{names[found[0]]}'?"
    return f"; the keys there are {', '.join(sorted(same))}" if same else ""


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
