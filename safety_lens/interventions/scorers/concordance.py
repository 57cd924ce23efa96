"""Do scorers agree? Two that mean the same thing should; where they do not, one of them measures something else."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float
from scipy import stats

from safety_lens.errors import DataError
from safety_lens.log import Measurement
from safety_lens.stats import Interval

NAN = float("nan")
Statistic = Callable[[Float[np.ndarray, " n"], Float[np.ndarray, " n"]], float]


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman's ρ in [−1, 1], ties at their mean rank; NaN where one is constant or there are fewer than 3."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return NAN
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def cohen_kappa(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Cohen's κ of two yes/no judgements (Cohen 1960), at most 1, 0 for chance; NaN where both say only one thing."""
    if not len(a):
        return NAN
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return (float((a == b).mean()) - chance) / (1 - chance) if chance < 1 else NAN


def agreement(
    scores: Mapping[str, Float[np.ndarray, " n"]],
    *,
    clusters: Sequence[object] | None = None,
    repeats: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Measurement]:
    """Spearman's ρ of every two scorers, and Cohen's κ where both only say 0 or 1.

    scores: scorer name → scores of the same completions in the same order; a completion that either could not score
    (NaN) is left out, and `n` counts the rest. clusters: the prompt of each completion, resampled as one. Limits are
    NaN where resampling changes nothing (perfect agreement) or the statistic is unknown.

    Raises:
        DataError: fewer than two scorers, or scores of different lengths.
    """
    lengths = {name: len(values) for name, values in scores.items()}
    if len(scores) < 2 or len(set(lengths.values())) > 1:
        raise DataError(f"agreement needs two or more scorers of the same completions, got {lengths}")
    rows = []
    for (one, a), (other, b) in combinations(scores.items(), 2):
        known = np.isfinite(a) & np.isfinite(b)
        labels = np.asarray([str(c) for c in clusters]) if clusters is not None else np.arange(len(a)).astype(str)
        binary = bool(np.isin(a[known], (0, 1)).all() and np.isin(b[known], (0, 1)).all())
        metrics: dict[str, Statistic] = {"spearman": spearman} | ({"kappa": cohen_kappa} if binary else {})
        for metric, statistic in metrics.items():
            found = _bootstrapped(statistic, a[known], b[known], labels[known], repeats, confidence, seed)
            rows.append(Measurement(f"{one} ~ {other}", metric, *found, n=int(known.sum()), seed=seed))
    return rows


def _bootstrapped(
    statistic: Statistic,
    a: Float[np.ndarray, " n"],
    b: Float[np.ndarray, " n"],
    labels: np.ndarray,
    repeats: int,
    confidence: float,
    seed: int,
) -> Interval:
    value = statistic(a, b)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if np.isnan(value) or len(members) < 2:
        return Interval(value, NAN, NAN)
    rng = np.random.default_rng(seed)
    draws = np.empty(repeats)
    for k in range(repeats):
        chosen = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        draws[k] = statistic(a[chosen], b[chosen])
    draws = draws[np.isfinite(draws)]
    if len(draws) < repeats / 2 or np.ptp(draws) == 0:
        return Interval(value, NAN, NAN)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))
