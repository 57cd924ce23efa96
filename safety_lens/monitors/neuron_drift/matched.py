"""A group's members in the matrices of a model in training, and random others of the same size beside them.

Scores select large weights, and large weights of a few rows: random entries of another size would be another
population. Partners are drawn within the same matrix (neurons and heads: the same block), by decile of |w| or ‖w‖.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from safety_lens.loading.effective import original_layer
from safety_lens.loading.homes import Home
from safety_lens.loading.merging import dequantised
from safety_lens.monitors.neuron_drift.changes import MatrixChange, Moves
from safety_lens.probes.groups import PARTS, NeuronGroup
from safety_lens.probes.matching import DECILES, size_classes, sizes_in
from safety_lens.probes.matrices import Matrix

Read = Callable[[MatrixChange, Tensor], Moves]
READS: Mapping[str, Read] = {"rows": MatrixChange.rows, "columns": MatrixChange.columns}


class Part(NamedTuple):
    """What the units of a group have in one matrix.

    key: of the group's index. read: how their moves are read; per: rows or columns that make one unit; each: weights
    of one unit in this matrix.
    """

    key: str
    read: Read
    per: int
    each: int

    def spelled(self, units: Int[Tensor, " k"]) -> Int[Tensor, " lines"]:
        """The rows, columns or entries of these units."""
        return (units[:, None] * self.per + torch.arange(self.per, device=units.device)).flatten()


def part_of(group: NeuronGroup, matrix: str) -> Part | None:
    """Where the group's members of a matrix are found; None where it has none."""
    if matrix not in group.shapes:
        return None
    d_out, d_in = group.shapes[matrix]
    key, _, kind = matrix.rpartition(".")
    along = PARTS[group.unit][1][kind] if group.unit != "weight" else None
    if along is None:
        return Part(matrix, MatrixChange.entries, 1, 1) if len(group.index.get(matrix, ())) else None
    per = group.d_head if group.unit == "head" else 1
    part = Part(key, READS[along], per, per * (d_in if along == "rows" else d_out))
    return part if len(group.index.get(key, ())) else None


class Weights:
    """The weights that training starts from, by matrix name, of a model with or without adapters in it."""

    def __init__(self, base: PreTrainedModel, homes: Mapping[str, Home]) -> None:
        self._modules, self._homes = dict(base.named_modules()), homes

    def __call__(self, matrix: str) -> Float[Tensor, "d_out d_in"]:
        """[d_out, d_in], a view wherever the layout allows."""
        home = self._homes[matrix]
        return home.take(dequantised(original_layer(self._modules[home.module])))

    def fit(self, group: NeuronGroup) -> None:
        """Refuse a group whose matrices are not those of this model.

        Raises:
            ModelMismatchError: it names the matrix.
        """
        named = [name for name in self._homes if name in group.shapes]
        shapes = {name: self(name).shape for name in named}
        group.check_fits([Matrix(name, 0, "", shape[0], shape[1]) for name, shape in shapes.items()])


def partners(
    weights: Weights,
    group: NeuronGroup,
    key: str,
    *,
    draws: int,
    seed: int,
    still: Bool[Tensor, " n"] | None = None,
) -> Int[Tensor, " m"]:
    """`draws` random others for every member at a key, of its decile of size; empty where the group takes everything.

    still: units that cannot move; they are nobody's partners, and as members they get none. Drawn with replacement.
    Where the group takes a whole decile, its partners come from the nearest decile with others (of two equally near,
    the smaller sizes). They depend on the base weights, the group's name, `still` and the seed alone.
    """
    digest = hashlib.sha256(f"{seed}/{group.name}/{group.unit}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    size = sizes_in(group, weights, key)
    members = group.index[key].to(size.device)
    free = torch.ones(len(size), dtype=torch.bool, device=size.device)
    free[members] = False
    if still is not None:
        free &= ~still.to(size.device)
        members = members[~still.to(size.device)[members]]
    if not bool(free.any()) or not len(members):
        return members[:0]
    decile = size_classes(size)
    pools = {b: pool for b in range(DECILES) if len(pool := _where(free & (decile == b)))}
    drawn = []
    for b, need in enumerate(torch.bincount(decile[members], minlength=DECILES).tolist()):
        pool = pools[min(pools, key=lambda other: (abs(other - b), other))]
        drawn.append(pool[torch.randint(len(pool), (need * draws,), generator=generator).to(pool.device)])
    return torch.cat(drawn)


def _where(mask: Bool[Tensor, " n"]) -> Int[Tensor, " k"]:
    return mask.nonzero().flatten()
