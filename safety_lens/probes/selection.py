"""Which hook: chosen on pairs that neither fitted the directions nor report on them.

A selector is a function of `Candidates`; what needs interventions (bypass, induce, KL) is one that they hand in.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Any

from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.log import Measurement
from safety_lens.probes.directions import Direction
from safety_lens.probes.estimators import Estimator
from safety_lens.probes.evaluate import HeldOut, gap_in_deviations, separation
from safety_lens.probes.reading import ConceptActivations

PREFERRED_DEPTH = 0.6  # stated before looking: where hooks cannot be told apart, the one nearest this depth is taken


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a selector may look at: directions and their scores on the selection pairs, never the reporting split.

    scores: hook → held-out scores on the selection pairs. split: "val", or "train" where they are cross-validated.
    groups: template label of each selection pair. fit: the estimator that gave the directions.
    """

    model: HookedTransformer
    acts: ConceptActivations
    directions: dict[str, Direction]
    scores: dict[str, HeldOut]
    split: str
    groups: tuple[str | None, ...]
    fit: Estimator


@dataclass(frozen=True)
class Choice:
    """The hook that a selector chose.

    Attributes:
        hook: Name of the hook.
        reason: Why it was chosen, for a reader.
        measurements: Numbers that the selector looked at.
        behaviour: How the behaviour is read on this model, as JSON (`Behaviour.entry`); None for other selectors.
    """

    hook: str
    reason: str
    measurements: tuple[Measurement, ...] = ()
    behaviour: Mapping[str, Any] | None = None

    @property
    def causal(self) -> bool:
        """Whether the direction was chosen by what it does, and passed."""
        return any(row.metric == "causal_passed" and row.value > 0 for row in self.measurements)


Selector = Callable[[Candidates], Choice]


def depth(hook: str, n_layers: int) -> float:
    """Position of a hook in the model, 0 at the embedding, 1 behind the last block."""
    found = re.match(r"blocks\.(\d+)\.", hook)
    if not found:
        return 0.0 if "embed" in hook else 1.0
    part = {"hook_resid_pre": 0.0, "hook_resid_mid": 0.5, "hook_attn_out": 0.4, "attn.hook_z": 0.3}
    return (int(found[1]) + part.get(hook[found.end() :], 1.0)) / n_layers


def by_separability(candidates: Candidates) -> Choice:
    """The largest held-out d' among hooks whose AUROC the best one does not beat beyond its interval.

    AUROC saturates at 1 for many hooks; taking the first of them would make depth a matter of order. Hooks whose d' is
    equal (one activation under two names) are settled by nearness to a depth fixed beforehand, and the reason says so.

    Raises:
        DataError: no hook has a direction.
    """
    subject = f"{candidates.acts.concept.name}"
    areas, gaps, rows = {}, {}, []
    for hook, scores in candidates.scores.items():
        if not scores.measurable:
            continue
        areas[hook], gaps[hook] = separation(scores, candidates.groups), gap_in_deviations(scores, candidates.groups)
        for metric, interval in (("auroc", areas[hook]), ("d_prime", gaps[hook])):
            rows.append(
                Measurement(
                    subject, f"select_{metric}", *interval, n=len(scores.pos), hook=hook, split=candidates.split
                )
            )
    if not areas:
        raise DataError(
            f"{subject}: no {candidates.split} pair can be scored, because too few pairs are left without its template;"
            " give the pairs several templates, or none"
        )
    best = max(areas.values())
    close = [hook for hook, area in areas.items() if area.value >= best.low]
    width = {hook: gaps[hook].value if isfinite(gaps[hook].value) else float("-inf") for hook in close}
    widest = max(width.values())  # a d' that is unknown (no spread at all) must not win by comparing as nothing
    tied = [hook for hook in close if width[hook] == widest or width[hook] >= widest - 1e-6 * abs(widest)]
    n_layers = candidates.model.cfg.n_layers
    chosen = min(tied, key=lambda hook: (abs(depth(hook, n_layers) - PREFERRED_DEPTH), depth(hook, n_layers), hook))
    reason = (
        f"largest d' ({gaps[chosen].value:.2f}) on the {candidates.split} pairs among {len(close)} of {len(areas)}"
        f" hooks whose AUROC is within the interval of the best ({best.value:.3f}, from {best.low:.3f})"
    )
    if len(tied) > 1:
        reason += f"; equal d' at {', '.join(h for h in tied if h != chosen)}: nearest to depth {PREFERRED_DEPTH} taken"
    return Choice(chosen, reason, tuple(rows))


def at_hook(hook: str) -> Selector:
    """A selector that was told the hook beforehand."""

    def choose(candidates: Candidates) -> Choice:
        if hook not in candidates.directions:
            raise DataError(f"no direction at {hook}; hooks with one: {', '.join(candidates.directions) or 'none'}")
        return Choice(hook, "named by the user")

    return choose


SELECTORS: dict[str, Selector] = {"separability": by_separability}


def selector(name: str, hooks: Sequence[str]) -> Selector:
    """The selector of this name, or one that takes the hook of this name out of `hooks`.

    Raises:
        DataError: neither.
    """
    if name in SELECTORS:
        return SELECTORS[name]
    if name in hooks:
        return at_hook(name)
    check_selector(name)
    near = get_close_matches(name, hooks, n=1, cutoff=0.0)
    raise DataError(f"select {name!r} is not among the {len(hooks)} hooks that are read; the nearest is {near[0]!r}")


def check_selector(name: str) -> None:
    """Refuse what is neither a selector nor spelt as a hook, before a model is loaded.

    Raises:
        DataError: with the names that can be given.
    """
    if name not in SELECTORS and "hook_" not in name:
        raise DataError(
            f"select {name!r} is not known; choose {', '.join(SELECTORS)} or a hook name, or pass a function"
            " (Candidates) -> Choice, such as interventions.causal_selector() (--select causal)"
        )
