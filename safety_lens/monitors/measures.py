"""How far a direction moved, with the noise of estimating it taken into account. Numpy only, float64.

Row i of "base" and "now" is the difference of contrast pair i's two activations before and during training; the mean
of the rows is the difference-in-means direction. Every quantity here is a quadratic form in the pairs' Gram matrices,
so resampling costs the same at any width. Sources: Efron 1987 (BCa intervals); Diedrichsen et al. 2016,
arXiv:1607.00872 (cross-validated distances); Spearman 1910 and Brown 1910 (reliability); Björck & Golub 1973
(principal angles).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

NAN = float("nan")
FEWEST_TEMPLATES = 4
"""From so many templates on, products of two pairs of one template are left out of cross-validated sums."""
MEASURABLE = 0.95
"""Share of resamples in which a cross-validated cosine must exist for its interval to be given."""


class Limits(NamedTuple):
    """Values with confidence limits, one entry per hook; NaN where unknown."""

    value: Float[np.ndarray, " hook"]
    low: Float[np.ndarray, " hook"]
    high: Float[np.ndarray, " hook"]


class Grams(NamedTuple):
    """Inner products of all pairs' differences, per hook: base with base, base with now, now with now."""

    base: Float[np.ndarray, "hook n n"]
    across: Float[np.ndarray, "hook n n"]
    now: Float[np.ndarray, "hook n n"]


def grams(base: Float[np.ndarray, "hook n d"], now: Float[np.ndarray, "hook n d"]) -> Grams:
    """The three Gram matrices of one concept at every hook."""
    return Grams(base @ base.mT, base @ now.mT, now @ now.mT)


def counts(n: int, repeats: int, seed: int) -> Float[np.ndarray, "repeats n"]:
    """How often each of n pairs is drawn in each bootstrap resample."""
    return np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=repeats).astype(float)


def strangers(groups: Sequence[str | None]) -> Bool[np.ndarray, "n n"]:
    """Which pairs are independent of which: all but a pair and itself, or, where templates recur, its template.

    Pairs of one wording share more than the concept; their product would count the wording as signal.
    """
    labels = [f"template {g}" if g is not None else f"pair {i}" for i, g in enumerate(groups)]
    if len(set(labels)) < FEWEST_TEMPLATES:
        return ~np.eye(len(labels), dtype=bool)
    return np.array([[a != b for b in labels] for a in labels], dtype=bool)


def _form(gram: Float[np.ndarray, "hook n m"], w: Float[np.ndarray, "k n"], u: Float[np.ndarray, "k m"]) -> np.ndarray:
    """w gram uᵀ for every resample: [hook, k]."""
    out: np.ndarray = ((w @ gram) * u).sum(-1)
    return out


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    out: np.ndarray = np.divide(over, under, out=np.full(over.shape, NAN), where=under > 0)
    return out


# --- M1, M2: the plain cosine, its interval, its noise --------------------------------------------------------------


def _cosines(g: Grams, w: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "hook k"]:
    norms = np.sqrt(_form(g.base, w, w).clip(0) * _form(g.now, w, w).clip(0))
    return _ratio(_form(g.across, w, w), norms).clip(-1.0, 1.0)


def paired_cosine(g: Grams, *, repeats: int = 1000, confidence: float = 0.95, seed: int = 0) -> Limits:
    """Cosine of the directions now and before, in [−1, 1], with a BCa bootstrap over pairs drawn jointly (M1).

    The prompts are the same, so it is exactly 1 where the weights have not changed: anything else means that the
    weights moved the activations. NaN where a direction has length 0; NaN limits for one pair.
    """
    n = g.base.shape[-1]
    value = _cosines(g, np.ones((1, n)))[:, 0]
    if n < 2:
        return Limits(value, np.full_like(value, NAN), np.full_like(value, NAN))
    draws = _cosines(g, counts(n, repeats, seed))
    return Limits(value, *bca(value, draws, _cosines(g, 1.0 - np.eye(n)), confidence))


def bca(
    value: Float[np.ndarray, " hook"],
    draws: Float[np.ndarray, "hook k"],
    left_out: Float[np.ndarray, "hook n"],
    confidence: float = 0.95,
) -> tuple[Float[np.ndarray, " hook"], Float[np.ndarray, " hook"]]:
    """Bias-corrected and accelerated limits from bootstrap draws and leave-one-out values (Efron 1987)."""
    k = draws.shape[1]
    below = ((draws < value[:, None]).sum(1) + 0.5 * (draws == value[:, None]).sum(1)) / k
    bias = special.ndtri(below.clip(1 / (k + 1), k / (k + 1)))
    off = left_out.mean(1, keepdims=True) - left_out
    skew = _ratio((off**3).sum(1), 6 * (off**2).sum(1) ** 1.5)
    skew = np.where(np.isfinite(skew), skew, 0.0)  # values that are all equal have no skew
    tails = special.ndtri([(1 - confidence) / 2, (1 + confidence) / 2])
    ends = []
    for z in tails:
        q = special.ndtr(bias + (bias + z) / (1 - skew * (bias + z)))
        found = [np.quantile(row, p) if np.isfinite(row).all() else NAN for row, p in zip(draws, q, strict=True)]
        ends.append(np.array(found, dtype=float))
    return ends[0], ends[1]


