"""Did a group move more than its random partners? Matrices are the units of inference, never single weights.

Weights of one matrix share two factors, so six million of them are not six million observations. Each matrix gives
one difference; signs are flipped by matrix, intervals resample whole layers, and several runs give a second interval
over their seeds (docs/maths.md, "Neuron drift"). Sources: Hedges 1981 (small-sample correction); Hesterberg 2015
(expanded percentiles).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from safety_lens.bootstrap import ratio_interval
from safety_lens.errors import DataError
from safety_lens.monitors.neuron_drift.moved import GroupDrift, Moved, Place
from safety_lens.paired import sign_flip
from safety_lens.stats import UNKNOWN, Interval

NAN = float("nan")
MARGIN = 0.1
"""Moving up to this much farther or less far than random partners counts as similar."""
EXACT = 20
"""Matrices up to which every pattern of signs is counted."""
DRAWS = 10_000

Answer = Literal["supported", "rejected", "undecided", "withheld"]


class Answers(NamedTuple):
    """Two hypotheses on fragile safety (github.com/stasahani1/CS2881-alignment-attribution-code), from an interval.

    h1 (fragile safety): the group moved farther than random partners, beyond the margin. h2 (pathways created
    elsewhere): it moved about as far, within the margin either way.
    """

    h1: Answer
    h2: Answer


def answers(ratio: Interval, margin: float = MARGIN) -> Answers:
    """What an interval of the ratio (group's movement by its partners') says about H1 and H2.

    Supported: the whole interval lies where the hypothesis says; rejected: all of it lies elsewhere; else undecided,
    as without limits.

    Raises:
        DataError: a margin that is not positive.
    """
    if not margin > 0:
        raise DataError(f"the margin within which movements are similar must be positive, got {margin}")
    least, most = 1 / (1 + margin), 1 + margin
    h1 = _answer(ratio.low > most, ratio.high <= most)
    h2 = _answer(ratio.low >= least and ratio.high <= most, ratio.low > most or ratio.high < least)
    return Answers(h1, h2)


def _answer(yes: bool, no: bool) -> Answer:
    return "supported" if yes else "rejected" if no else "undecided"


@dataclass(frozen=True)
class Comparison:
    """One group beside its partners. quantity: "change" (‖Δ‖) or "turn" (angles of neurons and heads).

    matrices, layers, runs: how many of each. ratio: how many times as far the group moved, mean over matrices of the
    contrast (s − r)/(s + r), read as a ratio; limits resample layers. over_runs: the same with limits over runs (t;
    none for one run). difference: mean over matrices of mean Δ² in the group minus in its partners, limits resample
    layers; p: of that difference, two-sided, signs flipped by matrix. d, g: its Cohen's d over matrices, and with
    Hedges' correction. pooled_d: descriptive only, (m₁ − m₂)/√((s₁² + s₂²)/2) of ‖Δ‖ over single units, as that
    study has it: units of one matrix are not independent, so nothing follows from its size. ratio_of_totals: RMS change
    of the group by that of its partners, all matrices as one, mean over runs: without limits, and ruled by the matrices
    that moved most. withheld: why no hypothesis is answered; None where they are.
    """

    group: str
    quantity: str
    matrices: int
    layers: int
    runs: int
    ratio: Interval
    over_runs: Interval
    difference: Interval
    p: float
    d: float
    g: float
    pooled_d: float
    ratio_of_totals: float
    margin: float
    withheld: str | None = None

    @property
    def decisive(self) -> Interval:
        """The ratio with the wider of both intervals' limits: what holds over layers and over runs."""
        if self.runs == 1:
            return self.ratio
        return Interval(
            self.ratio.value, min(self.ratio.low, self.over_runs.low), max(self.ratio.high, self.over_runs.high)
        )

    @property
    def answers(self) -> Answers:
        return Answers("withheld", "withheld") if self.withheld else answers(self.decisive, self.margin)


class Quantity(NamedTuple):
    """What is compared: where its places are, a contrast of each, and a difference of each."""

    places: Callable[[GroupDrift], tuple[Place, ...]]
    contrast: Callable[[Place], float]
    difference: Callable[[Place], float]
    total: Callable[[GroupDrift], float]


QUANTITIES = {
    "change": Quantity(
        lambda drift: drift.matrices,
        lambda p: p.contrast,
        lambda p: _squared(p.group.rms) - _squared(p.random.rms),
        lambda drift: drift.total.contrast,
    ),
    "turn": Quantity(
        lambda drift: drift.blocks,
        lambda p: p.turn_contrast,
        lambda p: _squared(p.group.turned) - _squared(p.random.turned),
        lambda drift: drift.whole.turn_contrast,
    ),
}
"""How far weights moved, and (neurons and heads) how far they turned."""


def _squared(x: float) -> float:
    return x * x


