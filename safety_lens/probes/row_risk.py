"""Which rows of a fine-tuning set push the model away from its safe answers.

A step of gradient descent on a row moves the weights by −η·g_row, and the odds that the model opens a safe answer to a
harmful request change, to first order, by η·⟨g_row, s⟩, with s the mean gradient of those log-odds' negative. A row's
risk is the cosine of −g_row with s: 1 when the row does nothing but make safe answers less likely, −1 when it makes
them more likely. The sign is what tells compliance with a harmful request from a refusal of the same request; the
energy ⟨g_row, g⟩², which has none, ranks both high.

Odds instead of likelihood: a model that is sure of its refusals has no gradient of their likelihood left, and what is
left tells one wording of a refusal from another.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.data.labelled import IGNORED, Labelled
from safety_lens.errors import DataError
from safety_lens.forced import Continuation, continuation_logprobs
from safety_lens.probes.gradients import Loss, Predictions, Seen, example_gradients, response_nll
from safety_lens.probes.matrices import Matrix, matrices_of
from safety_lens.probes.products import inner_products

BUDGET = 2**31
"""Bytes that the mean gradient may take; blocks beyond that are done in further passes."""
LEAST_SHARE = 0.01
"""A token opens a safe answer if it holds this much of the probability behind the safety prompts, on average."""
LEAST_KNOWN = 0.5
"""How probable the safe answers' own first tokens must be, on average, for the model to be said to give them."""


def safe_openings(model: HookedTransformer, safety: Sequence[Continuation]) -> tuple[int, ...]:
    """Tokens with which the model now opens its answers to the safety prompts, in ascending order.

    Those that hold at least `LEAST_SHARE` of the mean probability, and the first tokens of the given answers.

    Raises:
        DataError: no example, or the model does not give these answers: their first tokens hold less than
            `LEAST_KNOWN` of its probability.
    """
    if not safety:
        raise DataError("there is no safety example: nothing says what a safe answer is")
    heads = [Continuation(row.prompt, row.tokens[:1]) for row in safety]
    first = torch.stack([found[0] for found in continuation_logprobs(model, heads)]).exp()
    given = sorted({row.tokens[0] for row in heads})
    known = float(first[:, given].sum(1).mean())
    if known < LEAST_KNOWN:
        raise DataError(
            f"the first tokens of the {len(safety)} safe answers hold {known:.2f} of the model's probability: it does"
            " not give such answers now, so there is nothing to lose; use answers of the model itself"
        )
    often = (first.mean(0) >= LEAST_SHARE).nonzero()[:, 0].tolist()
    return tuple(sorted({*given, *often}))


def odds_against(openings: Sequence[int]) -> Loss:
    """−log(P/(1 − P)), P the probability that an answer begins with one of these tokens; nats."""

    def loss(predictions: Predictions) -> Float[Tensor, " batch"]:
        counts = torch.bincount(predictions.row, minlength=len(predictions.examples))
        logits = predictions.logits[counts.cumsum(0) - counts]  # the position before the first token of each row
        inside = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        inside[list(openings)] = True
        return logits[:, ~inside].logsumexp(-1) - logits[:, inside].logsumexp(-1)

    return loss


@dataclass(frozen=True, eq=False)
class RowRisk:
    """What one step on each row alone would do to the safe answers; rows in the order given.

    risk: cosine in [−1, 1], positive away from the safe answer; NaN for a row without a gradient. push: first-order
    change of the log-odds of a safe answer, nats per unit of learning rate of plain gradient descent; negative away
    from it. by_matrix: the push, split by matrix. losses: of each row, nats per response token. norms: ‖g_row‖.
    """

    risk: Float[np.ndarray, " n"]
    push: Float[np.ndarray, " n"]
    by_matrix: Float[np.ndarray, "matrix n"]
    losses: Float[np.ndarray, " n"]
    norms: Float[np.ndarray, " n"]
    matrices: tuple[str, ...]

    def riskiest(self, fraction: float) -> Int[np.ndarray, " k"]:
        """Numbers of the rows of highest risk, riskiest first, ties by number; rows without a gradient are never among
        them. The fraction of all rows is rounded down, and to one row at least.

        Raises:
            DataError: the fraction is not in (0, 1).
        """
        if not 0 < fraction < 1:
            raise DataError(f"the fraction of rows to take out lies between 0 and 1, got {fraction}")
        order = np.argsort(np.nan_to_num(-self.risk, nan=np.inf), kind="stable")
        wanted = max(1, int(fraction * len(order) + 1e-9))
        return order[: min(wanted, int(np.isfinite(self.risk).sum()))]


