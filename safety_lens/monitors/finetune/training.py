"""The Hugging Face Trainer as a run uses it: its arguments, the trained weights, and a stop at the first bad loss."""

import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from safety_lens.data.labelled import Labelled, collate
from safety_lens.errors import DataError, ModelError
from safety_lens.loading.hub import first_line, parse_device
from safety_lens.monitors.finetune.config import RunConfig, Tuning
from safety_lens.monitors.finetune.place import CHECKPOINTS
from safety_lens.monitors.processes import in_any

# renamed within transformers 5
_CHECKPOINTING = next(
    f.name for f in fields(TrainingArguments) if f.name in ("activation_checkpointing", "gradient_checkpointing")
)


class CheckedTrainer(Trainer):
    """A Trainer that ends at the first loss that is no number, in any process, instead of training on.

    Raises:
        ModelError: from `train`, naming the step and what to change.
    """

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = cast(Tensor, super().training_step(*args, **kwargs))
        found = float(loss)
        if in_any(not math.isfinite(found), loss.device):
            where = "in another process" if math.isfinite(found) else str(found)
            raise ModelError(
                f"the loss is {where} at step {self.state.global_step + 1}: the weights are lost from here on."
                f" Lower training.learning_rate ({self.args.learning_rate:g}), or train in bfloat16 or float32; the"
                f" last checkpoint is in {self.args.output_dir}"
            )
        return loss


def trainer(
    model: nn.Module,
    rows: Sequence[Labelled],
    arguments: TrainingArguments,
    tokenizer: Any,
    callbacks: Sequence[TrainerCallback] = (),
) -> CheckedTrainer:
    """A Trainer over labelled rows that prints nothing itself."""
    data = [{"input_ids": list(row.ids), "labels": list(row.labels)} for row in rows]
    made = CheckedTrainer(
        model=model,
        args=arguments,
        train_dataset=cast(Any, data),
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    for noisy in (PrinterCallback, ProgressCallback):
        made.remove_callback(noisy)
    return made


def training_arguments(config: RunConfig) -> TrainingArguments:
    """The Trainer's arguments of a run.

    Raises:
        DataError: a field in `training.more` that does not exist, a value the Trainer refuses, or a report_to that is
            not installed.
    """
    chosen = config.training
    _check_names(chosen.more)
    _check_reporters(chosen.report_to)
    values: dict[str, Any] = {
        "output_dir": str(config.out / CHECKPOINTS),
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": parse_device(config.device).type == "cpu",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,  # all that is trained is used; looking for more warns and costs time
        "logging_nan_inf_filter": False,  # the Trainer's default hides a NaN loss behind the last good one
        "save_strategy": "steps",
        "run_name": config.out.name,
        **chosen.model_dump(exclude={"more", "report_to", "gradient_checkpointing"}),
        _CHECKPOINTING: chosen.gradient_checkpointing,
        "report_to": chosen.report_to or "none",
        **chosen.more,
    }
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise DataError(f"the training arguments are refused: {first_line(error)}") from error


def _check_names(more: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(TrainingArguments)]
    for name in more:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise DataError(
                f"training.more.{name}: TrainingArguments has no such field"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )


def _check_reporters(wanted: Sequence[str]) -> None:
    usable = get_available_reporting_integrations()
    for name in wanted:
        if name not in (*usable, "none", "all"):
            raise DataError(
                f"training.report_to: {name!r} is unknown or not installed; usable here: {', '.join(usable) or 'none'}"
            )


def quantization_of(tuning: Tuning, dtype: torch.dtype | None) -> BitsAndBytesConfig | None:
    """How bitsandbytes should hold the base; None unless the method is qlora.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if tuning.method != "qlora":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "tuning.method: qlora needs bitsandbytes, which is not installed: pip install bitsandbytes, or set lora"
        ) from error
    if tuning.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype or torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def with_trained_weights(hf: PreTrainedModel, config: RunConfig) -> PreTrainedModel | PeftModel:
    """The model with what is to be trained: adapters, or all of its weights. Adapters start at no effect.

    Raises:
        DataError: targets, layers or modules_to_save that the model does not have.
    """
    tuning = config.tuning
    if tuning.method == "full":
        return hf.requires_grad_(True).train()
    if tuning.method == "qlora":
        hf = prepare_model_for_kbit_training(hf, use_gradient_checkpointing=config.training.gradient_checkpointing)
    elif config.training.gradient_checkpointing:
        hf.enable_input_require_grads()  # else a frozen embedding gives checkpointed blocks nothing to follow
    targets = _targets(hf, tuning)
    _check_layers(hf, tuning)
    settings = LoraConfig(
        r=tuning.rank,
        lora_alpha=cast(int, tuning.alpha),
        lora_dropout=tuning.dropout,
        target_modules=targets,
        layers_to_transform=tuning.layers,
        use_rslora=tuning.rslora,
        use_dora=tuning.dora,
        modules_to_save=tuning.modules_to_save or None,
        ensure_weight_tying=_touches_tied(hf, [*targets, *tuning.modules_to_save]),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in hf.modules()),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # mixed models: peft sets it itself
            return cast(PeftModel, get_peft_model(hf, settings))
    except ValueError as error:
        raise DataError(f"tuning: {first_line(error)}") from error


def _targets(hf: nn.Module, tuning: Tuning) -> list[str]:
    """Names of the modules that get an adapter; "all-linear" is every linear layer inside a block."""
    names = {name: type(module) for name, module in hf.named_modules()}
    inside = {
        name.rpartition(".")[2]
        for name, module in hf.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) or hasattr(module, "quant_state"))
        and any(map(str.isdigit, name.split(".")))
    }
    if tuning.targets == "all-linear":
        return sorted(inside)
    known = {name.rpartition(".")[2] for name in names} | set(names)
    for kind, wanted in (("targets", tuning.targets), ("modules_to_save", tuning.modules_to_save)):
        for name in wanted:
            if name not in known:
                near = difflib.get_close_matches(name, inside, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise DataError(
                    f"tuning.{kind}: the model has no module {name!r}; {hint}Linear layers of its blocks are"
                    f" {', '.join(sorted(inside))}"
                )
    return list(tuning.targets)


def _touches_tied(hf: PreTrainedModel, names: Sequence[str]) -> bool:
    """Whether an embedding that is also the unembedding is trained: then peft must train the two as one."""
    tied = (hf.get_input_embeddings(), hf.get_output_embeddings())
    if not getattr(hf.config, "tie_word_embeddings", False):
        return False
    return any(module in tied and name.rpartition(".")[2] in names for name, module in hf.named_modules())


def _check_layers(hf: PreTrainedModel, tuning: Tuning) -> None:
    n = int(hf.config.num_hidden_layers)
    if wrong := [layer for layer in tuning.layers or () if not 0 <= layer < n]:
        raise DataError(f"tuning.layers: block {wrong[0]} was asked for; this model has {n}: 0 to {n - 1}")


def out_of_vocabulary(rows: Sequence[Labelled], hf: PreTrainedModel, name: str | Path) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        ModelError: the tokenizer is of another model.
    """
    largest, size = max(max(row.ids) for row in rows), hf.get_input_embeddings().weight.shape[0]
    if largest >= size:
        raise ModelError(
            f"the tokenizer of {name} gives token {largest}, but the model has {size} embeddings (0 to {size - 1}): the"
            " tokenizer belongs to another model"
        )
