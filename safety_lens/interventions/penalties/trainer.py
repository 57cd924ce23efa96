"""Penalties in the Hugging Face Trainer, whatever its loss: a callback that adds their gradient before every step."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safety_lens.errors import DataError, ModelError
from safety_lens.interventions.penalties.terms import Drawing, Penalty
from safety_lens.loading.live import unwrapped


class PenaltyCallback(TrainerCallback):
    """Adds a penalty's gradient once for each optimizer step, whatever gradient accumulation does.

    It is added behind gradient clipping, which keeps the balance of task and penalty out of the clipping's hands. The
    terms of the last step appear in the Trainer's log as "penalty/NAME". Under data parallelism every process computes
    the terms and their gradients are averaged, so that weights stay equal where dropout or kernels differ. A resumed
    run draws the examples that the run it continues would have drawn.

    Raises, from training:
        DataError: fp16 without gradient clipping (gradients are still scaled when the penalty is added), DeepSpeed or
            FSDP. ModelError: a penalty that is no number.
    """

    def __init__(self, penalty: Penalty, trained: nn.Module) -> None:
        self.penalty, self.model = penalty, unwrapped(trained)
        self.last: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Refuse settings under which gradients are not where the penalty adds its own; go on where a run stopped."""
        if args.fp16 and not args.max_grad_norm:
            raise DataError("a penalty with fp16 needs training.max_grad_norm above 0, or bf16")
        if args.deepspeed or args.fsdp:
            raise DataError("a penalty needs whole gradients on every process: DeepSpeed and FSDP split them up")
        if isinstance(self.penalty, Drawing):
            self.penalty.seek(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Add the gradient of all terms to the gradients of what is trained."""
        terms = self.penalty()
        self.last = terms.values()
        if not all(math.isfinite(value) for value in self.last.values()):
            raise ModelError(f"the penalty is {self.last} at step {state.global_step + 1}: lower its weight")
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        found = torch.autograd.grad(terms.total, parameters, allow_unused=True)  # no backward hooks of DDP run
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                gradient = _mean_over_processes(gradient)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Write the terms beside the loss of the same entry."""
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1] |= {f"penalty/{name}": value for name, value in self.last.items()}


def _mean_over_processes(gradient: Tensor) -> Tensor:
    """The same in every process; with one process the gradient itself."""
    if not (dist.is_available() and dist.is_initialized()):
        return gradient
    total = gradient.contiguous()
    dist.all_reduce(total)
    return total / dist.get_world_size()
