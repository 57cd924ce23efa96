"""Statistics that put an uncertainty and a null beside every number.

All functions take and return numpy float64. "pos" and "neg" are scores of the two classes; row i of both comes from
contrast pair i where a function says *paired*. Sources: Hanley & McNeil 1982; DeLong et al. 1988; Obuchowski 1997
(clustered AUROC); Newcombe 2006, Statistics in Medicine 25:559 (score interval, "method 5"); Clopper & Pearson 1934;
Wilson 1927; Phipson & Smyth 2010 (a permutation p is never 0); Westfall & Young 1993 (max-T).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, stats

from safety_lens.errors import DataError

Scores = Float[np.ndarray, "..."]


class Interval(NamedTuple):
    """A value with its confidence limits; NaN where it is unknown."""

    value: float
    low: float
    high: float


UNKNOWN = Interval(float("nan"), float("nan"), float("nan"))


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Share k/n in [0, 1] with its Wilson score interval; NaN for n = 0 (Wilson 1927)."""
    if not 0 <= k <= n:
        raise DataError(f"a share needs 0 <= k <= n, got k={k}, n={n}")
    if n == 0:
        return UNKNOWN
    ci = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    return Interval(k / n, float(ci.low), float(ci.high))


def exact_bound_if_perfect(n: float, confidence: float = 0.95) -> float:
    """Lower Clopper-Pearson limit of a probability after n successes in n independent trials: (α/2)^(1/n)."""
    return float(((1 - confidence) / 2) ** (1 / n))


def _check(pos: Scores, neg: Scores) -> None:
    if pos.shape[-1] == 0 or neg.shape[-1] == 0:
        raise DataError(
            f"AUROC needs scores of both classes, got {pos.shape[-1]} positive and {neg.shape[-1]} negative"
        )


def auroc(
    pos: Float[np.ndarray, "*batch n_pos"], neg: Float[np.ndarray, "*batch n_neg"]
) -> Float[np.ndarray, "*batch"]:
    """P(score of a positive > score of a negative) in [0, 1]; ties count ½; NaN where a score is not finite.

    Raises:
        DataError: a class has no scores.
    """
    _check(pos, neg)
    both = np.concatenate([pos, neg], axis=-1)
    n, m = pos.shape[-1], neg.shape[-1]
    ranks = stats.rankdata(both, axis=-1)
    area = (ranks[..., :n].sum(-1) - n * (n + 1) / 2) / (n * m)
    return np.where(np.isfinite(both).all(-1), area, np.nan)


def placements(
    pos: Float[np.ndarray, " n_pos"], neg: Float[np.ndarray, " n_neg"]
) -> tuple[Float[np.ndarray, " n_pos"], Float[np.ndarray, " n_neg"]]:
    """DeLong's structural components: for each positive the share of negatives below it, and the mirror image."""
    below = (pos[:, None] > neg).astype(float) + 0.5 * (pos[:, None] == neg)
    return below.mean(1), below.mean(0)


def _influence(pos: Float[np.ndarray, " n_pos"], neg: Float[np.ndarray, " n_neg"]) -> Float[np.ndarray, " n"]:
    """Each example's contribution to the AUROC estimate's error; their squares sum to DeLong's variance."""
    over, under = placements(pos, neg)
    n, m = len(pos), len(neg)
    ddof_n, ddof_m = max(n - 1, 1), max(m - 1, 1)
    return np.concatenate([(over - over.mean()) / np.sqrt(n * ddof_n), (under - under.mean()) / np.sqrt(m * ddof_m)])


def _cluster_sums(values: Float[np.ndarray, " n"], clusters: Sequence[object]) -> Float[np.ndarray, " g"]:
    _, index = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    return np.bincount(index, weights=values)


