"""How far a group moved: sums over its members and over their random partners, by matrix, by block, and in total."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from safety_lens.errors import DataError
from safety_lens.monitors.neuron_drift.changes import Moves

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Moved:
    """Sums over units (entries, neurons or heads) and a sample of how far single ones moved.

    entries: weights they consist of here. weight, change: Σ‖w‖², Σ‖Δ‖². length: Σ‖Δ‖. chord: Σ 2 (1 − cos), cos: Σ cos;
    both NaN for entries, whose cosine is ±1 whatever happens. sample: ‖Δ‖ of evenly spaced units.
    """

    units: int
    entries: int
    weight: float
    change: float
    length: float
    chord: float
    cosine: float
    sample: Float[np.ndarray, " s"] = field(repr=False)

    @property
    def rms(self) -> float:
        """√(Σ Δ² / entries): how far a weight moved."""
        return _root(self.change, self.entries)

    @property
    def relative(self) -> float:
        """√(Σ Δ² / Σ w²), the ratio of the group: a mean of single ratios would be ruled by the smallest weights."""
        return _root(self.change, self.weight)

    @property
    def turned(self) -> float:
        """Root mean square distance between the directions of a unit before and after: √ mean 2 (1 − cos)."""
        return _root(self.chord, self.units)

    @property
    def mean_cosine(self) -> float:
        """Mean over units of cos(w, w + Δ)."""
        return self.cosine / self.units if self.units else NAN

    @property
    def mean_length(self) -> float:
        """Mean ‖Δ‖ of a unit; of entries: mean |Δ|."""
        return self.length / self.units if self.units else NAN

    @classmethod
    def of(cls, moves: Moves, entries: int, stride: int, has_angle: bool) -> "Moved":
        length, chord = moves.change.sqrt(), moves.chord
        return cls(
            len(moves.change),
            entries,
            float(moves.weight.sum()),
            float(moves.change.sum()),
            float(length.sum()),
            float(chord.sum()) if has_angle else NAN,
            float((1 - chord / 2).sum()) if has_angle else NAN,
            length[::stride].cpu().numpy(),
        )

    @classmethod
    def total(cls, parts: Sequence["Moved"]) -> "Moved":
        weight, change, length, chord, cosine = (
            float(sum(getattr(p, name) for p in parts)) for name in ("weight", "change", "length", "chord", "cosine")
        )
        sample = np.concatenate([p.sample for p in parts]) if parts else np.zeros(0)
        units, entries = (sum(getattr(p, name) for p in parts) for name in ("units", "entries"))
        return cls(units, entries, weight, change, length, chord, cosine, sample)


class Place(NamedTuple):
    """One matrix (or, of whole neurons and heads, one block): the group's members there and their random partners."""

    name: str
    group: Moved
    random: Moved

    @property
    def layer(self) -> int:
        return int(self.name.split(".")[1])

    @property
    def contrast(self) -> float:
        """(s − r) / (s + r) of the RMS changes of group and partners: 0 equal, 1 only the group moved, −1 only others.

        NaN where neither moved, or there are no partners. A group that moved ρ times as far has (ρ − 1) / (ρ + 1).
        """
        return _contrast(self.group.rms, self.random.rms)

    @property
    def turn_contrast(self) -> float:
        """The same of how far directions turned; NaN for entries."""
        return _contrast(self.group.turned, self.random.turned)


@dataclass(frozen=True, eq=False)
class GroupDrift:
    """How far one group moved. matrices: per adapted matrix. blocks: whole neurons or heads, none for entries.

    size: weights that the group consists of; outside: share of them in matrices that were not adapted. held: share in
    members that training kept frozen, which are left out. withheld: why nothing follows from the comparison; None where
    something may.
    """

    group: str
    unit: str
    matrices: tuple[Place, ...]
    blocks: tuple[Place, ...]
    size: int
    outside: float
    held: float = 0.0
    withheld: str | None = None

    @property
    def total(self) -> Place:
        """Over all adapted matrices."""
        return _sum("total", self.matrices)

    @property
    def whole(self) -> Place:
        """Over whole units: neurons and heads with all their adapted parts; single entries as they are."""
        return _sum("total", self.blocks or self.matrices)

    @property
    def cosine(self) -> float:
        """Mean cosine of the group's neurons or heads with themselves before training, over their adapted parts.

        Raises:
            DataError: a group of single weights.
        """
        if self.unit == "weight":
            raise DataError(
                f"group {self.group!r} is of single weights: the cosine of one number with another is its sign, 1 or"
                " -1, however far it moved. Use the change or the relative change, or a group of neurons or heads"
            )
        return self.whole.group.mean_cosine


def _sum(name: str, places: Sequence[Place]) -> Place:
    return Place(name, Moved.total([p.group for p in places]), Moved.total([p.random for p in places]))


def _root(total: float, n: float | int) -> float:
    return float(np.sqrt(max(total, 0.0) / n)) if n and total == total else NAN


def _contrast(s: float, r: float) -> float:
    return (s - r) / (s + r) if s + r > 0 else NAN
