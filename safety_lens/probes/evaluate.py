"""Held-out scores and the statistics on them: what makes a vector a result.

Fit on one split, report on another. Where a reporting pair's template also occurs in the fitting split, that pair is
scored by a fit without the template ("leave-template-out"), so wording that a template shares cannot help.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from safety_lens.probes.estimators import Estimator
from safety_lens.probes.reading import Sides
from safety_lens.stats import Interval, auroc, auroc_interval, d_prime_interval

NEGLIGIBLE = 1e-6
"""A gap below this share of the mean activation norm is float32 rounding, not a direction."""


class HeldOut(NamedTuple):
    """Scores of pairs no fit has seen, in within-class deviations of their own fit; NaN where there was no fit."""

    pos: Float[np.ndarray, " n"]
    neg: Float[np.ndarray, " n"]

    @property
    def measurable(self) -> bool:
        return bool(np.isfinite(self.pos).all() and np.isfinite(self.neg).all())


def fit_direction(fit: Estimator, sides: Sides) -> torch.Tensor | None:
    """The fitted vector, or None where the sides have no gap beyond rounding: "no direction at this hook"."""
    rms = float(torch.cat([sides.pos, sides.neg]).double().norm(dim=1).mean())
    gap = float((sides.pos.double().mean(0) - sides.neg.double().mean(0)).norm())
    if not np.isfinite(rms) or gap <= NEGLIGIBLE * rms:
        return None
    vector = fit(sides.pos, sides.neg)
    return vector if float(vector.double().norm()) > NEGLIGIBLE * rms else None


def _standardised(vector: torch.Tensor, fitted: Sides, held: Sides) -> HeldOut:
    """Projections from the midpoint of the fitting classes, in their pooled deviations: comparable across fits."""
    unit = vector.double() / vector.double().norm()
    fit_pos, fit_neg = (side.double() @ unit for side in (fitted.pos, fitted.neg))
    centre = (fit_pos.mean() + fit_neg.mean()) / 2
    spread = torch.cat([fit_pos - fit_pos.mean(), fit_neg - fit_neg.mean()]).pow(2).mean().sqrt()
    scale = spread if spread > 0 else torch.ones_like(spread)
    return HeldOut(*(((side.double() @ unit - centre) / scale).cpu().numpy() for side in (held.pos, held.neg)))


def held_out_scores(fit: Estimator, train: Sides, held: Sides) -> HeldOut:
    """Score each held-out pair with a fit on the training pairs, without those of its own template."""
    out = HeldOut(np.full(len(held), np.nan), np.full(len(held), np.nan))
    seen = {g for g in train.groups if g is not None}
    for group in sorted({g if g in seen else None for g in held.groups}, key=str):
        rows = [i for i, g in enumerate(held.groups) if (g if g in seen else None) == group]
        fitted = train if group is None else train.only([i for i, g in enumerate(train.groups) if g != group])
        vector = fit_direction(fit, fitted) if len(fitted) >= 2 else None
        if vector is not None:
            part = _standardised(vector, fitted, held.only(rows))
            out.pos[rows], out.neg[rows] = part.pos, part.neg
    return out


def shares_templates(train: Sides, held: Sides) -> bool:
    """Whether some template occurs on both sides of the split."""
    return bool({g for g in train.groups if g is not None} & set(held.groups))


def folded(train: Sides, *, folds: int = 5, seed: int = 0) -> Sides:
    """The pairs with fold labels as groups, so that scoring them against themselves is cross-validation.

    Folds keep templates whole where there are at least three; else pairs are dealt out at random (seeded).
    """
    rng = np.random.default_rng(seed)
    names = sorted({g for g in train.groups if g is not None})
    if len(names) >= 3:
        order = dict(zip(rng.permutation(names).tolist(), range(len(names)), strict=True))
        single = iter(rng.permutation(len(train)).tolist())
        labels = [order[g] % folds if g is not None else next(single) % folds for g in train.groups]
    else:
        labels = [int(i) % folds for i in rng.permutation(len(train))]
    return Sides(train.pos, train.neg, tuple(f"fold {label}" for label in labels))


def clusters_of(groups: Sequence[str | None]) -> list[str]:
    """One label per pair: its template where that is known, else the pair itself."""
    return [f"template {g}" if g is not None else f"pair {i}" for i, g in enumerate(groups)]


def separation(scores: HeldOut, groups: Sequence[str | None]) -> Interval:
    """AUROC of held-out scores with its interval, widened for pairs that share a template."""
    return auroc_interval(scores.pos, scores.neg, clusters=clusters_of(groups) * 2)


def gap_in_deviations(scores: HeldOut, groups: Sequence[str | None], *, seed: int = 0) -> Interval:
    """d' of held-out scores with a bootstrap interval over templates (over pairs where they are unknown)."""
    return d_prime_interval(scores.pos, scores.neg, clusters=clusters_of(groups), seed=seed)


def half_split_stability(fit: Estimator, train: Sides, *, repeats: int = 20, seed: int = 0) -> float:
    """Mean cosine between directions from two disjoint halves of the pairs; NaN below four pairs or without directions.

    Halves keep templates whole where there are at least four of them.
    """
    if len(train) < 4:
        return float("nan")
    rng = np.random.default_rng(seed)
    names = sorted({g for g in train.groups if g is not None})
    by_template = len(names) >= 4 and None not in train.groups
    cosines = []
    for _ in range(repeats):
        if by_template:
            first = set(rng.permutation(names)[: len(names) // 2].tolist())
            half = [i for i, g in enumerate(train.groups) if g in first]
        else:
            half = rng.permutation(len(train))[: len(train) // 2].tolist()
        rest = sorted(set(range(len(train))) - set(half))
        a, b = (fit_direction(fit, train.only(rows)) for rows in (half, rest))
        if a is not None and b is not None:
            cosines.append(float(torch.cosine_similarity(a.double(), b.double(), dim=0)))
    return float(np.mean(cosines)) if cosines else float("nan")


def plain_scores(fit: Estimator, train: Sides, held: Sides) -> HeldOut:
    """Held-out scores of one fit on all training pairs, whatever templates they share."""
    blank = replace(train, groups=(None,) * len(train))
    return held_out_scores(fit, blank, replace(held, groups=(None,) * len(held)))


def shuffled_null(fit: Estimator, train: Sides, held: Sides, *, repeats: int = 100, seed: int = 0) -> float:
    """AUROC on the held-out pairs that 95 % of refits on shuffled labels stay below, same scheme.

    Each shuffle swaps the sides of half the pairs: swapping at random would leave a remainder of the concept of order
    1/√n, and a strong concept would show through its own null.
    """
    rng = np.random.default_rng(seed)
    areas = []
    for _ in range(repeats):
        scores = held_out_scores(fit, train.swapped((rng.permutation(len(train)) < len(train) // 2).tolist()), held)
        if scores.measurable:
            areas.append(float(auroc(scores.pos, scores.neg)))
    return float(np.quantile(areas, 0.95)) if areas else float("nan")


def random_null(train: Sides, held: Sides, *, repeats: int = 1000, seed: int = 0) -> float:
    """AUROC that 95 % of random directions stay below, each pointed the right way on the training pairs."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(train.pos.shape[1], repeats, generator=generator, dtype=torch.float64)
    gap = (train.pos.double().mean(0) - train.neg.double().mean(0)).cpu() @ axes
    axes = axes * torch.where(gap < 0, -1.0, 1.0)
    pos, neg = ((side.double().cpu() @ axes).T.numpy() for side in (held.pos, held.neg))
    return float(np.quantile(auroc(pos, neg), 0.95))
