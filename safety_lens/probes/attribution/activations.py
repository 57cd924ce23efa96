"""Scores of neurons and heads at their hook points: gradient × activation, and change between two checkpoints.

Gradient × activation (MATH §2.2, E1–E3): Σ_t h ∂L/∂h is the derivative of the loss with respect to a gate on the neuron
or head, and equals the sum of w ∂L/∂w over the weights that read it. It is first-order in deleting the unit: check a
list by true ablation. Change scores: Chen et al. 2024 (arXiv:2406.14144), root mean square over the response's tokens
of the difference between two checkpoints on the same tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.artifacts import fingerprint
from safety_lens.errors import DataError, HookNameError, ModelMismatchError
from safety_lens.forced import Continuation
from safety_lens.models import hooks_at
from safety_lens.probes.attribution.inputs import POSITIONS, Picked, Read, positions_named, read_batch
from safety_lens.probes.attribution.scores import Scores, provenance
from safety_lens.probes.gradients import Loss, SeenPoint, example_batches, example_gradients, response_nll
from safety_lens.probes.matrices import Matrix, matrices_of
from safety_lens.types import FwdHook

__all__ = ["POSITIONS", "TOKENS", "attribute_neurons", "change_scores"]

_POINT = {"neuron": "mlp_post", "head": "z"}
_READER = {"neuron": "W_out", "head": "W_O"}
_PART = {"neuron": "mlp", "head": "attn"}
_Each = Callable[[Float[Tensor, "batch pos unit"]], Float[Tensor, "batch unit"]]


def _summed(terms: Float[Tensor, "batch pos unit"]) -> Float[Tensor, "batch unit"]:
    return terms.sum(1)


def _summed_by_size(terms: Float[Tensor, "batch pos unit"]) -> Float[Tensor, "batch unit"]:
    return terms.abs().sum(1)


TOKENS: dict[str, _Each] = {"sum": _summed, "each": _summed_by_size}
"""How the tokens of an example are put together: summed first (a unit that helps here and hurts there cancels, as
deleting it everywhere would), or each by its size."""


def attribute_neurons(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    *,
    unit: str = "neuron",
    layers: Sequence[int] | None = None,
    loss: Loss = response_nll,
    signed: bool = False,
    tokens: str = "sum",
    hooks: Sequence[FwdHook] = (),
    batch_size: int | str = "auto",
) -> Scores:
    """Gradient × activation: mean over examples of |Σ_t h ∂L/∂h|, at `mlp.hook_post` or `attn.hook_z`.

    Args:
        unit: "neuron" or "head" (summed over its dimensions).
        signed: the mean of Σ_t h ∂L/∂h itself. Positive: deleting the unit lowers the loss, to first order.
        tokens: "sum" or "each" (see TOKENS).

    Raises:
        DataError: no example, one that is empty or too long, another unit, or signed scores of tokens "each".
        ModelError: a loss or gradient that is not finite; the message names the example.
    """
    _check_unit(unit)
    if tokens not in TOKENS:
        raise DataError(f"tokens are put together by {' or '.join(TOKENS)}, not by {tokens!r}")
    if signed and tokens != "sum":
        raise DataError("signed scores need tokens='sum': sizes have no sign")
    points = hooks_at(model, _POINT[unit], layers)
    sums: dict[str, Tensor] = {}

    def see(seen: SeenPoint) -> None:
        terms = (seen.value * seen.grad).double()
        found = TOKENS[tokens](terms.sum(-1) if unit == "head" else terms)
        new = (found if signed else found.abs()).sum(0)
        sums[seen.hook] = sums[seen.hook] + new if seen.hook in sums else new

    example_gradients(model, examples, loss=loss, points=points, see_point=see, hooks=hooks, batch_size=batch_size)
    wide = torch.float64 if model.cfg.dtype == torch.float64 else torch.float32
    values = {_key(name, unit): (sums[name] / len(examples)).to(wide) for name in points}
    name = str(getattr(loss, "__name__", repr(loss)))
    source = provenance(model, examples, loss=name, tokens=tokens, edited=bool(hooks) or None)
    return Scores(values, unit, "gradient-activation", len(examples), signed, float(len(examples)), source=source)


def _check_unit(unit: str) -> None:
    if unit not in _POINT:
        raise DataError(f"activations are of a neuron or a head, not of a {unit!r}: score weights with snip_scores")


def _key(hook: str, unit: str) -> str:
    return f"blocks.{hook.split('.')[1]}.{_PART[unit]}"


def change_scores(
    model: HookedTransformer,
    other: HookedTransformer,
    examples: Sequence[Continuation],
    *,
    unit: str = "neuron",
    layers: Sequence[int] | None = None,
    positions: str = "response",
    batch_size: int | str = "auto",
) -> Scores:
    """How far each unit's activation differs between two checkpoints on the same tokens: root mean square over tokens.

    Teacher-forced: let one of the two write the responses (`own_answers`). Needs no gradient.

    Args:
        layers: default every block but the last, as in the paper.
        positions: whose activations count (see POSITIONS).

    Raises:
        DataError: as `attribute_neurons`.
        ModelMismatchError: models of different shape.
    """
    _check_unit(unit)
    picked = positions_named(positions)
    shapes = [(m.cfg.n_layers, m.cfg.d_mlp, m.cfg.n_heads, m.cfg.d_head, m.cfg.d_vocab) for m in (model, other)]
    if shapes[0] != shapes[1]:
        raise ModelMismatchError(f"change scores compare checkpoints of one model; these have the shapes {shapes}")
    if layers is None and model.cfg.n_layers < 2:
        raise HookNameError("the last block is left out by default, and this model has no other: pass layers=[0]")
    matrices = matrices_of(model, [_READER[unit]], range(model.cfg.n_layers - 1) if layers is None else layers)
    squares = _Squares(matrices, model.cfg.d_head if unit == "head" else 1)
    for batch in example_batches(model, examples, batch_size):
        squares.add(model, other, examples, batch, picked)
    wide = torch.float64 if model.cfg.dtype == torch.float64 else torch.float32
    values = {_key(m.name, unit): (squares.sums[m.name] / squares.tokens).sqrt().to(wide) for m in matrices}
    source = provenance(model, examples, other=fingerprint(other), positions=positions)
    return Scores(values, unit, "change", len(examples), weight=float(squares.tokens), power=2, source=source)


class _Squares:
    """Sums over tokens of squared differences between two models, by unit of `width` dimensions."""

    def __init__(self, matrices: Sequence[Matrix], width: int) -> None:
        self.matrices, self.width = matrices, width
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0

    def add(
        self,
        model: HookedTransformer,
        other: HookedTransformer,
        examples: Sequence[Continuation],
        batch: Sequence[int],
        picked: Picked,
    ) -> None:
        first: dict[str, Tensor] = {}
        reads: list[int] = []

        def keep(found: Read) -> None:
            first[found.matrix.name] = found.x
            reads.append(int(found.read.sum()))

        read_batch(model, examples, batch, self.matrices, keep, positions=picked)
        read_batch(other, examples, batch, self.matrices, partial(self._compare, first), positions=picked)
        self.tokens += reads[0]

    def _compare(self, first: dict[str, Tensor], found: Read) -> None:
        name = found.matrix.name
        gap = (found.x.to(first[name]).double() - first.pop(name).double()).square().sum((0, 1))
        gap = gap.unflatten(0, (-1, self.width)).sum(1)
        self.sums[name] = self.sums[name] + gap if name in self.sums else gap
