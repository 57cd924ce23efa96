"""Which weights safety depends on after fine-tuning: identified again on the trained weights, and compared.

Both models are scored on the same examples, the trained one with its adapters merged: an adapter's base weight alone
is not what the model computes with. Overlaps stand beside chance and beside a ceiling: what two disjoint
halves of the examples give for one and the same model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.log import Measurement
from safety_lens.monitors.neuron_drift.rows import SUBJECT
from safety_lens.probes.attribution.scores import Score, Scores, merge_scores
from safety_lens.probes.attribution.weights import snip_scores
from safety_lens.probes.examples import ExampleSet
from safety_lens.probes.groups import NeuronGroup
from safety_lens.probes.ranking import set_difference, top
from safety_lens.probes.sharing import MEASURES, Corrected, Halves, corrected, rank_overlap

Grouping = Callable[[Scores, Scores, HookedTransformer], NeuronGroup]
"""Makes a group from safety scores, utility scores and the model."""


def groupings(*, q: float, p: float, fraction: float, scope: str | None = None) -> dict[str, Grouping]:
    """The top of both scores, and what is important for safety and not for utility (Wei et al. 2024).

    q, p: of the set difference (see `set_difference`). fraction: of the top groups.
    """
    return {
        "top-safety": lambda safety, utility, model: top(safety, model, fraction, scope=scope, name="top-safety"),
        "top-utility": lambda safety, utility, model: top(utility, model, fraction, scope=scope, name="top-utility"),
        "set-difference": lambda safety, utility, model: set_difference(safety, utility, model, q=q, p=p, scope=scope),
    }


@dataclass(frozen=True, eq=False)
class Identified:
    """The groups of one model from all examples (`whole`) and from two disjoint halves, and the scores of the halves.

    scores: "safety" and "utility" → scores of the first and of the second half.
    """

    whole: Mapping[str, NeuronGroup]
    halves: Mapping[str, Halves]
    scores: Mapping[str, tuple[Scores, Scores]]


def identify(
    model: HookedTransformer,
    safety: ExampleSet,
    utility: ExampleSet,
    groups: Mapping[str, Grouping],
    *,
    score: Score = snip_scores,
    seed: int = 0,
    **settings: Any,
) -> Identified:
    """Score a model on both sets of examples, by halves, and make every group three times.

    seed: of the halves; take the same for models that are compared. settings: of the score function.

    Raises:
        DataError: fewer than two examples of a set, or a group that nothing is left of.
    """
    for kind, examples in (("safety", safety), ("utility", utility)):
        if len(examples) < 2:
            raise DataError(f"{len(examples)} {kind} example(s) cannot be halved: a ceiling needs two or more")
    parts = {"safety": safety.halves(seed), "utility": utility.halves(seed)}
    by_half = [{kind: score(model, half[i].continuations, **settings) for kind, half in parts.items()} for i in (0, 1)]
    both = {kind: merge_scores([half[kind] for half in by_half]) for kind in ("safety", "utility")}
    whole = {name: make(both["safety"], both["utility"], model) for name, make in groups.items()}
    halves = {
        name: Halves(*(make(half["safety"], half["utility"], model) for half in by_half))
        for name, make in groups.items()
    }
    return Identified(whole, halves, {kind: (by_half[0][kind], by_half[1][kind]) for kind in both})


@dataclass(frozen=True)
class Found:
    """What is found again of one group. members: before and after. measures: name → value beside chance and ceiling."""

    group: str
    members: tuple[int, int]
    measures: Mapping[str, Corrected]


@dataclass(frozen=True)
class Ranks:
    """Spearman's correlation of scores before and after, from different halves, and its ceiling from halves of one."""

    kind: str
    found: float
    ceiling: float


@dataclass(frozen=True)
class Reidentified:
    """Overlap of every group before and after training, and of the rankings they come from."""

    groups: tuple[Found, ...]
    ranks: tuple[Ranks, ...]


def compare_identified(before: Identified, after: Identified) -> Reidentified:
    """What of the groups before training is found again after it.

    Raises:
        DataError: identified with other groups. ModelMismatchError: models of different shapes.
    """
    if list(before.whole) != list(after.whole):
        raise DataError(f"groups before ({', '.join(before.whole)}) and after ({', '.join(after.whole)}) differ")
    found = []
    for name, group in before.whole.items():
        parts = (group, after.whole[name], before.halves[name], after.halves[name])
        measures = {measure: corrected(*parts, measure) for measure in MEASURES}
        found.append(Found(name, (group.size, after.whole[name].size), measures))
    return Reidentified(tuple(found), tuple(_ranks(kind, before, after) for kind in before.scores))


def _ranks(kind: str, before: Identified, after: Identified) -> Ranks:
    (a1, a2), (b1, b2) = before.scores[kind], after.scores[kind]
    across = [rank_overlap(a1, b2).spearman, rank_overlap(a2, b1).spearman]
    within = [rank_overlap(a1, a2).spearman, rank_overlap(b1, b2).spearman]
    # a correlation below 0 within one model has no geometric mean with another: there is no ceiling then
    ceiling = (within[0] * within[1]) ** 0.5 if min(within) > 0 else float("nan")
    return Ranks(kind, sum(across) / 2, ceiling)


def reidentified_rows(found: Reidentified, *, step: int | None = None, seed: int | None = None) -> list[Measurement]:
    """Rows "neurons/<group>": recall, jaccard and coefficient with `_whole`, `_chance`, `_ceiling` and `_normalised`.

    The plain figure is from different halves, as chance and ceiling are; `_whole` from all examples. Subject
    "scores/<kind>": spearman, spearman_ceiling.
    """
    rows: list[Measurement] = []
    for group in found.groups:
        for measure, value in group.measures.items():
            named = {"": value.found, **{f"_{k}": v for k, v in value._asdict().items() if k != "found"}}
            rows += [
                _row(f"{SUBJECT}{group.group}", f"{measure}{end}", v, group.members[0]) for end, v in named.items()
            ]
    for ranks in found.ranks:
        rows.append(_row(f"scores/{ranks.kind}", "spearman", ranks.found, None))
        rows.append(_row(f"scores/{ranks.kind}", "spearman_ceiling", ranks.ceiling, None))
    return [replace(row, step=step, seed=seed) for row in rows]


def _row(subject: str, metric: str, value: float, n: int | None) -> Measurement:
    return Measurement(subject, metric, value, n=n, split="before/after")


def reidentify(
    before: HookedTransformer,
    after: HookedTransformer,
    safety: ExampleSet,
    utility: ExampleSet,
    groups: Mapping[str, Grouping],
    **settings: Any,
) -> Reidentified:
    """`identify` for both models and `compare_identified`; where both do not fit in memory, call those yourself."""
    return compare_identified(*(identify(model, safety, utility, groups, **settings) for model in (before, after)))
