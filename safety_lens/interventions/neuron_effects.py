"""The causal check of a group: what a model does without it, or with nothing else, beside matched random groups.

A score is a first-order guess. Whether a group matters is seen by taking it out; whether it matters more than any other
weights of its size, by taking those out too; whether what is lost is safety or speech, by measuring both.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats
from transformer_lens import HookedTransformer

from safety_lens.bootstrap import crossed_interval, mean_interval
from safety_lens.errors import DataError
from safety_lens.forced import Continuation
from safety_lens.interventions.fluency import continuation_nll
from safety_lens.interventions.neurons import ablated
from safety_lens.log import Measurement
from safety_lens.probes.attribution.scores import Scores
from safety_lens.probes.groups import NeuronGroup, group_of
from safety_lens.probes.matching import random_groups
from safety_lens.stats import UNKNOWN, Interval, wilson

NAN = float("nan")
DRAWS = 20

Edit = Callable[[HookedTransformer, NeuronGroup], AbstractContextManager[HookedTransformer]]
"""`ablated` or `kept`, or either with means: `functools.partial(ablated, means=…)`."""


@dataclass(frozen=True, eq=False)
class Measure:
    """A number for every prompt, read from the model as it stands.

    controlled: whether it is also read under every random group; measures that only guard against broken text need not
    be. share: whether values are 0 or 1. span: half the range of one value, for intervals where all values are equal.
    """

    name: str
    read: Callable[[HookedTransformer], Float[np.ndarray, " prompt"]]
    controlled: bool = True
    share: bool = False
    span: float = 1.0


@dataclass(frozen=True, eq=False)
class Effect:
    """One measure with one group edited. before, edited: per prompt. random: under each random group, per prompt."""

    group: NeuronGroup
    measure: Measure
    before: Float[np.ndarray, " prompt"]
    edited: Float[np.ndarray, " prompt"]
    random: Float[np.ndarray, "draw prompt"]

    @property
    def value(self) -> Interval:
        """The measure with the group edited: bootstrap over prompts, or Wilson's interval of a share."""
        return self._level(self.edited)

    @property
    def unedited(self) -> Interval:
        """The measure before."""
        return self._level(self.before)

    def _level(self, values: Float[np.ndarray, " prompt"]) -> Interval:
        known = values[np.isfinite(values)]
        if self.measure.share:
            return wilson(int(known.sum()), len(known))
        return mean_interval(known, span=self.measure.span)

    @property
    def change(self) -> Interval:
        """What editing the group changed, bootstrap over prompts."""
        return mean_interval(self.edited - self.before, span=self.measure.span)

    @property
    def random_change(self) -> Interval:
        """What editing random groups changed on average, bootstrap over groups and prompts."""
        return crossed_interval(self.random - self.before)

    @property
    def beyond_random(self) -> Interval:
        """Change by the group minus change by random groups, bootstrap over groups and prompts; NaN without groups."""
        return crossed_interval(self.edited - self.random)

    @property
    def p(self) -> float:
        """How rarely a random group changes the mean as much, either way: at least 1 / (draws + 1); NaN without."""
        if not len(self.random):
            return NAN
        mine = abs(_mean(self.edited - self.before))
        theirs = np.abs([_mean(row - self.before) for row in self.random])
        return float((1 + (theirs >= mine - 1e-12).sum()) / (1 + len(theirs)))


