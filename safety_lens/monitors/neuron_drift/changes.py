"""What training did to each matrix of the hooked model: changes of modules, split into the maps that share a module.

Lengths and angles of single entries, rows and columns come from the two factors of ΔW in float64; ΔW itself is never
formed. With K = AAᵀ and Q = BᵀB: ‖Δ_i‖² = b_i K b_iᵀ and ⟨w_i, Δ_i⟩ = (W₀Aᵀ)_i · b_i for a row, a_kᵀ Q a_k and
(W₀ᵀB)_k · a_k for a column, ⟨b_i, a_j⟩ for an entry (docs/maths.md, "Neuron drift").
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_lens.loading.homes import Home
from safety_lens.monitors.weight_changes import Change

CHUNK = 1 << 18
"""Entries that are read at a time: each needs two rows of rank values."""


class Moves(NamedTuple):
    """Of each unit (an entry, a row, a column, a whole neuron): ‖w‖², ⟨w, Δ⟩ and ‖Δ‖², float64."""

    weight: Float[Tensor, " k"]
    along: Float[Tensor, " k"]
    change: Float[Tensor, " k"]

    def plus(self, other: "Moves") -> "Moves":
        """Two parts of the same units together."""
        return Moves(*(a + b for a, b in zip(self, other, strict=True)))

    def bundled(self, per: int) -> "Moves":
        """Every `per` consecutive units as one."""
        return self if per == 1 else Moves(*(part.unflatten(0, (-1, per)).sum(1) for part in self))

    @property
    def chord(self) -> Float[Tensor, " k"]:
        """2 (1 − cos) between w and w + Δ: the squared distance of their unit vectors; 0 where a unit has no length.

        From the part of Δ across w, since 1 − cos of two nearly equal vectors has no digits left.
        """
        after = self.weight + 2 * self.along + self.change
        lengths = (self.weight * after).clamp(min=0).sqrt()
        across = (self.weight * self.change - self.along**2).clamp(min=0)  # ‖w‖² · ‖Δ across w‖²
        # 1 − cos = (1 − cos²) / (1 + cos), and 1 − cos² = across / lengths²
        cosine = torch.where(lengths > 0, (self.weight + self.along) / lengths.clamp(min=1e-300), 1.0).clamp(-1, 1)
        small = across / (lengths.clamp(min=1e-300) ** 2 * (1 + cosine).clamp(min=1e-300))
        chord: Tensor = 2 * torch.where(cosine > 0, small, 1 - cosine)
        return chord


@dataclass(frozen=True, eq=False)
class MatrixChange:
    """ΔW = up @ down (float64; down None: up is ΔW) of one matrix of the hooked model, and its weight before.

    name: "blocks.3.attn.W_Q"; rows and columns are numbered as in `probes.matrices`.
    """

    name: str
    weight: Float[Tensor, "d_out d_in"]
    up: Float[Tensor, "d_out r"]
    down: Float[Tensor, "r d_in"] | None

    @property
    def layer(self) -> int:
        return int(self.name.split(".")[1])

    def entries(self, flat: Int[Tensor, " k"]) -> Moves:
        """Single weights by their flat index."""
        flat = flat.to(self.up.device)
        parts = [self._entries(part) for part in flat.split(CHUNK)] or [self._entries(flat)]
        return Moves(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _entries(self, flat: Int[Tensor, " k"]) -> Moves:
        i, j = flat // self.weight.shape[1], flat % self.weight.shape[1]
        w = self.weight[i, j].double()
        delta = self.up[i, j] if self.down is None else (self.up[i] * self.down[:, j].T).sum(1)
        return Moves(w**2, w * delta, delta**2)

    def rows(self, index: Int[Tensor, " k"]) -> Moves:
        """Outputs of the map: rows of W."""
        index = index.to(self.up.device)
        w, up = self.weight[index].double(), self.up[index]
        if self.down is None:
            return _moves(w, up)
        return Moves(
            w.square().sum(1),
            ((w @ self.down.T) * up).sum(1),
            ((up @ (self.down @ self.down.T)) * up).sum(1).clamp(min=0),
        )

    def columns(self, index: Int[Tensor, " k"]) -> Moves:
        """Inputs of the map: columns of W."""
        index = index.to(self.up.device)
        w = self.weight[:, index].T.double()
        if self.down is None:
            return _moves(w, self.up[:, index].T)
        down = self.down[:, index].T
        return Moves(
            w.square().sum(1),
            ((w @ self.up) * down).sum(1),
            ((down @ (self.up.T @ self.up)) * down).sum(1).clamp(min=0),
        )


def _moves(w: Float[Tensor, "k d"], delta: Float[Tensor, "k d"]) -> Moves:
    return Moves(w.square().sum(1), (w * delta).sum(1), delta.square().sum(1))


def matrix_changes(changes: Iterable[Change], homes: Mapping[str, Home]) -> Iterator[MatrixChange]:
    """The changes of modules as changes of the hooked model's matrices; embeddings and heads are left out.

    homes: of `loading.homes`, for the model that was trained.
    """
    inside: dict[str, list[tuple[str, Home]]] = {}
    for name, home in homes.items():
        inside.setdefault(home.module, []).append((name, home))
    for change in changes:
        for name, home in inside.get(change.name, ()):
            yield MatrixChange(name, _rows(home, change.weight), _rows(home, change.up), change.down)


def _rows(home: Home, upright: Float[Tensor, "d_module _"]) -> Float[Tensor, "d_out _"]:
    return home.take(upright.T if home.transposed else upright)