def compare(
    runs: Sequence[GroupDrift], quantity: str = "change", *, margin: float = MARGIN, seed: int = 0
) -> Comparison:
    """One group in one or several runs of the same training with different seeds, beside its random partners.

    Runs are averaged per matrix first. Everything is NaN and undecided where no matrix has both sides.

    Raises:
        DataError: no run, drifts of different groups, runs that adapted different matrices, or single weights asked
            for their turn.
    """
    asked = QUANTITIES[quantity]
    names = _check(runs, quantity, asked)
    contrast, difference = (
        np.array([[f(p) for p in asked.places(run)] for run in runs], dtype=float).reshape(len(runs), -1)
        for f in (asked.contrast, asked.difference)
    )
    layers = np.array([int(name.split(".")[1]) for name in names], dtype=int)
    c, d = contrast.mean(0), difference.mean(0)
    known = np.isfinite(c) & np.isfinite(d)
    c, d, layers = c[known], d[known], layers[known]
    by_run = contrast[:, known].mean(1) if known.any() else np.zeros(0)
    cohen = float(d.mean() / d.std(ddof=1)) if len(d) > 1 and d.std(ddof=1) > 0 else NAN
    return Comparison(
        runs[0].group, quantity, len(c), len(np.unique(layers)), len(runs),
        _as_ratio(by_layer(c, layers, seed=seed)), _as_ratio(_t_interval(by_run)),
        by_layer(d, layers, seed=seed), flip_p(d, seed=seed),
        cohen, cohen * (1 - 3 / (4 * len(d) - 5)) if len(d) > 1 else NAN,
        float(np.mean([pooled_d(run) for run in runs])),
        _as_ratio(Interval(float(np.mean([asked.total(run) for run in runs])), NAN, NAN)).value, margin,
        "; ".join(dict.fromkeys(run.withheld for run in runs if run.withheld)) or None,
    )  # fmt: skip


def _check(runs: Sequence[GroupDrift], quantity: str, asked: Quantity) -> list[str]:
    if not runs:
        raise DataError("there is no run to compare")
    if len({run.group for run in runs}) > 1:
        raise DataError(f"drifts of different groups cannot be averaged: {sorted({run.group for run in runs})}")
    if quantity == "turn" and runs[0].unit == "weight":
        _ = runs[0].cosine  # raises, with the reason
    names = [[p.name for p in asked.places(run)] for run in runs]
    if any(other != names[0] for other in names):
        raise DataError(f"the runs of {runs[0].group!r} adapted different matrices: compare them one by one")
    return names[0]


def by_layer(values: Float[np.ndarray, " matrix"], layers: Sequence[int] | np.ndarray, *, seed: int = 0) -> Interval:
    """Mean over matrices with a bootstrap that resamples layers with all their matrices; NaN limits for one layer."""
    if not len(values):
        return UNKNOWN
    _, at = np.unique(layers, return_inverse=True)
    return ratio_interval(np.bincount(at, weights=values), np.bincount(at).astype(float), seed=seed)


def _t_interval(values: Float[np.ndarray, " run"], confidence: float = 0.95) -> Interval:
    """Mean of runs with Student's t limits; NaN limits for one run."""
    if not len(values):
        return UNKNOWN
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, NAN, NAN)
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def _as_ratio(contrast: Interval) -> Interval:
    """(s − r)/(s + r) as s/r: −1 → 0, 0 → 1, 1 → ∞."""
    return Interval(*(_ratio(min(max(value, -1.0), 1.0)) if value == value else NAN for value in contrast))


def _ratio(contrast: float) -> float:
    return (1 + contrast) / (1 - contrast) if contrast < 1 else float("inf")


def flip_p(differences: Float[np.ndarray, " matrix"], *, seed: int = 0) -> float:
    """Two-sided p that the differences are centred on 0: every pattern of signs up to 20 matrices, else 10 000 draws.

    p is the share of patterns, the observed one among them, whose sum is at least as far from 0: never below 2^(1−n) of
    n matrices. NaN for no matrix, 1 where all differences are 0.
    """
    d = differences[np.isfinite(differences)]
    if not len(d):
        return NAN
    if len(d) > EXACT:
        return float(sign_flip(d[None], repeats=DRAWS, seed=seed).p[0])
    half = len(d) // 2
    sums = (_signed_sums(d[:half])[:, None] + _signed_sums(d[half:])[None]).ravel()  # 2^n sums from two lots of 2^(n/2)
    limit = abs(d.sum()) - 1e-9 * np.abs(d).sum()  # patterns that only rounding tells apart are ties, and count
    return float((np.abs(sums) >= limit).sum() / len(sums))


def _signed_sums(d: Float[np.ndarray, " n"]) -> Float[np.ndarray, " patterns"]:
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def pooled_d(drift: GroupDrift) -> float:
    """Cohen's d of ‖Δ‖ over all single units of group and partners; descriptive only (see `Comparison`)."""
    s, r = drift.whole.group, drift.whole.random
    spread = np.sqrt((_variance(s) + _variance(r)) / 2)
    return float((s.mean_length - r.mean_length) / spread) if spread > 0 else NAN


def _variance(moved: Moved) -> float:
    return max(moved.change / moved.units - moved.mean_length**2, 0.0) if moved.units else NAN
