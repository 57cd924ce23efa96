"""Statistics of one text scored twice: the same prompt and seed with and without an intervention.

The unit of inference is the prompt: seeds of one prompt share its wording and are averaged first. NaN is a score that
is unknown; a pair with a NaN on either side is left out on both. Sources: Fisher 1935 and Good 2005 (sign flips);
Westfall & Young 1993 (max-T); Holm 1979; Tan et al. 2024, arXiv:2407.12404 (steerability per prompt, the
anti-steerable share).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from safety_lens.bootstrap import mean_interval
from safety_lens.errors import DataError
from safety_lens.stats import Interval, PermutationResult, sign_flips, wilson

NAN = float("nan")
DISTRUST = 0.4
"""A share of anti-steerable prompts that cannot be ruled out at this height makes an effect untrustworthy."""


class PerPrompt(NamedTuple):
    """Mean paired difference of each prompt (NaN where no pair is known), and the pairs behind it."""

    difference: Float[np.ndarray, " prompt"]
    pairs: Float[np.ndarray, " prompt"]

    @property
    def n(self) -> int:
        """Prompts with at least one pair."""
        return int((self.pairs > 0).sum())


def per_prompt(base: Float[np.ndarray, "prompt seed"], changed: Float[np.ndarray, "_ _"]) -> PerPrompt:
    """changed − base, averaged over the seeds for which both are known.

    Raises:
        DataError: the two are not of one shape: row i of both must be prompt i, column j seed j.
    """
    if base.shape != changed.shape:
        raise DataError(f"paired scores need one shape [prompt, seed], got {base.shape} and {changed.shape}")
    gap = changed.astype(float) - base
    known = np.isfinite(gap)
    pairs = known.sum(1).astype(float)
    total = np.where(known, gap, 0.0).sum(1)
    return PerPrompt(np.divide(total, pairs, out=np.full(len(gap), NAN), where=pairs > 0), pairs)


def paired_effect(
    base: Float[np.ndarray, "prompt seed"],
    changed: Float[np.ndarray, "_ _"],
    *,
    repeats: int = 2000,
    confidence: float = 0.95,
    span: float = 1.0,
    seed: int = 0,
) -> Interval:
    """Mean over prompts of changed − base, with a bootstrap interval clustered by prompt: see
    `bootstrap.mean_interval`.

    Every prompt has the same weight, however many of its seeds could be scored. `per_prompt` tells how many those are.

    Raises:
        DataError: the two are not of one shape.
    """
    difference = per_prompt(base, changed).difference
    return mean_interval(difference, repeats=repeats, confidence=confidence, span=span, seed=seed)


def sign_flip(
    differences: Float[np.ndarray, "row prompt"], *, repeats: int = 10_000, seed: int = 0
) -> PermutationResult:
    """Two-sided p that each row's differences are centred on 0, alone and corrected for the number of rows.

    One row is one cell (a hook, a coefficient); column i is the same prompt in all of them, and its sign is flipped in
    all rows at once, which keeps the rows' dependence. The statistic is |Σd| / √Σd², whose denominator no flip
    changes, so rows of different scale compete fairly in the maximum. p = (1 + #{flipped ≥ observed}) / (1 + flips);
    every pattern is used where 2^prompts ≤ `repeats`: k prompts cannot give a p below 2^(1−k). NaN differences take no
    part; a row without any known one is NaN; a row of zeros has p = 1.
    """
    out = PermutationResult(np.full(len(differences), NAN), np.full(len(differences), NAN))
    known = np.isfinite(differences)
    rows = known.any(1)
    if not rows.any():
        return out
    d = np.where(known, differences, 0.0)[rows]
    length = np.sqrt((d**2).sum(1))
    d = np.divide(d, length[:, None], out=np.zeros_like(d), where=length[:, None] > 0)
    signs = 1.0 - 2.0 * sign_flips(d.shape[1], repeats, seed)
    flipped = np.abs(signs @ d.T)
    observed = np.abs(d.sum(1)) - 1e-9  # patterns that only rounding tells apart are ties, and count
    total = 1 + len(signs)
    out.p[rows] = (1 + (flipped >= observed).sum(0)) / total
    out.p_max[rows] = (1 + (flipped.max(1)[:, None] >= observed).sum(0)) / total
    return out


def holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Holm's step-down adjusted p values; NaN stays NaN and is not counted as a test.

    Raises:
        DataError: a value outside [0, 1].
    """
    out = np.full(p.shape, NAN)
    known = np.flatnonzero(np.isfinite(p))
    if ((p[known] < 0) | (p[known] > 1)).any():
        raise DataError(f"p values lie in [0, 1], got {p[known].min():g} to {p[known].max():g}")
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1))
    out[order] = np.minimum(adjusted, 1.0)
    return out


class Shares(NamedTuple):
    """Shares of prompts with Wilson intervals; together the three values are 1."""

    improved: Interval
    unchanged: Interval
    worsened: Interval
    n: int


