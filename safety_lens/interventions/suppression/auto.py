"""`auto`: the mode with the largest measured effect at one benign KL."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from safety_lens.errors import DataError
from safety_lens.interventions.suppression.analysis import hedges_g
from safety_lens.interventions.suppression.data import UNNAMED
from safety_lens.interventions.suppression.measure import ModeResult
from safety_lens.interventions.suppression.reading import HookFit
from safety_lens.probes.selection import PREFERRED_DEPTH, depth

DEEPEST = 0.8
"""Blocks from this share of the depth on are not chosen: too little comes behind them (as in Arditi et al. 2024)."""


def choose_hook(fits: Sequence[HookFit], n_layers: int) -> str:
    """The hook to edit where none was named: by the effect size of the calibration pairs, of all categories together.

    All hooks whose effect lies within the interval of the largest are alike; the one nearest a depth stated beforehand
    (`PREFERRED_DEPTH`) is taken. Hooks in the last fifth of the model are left out where there are others.

    Raises:
        DataError: no effect can be estimated.
    """
    pooled = {at.hook: at for at in fits if at.category == UNNAMED}
    early = {h: at for h, at in pooled.items() if depth(h, n_layers) <= DEEPEST} or pooled
    effects = {
        h: hedges_g(at.held_artifact.double().numpy(), at.held_natural.double().numpy()) for h, at in early.items()
    }
    known = {h: e for h, e in effects.items() if np.isfinite(e.value)}
    if not known:
        raise DataError("the calibration pairs tell no layer from another; name the layers, or give more pairs")
    best = max(known.values())
    close = [h for h, e in known.items() if e.value >= best.low]
    return min(close, key=lambda h: (abs(depth(h, n_layers) - PREFERRED_DEPTH), depth(h, n_layers)))


class Chosen(NamedTuple):
    """The mode and scale of `choose_mode`, and why, in one line."""

    mode: str
    scale: float
    reason: str


def choose_mode(results: Sequence[ModeResult], kl_budget: float) -> Chosen:
    """The cheapest of the modes whose effect is within the interval of the largest effect.

    Cheapest: least benign KL, then fewest natural tokens touched, then largest effect.

    Raises:
        DataError: no mode has an effect that is known.
    """
    known = [r for r in results if np.isfinite(r.effect.value)]
    if not known:
        raise DataError("no mode could be measured; name one with mode, or give more pairs")
    best = max(known, key=lambda r: r.effect.value)
    close = [r for r in known if r.effect.value >= best.effect.low]
    chosen = min(close, key=lambda r: (round(r.kl.value, 6), r.false_fire.value, -r.effect.value))
    name = next(iter(chosen.scores), None)
    what = f"the share {name}" if name else "the artifact projection (in gaps)"
    others = ", ".join(
        f"{r.mode} {r.effect.value:.2f} at {r.kl.value:.3f}"
        for r in sorted(known, key=lambda r: -r.effect.value)
        if r is not chosen
    )
    reason = (
        f"{chosen.mode} at {chosen.scale:.3g} gaps lowers {what} by {chosen.effect.value:.2f}"
        f" [{chosen.effect.low:.2f}, {chosen.effect.high:.2f}] for {chosen.kl.value:.3f} nat per benign token and"
        f" {chosen.false_fire.value:.1%} of natural tokens touched ({chosen.n} held-out pairs, budget {kl_budget:g}"
        f" nat); others: {others or 'none'}"
    )
    return Chosen(chosen.mode, chosen.scale, reason)