def _mean(values: Float[np.ndarray, " n"]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else NAN


def causal_check(
    model: HookedTransformer,
    groups: Sequence[NeuronGroup],
    measures: Sequence[Measure],
    *,
    edit: Edit = ablated,
    draws: int = DRAWS,
    seed: int = 0,
    on_group: Callable[[NeuronGroup], None] = lambda group: None,
) -> list[Effect]:
    """Measure a model without each group (or with nothing else), and without random groups matched to it.

    Groups of several sizes chosen in one way give the faithfulness curve. Measures are read on prompts that chose
    nothing. draws: random groups for each group (`random_groups`).

    Raises:
        DataError: an empty group, no groups or measures, or fewer than 0 draws.
        ModelMismatchError: a group of another model.
    """
    if not groups or not measures:
        raise DataError("a causal check needs a group and a measure: got none")
    if draws < 0:
        raise DataError(f"draws must be 0 or more, got {draws}")
    before = {measure.name: measure.read(model) for measure in measures}
    out = []
    for group in groups:
        on_group(group)
        with edit(model, group):
            edited = {measure.name: measure.read(model) for measure in measures}
        random: dict[str, list[Float[np.ndarray, " prompt"]]] = {measure.name: [] for measure in measures}
        for other in random_groups(group, model, range(seed, seed + draws)):
            with edit(model, other):
                for measure in measures:
                    if measure.controlled:
                        random[measure.name].append(measure.read(model))
        for measure in measures:
            name = measure.name
            rows = np.array(random[name], dtype=float).reshape(-1, len(before[name]))
            out.append(Effect(group, measure, before[name], edited[name], rows))
    return out


def broken_not_counted(effect: Effect, text: Effect) -> Effect:
    """An effect in which prompts whose answers the edit broke count as unchanged: broken text is not a lost refusal.

    text: 1 where the answer to the same prompt is text. Random groups keep their whole change, so what is left beyond
    them is a lower bound.

    Raises:
        DataError: effects of different groups or numbers of prompts.
    """
    if effect.group is not text.group or effect.edited.shape != text.edited.shape:
        raise DataError(f"{effect.measure.name} and {text.measure.name} were not read on the same prompts and group")
    counted = np.where(text.edited >= 0.5, effect.edited, effect.before)
    return replace(effect, measure=replace(effect.measure, name=f"{effect.measure.name}_in_text"), edited=counted)


def effect_rows(effects: Sequence[Effect], **at: Any) -> list[Measurement]:
    """Measurement rows: for every group and measure its value, change, change by random groups, and the difference."""
    rows = []
    for e in effects:
        group, name = e.group, e.measure.name
        subject, note = f"group/{group.name}", f"{group.size:,} {group.unit}s, {group.share:.3%}"
        n = int(np.isfinite(e.edited).sum())
        shown: Mapping[str, Interval] = {
            "": e.value,
            "_before": e.unedited,
            "_change": e.change,
            "_change_random": e.random_change if len(e.random) else UNKNOWN,
            "_beyond_random": e.beyond_random if len(e.random) else UNKNOWN,
            "_p": Interval(e.p, NAN, NAN),
        }
        for suffix, found in shown.items():
            rows.append(Measurement(subject, f"{name}{suffix}", *found, n=n, coeff=group.share, note=note, **at))
    return rows


# --- does attribution rank what ablation finds? -----------------------------------------------------------------------


class Agreement(NamedTuple):
    """Spearman's correlation of attribution with the effect of true ablation, over units.

    rho: with a Bonett-Wright interval. n: units ablated. attribution, effect: per unit.
    """

    rho: Interval
    n: int
    attribution: Float[np.ndarray, " unit"]
    effect: Float[np.ndarray, " unit"]


def ablation_agreement(
    model: HookedTransformer,
    scores: Scores,
    examples: Sequence[Continuation],
    *,
    units: int = 64,
    edit: Edit = ablated,
    seed: int = 0,
) -> Agreement:
    """Ablate units one by one and compare what that does to the loss with their scores.

    Units are drawn evenly from all that have a score. Unsigned scores are compared with the mean over examples of
    |ΔL|; signed ones, whose first-order ΔL of deleting is minus the score, with the mean of −ΔL. L is the mean negative
    log-likelihood of the continuation, in nats per token. Single weights of a half-precision model move the loss by
    less than its rounding: compare neurons there, or load it in float32.

    Raises:
        DataError: fewer than 4 units, no examples. ModelMismatchError: scores of another model.
    """
    if units < 4:
        raise DataError(f"a rank correlation needs at least 4 units, got {units}")
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *(values.numel() for values in scores.values.values())])
    chosen = np.sort(rng.choice(scores.numel, min(units, scores.numel), replace=False))
    keys = list(scores.values)
    before = losses(model, examples)
    attribution, effect = [], []
    for number in chosen:
        part = int(np.searchsorted(starts, number, side="right")) - 1
        member = int(number - starts[part])
        group = group_of(model, "one", scores.unit, {keys[part]: [member]})
        with edit(model, group):
            moved = losses(model, examples) - before
        attribution.append(float(scores.values[keys[part]].flatten()[member]))
        effect.append(float(-moved.mean() if scores.signed else np.abs(moved).mean()))
    found = np.array(attribution), np.array(effect)
    return Agreement(spearman(*found), len(chosen), *found)


def losses(model: HookedTransformer, examples: Sequence[Continuation]) -> Float[np.ndarray, " n"]:
    """Mean negative log-likelihood of each continuation, nats per token."""
    return np.array([tokens.mean() for tokens in continuation_nll(model, examples)])


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], confidence: float = 0.95) -> Interval:
    """Spearman's ρ with the interval of Bonett & Wright 2000 (Psychometrika 65:23); NaN where one side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return UNKNOWN
    rho = float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])
    if len(a) < 4 or abs(rho) >= 1:
        return Interval(rho, NAN, NAN)
    width = float(stats.norm.ppf(0.5 + confidence / 2)) * ((1 + rho**2 / 2) / (len(a) - 3)) ** 0.5
    return Interval(rho, *(float(np.tanh(np.arctanh(rho) + side * width)) for side in (-1, 1)))
