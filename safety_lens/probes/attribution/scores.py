"""Scores: how important every weight, neuron or head is, with what it takes to merge and to check them.

Every kind of score is a mean, or a root of a mean of squares, over examples or tokens. So two sets of scores of the
same model merge exactly, however the examples were split (docs/maths.md, "Merging").
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.artifacts import fingerprint
from safety_lens.errors import DataError, ModelMismatchError
from safety_lens.forced import Continuation
from safety_lens.probes.examples import examples_sha256
from safety_lens.probes.matrices import Matrix, matrices_of

UNITS = ("weight", "neuron", "head")
KIND = ("unit", "method", "signed", "power", "shapes")  # what scores of one kind have in common


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance by matrix or by block part; larger is more important, whatever made it.

    values: unit weight: matrix name → [d_out, d_in]; neuron: "blocks.3.mlp" → [d_mlp]; head: "blocks.3.attn" →
    [n_heads]. float32 or float64.
    method: "snip", "wanda", "gradient-activation", "change".
    n: examples scored.
    signed: values may be negative; unsigned ones never are.
    weight: how much these scores count beside others of theirs when merged: examples, or tokens where the mean is over
    tokens. power: 1 for means, 2 for roots of means of squares, 0 for sums of such roots, which do not merge.
    source: where they come from: model fingerprint, hash of the examples, settings.
    """

    values: dict[str, Tensor]
    unit: str
    method: str
    n: int
    signed: bool = False
    weight: float = 0.0
    power: int = 1
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise DataError(f"scores are of {', '.join(UNITS)}, not of {self.unit!r}")
        if not self.values:
            raise DataError("there are no scores: no matrix was asked for")
        for name, values in self.values.items():
            low, high = (float(bound) for bound in torch.aminmax(values))  # one pass, no temporary; NaN propagates
            if not (math.isfinite(low) and math.isfinite(high)):
                raise DataError(f"the scores of {name} are not finite: they rank nothing")
            if low < 0 and not self.signed:
                raise DataError(
                    f"the scores of {name} go down to {low:.3g}: importance is never negative, and negated scores would"
                    " pick the least important entries. Pass the absolute scores, or say signed=True"
                )

    @property
    def numel(self) -> int:
        """How many weights, neurons or heads have a score."""
        return sum(values.numel() for values in self.values.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(values.shape) for name, values in self.values.items()}

    def absolute(self) -> "Scores":
        """Signed scores by size alone; unsigned ones are given back as they are.

        |mean| is not the mean of |·|: what cancels between examples is gone (MATH §0.7 puts the two top sets at a
        Jaccard index of 0.35), so rank by scores that were made unsigned.
        """
        if not self.signed:
            return self
        return replace(self, values={name: v.abs() for name, v in self.values.items()}, signed=False)

    def quantiles(self, at: Sequence[float] = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)) -> dict[str, list[float]]:
        """Scores at these shares of each matrix, from least to most important: what is kept of many GB of scores."""
        return {name: [_quantile(values.flatten(), share) for share in at] for name, values in self.values.items()}


