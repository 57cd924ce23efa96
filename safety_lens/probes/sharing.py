"""What two groups share, beside what chance and the draw of examples allow.

Two groups chosen from the same scores by random would share |A||B|/n members of each matrix (hypergeometric). Two
groups chosen for the same model from other examples do not agree fully either: that ceiling, not 1, is what "the same
group" looks like. A figure between the two says how much of what can be shared is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from safety_lens.errors import DataError, ModelMismatchError
from safety_lens.log import Measurement
from safety_lens.probes.attribution.scores import Scores
from safety_lens.probes.groups import NeuronGroup

NAN = float("nan")


def intersection(a: NeuronGroup, b: NeuronGroup, name: str | None = None) -> NeuronGroup:
    """What is in both groups.

    Raises:
        DataError: groups of different units. ModelMismatchError: groups of matrices of different shapes.
    """
    return _combined(a, b, name or f"{a.name}-and-{b.name}", "intersection")


def union(a: NeuronGroup, b: NeuronGroup, name: str | None = None) -> NeuronGroup:
    """What is in either group.

    Raises:
        DataError: groups of different units. ModelMismatchError: groups of matrices of different shapes.
    """
    return _combined(a, b, name or f"{a.name}-or-{b.name}", "union")


def difference(a: NeuronGroup, b: NeuronGroup, name: str | None = None) -> NeuronGroup:
    """What is in the first group and not in the second.

    Raises:
        DataError: groups of different units. ModelMismatchError: groups of matrices of different shapes.
    """
    return _combined(a, b, name or f"{a.name}-without-{b.name}", "difference")


SETS: dict[str, Callable[..., Any]] = {"intersection": np.intersect1d, "union": np.union1d, "difference": np.setdiff1d}


def _combined(a: NeuronGroup, b: NeuronGroup, name: str, how: str) -> NeuronGroup:
    check_comparable(a, b)
    none = torch.zeros(0, dtype=torch.int64)
    index = {
        key: torch.from_numpy(SETS[how](a.index.get(key, none).numpy(), b.index.get(key, none).numpy()))
        for key in dict.fromkeys([*a.index, *b.index])
    }
    source = {"made by": how, "of": [{"name": g.name, **g.source} for g in (a, b)]}
    if a.source.get("model") == b.source.get("model") is not None:
        source["model"] = a.source["model"]
    return NeuronGroup(name, a.unit, index, {**a.shapes, **b.shapes}, source, a.d_head)


def check_comparable(a: NeuronGroup, b: NeuronGroup) -> None:
    """Refuse two groups that cannot have members in common.

    Raises:
        DataError: different units. ModelMismatchError: one matrix of two shapes.
    """
    if a.unit != b.unit:
        raise DataError(f"{a.name!r} is of {a.unit}s and {b.name!r} of {b.unit}s: they have no members in common")
    for key in set(a.index) & set(b.index):
        if a.count(key) != b.count(key):
            raise ModelMismatchError(
                f"{a.name!r} and {b.name!r} were made with different models: {key} has {a.count(key)} {a.unit}s there"
                f" and {b.count(key)} here"
            )


# --- measures ---------------------------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """Overlap measures in [0, 1]; NaN where a group is empty.

    jaccard: |A∩B| / |A∪B|. coefficient: |A∩B| / min(|A|, |B|). recall: |A∩B| / |A|, the share of A found again in B.
    """

    jaccard: float
    coefficient: float
    recall: float


MEASURES = Shared._fields


def _shared(both: float | int, a: int, b: int) -> Shared:
    if not a or not b:
        return Shared(NAN, NAN, NAN)
    return Shared(both / (a + b - both), both / min(a, b), both / a)


@dataclass(frozen=True)
class Overlap:
    """How much two groups share. both, a, b: members of both, of each. universe: among how many they were chosen.

    expected, deviation: mean and standard deviation of `both` for random groups with as many members in every matrix.
    """

    both: int
    a: int
    b: int
    universe: int
    expected: float
    deviation: float

    @property
    def found(self) -> Shared:
        """The measures."""
        return _shared(self.both, self.a, self.b)

    @property
    def chance(self) -> Shared:
        """The measures at the number of members that random groups share on average."""
        return _shared(self.expected, self.a, self.b)

    @property
    def z(self) -> float:
        """Standard deviations by which the groups share more than random ones; NaN where chance has no spread."""
        return (self.both - self.expected) / self.deviation if self.deviation > 0 else NAN


def overlap(a: NeuronGroup, b: NeuronGroup) -> Overlap:
    """What two groups of one unit share, matrix by matrix, and what random groups would.

    Matrices that only one of the groups was chosen from count with none shared.

    Raises:
        DataError: groups of different units. ModelMismatchError: groups of matrices of different shapes.
    """
    check_comparable(a, b)
    both = intersection(a, b).size
    keys = dict.fromkeys([*a.index, *b.index])
    expected = variance = 0.0
    universe = 0
    for key in keys:
        n = a.count(key) if key in a.index else b.count(key)
        universe += n
        if key in a.index and key in b.index:
            first, second = len(a.index[key]), len(b.index[key])
            expected += first * second / n
            variance += first * second * (n - first) * (n - second) / (n * n * max(n - 1, 1))
    return Overlap(both, a.size, b.size, universe, expected, variance**0.5)


def normalised(measure: float, chance: float, ceilings: Sequence[float]) -> float:
    """(o − chance) / (ceiling − chance): 0 as random groups, 1 as two draws of examples for one model.

    ceilings: one for each of the two models; their geometric mean counts. All four figures must be of groups of equal
    sizes chosen with equally many examples. NaN where the ceiling is not above chance: nothing can be told then.
    """
    ceiling = float(np.prod(ceilings) ** (1 / len(ceilings)))
    return (measure - chance) / (ceiling - chance) if ceiling > chance else NAN


class Halves(NamedTuple):
    """Groups chosen for one model in one way from two disjoint halves of the examples."""

    first: NeuronGroup
    second: NeuronGroup


class Corrected(NamedTuple):
    """An overlap measure between two models with what it can be. All but `whole` are at half the examples.

    whole: of the groups from all examples. found: of groups from different halves, mean of both ways. ceiling: of the
    halves within each model, geometric mean of the two. normalised: (found − chance) / (ceiling − chance).
    """

    whole: float
    found: float
    chance: float
    ceiling: float
    normalised: float


def corrected(
    a: NeuronGroup, b: NeuronGroup, halves_a: Halves, halves_b: Halves, measure: str = "jaccard"
) -> Corrected:
    """An overlap between two models, corrected for the draw of examples.

    Groups are compared across models only from different halves: from the same examples they would also share what is
    particular to those examples, and an unchanged model would come out above its own ceiling.

    Raises:
        DataError: groups of different units, or no such measure.
    """
    if measure not in MEASURES:
        raise DataError(f"no overlap measure {measure!r}: choose {', '.join(MEASURES)}")

    def of(one: Overlap) -> tuple[float, float]:
        return getattr(one.found, measure), getattr(one.chance, measure)

    whole, _ = of(overlap(a, b))
    across = [of(overlap(halves_a.first, halves_b.second)), of(overlap(halves_a.second, halves_b.first))]
    found, chance = (float(np.mean([pair[i] for pair in across])) for i in (0, 1))
    ceilings = [of(overlap(*halves))[0] for halves in (halves_a, halves_b)]
    ceiling = float(np.sqrt(ceilings[0] * ceilings[1]))
    return Corrected(whole, found, chance, ceiling, normalised(found, chance, ceilings))


def overlap_rows(subject: str, found: Overlap, **at: Any) -> list[Measurement]:
    """Every measure as found and by chance, as measurement rows."""
    out = []
    for name in MEASURES:
        out.append(Measurement(subject, name, getattr(found.found, name), n=found.a, **at))
        out.append(Measurement(subject, f"{name}_chance", getattr(found.chance, name), n=found.a, **at))
    return [*out, Measurement(subject, "z", found.z, n=found.a, **at)]


# --- without a threshold ----------------------------------------------------------------------------------------------

SAMPLE = 2**20
"""Entries of a matrix whose ranks are compared, evenly spaced; all of them where there are no more."""
FRACTIONS = tuple(float(f) for f in np.geomspace(0.001, 0.5, 19))


class RankOverlap(NamedTuple):
    """Agreement of two sets of scores, without choosing a threshold.

    spearman: of all scores, in [−1, 1]; 0 by chance. top_weighted: mean over logarithmically spaced shares f from 0.1 %
    to 50 % of |top f of A ∩ top f of B| / size, in [0, 1], so that every doubling of f counts the same (Fagin et al.
    2003's average overlap). chance: its expectation for unrelated scores, the mean of f. by_fraction: f → overlap.
    Matrices count by their size.
    """

    spearman: float
    top_weighted: float
    chance: float
    by_fraction: dict[float, float]


def rank_overlap(a: Scores, b: Scores) -> RankOverlap:
    """Compare two sets of scores of the same matrices by rank, matrix by matrix.

    Raises:
        DataError: scores of different units or matrices.
    """
    if a.unit != b.unit or a.shapes != b.shapes:
        raise DataError("scores that are compared by rank must be of the same unit and the same matrices")
    rho, shares, weights = [], [], []
    for name, values in a.values.items():
        mine, theirs = _ranks(values), _ranks(b.values[name])
        rho.append(_correlation(mine, theirs))
        first, second = _places(mine), _places(theirs)
        shares.append([_top_share(first, second, f) for f in FRACTIONS])
        weights.append(values.numel())
    share = [weighted(np.array(column), np.array(weights)) for column in np.array(shares).T]
    known = np.isfinite(share)
    return RankOverlap(
        weighted(np.array(rho), np.array(weights)),
        float(np.mean(np.array(share)[known])) if known.any() else NAN,
        float(np.mean(np.array(FRACTIONS)[known])) if known.any() else NAN,
        dict(zip(FRACTIONS, share, strict=True)),
    )


def _ranks(values: Tensor) -> Float[np.ndarray, " n"]:
    flat = values.flatten()[:: -(-values.numel() // SAMPLE)]
    ranks: Float[np.ndarray, " n"] = stats.rankdata(flat.double().cpu().numpy())
    return ranks


def _correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else NAN


def _places(ranks: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The place of each entry from the top, 0 the highest; ties go by index."""
    places = np.empty(len(ranks), dtype=np.int64)
    places[np.argsort(-ranks, kind="stable")] = np.arange(len(ranks))
    return places


def _top_share(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"], fraction: float) -> float:
    """Share of the top k of one, by place, that are in the top k of the other; NaN where k is 0."""
    k = int(fraction * len(a))
    return int(((a < k) & (b < k)).sum()) / k if k else NAN


def weighted(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | Any) -> float:
    """Weighted mean of the values that are known; NaN where none is."""
    known = np.isfinite(values)
    return float((values[known] * weights[known]).sum() / weights[known].sum()) if known.any() else NAN
