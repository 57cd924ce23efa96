"""The planned run on a throwaway model: trained weights, rows, learning rates, batches. The model is not touched.

The throwaway is a copy of the module tree whose tensors are the model's own memory; adapters are put on the copy, and
full fine-tuning gets tensors of its own.
"""

import copy
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, get_scheduler, set_seed

from safety_lens.data.labelled import Labelled
from safety_lens.errors import DataError, ModelError
from safety_lens.loading.live import has_adapters
from safety_lens.loading.refusals import is_quantised
from safety_lens.monitors.finetune.config import RunConfig
from safety_lens.monitors.finetune.freezing import freeze_named, named_groups
from safety_lens.monitors.finetune.run import Prepared, prepare, tokens_of
from safety_lens.monitors.finetune.training import out_of_vocabulary, training_arguments, with_trained_weights
from safety_lens.monitors.isolation import undisturbed


@dataclass(frozen=True, eq=False)
class Planned:
    """A run as it is planned, before it has a model.

    rates: learning rate of every optimizer step. rows: training rows as tokens. notes: what was left out.
    """

    config: RunConfig
    rows: tuple[Labelled, ...]
    rates: Float[np.ndarray, " step"]
    ready: Prepared
    notes: tuple[str, ...]

    @property
    def times(self) -> Float[np.ndarray, " step"]:
        """t after every step: the sum of the learning rates so far."""
        return np.cumsum(self.rates)

    @property
    def batch_rows(self) -> int:
        """Rows of one optimizer step."""
        training = self.config.training
        return training.per_device_train_batch_size * training.gradient_accumulation_steps

    def batches(self, n: int, seed: int) -> list[list[Labelled]]:
        """Rows of n optimizer steps, drawn without replacement; fewer steps where the rows do not suffice."""
        order = random.Random(seed).sample(self.rows, len(self.rows))
        size = min(self.batch_rows, len(order))
        return [order[i * size : (i + 1) * size] for i in range(min(n, len(order) // size))]


def plan(config: RunConfig, tokenizer: PreTrainedTokenizerBase, hf: PreTrainedModel) -> Planned:
    """Read the rows of a run and lay out its steps; nothing is trained.

    Raises:
        DataError, ModelError: as the run itself would; ModelError for weights in half precision, whose rounding
            swallows the first steps, and for a model that has adapters already.
    """
    if has_adapters(hf):
        raise ModelError("a forecast starts from a model without adapters: merge them first, or name the base")
    width = min(p.dtype.itemsize for p in hf.parameters() if p.is_floating_point())
    if width < 4 and not any(is_quantised(m) for m in hf.modules()):
        raise ModelError(
            "half precision rounds the first steps of a run away: load the model in float32 for a forecast (--dtype"
            " float32); the run itself may use another"
        )
    ready = prepare(config)
    rows = tokens_of(ready, tokenizer)
    out_of_vocabulary(rows.rows, hf, config.model)
    notes = (*ready.data.notes, *rows.notes)
    return Planned(config, rows.rows, _rates(config, len(rows.rows)), ready, notes)


def _rates(config: RunConfig, rows: int) -> Float[np.ndarray, " step"]:
    training = config.training
    per_epoch = math.ceil(math.ceil(rows / training.per_device_train_batch_size) / training.gradient_accumulation_steps)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(per_epoch * training.num_train_epochs)
    arguments = training_arguments(config)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=cast(dict[str, Any], arguments.lr_scheduler_kwargs or {}),
    )
    found = []
    for _ in range(steps):
        found.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return np.array(found)


@dataclass(frozen=True, eq=False)
class Throwaway:
    """The model as the run would train it, on memory of its own; base: the same without anything trained.

    callbacks: what the run's Trainer needs beside it (frozen groups put back after every step).
    """

    live: nn.Module
    base: nn.Module
    callbacks: tuple[TrainerCallback, ...]

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.live.parameters() if p.requires_grad]


@contextmanager
def throwaway(hf: PreTrainedModel, planned: Planned) -> Iterator[Throwaway]:
    """The model with the weights that the run would train, at its start. Random streams are put back afterwards.

    Raises:
        DataError: targets or layers that the model does not have, or nothing to train.
    """
    config = planned.config
    with undisturbed():
        base = _aliased(hf, own=False).eval()
        groups = named_groups(config.tuning.freeze, hf)
        set_seed(config.seed)
        live = with_trained_weights(cast(PreTrainedModel, _aliased(hf, own=config.tuning.method == "full")), config)
        frozen, _ = freeze_named(live, groups)
        found = Throwaway(live, base, (frozen.callback(),) if frozen else ())
        if not found.trained:
            raise DataError("the plan trains no weight: choose tuning.targets that the model has")
        yield found


def _aliased(hf: nn.Module, *, own: bool) -> nn.Module:
    """A copy of the module tree. own: with tensors of its own; else they are the model's memory, without its flags."""

    def parameter(p: nn.Parameter) -> nn.Parameter:
        if not p.is_floating_point() or hasattr(p, "quant_state"):  # packed weights are never trained
            return p
        return nn.Parameter(p.detach().clone() if own else p.detach(), requires_grad=False)

    made = copy.deepcopy(hf, {id(p): parameter(p) for p in hf.parameters()})
    for module in made.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
    return made


def micro_batches(rows: Sequence[Labelled], size: int) -> Iterator[Sequence[Labelled]]:
    """Rows that share a forward."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
