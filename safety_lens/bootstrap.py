"""Bootstrap intervals over prompts, and a quantile's interval without one.

Source: Hesterberg 2015, The American Statistician 69:371 (the expanded percentile interval).
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy import stats

from safety_lens.errors import DataError
from safety_lens.stats import UNKNOWN, Interval, exact_bound_if_perfect

NAN = float("nan")


def mean_interval(
    values: Float[np.ndarray, " prompt"],
    *,
    repeats: int = 2000,
    confidence: float = 0.95,
    span: float = 1.0,
    seed: int = 0,
) -> Interval:
    """Mean of independent values with an expanded percentile bootstrap interval; NaN values are left out.

    The percentiles are widened by what t quantiles and n/(n−1) are wider than the normal's, so that few prompts are not
    too sure (Hesterberg 2015). Values that are all equal show no spread to resample: the interval then allows the share
    of unseen prompts that n equal ones cannot rule out, 1 − (α/2)^(1/n), to lie anywhere within ±`span`. NaN for no
    values, NaN limits for one.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return UNKNOWN
    mean = float(known.mean())
    if len(known) == 1:
        return Interval(mean, NAN, NAN)
    if np.ptp(known) <= 1e-12 * np.abs(known).max():
        unseen = 1 - exact_bound_if_perfect(float(len(known)), confidence)
        low, high = ((1 - unseen) * mean + unseen * end for end in (min(mean, -span), max(mean, span)))
        return Interval(mean, low, high)
    draws = _resamples(len(known), repeats, seed) @ known / len(known)
    low, high = np.quantile(draws, _expanded(len(known), confidence))
    return Interval(mean, float(low), float(high))


def ratio_interval(
    totals: Float[np.ndarray, " prompt"],
    counts: Float[np.ndarray, " prompt"],
    *,
    repeats: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Σ totals / Σ counts (for instance nats per token) with a bootstrap over prompts; prompts with NaN are left out.

    NaN where nothing was counted, NaN limits for fewer than two prompts.
    """
    known = np.isfinite(totals) & (counts > 0)
    totals, counts = totals[known], counts[known]
    if not len(totals):
        return UNKNOWN
    value = float(totals.sum() / counts.sum())
    if len(totals) == 1:
        return Interval(value, NAN, NAN)
    drawn = _resamples(len(totals), repeats, seed)
    low, high = np.quantile((drawn @ totals) / (drawn @ counts), _expanded(len(totals), confidence))
    return Interval(value, float(low), float(high))


@lru_cache(maxsize=8)
def _resamples(n: int, repeats: int, seed: int) -> Float[np.ndarray, "repeats n"]:
    """How often each of n units is drawn; equal for equal arguments, so cells of one grid share their resamples."""
    drawn = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=repeats).astype(float)
    drawn.flags.writeable = False
    return drawn


def _expanded(n: int, confidence: float) -> tuple[float, float]:
    t = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    tail = float(stats.norm.sf(t * np.sqrt(n / (n - 1))))
    return tail, 1 - tail


def quantile_interval(values: Float[np.ndarray, " n"], q: float, *, confidence: float = 0.95) -> Interval:
    """The q-quantile of independent values with a distribution-free interval of order statistics; NaN is left out.

    A limit that no order statistic reaches at this confidence is NaN (Conover 1999, section 3.2). The interval assumes
    nothing but independence: use it on prompts, not on tokens of one prompt.

    Raises:
        DataError: q outside (0, 1).
    """
    if not 0 < q < 1:
        raise DataError(f"a quantile lies in (0, 1), got {q}")
    known = np.sort(values[np.isfinite(values)])
    n, tail = len(known), (1 - confidence) / 2
    if not n:
        return UNKNOWN
    # [X_(r), X_(s)] covers with probability P(r ≤ B < s), B the number of values below the quantile
    r, s = int(stats.binom.ppf(tail, n, q)), int(stats.binom.ppf(1 - tail, n, q)) + 1
    low = float(known[r - 1]) if r >= 1 else NAN
    high = float(known[s - 1]) if s <= n else NAN
    return Interval(float(np.quantile(known, q)), low, high)


def crossed_interval(
    values: Float[np.ndarray, "draw prompt"], *, repeats: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of values of which rows and columns are both a sample, such as random groups and prompts.

    Rows and columns are resampled independently of one another; limits so found are a little too wide rather than too
    narrow (Owen 2007, arXiv:0712.1111, "The pigeonhole bootstrap"). Columns with a NaN are left out. NaN limits for
    fewer than two rows or columns.
    """
    known = values[:, np.isfinite(values).all(0)]
    if not known.size:
        return UNKNOWN
    mean = float(known.mean())
    if min(known.shape) < 2:
        return Interval(mean, NAN, NAN)
    rows, columns = (_resamples(n, repeats, s) / n for n, s in zip(known.shape, (seed, seed + 1), strict=True))
    low, high = np.quantile(((rows @ known) * columns).sum(1), _expanded(min(known.shape), confidence))
    return Interval(mean, float(low), float(high))
