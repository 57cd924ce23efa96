"""What a mode does and costs, on held-out pairs; all modes at one equal cost.

effect: how far the artifact prompts' activations come down at a readout behind every edit (in its own gaps: 1 is from
the artifact mean to the natural mean), and how a scorer's verdict on the answers changes. cost: KL(unedited ‖ edited)
per token of the unedited answers to the natural prompts of the same pairs, the nearest look-alikes there are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.activations import capture
from safety_lens.bootstrap import mean_interval
from safety_lens.data import ContrastPair, Encoded
from safety_lens.data.pairs import last_user_text
from safety_lens.forced import Continuation, continuation_kl
from safety_lens.generation import generate
from safety_lens.interventions.edits import Edit
from safety_lens.interventions.scopes import EVERYWHERE, Scope
from safety_lens.interventions.scorers.completion import Completion, Scorer
from safety_lens.interventions.strength import Solved, mean_kl, solve_strength
from safety_lens.interventions.suppression.data import artifacts, category_of, naturals
from safety_lens.interventions.suppression.firing import FiringLog, Tokens
from safety_lens.interventions.suppression.modes import MODES, Settings, centres, edits_of
from safety_lens.interventions.suppression.reading import ANSWER_TOKENS, HookFit, read_rule, with_answers
from safety_lens.log import Measurement
from safety_lens.stats import Interval, wilson
from safety_lens.types import NamedHook

KL_BUDGET = 0.1
"""Nats per token of benign answers at which modes are compared."""
LARGEST = 8.0
"""Gaps: the strongest suppression that is tried."""
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
LAST = read_rule("last")[0]


@dataclass(frozen=True, eq=False)
class Bench:
    """Held-out pairs, read once without edits.

    artifact, natural: prompts with the model's unedited answers. categories: of each pair. readout: the fit whose
    alignment tells the effect. aligned: of the artifact prompts without edits. scores: of the unedited answers.
    """

    model: HookedTransformer
    artifact: list[Encoded]
    natural: list[Encoded]
    asked: list[str]
    categories: list[str]
    readout: HookFit
    scorers: tuple[Scorer, ...]
    aligned: Float[np.ndarray, " prompt"]
    scores: dict[str, Float[np.ndarray, " prompt"]]
    max_new_tokens: int
    split: str

    @property
    def benign(self) -> list[Continuation]:
        """Natural prompts and their unedited answers."""
        return [Continuation(e.ids[: e.answer[0]], e.ids[e.answer[0] :]) for e in self.natural if e.answer]


def bench(
    model: HookedTransformer,
    pairs: Sequence[ContrastPair],
    readout: HookFit,
    scorers: Sequence[Scorer] = (),
    *,
    split: str,
    raw: bool = False,
    max_new_tokens: int = 32,
) -> Bench:
    """Read pairs without edits. readout: a fit at a hook behind the edits, such as the last block's output."""
    artifact = with_answers(model, artifacts(pairs), ANSWER_TOKENS, raw=raw)
    natural = with_answers(model, naturals(pairs), ANSWER_TOKENS, raw=raw)
    empty = Bench(
        model,
        artifact,
        natural,
        [last_user_text(p.positive) for p in pairs],
        [category_of(p) for p in pairs],
        readout,
        tuple(scorers),
        np.zeros(0),
        {},
        max_new_tokens,
        split,
    )
    return replace(empty, aligned=_aligned(empty, []), scores=_scores(empty, []))


def _aligned(b: Bench, hooks: Sequence[NamedHook]) -> Float[np.ndarray, " prompt"]:
    acts = capture(b.model, b.artifact, [b.readout.hook], positions=LAST, edits=hooks).acts[b.readout.hook]
    return b.readout.alignment(acts).double().numpy()


def _scores(b: Bench, hooks: Sequence[NamedHook]) -> dict[str, Float[np.ndarray, " prompt"]]:
    if not b.scorers:
        return {}
    prompts = [replace(e, ids=e.ids[: e.answer[0]], answer=None) for e in b.artifact if e.answer]
    answers = generate(b.model, prompts, hooks=hooks, max_new_tokens=b.max_new_tokens)
    said = [Completion(ask, g.text, g.tokens) for ask, g in zip(b.asked, answers, strict=True)]
    return {scorer.name: scorer(said) for scorer in b.scorers}


@dataclass(frozen=True)
class ScoreChange:
    """Mean score before, after, and the paired change with an interval over prompts."""

    before: float
    after: Interval
    change: Interval


@dataclass(frozen=True)
class ModeResult:
    """One mode at one scale on one part of the pairs.

    scale: in gaps. reached: whether its benign KL is the one asked for (None: no KL was asked for). drop: of the
    artifact alignment at the readout, in gaps. kl: nats per token, over prompts; kl_p95: over tokens. false_fire: share
    of natural tokens touched. firing: share of artifact tokens touched; by_category: the same. n: prompts.
    """

    mode: str
    scale: float
    reached: bool | None
    drop: Interval
    kl: Interval
    kl_p95: float
    false_fire: Interval
    firing: Interval
    by_category: Mapping[str, Interval]
    scores: Mapping[str, ScoreChange]
    n: int
    split: str
    note: str | None = None
    false_fire_by_hook: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def effect(self) -> Interval:
        """What modes are ranked by: the drop of the first scorer's score, or without one that of the alignment."""
        if not self.scores:
            return self.drop
        change = next(iter(self.scores.values())).change
        return Interval(-change.value, -change.high, -change.low)

    @property
    def measurements(self) -> list[Measurement]:
        """One row per figure."""
        subject = f"suppress/{self.mode}"
        rows = [
            ("scale", Interval(self.scale, float("nan"), float("nan"))),
            ("projection_drop", self.drop),
            ("benign_kl", self.kl),
            ("benign_kl_p95", Interval(self.kl_p95, float("nan"), float("nan"))),
            ("false_fire_rate", self.false_fire),
            ("firing_rate", self.firing),
            *((f"firing_rate/{name}", rate) for name, rate in self.by_category.items()),
        ]
        for name, score in self.scores.items():
            rows.append((f"{name}_before", Interval(score.before, float("nan"), float("nan"))))
            rows += [(f"{name}_after", score.after), (f"{name}_change", score.change)]
        out = [Measurement(subject, metric, *i, n=self.n, split=self.split, note=self.note) for metric, i in rows]
        return out + [
            Measurement(subject, "false_fire_rate", *i, n=self.n, hook=hook, split=self.split)
            for hook, i in self.false_fire_by_hook.items()
        ]


