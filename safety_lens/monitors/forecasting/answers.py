"""The safe answers, forced through the model as it is and as it would become: KL per token, and how it grows.

Nothing of the size answers × vocabulary is kept: the untrained model runs beside the trained one, batch by batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safety_lens.batching import length_batches
from safety_lens.bootstrap import ratio_interval
from safety_lens.errors import DataError, ModelError
from safety_lens.forced import TOKEN_BUDGET, Continuation
from safety_lens.kv import right_padded
from safety_lens.monitors.forecasting.growth import Moments
from safety_lens.monitors.forecasting.path import Path
from safety_lens.stats import Interval

FEWEST = 8
"""Safety examples without which an interval over examples says nothing."""


@dataclass(frozen=True, eq=False)
class Kl:
    """KL(untrained ‖ now) of every safety example: nats summed over its answer, and its tokens."""

    sums: Float[np.ndarray, " n"]
    tokens: Float[np.ndarray, " n"]

    @property
    def interval(self) -> Interval:
        """Nats per token with a bootstrap interval over examples."""
        return ratio_interval(self.sums, self.tokens)

    def per_token(self, drawn: np.ndarray) -> float:
        """Of the examples with these numbers."""
        return float(self.sums[drawn].sum() / self.tokens[drawn].sum())


class SafeAnswers:
    """Safe answers and the untrained model they are compared with.

    Raises:
        DataError: fewer than FEWEST examples.
    """

    def __init__(self, base: nn.Module, rows: Sequence[Continuation]) -> None:
        if len(rows) < FEWEST:
            raise DataError(
                f"the safety set has {len(rows)} examples; {FEWEST} or more are needed for an interval: add prompts"
            )
        if empty := [i for i, row in enumerate(rows) if not row.prompt or not row.tokens]:
            raise DataError(f"safety example {empty[0]} needs a prompt and an answer of a token or more")
        self.base, self.rows = base, list(rows)
        self.tokens = np.array([len(row.tokens) for row in rows], dtype=float)
        self.device = next(base.parameters()).device

    @torch.no_grad()
    def kl(self, live: nn.Module) -> Kl:
        """How far the model has moved.

        Raises:
            ModelError: log-probabilities that are not finite; the example is named.
        """
        sums = np.zeros(len(self.rows))
        for batch in self._batches():
            p, q = (self._logprobs(model, batch) for model in (self.base, live))
            sums[batch.numbers] = batch.summed((p.exp() * (p - q)).sum(-1).clamp(min=0.0))
        return Kl(sums, self.tokens)

    @torch.no_grad()
    def moments(self, live: nn.Module, path: Path, h: float) -> Moments:
        """Changes of the log-probabilities along the path, by central differences at ±h.

        With z(t) the logits along the path: u-part −z′(0), w-part z″(0), so that ½Var(t·z′ + ½t²·z″) is the KL. Their
        variances are taken under the untrained model's own distribution, which makes this the Fisher information
        itself and no sample of it.
        """
        found = np.zeros((4, len(self.rows)))
        for batch in self._batches():
            now = self._logprobs(live, batch)
            with path.at(h):
                ahead = self._logprobs(live, batch)
            with path.at(-h):
                behind = self._logprobs(live, batch)
            u, w, p = (behind - ahead) / (2 * h), (ahead + behind - 2 * now) / h**2, now.exp()
            u_own = u.gather(-1, batch.targets[:, None])[:, 0] - (p * u).sum(-1)
            values = (_covariance(p, u, u), _covariance(p, u, w), _covariance(p, w, w), u_own)
            for row, value in zip(found, values, strict=True):
                row[batch.numbers] = batch.summed(value)
        return Moments(*(found / self.tokens.mean()))

    def _batches(self) -> Iterator["_Batch"]:
        budget = TOKEN_BUDGET.get(self.device.type, 2048)
        for numbers in length_batches([len(r.prompt) + len(r.tokens) for r in self.rows], budget):
            yield _Batch(numbers, [self.rows[i] for i in numbers], self.device)

    def _logprobs(self, model: nn.Module, batch: "_Batch") -> Float[Tensor, "token d_vocab"]:
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        found: Tensor = logits[batch.row, batch.place].double().log_softmax(-1)
        if not bool(found.max(-1).values.isfinite().all()):
            bad = int(batch.row[~found.max(-1).values.isfinite()][0])
            raise ModelError(f"safety example {batch.numbers[bad]} gets log-probabilities that are not finite")
        return found


class _Batch:
    """Rows that run together. row, place: for every answer token, whose it is and the position before it."""

    def __init__(self, numbers: Sequence[int], rows: Sequence[Continuation], device: torch.device) -> None:
        self.numbers = list(numbers)
        self.ids, self.mask = right_padded([(*row.prompt, *row.tokens[:-1]) for row in rows], device)
        pairs = [(b, len(r.prompt) - 1 + k) for b, r in enumerate(rows) for k in range(len(r.tokens))]
        self.row, self.place = torch.tensor(pairs, device=device).T
        self.targets: Int[Tensor, " token"] = torch.tensor([t for r in rows for t in r.tokens], device=device)

    def summed(self, values: Float[Tensor, " token"]) -> Float[np.ndarray, " batch"]:
        found: Float[np.ndarray, " batch"] = (
            values.new_zeros(len(self.numbers)).index_add(0, self.row, values).cpu().numpy()
        )
        return found


def _covariance(
    p: Float[Tensor, "token d_vocab"], x: Float[Tensor, "token d_vocab"], y: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, " token"]:
    found: Tensor = (p * x * y).sum(-1) - (p * x).sum(-1) * (p * y).sum(-1)
    return found