def _quantile(values: Float[Tensor, " n"], share: float) -> float:
    """The lowest value that at least this share of the values does not exceed; torch.quantile stops at 16 M values."""
    if not 0 <= share <= 1:
        raise DataError(f"a quantile lies between 0 and 1, got {share}")
    return float(values.kthvalue(max(1, -int(-share * len(values) // 1))).values)


# --- merging ----------------------------------------------------------------------------------------------------------


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of all examples from scores of disjoint parts of them, equal to scoring them at once.

    Raises:
        DataError: no parts, or parts that differ in unit, method, sign or matrices.
        ModelMismatchError: parts from different models.
    """
    if not parts:
        raise DataError("there are no scores to merge")
    first = parts[0]
    for other in parts[1:]:
        check_same_kind(first, other, KIND, "scores that are merged must be of one kind")
    if first.power not in (1, 2):
        raise DataError("sums of roots do not merge: merge the weight scores, then aggregate them")
    total = sum(part.weight for part in parts)
    values = {name: _merged([(p.values[name], p.weight) for p in parts], total, first.power) for name in first.values}
    source = {key: value for key, value in first.source.items() if all(p.source.get(key) == value for p in parts[1:])}
    return replace(first, values=values, n=sum(part.n for part in parts), weight=total, source=source)


def check_same_kind(first: Scores, other: Scores, fields: Sequence[str], why: str) -> None:
    """Refuse two scores that differ in one of these fields or come from different models.

    why: how the message begins, such as "scores that are merged must be of one kind".

    Raises:
        DataError, ModelMismatchError: what differs.
    """
    for name in fields:
        mine, theirs = getattr(first, name), getattr(other, name)
        if mine != theirs:
            shown = "cover other matrices" if name == "shapes" else f"differ in {name}: {mine} and {theirs}"
            raise DataError(f"{why}; these {shown}")
    mine, theirs = (part.source.get("model", {}).get("weights_sha256") for part in (first, other))
    if mine != theirs:
        raise ModelMismatchError(f"{why}; these come from different models: their weights differ")


def _merged(parts: Sequence[tuple[Tensor, float]], total: float, power: int) -> Tensor:
    out = torch.zeros_like(parts[0][0], dtype=torch.float64)
    for values, weight in parts:
        out += values.double().to(out.device).pow(power) * (weight / total)
    return out.pow(1 / power).to(parts[0][0].dtype)


# --- from weights to neurons and heads --------------------------------------------------------------------------------


def aggregated(scores: Scores, model: HookedTransformer, unit: str) -> Scores:
    """Weight scores summed to neurons (gate row, up row, down column) or heads (query rows, output columns).

    Keys and values that query heads share belong to none of them and are left out; where every head has its own, its
    key and value rows count too. Scores of that unit already are given back as they are.

    Raises:
        DataError: scores of another unit than weights, or a matrix that the unit needs and the scores lack.
    """
    if scores.unit == unit:
        return scores
    if unit not in UNITS:
        raise DataError(f"scores are of {', '.join(UNITS)}, not of {unit!r}")
    if scores.unit != "weight":
        raise DataError(
            f"scores of {scores.unit}s cannot be made scores of {unit}s: score weights, or {unit}s directly"
        )
    needed, part = _needed(model, unit), _PARTS[unit]
    layers = sorted({m.layer for m in matrices_of(model) if m.name in scores.values})
    values: dict[str, Tensor] = {}
    for matrix in matrices_of(model, needed, layers):
        if matrix.name not in scores.values:
            raise DataError(f"scores of {unit}s sum over {', '.join(needed)} of a block: {matrix.name} was not scored")
        key = f"blocks.{matrix.layer}.{part}"
        found = _by_unit(scores.values[matrix.name], matrix, unit, model.cfg.d_head)
        values[key] = values[key] + found if key in values else found
    return replace(scores, values=values, unit=unit, power=1 if scores.power == 1 else 0)


_PARTS = {"neuron": "mlp", "head": "attn"}


def _needed(model: HookedTransformer, unit: str) -> list[str]:
    if unit == "neuron":
        return ["W_gate", "W_in", "W_out"] if model.cfg.gated_mlp else ["W_in", "W_out"]
    shared = model.cfg.n_key_value_heads not in (None, model.cfg.n_heads)
    return ["W_Q", "W_O"] if shared else ["W_Q", "W_K", "W_V", "W_O"]


def _by_unit(values: Float[Tensor, "d_out d_in"], matrix: Matrix, unit: str, d_head: int) -> Float[Tensor, " unit"]:
    """Sums over the rows, or for matrices that write into the residual stream over the columns, of each unit."""
    along = 0 if matrix.kind in ("W_O", "W_out") else 1
    each = values.sum(along, dtype=torch.float64)
    return (each.unflatten(0, (-1, d_head)).sum(1) if unit == "head" else each).to(values.dtype)


def scored_matrices(
    model: HookedTransformer, matrices: Sequence[Matrix] | None, layers: Sequence[int] | None
) -> list[Matrix]:
    """The matrices to score: those given, or all of some blocks.

    Raises:
        DataError: both were given, or none is left.
    """
    if matrices is not None and layers is not None:
        raise DataError("give matrices or layers, not both")
    found = list(matrices) if matrices is not None else matrices_of(model, layers=layers)
    if not found:
        raise DataError("there are no matrices to score")
    return found


Score = Callable[..., Scores]
"""A score function: (model, examples, **settings) → Scores."""


def provenance(model: HookedTransformer, examples: Sequence[Continuation], **settings: Any) -> dict[str, Any]:
    """What goes into `Scores.source`: the model, the examples, and the settings that were given."""
    given = {key: value for key, value in settings.items() if value is not None}
    return {"model": fingerprint(model), "examples_sha256": examples_sha256(examples), **given}