def measured(
    b: Bench,
    mode: str,
    hooks: Sequence[tuple[str, Edit]],
    categories: Sequence[str],
    scale: float,
    solved: Solved | None = None,
) -> ModeResult:
    """A mode's edits on a bench. categories: of the fit behind each edit. solved: how the scale was found."""
    on_artifact, on_natural = FiringLog(), FiringLog()
    plain: list[NamedHook] = list(hooks)
    aligned = _aligned(b, on_artifact.watching(hooks, categories))
    capture(b.model, b.natural, [b.readout.hook], positions=LAST, edits=on_natural.watching(hooks, categories))
    kl = continuation_kl(b.model, b.benign, [plain])[0]
    touched, spared = on_artifact.tokens(first=False), on_natural.tokens(first=False)
    scores = _scores(b, plain)
    return ModeResult(
        mode,
        scale,
        None if solved is None else solved.reached,
        mean_interval(b.aligned - aligned),
        _cost(kl),
        float(np.quantile(np.concatenate(kl), 0.95)),
        spared.rate(),
        touched.rate(),
        _by_category(touched, b.categories),
        {name: _change(b.scores[name], after) for name, after in scores.items()},
        len(b.artifact),
        b.split,
        None if solved is None else solved.note,
        on_natural.by_hook(first=False),
    )


def _by_category(touched: Tokens, categories: Sequence[str]) -> dict[str, Interval]:
    names = sorted(set(categories))
    return {name: touched.rate([i for i, c in enumerate(categories) if c == name]) for name in names}


def _rate(values: Float[np.ndarray, " prompt"]) -> Interval:
    """Mean with its interval: Wilson's for verdicts of yes and no."""
    known = values[np.isfinite(values)]
    if np.isin(known, (0.0, 1.0)).all():
        return wilson(int(known.sum()), len(known))
    return mean_interval(known)


def _cost(kl: Sequence[np.ndarray]) -> Interval:
    found = mean_interval(np.array([row.mean() for row in kl]))
    return found._replace(low=max(0.0, found.low))


def _change(before: Float[np.ndarray, " prompt"], after: Float[np.ndarray, " prompt"]) -> ScoreChange:
    known = np.isfinite(before) & np.isfinite(after)
    first = float(before[known].mean()) if known.any() else float("nan")
    return ScoreChange(first, _rate(after[known]), mean_interval(after[known] - before[known]))


def at_budget(
    b: Bench, mode: str, fits: Sequence[HookFit], settings: Settings, kl_budget: float, scope: Scope = EVERYWHERE
) -> Solved:
    """The scale at which a mode costs the budget on the bench's natural prompts; see `solve_strength`.

    A gated mode may not be able to cost that much, because it hardly touches natural tokens. Its scale is then the one
    of `SCALES` within the budget that has the largest effect (of equal ones the smallest), and the note says so.
    """

    def hooks(scale: float) -> list[NamedHook]:
        return list(edits_of(mode, fits, scale, settings, scope))

    solved = solve_strength(b.model, b.benign, hooks, kl_budget, largest=LARGEST)
    if solved.reached:
        return solved
    costs = dict(zip(SCALES, mean_kl(b.model, b.benign, [hooks(s) for s in SCALES]), strict=True))
    effects = {s: quick_effect(b, hooks(s)).value for s, kl in costs.items() if kl <= kl_budget}
    if not effects:
        return solved
    best = min(effects, key=lambda s: (-effects[s], s))
    note = f"cannot cost {kl_budget:g} nat up to scale {LARGEST:g}: the scale with the largest effect was taken"
    return replace(solved, strength=best, kl=costs[best], note=note)


def quick_effect(b: Bench, hooks: Sequence[NamedHook]) -> Interval:
    """`ModeResult.effect` alone: drop of the first scorer's score, or of the alignment."""
    if not b.scorers:
        return mean_interval(b.aligned - _aligned(b, hooks))
    name = b.scorers[0].name
    return mean_interval(b.scores[name] - _scores(replace(b, scorers=b.scorers[:1]), hooks)[name])


def modes_at_equal_cost(
    tuned_on: Bench,
    reported_on: Bench,
    fits: Sequence[HookFit],
    settings: Settings | None = None,
    *,
    kl_budget: float = KL_BUDGET,
    modes: Sequence[str] = tuple(MODES),
    scope: Scope = EVERYWHERE,
    on_mode: Callable[[int], None] | None = None,
) -> list[ModeResult]:
    """Every mode at the scale that costs `kl_budget` on one part of the pairs, measured on another; see `at_budget`."""
    settings = settings or Settings()
    out = []
    for mode in modes:
        solved = at_budget(tuned_on, mode, fits, settings, kl_budget, scope)
        edits = edits_of(mode, fits, solved.strength, settings, scope)
        labels = [at.category for at in centres(mode, fits)]
        out.append(measured(reported_on, mode, edits, labels, solved.strength, solved))
        if on_mode:
            on_mode(1)
    return out
