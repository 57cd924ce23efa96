"""Directions with their evidence: read once, fit on train, choose a hook on val, report on test."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformer_lens import HookedTransformer

from safety_lens.data import Concept
from safety_lens.errors import DataError
from safety_lens.log import Measurement
from safety_lens.models import hooks_at
from safety_lens.positions import Positions, last_token
from safety_lens.probes.controls import bigram_scores, embedding_scores, length_scores, lexical_scores
from safety_lens.probes.directions import Direction, Evidence
from safety_lens.probes.estimators import Estimator, estimator, pca_direction
from safety_lens.probes.evaluate import (
    HeldOut,
    clusters_of,
    fit_direction,
    folded,
    gap_in_deviations,
    half_split_stability,
    held_out_scores,
    plain_scores,
    random_null,
    separation,
    shares_templates,
    shuffled_null,
)
from safety_lens.probes.reading import ConceptActivations, read_concepts
from safety_lens.probes.selection import Candidates, Choice, Selector, selector
from safety_lens.stats import UNKNOWN, Interval, auroc_difference, auroc_permutation

LEFT_OUT = "leave-template-out"
NO_DIRECTION = "no direction at this hook: both sides have the same mean activation"


@dataclass(frozen=True, eq=False)
class DirectionSet:
    """One concept, one method: a direction for each hook that has one, and the hook that was chosen.

    evidence: hook → evidence, also for hooks without a direction (NaN there, with the reason). choice: None where no
    hook has a direction. measurements: every number as a row. scores: hook → held-out scores of the reporting pairs.
    """

    concept: str
    method: str
    directions: dict[str, Direction]
    evidence: dict[str, Evidence]
    choice: Choice | None
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...] = ()
    scores: dict[str, HeldOut] = field(default_factory=dict)

    @property
    def best(self) -> Direction:
        """The direction at the chosen hook.

        Raises:
            DataError: no hook has a direction, or none was chosen (imported directions that are not judged).
        """
        if self.choice is None and self.directions:
            raise DataError(
                f"{self.concept}/{self.method} has {len(self)} directions, none of them chosen: name a hook, or judge"
                f" them on a concept's pairs; the hooks are {', '.join(self.directions)}"
            )
        if self.choice is None:
            raise DataError(
                f"{self.concept}/{self.method}: no direction at any of {len(self.evidence)} hooks;"
                " the two sides give the same activations there (read another position or hook)"
            )
        return self.directions[self.choice.hook]

    def __getitem__(self, hook: str) -> Direction:
        if hook not in self.directions:
            raise DataError(
                f"{self.concept}/{self.method} has no direction at {hook!r};"
                f" it has {', '.join(self.directions) or 'none'}"
            )
        return self.directions[hook]

    def __iter__(self) -> Iterator[Direction]:
        return iter(self.directions.values())

    def __len__(self) -> int:
        return len(self.directions)


def extract_directions(
    model: HookedTransformer,
    concept: Concept,
    *,
    hooks: Sequence[str] | None = None,
    method: str = "dim",
    positions: Positions = last_token,
    select: str | Selector = "separability",
    seed: int = 0,
    null_repeats: int = 100,
    truncate: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    batch_size: int | str = "auto",
    on_batch: Callable[[int], None] | None = None,
) -> DirectionSet:
    """Find a concept's direction at every hook, and say how good it is on pairs it was not fitted on.

    Args:
        hooks: hook names; default every block's `hook_resid_post`.
        method: an estimator of `probes.estimators.METHODS`.
        positions: one row per prompt: `last_token`, `mean_last(k)`, `mean_over(span)`, `answer_letter`.
        select: "separability", a hook name, or a function `(Candidates) -> Choice`.
        null_repeats: refits on shuffled labels behind `null_shuffled`; they dominate the time of `logistic`.

    Raises:
        DataError: too few pairs, an unknown method or selector, several rows per prompt.
        HookNameError: a hook the model does not have.
    """
    acts = read_concepts(
        model,
        [concept],
        hooks_at(model) if hooks is None else hooks,
        positions=positions,
        truncate=truncate,
        template_kwargs=template_kwargs,
        batch_size=batch_size,
        on_batch=on_batch,
    )[0]
    return directions_from(model, acts, method=method, select=select, seed=seed, null_repeats=null_repeats)


def directions_from(
    model: HookedTransformer,
    acts: ConceptActivations,
    *,
    method: str = "dim",
    select: str | Selector = "separability",
    seed: int = 0,
    null_repeats: int = 100,
) -> DirectionSet:
    """`extract_directions` on activations that are already read: further methods cost no forward."""
    fit = estimator(method)
    choose = selector(select, acts.hooks) if isinstance(select, str) else select
    name = acts.concept.name
    vectors = {hook: fit_direction(fit, acts.sides["train"][hook]) for hook in acts.hooks}
    scores = {
        hook: held_out_scores(fit, acts.sides["train"][hook], acts.sides["test"][hook])
        for hook, vector in vectors.items()
        if vector is not None
    }
    evidence = _evidence(fit, acts, scores, seed, null_repeats)
    directions = {h: Direction(name, h, v, method, evidence[h]) for h, v in vectors.items() if v is not None}
    choice = choose(_candidates(model, fit, acts, directions, seed)) if directions else None
    cut = (f"{acts.truncated} prompts were cut to fit the model's context",) if acts.truncated else ()
    notes = (*acts.concept.notes, *cut)
    rows = [
        row for h in acts.hooks for row in evidence_rows(f"{name}/{method}", h, evidence[h], directions.get(h), seed)
    ]
    if choice is not None:
        measured = tuple(replace(row, subject=f"{name}/{method}", seed=seed) for row in choice.measurements)
        choice = replace(choice, measurements=measured)
        rows += measured
        rows.append(Measurement(f"{name}/{method}", "chosen", 1.0, hook=choice.hook, seed=seed, note=choice.reason))
    return DirectionSet(name, method, directions, evidence, choice, tuple(rows), notes, scores)


def _candidates(
    model: HookedTransformer,
    fit: Estimator,
    acts: ConceptActivations,
    directions: dict[str, Direction],
    seed: int,
) -> Candidates:
    split = "val" if acts.concept.val else "train"
    scores, groups = {}, acts.sides[split][acts.hooks[0]].groups
    for hook in directions:
        train = acts.sides["train"][hook]
        if split == "val":
            scores[hook] = held_out_scores(fit, train, acts.sides["val"][hook])
        else:
            folds = folded(train, seed=seed)
            scores[hook] = held_out_scores(fit, folds, folds)
    unjudged = {h: without_evidence(d) for h, d in directions.items()}
    return Candidates(model, acts, unjudged, scores, split, groups, fit)


def without_evidence(direction: Direction) -> Direction:
    """The direction without its evidence: a selector must not see the reporting split."""
    return Direction(direction.concept, direction.hook, direction.vector, direction.method)


def _evidence(
    fit: Estimator, acts: ConceptActivations, found: dict[str, HeldOut], seed: int, null_repeats: int
) -> dict[str, Evidence]:
    """Evidence of every hook on the reporting split, from the held-out scores of hooks with a direction."""
    groups = acts.embedding["test"].groups
    scores = {hook: s for hook, s in found.items() if s.measurable}
    p, p_max = {}, {}
    if scores:
        stacked = [np.stack([getattr(s, side) for s in scores.values()]) for side in ("pos", "neg")]
        tested = auroc_permutation(stacked[0], stacked[1], clusters=clusters_of(groups), seed=seed)
        p = dict(zip(scores, tested.p.tolist(), strict=True))
        p_max = dict(zip(scores, tested.p_max.tolist(), strict=True))
    lexical = lexical_scores(acts, "test")
    shared = _controls(acts, groups, lexical)
    recurring = shared.scheme == LEFT_OUT
    out = {}
    for hook in acts.hooks:
        if hook not in scores:
            out[hook] = replace(shared, notes=(NO_DIRECTION if hook not in found else "too few pairs to score",))
            continue
        train, test = acts.sides["train"][hook], acts.sides["test"][hook]
        s = scores[hook]
        judged = replace(
            shared,
            auroc=separation(s, groups),
            d_prime=gap_in_deviations(s, groups, seed=seed),
            p=p[hook],
            p_max=p_max[hook],
            stability=half_split_stability(fit, train, seed=seed),
            null_shuffled=shuffled_null(fit, train, test, repeats=null_repeats, seed=seed),
            null_random=random_null(train, test, seed=seed),
            above_lexical=auroc_difference(s.pos, s.neg, lexical.pos, lexical.neg, clusters=clusters_of(groups) * 2),
            auroc_known_templates=separation(plain_scores(fit, train, test), groups) if recurring else UNKNOWN,
        )
        out[hook] = replace(judged, notes=_remarks(judged, len(set(clusters_of(groups))), fit is not pca_direction))
    return out


def _controls(acts: ConceptActivations, groups: Sequence[str | None], lexical: HeldOut) -> Evidence:
    """What all hooks share: the controls and how pairs were held out."""
    train, test = acts.embedding["train"], acts.embedding["test"]
    recurring = shares_templates(train, test)
    return Evidence(
        lexical=separation(lexical, groups),
        bigram=separation(bigram_scores(acts, "test"), groups),
        length=separation(length_scores(acts, "test"), groups),
        embedding=separation(embedding_scores(acts, "test"), groups),
        lexical_known_templates=separation(lexical_scores(acts, "test", plain_scores), groups)
        if recurring
        else UNKNOWN,
        n=len(test),
        split="test",
        scheme=LEFT_OUT if recurring else "held-out split",
    )


def _remarks(evidence: Evidence, templates: int, informative_shuffles: bool) -> tuple[str, ...]:
    """What a reader must be told: controls that do as well, nulls that reach as far, a p value that could not be small.

    templates: units that the permutation swaps (templates, or pairs where those are unknown). informative_shuffles:
    False for pca, whose axis needs no labels: shuffling them only turns it around.
    """
    notes = []
    for control, what in (
        ("lexical", "a bag of words"),
        ("bigram", "words and bigrams"),
        ("length", "length alone"),
        ("embedding", "the mean token embedding"),
    ):
        interval: Interval = getattr(evidence, control)
        if interval.low > 0.5 and interval.value >= evidence.auroc.low:
            notes.append(
                f"confound: {what} separates the same pairs with AUROC {interval.value:.2f}"
                f" [{interval.low:.2f}, {interval.high:.2f}], within the direction's interval or above it"
            )
    known = evidence.lexical_known_templates
    if known.value == 1.0:
        notes.append(
            f"confound: with the templates known, a bag of words separates these pairs perfectly"
            f" (AUROC 1.00 [{known.low:.2f}, 1.00])"
        )
    if informative_shuffles and evidence.null_shuffled >= evidence.auroc.value:
        notes.append(f"5 % of refits on shuffled labels reach AUROC {evidence.null_shuffled:.2f} here")
    if evidence.null_random >= evidence.auroc.value:
        notes.append(f"5 % of random directions reach AUROC {evidence.null_random:.2f} here")
    if 2.0**-templates > 0.05:
        notes.append(f"the reporting pairs have {templates} templates: p cannot fall below {2.0**-templates:.2g}")
    elif evidence.p_max > 0.05:
        notes.append(f"not distinguishable from chance over all hooks (p = {evidence.p_max:.2g})")
    return tuple(notes)


def evidence_rows(subject: str, hook: str, e: Evidence, direction: Direction | None, seed: int) -> list[Measurement]:
    """One hook's evidence as measurement rows; the length of the direction is NaN where there is none."""
    note = "; ".join(e.notes) or None
    numbers: dict[str, Interval] = {
        "auroc": e.auroc,
        "d_prime": e.d_prime,
        "p": UNKNOWN._replace(value=e.p),
        "p_max": UNKNOWN._replace(value=e.p_max),
        "stability": UNKNOWN._replace(value=e.stability),
        "null_shuffled_q95": UNKNOWN._replace(value=e.null_shuffled),
        "null_random_q95": UNKNOWN._replace(value=e.null_random),
        "lexical_auroc": e.lexical,
        "bigram_auroc": e.bigram,
        "length_auroc": e.length,
        "embedding_auroc": e.embedding,
        "above_lexical": e.above_lexical,
        "auroc_known_templates": e.auroc_known_templates,
        "lexical_auroc_known_templates": e.lexical_known_templates,
        "norm": UNKNOWN._replace(value=float("nan") if direction is None else direction.norm),
    }
    return [
        Measurement(subject, m, *i, n=e.n, hook=hook, split=e.split, seed=seed, note=note if m == "auroc" else None)
        for m, i in numbers.items()
    ]
