"""Differences of two samples, and the smallest change that a sample could have shown.

Sources: Newcombe 1998, Statistics in Medicine 17:873, method 10 (two rates); Welch 1947 (two means).
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy import stats

from safety_lens.bootstrap import mean_interval
from safety_lens.stats import UNKNOWN, Interval, wilson

POWER = 0.8
CONFIDENCE = 0.95


def difference_of_rates(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> Interval:
    """Rate of ones in a minus that in b, with Newcombe's interval; NaN entries are left out."""
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    if not len(a) or not len(b):
        return UNKNOWN
    p, q = wilson(int(a.sum()), len(a)), wilson(int(b.sum()), len(b))
    gap = p.value - q.value
    low = gap - float(np.hypot(p.value - p.low, q.high - q.value))
    return Interval(gap, low, gap + float(np.hypot(p.high - p.value, q.value - q.low)))


def difference_of_means(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> Interval:
    """Mean of a minus mean of b, with Welch's interval; NaN entries are left out. Unknown for fewer than two each."""
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    if min(len(a), len(b)) < 2 or a.var() + b.var() == 0:
        return UNKNOWN
    found = stats.ttest_ind(a, b, equal_var=False).confidence_interval(CONFIDENCE)
    return Interval(float(a.mean() - b.mean()), float(found.low), float(found.high))


def detectable_mean(change: Interval) -> float:
    """Smallest change of a mean that as many prompts of this spread show with 80 % power, in the change's units."""
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    return (z + float(stats.norm.ppf(POWER))) * (change.high - change.low) / (2 * z)


@lru_cache(maxsize=64)
def detectable_share(n: int) -> float:
    """Smallest share of n prompts that must change, all one way, to be seen with 80 % power; NaN where none can be."""
    needed = next((k for k in range(1, n + 1) if _seen(k, n)), None)
    if needed is None:
        return float("nan")
    return float(stats.beta.ppf(POWER, needed, n - needed + 1))  # P(Binomial(n, p) >= needed) = POWER


def _seen(k: int, n: int) -> bool:
    return mean_interval(np.array([1.0] * k + [0.0] * (n - k))).low > 0
