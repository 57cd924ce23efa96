"""Scores of single weights: SNIP from every example's own gradient, and Wanda from inputs alone.

SNIP (Lee et al. 2019, as used by Wei et al. 2024, arXiv:2402.05162): mean over examples of |w · ∂L/∂w|, the size of the
first-order change of the loss when w is deleted. The absolute value is taken per example: |mean| instead of mean |·|
picks other weights. Wanda (Sun et al. 2023, arXiv:2306.11695): |w| times the norm of its input.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.forced import Continuation
from safety_lens.probes.attribution.inputs import Read, positions_named, read_inputs
from safety_lens.probes.attribution.scores import Scores, provenance, scored_matrices
from safety_lens.probes.gradients import Loss, Seen, example_gradients, response_nll
from safety_lens.probes.matrices import Matrix, weight_of
from safety_lens.types import FwdHook

IN_CACHE = 2**18  # floats of a tile for each thread of a CPU: made, and its size added, before they leave the cache


def snip_scores(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    *,
    matrices: Sequence[Matrix] | None = None,
    layers: Sequence[int] | None = None,
    loss: Loss = response_nll,
    signed: bool = False,
    layers_per_pass: int | None = None,
    store: torch.device | str | None = None,
    hooks: Sequence[FwdHook] = (),
    batch_size: int | str = "auto",
) -> Scores:
    """SNIP scores of weights: mean over examples of |w ∂L/∂w|, each example by itself, in one pass for all blocks.

    Sums are float32 (float64 for float64 models) whatever the model's dtype: a bfloat16 sum of ones stops at 256.

    Args:
        matrices, layers: what to score, default every linear map of every block.
        loss: of one example; nats per response token by default.
        signed: mean of w ∂L/∂w instead. Positive: deleting the weight lowers the loss, to first order.
        layers_per_pass: score this many blocks at a time, with a pass each, where the sums of all do not fit beside
            the model. store: where finished scores go, such as "cpu"; default the model's device.
        hooks: edits under which everything runs.

    Raises:
        DataError: no example, or one that is empty or longer than the context; no matrices.
        ModelError: a loss or gradient that is not finite; the message names the example.
    """
    chosen = scored_matrices(model, matrices, layers)
    source = provenance(model, examples, loss=_name(loss), edited=bool(hooks) or None)
    add = add_signed if signed else add_absolute
    values: dict[str, Tensor] = {}
    for group in _layer_groups(chosen, layers_per_pass):
        sums = {m.name: _zeros(model, m) for m in group}
        see = partial(_see, sums, add, model.cfg.n_layers - 1)
        example_gradients(model, examples, group, see, loss=loss, hooks=hooks, batch_size=batch_size)
        for matrix in group:
            total = sums.pop(matrix.name).div_(len(examples)).mul_(weight_of(model, matrix))
            values[matrix.name] = (total if signed else total.abs_()).to(store or total.device)
    return Scores(values, "weight", "snip", len(examples), signed, float(len(examples)), source=source)


def _name(loss: Loss) -> str:
    return str(getattr(loss, "__name__", repr(loss)))


def _layer_groups(matrices: Sequence[Matrix], layers_per_pass: int | None) -> list[list[Matrix]]:
    if layers_per_pass is None:
        return [list(matrices)]
    if layers_per_pass < 1:
        raise DataError(f"layers_per_pass must be 1 or more, got {layers_per_pass}")
    layers = sorted({m.layer for m in matrices})
    parts = [set(layers[i : i + layers_per_pass]) for i in range(0, len(layers), layers_per_pass)]
    return [[m for m in matrices if m.layer in part] for part in parts]


def _zeros(model: HookedTransformer, matrix: Matrix) -> Float[Tensor, "d_out d_in"]:
    wide = torch.float64 if model.cfg.dtype == torch.float64 else torch.float32
    return torch.zeros(matrix.shape, dtype=wide, device=model.cfg.device)


Spans = Sequence[tuple[int, int]]
"""The positions of each row of a batch that are read: first, and behind the last."""


def _see(sums: dict[str, Tensor], add: Any, last: int, seen: Seen) -> None:
    add(sums[seen.matrix.name], seen.delta, seen.x, _spans(seen, last))


def _spans(seen: Seen, last: int) -> Spans:
    """Positions without a gradient cost time and add 0: padding behind, and in the last block what comes before the
    tokens that predict the response (its keys and values apart)."""
    ends = seen.mask.sum(1).tolist()
    if seen.matrix.layer != last:
        return [(0, end) for end in ends]
    starts = (seen.delta != 0).any(-1).int().argmax(1).tolist()
    return list(zip(starts, ends, strict=True))


def add_signed(
    total: Float[Tensor, "d_out d_in"],
    delta: Float[Tensor, "batch pos d_out"],
    x: Float[Tensor, "batch pos d_in"],
    spans: Spans,
) -> None:
    """total += Σ_n δ_nᵀ x_n."""
    total.addmm_(delta.flatten(0, 1).T, x.flatten(0, 1))


def add_absolute(
    total: Float[Tensor, "d_out d_in"],
    delta: Float[Tensor, "batch pos d_out"],
    x: Float[Tensor, "batch pos d_in"],
    spans: Spans,
) -> None:
    """total += Σ_n |δ_nᵀ x_n|, a tile of rows at a time: on a CPU memory is what this costs, not arithmetic."""
    d_out, d_in = total.shape
    rows = max(1, IN_CACHE * torch.get_num_threads() // d_in) if total.device.type == "cpu" else d_out
    tile = total.new_empty(min(rows, d_out), d_in)
    for first in range(0, d_out, rows):
        part = total[first : first + rows]
        gradient = tile[: len(part)]
        for row, (start, end) in enumerate(spans):
            torch.mm(delta[row, start:end, first : first + rows].T, x[row, start:end], out=gradient)
            part += gradient.abs_()


# --- Wanda ------------------------------------------------------------------------------------------------------------


def wanda_scores(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    *,
    matrices: Sequence[Matrix] | None = None,
    layers: Sequence[int] | None = None,
    positions: str = "response",
    store: torch.device | str | None = None,
    hooks: Sequence[FwdHook] = (),
    batch_size: int | str = "auto",
) -> Scores:
    """Wanda scores of weights: |w_ij| · sqrt(mean over examples of Σ_t x_tj²). No gradients.

    positions: whose inputs count; "response" as in Wei et al.'s code, "predicting", "prompt" or "all" (see POSITIONS).
    Whether the square root is of a mean or a sum over examples is a factor common to all weights.

    Raises:
        DataError: as `snip_scores`, or no such token rule.
        ModelError: an activation that is not finite; the message names the example.
    """
    chosen = scored_matrices(model, matrices, layers)
    source = provenance(model, examples, positions=positions, edited=bool(hooks) or None)
    squares: dict[str, Tensor] = {}

    def see(found: Read) -> None:
        new = found.x.double().square().sum((0, 1))
        name = found.matrix.name
        squares[name] = squares[name] + new if name in squares else new

    read_inputs(model, examples, chosen, see, positions=positions_named(positions), hooks=hooks, batch_size=batch_size)
    values = {}
    for matrix in chosen:
        norm = (squares[matrix.name] / len(examples)).sqrt()
        values[matrix.name] = _zeros(model, matrix).copy_(weight_of(model, matrix)).abs_().mul_(norm.to(_wide(model)))
    if store is not None:
        values = {name: v.to(store) for name, v in values.items()}
    return Scores(values, "weight", "wanda", len(examples), weight=float(len(examples)), power=2, source=source)


def _wide(model: HookedTransformer) -> torch.dtype:
    return torch.float64 if model.cfg.dtype == torch.float64 else torch.float32
