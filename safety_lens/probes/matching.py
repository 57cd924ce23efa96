"""Random groups of the same size as a given one, drawn within each matrix and matched on the size of the weights.

SNIP and Wanda select large weights. A random group drawn from all weights is another population, and would make almost
any group look special; matched on the decile of |w| within the matrix, only what is left after size can differ.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.probes.groups import PARTS, NeuronGroup
from safety_lens.probes.matrices import weight_of

DECILES = 10
FEWEST = 20
"""Weights, neurons or heads that each class of size must hold on average; with fewer there are fewer classes."""
SAMPLE = 2**20
"""Sizes from which the limits of the classes are read, evenly spaced; all of them where there are no more."""


def random_like(group: NeuronGroup, model: HookedTransformer, *, seed: int = 0, name: str | None = None) -> NeuronGroup:
    """A random group that shares no member with `group` and has as many of each size class in every matrix.

    source["unmatched"]: share of members whose class had too few others, and that come from the nearest class instead.

    Raises:
        DataError: more members in a matrix than others there. ModelMismatchError: a group of another model.
    """
    found = random_groups(group, model, [seed])[0]
    return found if name is None else found.renamed(name)


def random_groups(group: NeuronGroup, model: HookedTransformer, seeds: Sequence[int]) -> list[NeuronGroup]:
    """`random_like` for several seeds; each matrix is sorted into size classes once for all of them."""
    group.check_fits(model)
    drawn: list[dict[str, Tensor]] = [{} for _ in seeds]
    unmatched = 0
    for key, members in group.index.items():
        if not len(members):
            for index in drawn:
                index[key] = members
            continue
        pool = _pool(group, key, sizes(group, model, key))
        unmatched += pool.unmatched
        for index, seed in zip(drawn, seeds, strict=True):
            digest = hashlib.sha256(f"{seed}/{group.unit}/{key}".encode()).digest()
            rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
            index[key] = torch.from_numpy(np.sort(_drawn(pool, rng)).astype(np.int64))
    source = {
        "made by": "random",
        "like": group.name,
        "matched on": "size class within the matrix",
        "unmatched": unmatched / group.size if group.size else 0.0,
        "model": group.source.get("model"),
    }
    return [
        NeuronGroup(
            f"random-{seed}-like-{group.name}", group.unit, i, group.shapes, {**source, "seed": seed}, group.d_head
        )
        for i, seed in zip(drawn, seeds, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Pool:
    """One matrix or block part. others: no members of the group, by class. wanted: how many of each class are drawn."""

    others: tuple[Int[np.ndarray, " _"], ...]
    wanted: Int[np.ndarray, " classes"]

    @property
    def unmatched(self) -> int:
        return sum(max(int(need) - len(others), 0) for need, others in zip(self.wanted, self.others, strict=True))


def _pool(group: NeuronGroup, key: str, size: Float[Tensor, " n"]) -> _Pool:
    members = group.index[key].numpy()
    if 2 * len(members) > len(size):
        raise DataError(
            f"group {group.name!r} has {len(members)} of the {len(size)} {group.unit}s of {key}: not as many others are"
            " left to draw a random group from"
        )
    classes = size_classes(size).cpu().numpy()
    free = np.ones(len(classes), dtype=bool)
    free[members] = False
    others = tuple(np.flatnonzero(free & (classes == c)) for c in range(DECILES))
    return _Pool(others, np.bincount(classes[members], minlength=DECILES))


def _drawn(pool: _Pool, rng: np.random.Generator) -> Int[np.ndarray, " k"]:
    left = list(pool.others)
    taken = []

    def take(c: int, need: int) -> int:
        chosen = rng.choice(len(left[c]), min(need, len(left[c])), replace=False)
        taken.append(left[c][chosen])
        left[c] = np.delete(left[c], chosen) if pool.unmatched else left[c]
        return need - len(chosen)

    short = [take(c, int(need)) for c, need in enumerate(pool.wanted)]
    for c, need in enumerate(short):  # without enough others: the nearest class, of two equally near the smaller sizes
        for other in sorted(range(len(left)), key=lambda o: (abs(o - c), o)):
            need = take(other, need) if need else 0
    return np.concatenate(taken)


def sizes(group: NeuronGroup, model: HookedTransformer, key: str) -> Float[Tensor, " n"]:
    """|w| of every entry of a matrix, or ‖w‖ of all weights of every neuron or head of a block."""
    return sizes_in(group, partial(weight_of, model), key)


def sizes_in(group: NeuronGroup, weight: Callable[[str], Tensor], key: str) -> Float[Tensor, " n"]:
    """`sizes`, with the weights [d_out, d_in] from a function of the matrix' name."""
    if group.unit == "weight":
        return weight(key).abs().float().flatten()
    squares = torch.zeros((), dtype=torch.float32)
    for kind, along in PARTS[group.unit][1].items():
        if (name := f"{key}.{kind}") in group.shapes:
            lines = weight(name).float().square().sum(1 if along == "rows" else 0).cpu()
            squares = squares + (lines.unflatten(0, (-1, group.d_head)).sum(1) if group.unit == "head" else lines)
    return squares.sqrt()


def size_classes(size: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The decile of each size, 0 the smallest; fewer classes where there are fewer than 200."""
    classes = max(1, min(DECILES, len(size) // FEWEST))
    sample = size[:: max(1, len(size) // SAMPLE)][: 2**24]
    limits = sample.quantile(torch.arange(1, classes, device=size.device, dtype=size.dtype) / classes)
    return torch.bucketize(size, limits)


def class_counts(group: NeuronGroup, model: HookedTransformer) -> Mapping[str, Int[np.ndarray, " classes"]]:
    """How many members of a group are in each size class, by matrix."""
    return {
        key: np.bincount(size_classes(sizes(group, model, key)).cpu().numpy()[found.numpy()], minlength=DECILES)
        for key, found in group.index.items()
    }
