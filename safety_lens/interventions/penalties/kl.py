"""KL: a penalty on changes of the safe answers themselves, measured by running the model on them at every step.

λ·mean KL(reference ‖ now) per token over a few safety examples, drawn anew at every call. Unlike the Fisher energy it
is exact at any distance from the reference; it costs a forward and a backward pass over those examples.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safety_lens.errors import DataError
from safety_lens.forced import Continuation
from safety_lens.interventions.penalties.terms import Terms, check_weights
from safety_lens.kv import right_padded
from safety_lens.loading.live import unwrapped


class KlPenalty:
    """weight · mean KL per token (nats) between the safe answers of the reference and those of the model now.

    The reference is the model as it is when the penalty is made; its log-probabilities are kept on the CPU (answer
    tokens × vocabulary, float32). Dropout acts as in the rest of the step; the reference is free of it.

    Args:
        trained: the model in training. examples: prompts with safe answers, such as the model's own refusals.
        weight: λ ≥ 0, loss per nat. batch_size: examples of a call, drawn in shuffled rounds by `seed`.

    Raises:
        DataError: a negative weight, no example, an empty one, or a batch size below 1.
    """

    def __init__(
        self,
        trained: nn.Module,
        examples: Sequence[Continuation],
        *,
        weight: float = 1.0,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        check_weights(weight=weight)
        if not examples or any(not row.prompt or not row.tokens for row in examples):
            raise DataError(
                f"a KL penalty needs safety examples with prompt and answer; got {len(examples)}, some empty"
            )
        if batch_size < 1:
            raise DataError(f"batch_size must be 1 or more, got {batch_size}")
        self.model: Any = unwrapped(trained)
        self.examples, self.weight, self.batch_size = list(examples), weight, min(batch_size, len(examples))
        self.seed = seed
        self.seek(0)
        self._reference: list[Tensor] = []
        self.reset_reference()

    @torch.no_grad()
    def reset_reference(self) -> None:
        """Hold the model to its answers as they are now."""
        with _evaluating(self.model):
            found: list[Tensor] = []
            for start in range(0, len(self.examples), self.batch_size):
                rows = self.examples[start : start + self.batch_size]
                logp = self._answers(rows)
                found += [part.cpu() for part in logp.split([len(row.tokens) for row in rows])]
        self._reference = found

    def __call__(self) -> Terms:
        numbers = next(self._drawn)
        now = self._answers([self.examples[i] for i in numbers])
        reference = torch.cat([self._reference[i] for i in numbers]).to(now.device)
        kl = (reference.exp() * (reference - now)).sum(-1).mean()
        return Terms({"kl": self.weight * kl})

    def seek(self, calls: int) -> None:
        """Draw from here on what is drawn after so many calls."""
        self._drawn = itertools.islice(self._draws(self.seed), calls, None)

    def _draws(self, seed: int) -> Iterator[list[int]]:
        rng, order = random.Random(seed), list[int]()
        while True:
            if len(order) < self.batch_size:
                order = rng.sample(range(len(self.examples)), len(self.examples))
            yield order[: self.batch_size]
            order = order[self.batch_size :]

    def _answers(self, rows: Sequence[Continuation]) -> Float[Tensor, "token d_vocab"]:
        """Log-probabilities before each token of the answers, one row after the other."""
        device = next(self.model.parameters()).device
        ids, mask = right_padded([(*row.prompt, *row.tokens[:-1]) for row in rows], device)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        read = [logits[b, len(row.prompt) - 1 :][: len(row.tokens)] for b, row in enumerate(rows)]
        return torch.cat(read).float().log_softmax(-1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
