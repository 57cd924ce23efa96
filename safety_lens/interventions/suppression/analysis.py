"""Where artifacts show: held-out effect sizes by category and hook, and how alike the categories are.

A direction is fitted on the fit and calibration pairs and looked at on the report pairs only, one number per prompt.
In-sample, or with a d-dimensional norm in the numerator, pure noise has an "effect"; here its interval covers 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from transformer_lens import HookedTransformer

from safety_lens.data import ContrastPair
from safety_lens.interventions.suppression.cache import Kept, remembered
from safety_lens.interventions.suppression.data import UNNAMED, ArtifactPairs, category_of
from safety_lens.interventions.suppression.reading import read_pairs, site_hooks
from safety_lens.log import Measurement
from safety_lens.stats import UNKNOWN, Interval

NAN = float("nan")


def hedges_g(pos: Float[np.ndarray, " pair"], neg: Float[np.ndarray, " pair"], confidence: float = 0.95) -> Interval:
    """Cohen's d of paired scalars, (mean of pos − mean of neg) / pooled standard deviation, for small samples.

    With n pairs and s the standard deviation of the differences: correction J = 1 − 3/(4(n − 1) − 1), variance
    (s/pooled)²·(1/n + d²/(2n)), limits by t with n − 1 degrees of freedom (Borenstein et al. 2009, Introduction to
    Meta-Analysis, eqs. 4.26 to 4.29, whose 2(1 − r) is (s/pooled)²). NaN for fewer than two pairs or without spread.
    """
    n = len(pos)
    if n < 2:
        return UNKNOWN
    pooled = float(np.sqrt((pos.var(ddof=1) + neg.var(ddof=1)) / 2))
    if not pooled > 0:
        return UNKNOWN
    d = float(pos.mean() - neg.mean()) / pooled
    shrink = 1 - 3 / (4 * (n - 1) - 1)
    spread = float((pos - neg).std(ddof=1)) / pooled
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * spread * np.sqrt((1 + d**2 / 2) / n)
    return Interval(shrink * d, shrink * (d - half), shrink * (d + half))


def held_out_effect(
    fit_pos: Float[np.ndarray, "fit d"],
    fit_neg: Float[np.ndarray, "fit d"],
    pos: Float[np.ndarray, "held d"],
    neg: Float[np.ndarray, "held d"],
) -> Interval:
    """Effect size of held-out rows along the difference in means of other rows; see `hedges_g`.

    NaN where the fitted direction has no length.
    """
    vector = fit_pos.mean(0) - fit_neg.mean(0)
    length = np.linalg.norm(vector)
    if not np.isfinite(length) or length == 0:
        return UNKNOWN
    return hedges_g(pos @ (vector / length), neg @ (vector / length))


def direction_cosine(
    a: Float[np.ndarray, "pair_a d"], b: Float[np.ndarray, "pair_b d"], confidence: float = 0.95
) -> Interval:
    """Cosine between the mean within-pair differences of two disjoint sets of pairs, freed of what noise takes off it.

    The squared lengths are estimated without bias, (‖Σd‖² − Σ‖d‖²)/(n(n − 1)), so noise does not pull the cosine
    towards 0 (after Diedrichsen et al. 2016, "crossnobis"); limits by the jackknife over pairs. Clipped to [-1, 1].
    NaN where a set has fewer than three pairs or no length beyond its noise.
    """
    if min(len(a), len(b)) < 3:
        return UNKNOWN
    value = _cosine(a, b)
    if np.isnan(value):
        return UNKNOWN
    left = [_cosine(np.delete(a, i, 0), b) for i in range(len(a))]
    right = [_cosine(a, np.delete(b, i, 0)) for i in range(len(b))]
    variance = sum((len(x) - 1) / len(x) * float(((np.array(x) - np.mean(x)) ** 2).sum()) for x in (left, right))
    half = float(stats.t.ppf(0.5 + confidence / 2, min(len(a), len(b)) - 1)) * np.sqrt(variance)
    low, high = value - half, value + half
    return Interval(*(float(np.clip(x, -1, 1)) for x in (value, low, high)))


def _cosine(a: Float[np.ndarray, "pair_a d"], b: Float[np.ndarray, "pair_b d"]) -> float:
    squares = [((x.sum(0) ** 2).sum() - (x**2).sum()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    if min(squares) <= 0:
        return NAN
    return float(a.mean(0) @ b.mean(0) / np.sqrt(squares[0] * squares[1]))


class Analysis(NamedTuple):
    """Measurements of `analyse`, and the hook with the largest effect of each category.

    measurements: "effect_size" (subject artifacts/<category>, one a hook, n = prompts) and "cosine" (subject
    artifacts/<category>~<category>, one a hook).
    """

    measurements: list[Measurement]
    strongest: dict[str, str | None]


def analyse(
    model: HookedTransformer, pairs: ArtifactPairs, *, site: str = "resid", read: str = "last", cache: bool = True
) -> Analysis:
    """Effect sizes of every category at every block, and cosines between categories; cached per model, data, template.

    Raises:
        DataError: an unknown site or reading rule.
    """
    hooks = site_hooks(model, site, None)

    def work() -> Kept:
        found = _analysed(model, pairs, hooks, read)
        return Kept(measurements=found.measurements, facts={"strongest": found.strongest})

    kept = remembered("suppression-analysis", model, pairs, {"hooks": hooks, "read": read}, work, cache=cache)
    return Analysis(kept.measurements, kept.facts["strongest"])


def _analysed(model: HookedTransformer, pairs: ArtifactPairs, hooks: Sequence[str], read: str) -> Analysis:
    fitted = (*pairs.fit, *pairs.calibrate)
    fit = read_pairs(model, fitted, hooks, read=read, raw=pairs.raw)
    held = read_pairs(model, pairs.report, hooks, read=read, raw=pairs.raw)
    names = [UNNAMED, *(c for c in pairs.categories if c != UNNAMED)]
    rows, strongest = [], {}
    for name in names:
        chosen, kept = (
            [i for i, p in enumerate(part) if name in (UNNAMED, category_of(p))] for part in (fitted, pairs.report)
        )
        effects = {}
        for hook in hooks:
            sides = [
                x[hook][i].double().numpy()
                for x, i in ((fit.artifact, chosen), (fit.natural, chosen), (held.artifact, kept), (held.natural, kept))
            ]
            effects[hook] = held_out_effect(*sides)
            rows.append(
                Measurement(
                    f"artifacts/{name}", "effect_size", *effects[hook], n=2 * len(kept), hook=hook, split="report"
                )
            )
        known = [h for h in hooks if not np.isnan(effects[h].value)]
        strongest[name] = max(known, key=lambda h: effects[h].value) if known else None
    return Analysis(rows + _cosines(fitted, fit.artifact, fit.natural, hooks, names[1:]), strongest)


def _cosines(
    fitted: Sequence[ContrastPair],
    pos: dict[str, torch.Tensor],
    neg: dict[str, torch.Tensor],
    hooks: Sequence[str],
    names: Sequence[str],
) -> list[Measurement]:
    rows = []
    members = {n: [i for i, p in enumerate(fitted) if category_of(p) == n] for n in names}
    for hook in hooks:
        differences = (pos[hook].double() - neg[hook].double()).numpy()
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                found = direction_cosine(differences[members[a]], differences[members[b]])
                n = len(members[a]) + len(members[b])
                rows.append(Measurement(f"artifacts/{a}~{b}", "cosine", *found, n=n, hook=hook, split="fit"))
    return rows