SPLITS = 50
"""Splits into halves that reliability is averaged over."""


def reliability(
    gram: Float[np.ndarray, "hook n n"], apart: Bool[np.ndarray, "n n"], *, confidence: float = 0.95, seed: int = 0
) -> Limits:
    """Expected cosine of two directions from two samples of as many pairs each that share no template (M2), in [-1, 1].

    From one sample: the mean cosine r of directions from two halves of the templates (pairs where unknown), over random
    splits; for samples of full size 2r/(1 + r) (Spearman and Brown), plus what the spread of r takes off that concave
    curve. Limits by the jackknife over templates, Student's t. For isotropic noise the expectation is
    1 / (1 + d(1/n₊ + 1/n₋)/d'²). NaN for fewer than four templates or pairs, or without a direction.
    """
    n = gram.shape[-1]
    template = (~apart).argmax(1)
    templates = np.unique(template)
    m = len(templates)
    if m < FEWEST_TEMPLATES:
        return Limits(*np.full((3, len(gram)), NAN))
    rng = np.random.default_rng(seed)
    half = np.array([np.isin(template, rng.permutation(templates)[: m // 2]) for _ in range(SPLITS)], dtype=float)

    def r(kept: Float[np.ndarray, " n"]) -> Float[np.ndarray, " hook"]:
        a, b = half * kept, (1 - half) * kept
        norms = np.sqrt(_form(gram, a, a).clip(0) * _form(gram, b, b).clip(0))
        found: np.ndarray = _ratio(_form(gram, a, b), norms).mean(1)
        return found

    value, left_out = r(np.ones(n)), np.stack([r((template != t).astype(float)) for t in templates], 1)
    variance = (m - 1) / m * ((left_out - left_out.mean(1, keepdims=True)) ** 2).sum(1)
    off = np.sqrt(variance) * special.stdtrit(m - 1, (1 + confidence) / 2)
    low, high = (_whole_size((value + sign * off).clip(LEAST, 1.0)) for sign in (-1, 1))
    return Limits((_whole_size(value.clip(LEAST)) + 2 * variance / (1 + value.clip(LEAST)) ** 3).clip(-1, 1), low, high)


LEAST = -1 / 3
"""Mean cosine of halves below which Spearman and Brown's 2r/(1 + r) would leave [-1, 1]."""


def _whole_size(r: Float[np.ndarray, " hook"]) -> Float[np.ndarray, " hook"]:
    """Cosine for samples of full size from that of halves (Spearman and Brown)."""
    found: np.ndarray = 2 * r / (1 + r)
    return found


# --- M3: cross-validated cosine -------------------------------------------------------------------------------------


def _unbiased(gram: np.ndarray, w: Float[np.ndarray, "k n"], apart: Bool[np.ndarray, "n n"]) -> np.ndarray:
    """Mean product of pairs that are independent of one another: [hook, k]; noise has expectation 0 in it."""
    return _ratio(
        _form(gram * apart, w, w), np.broadcast_to(_form(apart[None].astype(float), w, w), (len(gram), len(w)))
    )


def _cross_validated(g: Grams, w: Float[np.ndarray, "k n"], apart: Bool[np.ndarray, "n n"]) -> np.ndarray:
    before, now = (_unbiased(gram, w, apart) for gram in (g.base, g.now))
    lengths = np.where((before > 0) & (now > 0), before * now, NAN)
    return _unbiased(g.across, w, apart) / np.sqrt(lengths)


def cross_validated_cosine(
    g: Grams, apart: Bool[np.ndarray, "n n"], *, repeats: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Limits:
    """Cosine of the *true* directions, corrected for the noise of estimating both (M3); may exceed 1 by chance.

    ½(v₀ᴬ·vₜᴮ + v₀ᴮ·vₜᴬ) / √((v₀ᴬ·v₀ᴮ)(vₜᴬ·vₜᴮ)) over halves A and B, averaged over all splits: that is the mean product
    of independent pairs. NaN ("not measurable") where a squared length is not above its noise; NaN limits where that
    happens in more than 5 % of the resamples.
    """
    n = g.base.shape[-1]
    value = _cross_validated(g, np.ones((1, n)), apart)[:, 0]
    draws = _cross_validated(g, counts(n, repeats, seed), apart)
    low, high = np.full_like(value, NAN), np.full_like(value, NAN)
    for i, row in enumerate(draws):
        known = row[np.isfinite(row)]
        if np.isfinite(value[i]) and len(known) >= MEASURABLE * len(row):
            low[i], high[i] = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Limits(value, low, high)


# --- M4, M7, M8 -----------------------------------------------------------------------------------------------------


class Lengths(NamedTuple):
    """norm: length now. retained: part of the old direction that is left, in units of its old length (norm ratio ×
    cosine). growth: length at right angles to the old direction, in the same units."""

    norm: Float[np.ndarray, " hook"]
    retained: Float[np.ndarray, " hook"]
    growth: Float[np.ndarray, " hook"]


def lengths(g: Grams) -> Lengths:
    """Retained signal and orthogonal growth (M4)."""
    n = g.base.shape[-1]
    one = np.full((1, n), 1 / n)
    before, across, now = (_form(gram, one, one)[:, 0] for gram in g)
    retained = _ratio(across, before)
    growth = np.sqrt((_ratio(now, before) - retained**2).clip(0))
    return Lengths(np.sqrt(now.clip(0)), retained, growth)


def principal_angles(a: Float[np.ndarray, "k d"], b: Float[np.ndarray, "k2 d"]) -> Float[np.ndarray, " angles"]:
    """Angles between two subspaces given by orthonormal rows, ascending, in radians (M7).

    Small angles come from sines: the arc cosine of nearly 1 has half of the digits (Björck & Golub 1973).
    """
    cosines = np.linalg.svd(a @ b.T, compute_uv=False).clip(0.0, 1.0)
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    sines = np.sort(np.linalg.svd(small - small @ large.T @ large, compute_uv=False)[: len(small)]).clip(0.0, 1.0)
    out: np.ndarray = np.where(cosines > np.sqrt(0.5), np.arcsin(sines), np.arccos(cosines))
    return out


def top_subspace(differences: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, "k2 d"]:
    """Orthonormal rows that span the k largest uncentred components of the pairs' differences."""
    _, _, rows = np.linalg.svd(differences, full_matrices=False)
    out: np.ndarray = rows[:k]
    return out


@lru_cache(maxsize=64)
def chance_angle(d: int, k: int, *, repeats: int = 200, seed: int = 0) -> float:
    """The largest principal angle (radians) that 95 % of random k-dimensional subspaces of d dimensions exceed."""
    rng = np.random.default_rng(seed)
    fixed = np.eye(k, d)
    found = [principal_angles(fixed, np.linalg.qr(rng.standard_normal((d, k)))[0].T)[-1] for _ in range(repeats)]
    return float(np.quantile(found, 0.05))


class Crossing(NamedTuple):
    """Cosine of two concepts' directions, plain and corrected for the noise of estimating both."""

    plain: Limits
    corrected: Limits


def crossing(
    a: Float[np.ndarray, "hook n d"],
    b: Float[np.ndarray, "hook m d"],
    apart: tuple[Bool[np.ndarray, "n n"], Bool[np.ndarray, "m m"]],
    *,
    repeats: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Crossing:
    """Entanglement of two concepts at the same hooks (M8), with percentile bootstraps over the pairs of both."""
    aa, ab, bb = a @ a.mT, a @ b.mT, b @ b.mT
    n, m = ab.shape[1:]
    w = np.concatenate([np.ones((1, n)), counts(n, repeats, seed)])
    u = np.concatenate([np.ones((1, m)), counts(m, repeats, seed + 1)])
    between = _form(ab, w, u) / (n * m)
    plain = _ratio(between, np.sqrt(_form(aa, w, w).clip(0) * _form(bb, u, u).clip(0)) / (n * m))
    squares = _unbiased(aa, w, apart[0]).clip(0) * _unbiased(bb, u, apart[1]).clip(0)
    return Crossing(_percentiles(plain, confidence), _percentiles(_ratio(between, np.sqrt(squares)), confidence))


def _percentiles(draws: Float[np.ndarray, "hook k"], confidence: float) -> Limits:
    """The first column is the estimate, the others are its resamples."""
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    known = np.isfinite(draws).mean(1) >= MEASURABLE
    ends = [np.nanquantile(row, tails) if ok else (NAN, NAN) for row, ok in zip(draws, known, strict=True)]
    return Limits(draws[:, 0], *np.array(ends, dtype=float).reshape(-1, 2).T)
