"""From scores to groups: the most important members, and those important for safety and not for utility.

Set difference: Wei et al. 2024, arXiv:2402.05162, section 4.1: S(p, q) = S_s(q) \\ S_u(p), the top q by safety score
without the top p by utility score, each taken within a matrix.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError, ModelMismatchError
from safety_lens.probes.attribution.scores import Scores, check_same_kind
from safety_lens.probes.groups import NeuronGroup, part_shapes
from safety_lens.probes.sharing import difference

Pools = Callable[[Scores], list[list[str]]]


def _each(scores: Scores) -> list[list[str]]:
    return [[name] for name in scores.values]


def _layers(scores: Scores) -> list[list[str]]:
    layers: dict[str, list[str]] = {}
    for name in scores.values:
        layers.setdefault(name.split(".")[1], []).append(name)
    return list(layers.values())


def _all(scores: Scores) -> list[list[str]]:
    return [list(scores.values)]


SCOPES: Mapping[str, Mapping[str, Pools]] = {
    "weight": {"matrix": _each, "layer": _layers, "global": _all, "row": _each},
    "neuron": {"layer": _layers, "global": _all},
    "head": {"global": _all, "layer": _layers},
}
"""Unit → among whom members are ranked; the first is the default, and a layer has too few heads for a share of them.
"row" ranks each output row by itself, as pruning with SNIP and Wanda does."""


def top(
    scores: Scores, model: HookedTransformer, fraction: float, *, scope: str | None = None, name: str = "top"
) -> NeuronGroup:
    """The int(fraction · n) highest scores within each row, matrix, layer or the whole model; ties go by index.

    Signed scores are ranked by value, not by size.

    Args:
        scope: "matrix" for weights, "layer" for neurons and "global" for heads by default; see SCOPES.

    Raises:
        DataError: a fraction outside (0, 1), a scope that the unit does not have, or so small a fraction that nothing
            is chosen anywhere. ModelMismatchError: scores of another model.
    """
    _check_fraction(fraction, "fraction")
    scope, pools = _pools(scores, scope)
    shapes = _shapes(scores, model)
    index: dict[str, Tensor] = {}
    for names in pools(scores):
        values = {key: scores.values[key] for key in names}
        chosen = _top_of_rows(values, fraction) if scope == "row" else _top_of_all(values, fraction)
        index |= {key: mask.flatten().nonzero().flatten().cpu() for key, mask in chosen.items()}
    if not any(len(members) for members in index.values()):
        most = max(_pool_sizes(scores, pools, scope))
        wider = "" if scope == "global" else " or a wider scope"
        raise DataError(
            f"the top {fraction:g} by {scope} of {scores.numel} {scores.unit}s is not one {scores.unit} anywhere: a"
            f" share of {_share_of_one(most):g} gives 1 of {most} (identify has --top, --q and --p){wider}"
        )
    source = {
        "made by": "top",
        "method": scores.method,
        "fraction": fraction,
        "scope": scope,
        "n": scores.n,
        "signed": scores.signed,
        **scores.source,
    }
    return NeuronGroup(name, scores.unit, index, shapes, source, model.cfg.d_head if scores.unit == "head" else 0)


def set_difference(
    safety: Scores,
    utility: Scores,
    model: HookedTransformer,
    *,
    q: float,
    p: float,
    scope: str | None = None,
    name: str = "set-difference",
) -> NeuronGroup:
    """The top q by safety score without the top p by utility score.

    Raises:
        DataError: p or q outside (0, 1), signed scores, scores of two units, methods or sets of matrices, nothing left.
        ModelMismatchError: scores of different models.
    """
    _check_fraction(p, "p")
    _check_fraction(q, "q")
    _check_pair(safety, utility)
    important, useful = (top(s, model, f, scope=scope) for s, f in ((safety, q), (utility, p)))
    group = difference(important, useful, name)
    if not group.size:
        raise DataError(
            f"the top {q:g} for safety are all among the top {p:g} for utility: no safety-critical {safety.unit} is"
            " left. Choose a larger q or a smaller p"
        )
    source = {
        "made by": "set difference",
        "method": safety.method,
        "q": q,
        "p": p,
        "scope": important.source["scope"],
        "n": {"safety": safety.n, "utility": utility.n},
        "model": safety.source.get("model"),
        "safety": safety.source,
        "utility": utility.source,
    }
    return NeuronGroup(name, group.unit, group.index, group.shapes, source, group.d_head)


def _pool_sizes(scores: Scores, pools: Pools, scope: str) -> list[int]:
    """Among how many each choice is made."""
    if scope == "row":
        return [values.shape[1] for values in scores.values.values()]
    return [sum(scores.values[name].numel() for name in names) for names in pools(scores)]


def _share_of_one(n: int) -> float:
    """The smallest share of two significant digits of which int(share · n) is 1."""
    digits = 1 - math.floor(math.log10(1 / n))
    return float(round(math.ceil(10**digits / n) / 10**digits, digits))


def _check_fraction(value: float, what: str) -> None:
    if not 0 < value < 1:
        raise DataError(f"{what} is a share between 0 and 1, ends excluded, got {value:g}")


def _check_pair(safety: Scores, utility: Scores) -> None:
    for what, scores in (("safety", safety), ("utility", utility)):
        if scores.signed:
            raise DataError(
                f"a set difference ranks importance, and these {what} scores are signed: score with signed=False"
            )
    check_same_kind(safety, utility, ("unit", "method", "shapes"), "safety and utility scores must be of one kind")


def _pools(scores: Scores, scope: str | None) -> tuple[str, Pools]:
    there = SCOPES[scores.unit]
    scope = scope or next(iter(there))
    if scope not in there:
        why = {
            "row": "a row of a matrix holds single weights only",
            "matrix": f"a {scores.unit} lies in several matrices at once",
        }.get(scope, "there is no such scope")
        raise DataError(f"scope {scope!r} is undefined for {scores.unit}s ({why}): choose {', '.join(there)}")
    return scope, there[scope]


def _shapes(scores: Scores, model: HookedTransformer) -> dict[str, tuple[int, int]]:
    try:
        shapes = part_shapes(model, scores.unit, scores.values)
    except DataError as error:
        raise ModelMismatchError(f"the scores are of another model: {error}") from error
    for name, values in scores.values.items():
        if scores.unit == "weight" and tuple(values.shape) != shapes[name]:
            raise ModelMismatchError(
                f"the scores are of another model: {name} has shape {tuple(values.shape)} there and {shapes[name]} here"
            )
    return shapes


# --- the highest of many ----------------------------------------------------------------------------------------------


def _top_of_rows(values: dict[str, Tensor], fraction: float) -> dict[str, Bool[Tensor, "d_out d_in"]]:
    out = {}
    for key, matrix in values.items():
        k = int(fraction * matrix.shape[1])
        # a stable sort keeps equal scores in the order of their index
        order = matrix.sort(dim=1, descending=True, stable=True).indices[:, :k]
        out[key] = torch.zeros_like(matrix, dtype=torch.bool).scatter_(1, order, True)
    return out


def _top_of_all(values: dict[str, Tensor], fraction: float) -> dict[str, Bool[Tensor, "..."]]:
    """The highest of several tensors together, without putting them side by side."""
    k = int(fraction * sum(v.numel() for v in values.values()))
    keys = {name: _ordered(v.flatten()) for name, v in values.items()}
    if k == 0:
        return {name: torch.zeros_like(v, dtype=torch.bool) for name, v in keys.items()}
    threshold = kth_largest(list(keys.values()), k)
    above = {name: key > threshold for name, key in keys.items()}
    room = k - sum(int(mask.sum()) for mask in above.values())
    for name, key in keys.items():  # of equal scores the first ones, by matrix and by index
        tied = (key == threshold).nonzero().flatten()[:room]
        above[name][tied] = True
        room -= len(tied)
    return above


_SIGN = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}


def _ordered(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Integers in the order of the floats: their bits, turned around where they are negative."""
    bits = (values + 0.0).view(torch.int64 if values.dtype == torch.float64 else torch.int32)  # −0 becomes 0
    return torch.where(bits < 0, bits ^ _SIGN[bits.dtype], bits)


def kth_largest(parts: Sequence[Int[Tensor, " _"]], k: int) -> int:
    """The k-th largest integer of several tensors, found by halving: nothing is sorted or copied."""
    low, high = min(int(p.min()) for p in parts), max(int(p.max()) for p in parts)
    while low < high:  # at least k values are ≥ low, fewer than k are > high
        middle = low + (high - low + 1) // 2
        if sum(int((part >= middle).sum()) for part in parts) >= k:
            low = middle
        else:
            high = middle - 1
    return low