def design_effect(
    pos: Float[np.ndarray, " n_pos"], neg: Float[np.ndarray, " n_neg"], clusters: Sequence[object] | None
) -> float:
    """How many times larger the clustered variance of the AUROC is than the independent one, never below 1.

    clusters: one label for each positive, then one for each negative (Obuchowski 1997). 1 where it cannot be
    estimated: no clusters, a single cluster, or perfect separation.
    """
    if clusters is None:
        return 1.0
    influence = _influence(pos, neg)
    independent = float((influence**2).sum())
    sums = _cluster_sums(influence, clusters)
    if independent == 0 or len(sums) < 2:
        return 1.0
    clustered = float((sums**2).sum()) * len(sums) / (len(sums) - 1)
    return max(1.0, clustered / independent)


def _score_limit(area: float, n: float, m: float, z: float, toward: float) -> float:
    """The θ between `area` and `toward` at which |area − θ| equals z standard errors under θ (Newcombe's method 5)."""

    def excess(theta: float) -> float:
        spread = 1 + ((n + m) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(area - theta) - z * float(np.sqrt(max(theta * (1 - theta) * spread / (n * m), 0.0)))

    # At `toward` (0 or 1) the standard error is 0, at `area` the distance is 0: the root lies between.
    start = area + (toward - area) * 1e-9
    return toward if excess(start) >= 0 else float(optimize.brentq(excess, start, toward))


def auroc_interval(
    pos: Float[np.ndarray, " n_pos"],
    neg: Float[np.ndarray, " n_neg"],
    *,
    clusters: Sequence[object] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """AUROC with a score interval that stays honest at 0 and 1.

    Newcombe's method 5 on sample sizes divided by the design effect. A limit is never nearer to 1 than the exact bound
    that perfect separation of min(n_pos, n_neg) independent examples gives (k disjoint pairs, each ordered right with
    probability θ, are all ordered right with probability at most θ^k), and likewise at 0.

    Raises:
        DataError: a class has no scores.
    """
    area = float(auroc(pos, neg))
    if np.isnan(area):
        return UNKNOWN
    deff = design_effect(pos, neg, clusters)
    n, m = len(pos) / deff, len(neg) / deff
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    perfect = exact_bound_if_perfect(min(n, m), confidence)
    low = 0.0 if area == 0 else _score_limit(area, n, m, z, 0.0)
    high = 1.0 if area == 1 else _score_limit(area, n, m, z, 1.0)
    return Interval(area, min(low, perfect), max(high, 1 - perfect))


def auroc_difference(
    pos_a: Float[np.ndarray, " n_pos"],
    neg_a: Float[np.ndarray, " n_neg"],
    pos_b: Float[np.ndarray, " n_pos"],
    neg_b: Float[np.ndarray, " n_neg"],
    *,
    clusters: Sequence[object] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """AUROC(a) − AUROC(b) of two scores of the same examples, with a Wald interval (DeLong et al. 1988).

    NaN limits where both scores separate perfectly or the difference has no variance: no interval can be estimated.
    """
    delta = _influence(pos_a, neg_a) - _influence(pos_b, neg_b)
    labels = clusters if clusters is not None else range(len(delta))
    sums = _cluster_sums(delta, labels)
    se = float(np.sqrt((sums**2).sum() * len(sums) / max(len(sums) - 1, 1)))
    value = float(auroc(pos_a, neg_a) - auroc(pos_b, neg_b))
    if se == 0:
        return Interval(value, float("nan"), float("nan"))
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    return Interval(value, max(-1.0, value - z * se), min(1.0, value + z * se))


def d_prime(
    pos: Float[np.ndarray, "*batch n_pos"], neg: Float[np.ndarray, "*batch n_neg"]
) -> Float[np.ndarray, "*batch"]:
    """(mean of pos − mean of neg) / pooled standard deviation; NaN where the spread is 0 or a class has one example.

    For Gaussian classes AUROC = Φ(d'/√2).
    """
    n, m = pos.shape[-1], neg.shape[-1]
    if n < 2 or m < 2:
        return np.full(pos.shape[:-1], np.nan)
    pooled = ((n - 1) * pos.var(-1, ddof=1) + (m - 1) * neg.var(-1, ddof=1)) / (n + m - 2)
    gap = pos.mean(-1) - neg.mean(-1)
    out: Scores = np.divide(gap, np.sqrt(pooled), out=np.full_like(gap, np.nan, dtype=float), where=pooled > 0)
    return out


def d_prime_interval(
    pos: Float[np.ndarray, " n"],
    neg: Float[np.ndarray, " n"],
    *,
    clusters: Sequence[object] | None = None,
    repeats: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """d' of paired scores with a percentile bootstrap over pairs, or over clusters of pairs (one label per pair).

    NaN where d' is; NaN limits where there are fewer than two clusters.
    """
    value = float(d_prime(pos, neg))
    labels = [str(c) for c in clusters] if clusters is not None else [str(i) for i in range(len(pos))]
    names, index = np.unique(labels, return_inverse=True)
    if np.isnan(value) or len(names) < 2:
        return Interval(value, float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=repeats)
    weights = drawn[:, index].astype(float)  # how often each pair was drawn
    total = weights.sum(1)
    means = [weights @ side / total for side in (pos, neg)]
    spread = sum(
        (weights @ side**2 - total * mean**2) / (total - 1) for side, mean in zip((pos, neg), means, strict=True)
    )
    usable = spread > 1e-12 * (pos.var() + neg.var())  # a draw of one pair only has no spread
    draws = (means[0] - means[1])[usable] / np.sqrt(spread[usable] / 2)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


class PermutationResult(NamedTuple):
    """One-sided p values in (0, 1]: `p` of each row alone, `p_max` corrected for having looked at all rows."""

    p: Float[np.ndarray, " hook"]
    p_max: Float[np.ndarray, " hook"]


def sign_flips(n: int, repeats: int, seed: int) -> Int[np.ndarray, "k n"]:
    """0/1 per unit: every pattern but the identity where there are few, else seeded draws."""
    if 2**n <= repeats:
        return (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1
    return np.random.default_rng(seed).integers(0, 2, (repeats, n))


def auroc_permutation(
    pos: Float[np.ndarray, "hook n"],
    neg: Float[np.ndarray, "hook n"],
    *,
    clusters: Sequence[object] | None = None,
    repeats: int = 10_000,
    seed: int = 0,
) -> PermutationResult:
    """Is AUROC above what swapping the two sides within pairs gives? Paired; rows are hooks, p over rows by max-T.

    clusters: one label per pair; pairs of one cluster are swapped together, since what they share (the wording of a
    template) would swap together. p = (1 + #{permuted ≥ observed}) / (1 + permutations); every pattern is used where
    2^clusters ≤ `repeats`, so k clusters cannot give a p below 2^-k. Rows with a non-finite score get NaN and do not
    enter the maximum.
    """
    n = pos.shape[1]
    finite = np.isfinite(pos).all(1) & np.isfinite(neg).all(1)
    out = PermutationResult(np.full(len(pos), np.nan), np.full(len(pos), np.nan))
    if n == 0 or not finite.any():
        return out
    ranks = stats.rankdata(np.concatenate([pos, neg], 1)[finite], axis=1)
    # Swapping labels moves no rank: the permuted rank sum of the positives is a matrix product.
    labels = [str(c) for c in clusters] if clusters is not None else [str(i) for i in range(n)]
    names, index = np.unique(labels, return_inverse=True)
    flips = sign_flips(len(names), repeats, seed)[:, index]
    observed = ranks[:, :n].sum(1)
    permuted = observed + flips @ (ranks[:, n:] - ranks[:, :n]).T
    total = 1 + len(flips)
    out.p[finite] = (1 + (permuted >= observed - 1e-9).sum(0)) / total
    out.p_max[finite] = (1 + (permuted.max(1)[:, None] >= observed - 1e-9).sum(0)) / total
    return out