def row_risk(
    model: HookedTransformer,
    rows: Sequence[Continuation],
    safety: Sequence[Continuation],
    *,
    matrices: Sequence[Matrix] | None = None,
    belongs: Sequence[int] | None = None,
    safe: Loss | None = None,
    batch_size: int | str = "auto",
    budget: int = BUDGET,
) -> RowRisk:
    """Rank training rows by their push away from the safe answers: one pass over the safety set, one over the rows.

    Args:
        rows: prompt and response of each training row. safety: harmful requests with the model's own safe answers.
        matrices: what training moves; default every linear map of the blocks.
        belongs: for conversations with several responses: which row each of `rows` belongs to, counted from 0. A row
            is as risky as its riskiest response.
        safe: the loss whose rise is the risk; default `odds_against(safe_openings(model, safety))`.
        budget: bytes of the mean gradient; more blocks than fit are done in several passes.

    Raises:
        DataError: no row or safety example, or answers that the model does not give.
        ModelError: a loss or gradient that is not finite; the message names the example.
    """
    if not rows:
        raise DataError("there is no training row to rank")
    safe = safe or odds_against(safe_openings(model, safety))
    chosen = matrices_of(model) if matrices is None else list(matrices)
    products, squares, losses, direction = list[np.ndarray](), np.zeros(len(rows)), np.zeros(len(rows)), 0.0
    for group in _groups(chosen, budget):
        mean = mean_gradient(model, safety, group, loss=safe, batch_size=batch_size)
        direction += sum(float(values.double().square().sum()) for values in mean.values())
        found = inner_products(
            model, rows, [mean], loss=response_nll, matrices=group, norms=True, batch_size=batch_size
        )
        products.append(found.values[0])
        squares, losses = squares + found.squared_norms.sum(0), found.losses
    by_matrix, norms = np.concatenate(products), np.sqrt(squares)
    push = by_matrix.sum(0)
    scale = norms * np.sqrt(direction)
    risk = np.divide(-push, scale, out=np.full(len(rows), np.nan), where=scale > 0)
    names = tuple(matrix.name for matrix in chosen)
    whole = RowRisk(risk, push, by_matrix, losses, norms, names)
    return whole if belongs is None else _by_row(whole, belongs)


def mean_gradient(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    matrices: Sequence[Matrix],
    *,
    loss: Loss = response_nll,
    batch_size: int | str = "auto",
) -> dict[str, Float[Tensor, "d_out d_in"]]:
    """ḡ = mean_n g_n by matrix name, float32 or wider: as large as the matrices themselves."""
    total: dict[str, Tensor] = {}

    def see(seen: Seen) -> None:
        part = seen.delta.flatten(0, 1).T @ seen.x.flatten(0, 1)
        total[seen.matrix.name] = total[seen.matrix.name].add_(part) if seen.matrix.name in total else part

    example_gradients(model, examples, matrices, see, loss=loss, batch_size=batch_size)
    zeros = {m.name: torch.zeros(m.shape, device=model.cfg.device) for m in matrices if m.name not in total}
    return {m.name: (total | zeros)[m.name] / len(examples) for m in matrices}


def _groups(matrices: Sequence[Matrix], budget: int) -> Iterator[list[Matrix]]:
    group: list[Matrix] = []
    for matrix in matrices:
        if group and 4 * sum(m.numel for m in [*group, matrix]) > budget:
            yield group
            group = []
        group.append(matrix)
    yield group


def _by_row(parts: RowRisk, belongs: Sequence[int]) -> RowRisk:
    """The riskiest response of each row."""
    owner = np.asarray(belongs)
    if len(owner) != len(parts.risk) or set(owner.tolist()) != set(range(int(owner.max()) + 1)):
        raise DataError(f"belongs must name a row for each of the {len(parts.risk)} responses, and leave out no row")
    order = np.lexsort((np.nan_to_num(-parts.risk, nan=np.inf), owner))
    kept = order[np.unique(owner[order], return_index=True)[1]]
    return RowRisk(
        parts.risk[kept], parts.push[kept], parts.by_matrix[:, kept], parts.losses[kept], parts.norms[kept],
        parts.matrices,
    )  # fmt: skip


def responses_of(row: Labelled) -> list[Continuation]:
    """Every stretch of learned tokens of a training row, behind all that stands before it; [] without a prompt."""
    spoken = [label != IGNORED for label in row.labels]
    starts = [i for i, said in enumerate(spoken) if said and i and not spoken[i - 1]]
    ends = [next((i for i in range(start, len(spoken)) if not spoken[i]), len(spoken)) for start in starts]
    return [Continuation(row.ids[:a], row.ids[a:b]) for a, b in zip(starts, ends, strict=True)]


def write_row_risk(path: Path, found: RowRisk, ids: Sequence[str | int]) -> None:
    """One JSON line for each row, riskiest first: its id, risk, push and loss (null where unknown).

    Raises:
        DataError: not one id for each row.
    """
    if len(ids) != len(found.risk):
        raise DataError(f"{len(ids)} ids for {len(found.risk)} rows")
    order = np.argsort(np.nan_to_num(-found.risk, nan=np.inf), kind="stable")
    lines = [
        {"row": ids[i], "risk": _known(found.risk[i]), "push": float(found.push[i]), "loss": float(found.losses[i])}
        for i in order
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8", newline="\n")


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