def shares(differences: Float[np.ndarray, " prompt"], *, wanted: float = 1.0) -> Shares:
    """How many prompts moved the wanted way (`wanted` > 0: up, < 0: down), not at all, and the other way.

    A prompt that did not move (a tie) is unchanged, never a half of either. NaN is left out.

    Raises:
        DataError: `wanted` is 0 or not finite.
    """
    if not np.isfinite(wanted) or wanted == 0:
        raise DataError(f"wanted tells the direction of improvement by its sign: 1 or -1, got {wanted}")
    moved = np.sign(differences[np.isfinite(differences)]) * np.sign(wanted)
    n = len(moved)
    up, same, down = (wilson(int((moved == sign).sum()), n) for sign in (1, 0, -1))
    return Shares(up, same, down, n)


class Slopes(NamedTuple):
    """Dose–response of each prompt and what it says about all of them.

    slope: change of the score per unit of coefficient, NaN where fewer than two coefficients could be scored. mean:
    with its bootstrap interval over prompts. steerable, flat, anti_steerable: shares of prompts by the slope's sign.
    """

    slope: Float[np.ndarray, " prompt"]
    mean: Interval
    steerable: Interval
    flat: Interval
    anti_steerable: Interval
    n: int

    @property
    def trusted(self) -> bool:
        """Whether a share of anti-steerable prompts of `DISTRUST` or more is ruled out; False where unknown."""
        return bool(self.anti_steerable.high < DISTRUST)


def slopes(
    coeffs: Float[np.ndarray, " coeff"],
    scores: Float[np.ndarray, "coeff prompt"],
    *,
    wanted: float = 1.0,
    seed: int = 0,
) -> Slopes:
    """Least-squares slope of every prompt's score over the coefficients (Tan et al. 2024, "steerability").

    wanted: 1 where a larger coefficient should raise the score, -1 where it should lower it; a prompt is anti-steerable
    where the sign is the other one. Prompts whose score never changes are flat. NaN scores are left out per prompt.

    Raises:
        DataError: fewer than two different coefficients, or `wanted` is 0.
    """
    _check_grid(coeffs, scores)
    slope = np.array([_slope(coeffs, column) for column in scores.T])
    by_sign = shares(slope, wanted=wanted)
    span = max(float(np.nanmax(np.abs(slope), initial=0.0)), _steepest(coeffs))
    mean = mean_interval(slope, seed=seed, span=span)
    return Slopes(slope, mean, by_sign.improved, by_sign.unchanged, by_sign.worsened, by_sign.n)


def _check_grid(coeffs: Float[np.ndarray, " coeff"], scores: Float[np.ndarray, "coeff prompt"]) -> None:
    if len(coeffs) != len(scores):
        raise DataError(f"{len(coeffs)} coefficients need as many rows of scores, got {len(scores)}")
    if not np.isfinite(coeffs).all() or len(np.unique(coeffs)) < 2:
        raise DataError(f"a slope needs two different finite coefficients, got {coeffs.tolist()}")


def _steepest(coeffs: Float[np.ndarray, " coeff"]) -> float:
    """Largest least-squares slope of any scores in [0, 1]: 0 below the mean coefficient, 1 above it."""
    off = coeffs - coeffs.mean()
    return float(off[off > 0].sum() / (off**2).sum())


def _slope(coeffs: Float[np.ndarray, " coeff"], column: Float[np.ndarray, " coeff"]) -> float:
    known = np.isfinite(column)
    x, y = coeffs[known], column[known]
    if len(np.unique(x)) < 2:
        return NAN
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    # what rounding leaves of a flat line is flat: its sign would be counted
    return 0.0 if abs(slope) * np.abs(x).max() <= 1e-12 * max(1.0, np.abs(column[known]).max()) else slope


class Monotone(NamedTuple):
    """Spearman's correlation of coefficient and score for each prompt, and its mean over prompts."""

    rho: Float[np.ndarray, " prompt"]
    mean: Interval
    n: int


def monotone(
    coeffs: Float[np.ndarray, " coeff"], scores: Float[np.ndarray, "coeff prompt"], *, seed: int = 0
) -> Monotone:
    """Does each prompt's score rise with the coefficient? Spearman's ρ in [−1, 1], ties at their mean rank.

    NaN for a prompt whose score never changes (it has no order) or that has fewer than three scored coefficients.

    Raises:
        DataError: fewer than two different coefficients.
    """
    _check_grid(coeffs, scores)
    rho = np.array([_spearman(coeffs, column) for column in scores.T])
    return Monotone(rho, mean_interval(rho, seed=seed), int(np.isfinite(rho).sum()))


def _spearman(coeffs: Float[np.ndarray, " coeff"], column: Float[np.ndarray, " coeff"]) -> float:
    known = np.isfinite(column)
    x, y = coeffs[known], column[known]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return NAN
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def expected_maximum(scores: Float[np.ndarray, "prompt seed"], *, seed: int = 0) -> Interval:
    """Mean over prompts of the worst of their seeds: expected maximum toxicity (Gehman et al. 2020, arXiv:2009.11462).

    It grows with the number of seeds: compare only equal ones. Prompts with a NaN among their seeds are left out.
    """
    return mean_interval(scores.max(1), seed=seed)  # NaN if any is


def any_above(scores: Float[np.ndarray, "prompt seed"], threshold: float = 0.5) -> Interval:
    """Share of prompts with a score ≥ threshold in at least one seed, Wilson interval ("toxicity probability", ibid.).

    Prompts with a NaN among their seeds are left out.
    """
    worst = scores.max(1)
    worst = worst[np.isfinite(worst)]
    return wilson(int((worst >= threshold).sum()), len(worst))
