"""`select="causal"`: the hook whose direction the model uses, not the one that separates best.

A direction may separate two sides perfectly and do nothing: the AUROC only says that the information is there. Here
each candidate is ablated where the concept is present (bypass), added where it is absent (induce), and charged for what
its ablation changes where it is absent (KL), as Arditi et al. 2024 choose the refusal direction.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from safety_lens.activations import encode_for
from safety_lens.data import Encoded
from safety_lens.errors import DataError
from safety_lens.interventions.causality.behaviour import ReadLogits, TokenLogOdds, derive_log_odds
from safety_lens.interventions.causality.limits import Limits, ablatable, in_order, left_out, twin
from safety_lens.interventions.causality.use import CausalUse, PerPrompt, clustered_mean
from safety_lens.interventions.sweeping.controls import random_direction
from safety_lens.log import Measurement
from safety_lens.probes.directions import Direction
from safety_lens.probes.evaluate import clusters_of
from safety_lens.probes.selection import PREFERRED_DEPTH, Candidates, Choice, Selector, by_separability, depth
from safety_lens.stats import Interval

NAN = float("nan")
STANDARD = Limits()


def causal_selector(
    behaviour: ReadLogits | None = None,
    *,
    limits: Limits = STANDARD,
    truncate: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    batch_size: int | str = "auto",
    seed: int = 0,
    on_candidate: Callable[[int], None] | None = None,
) -> Selector:
    """A selector for `extract_directions(select=...)` that looks at what each direction does on the selection pairs.

    Args:
        behaviour: score of the next token's logits, above 0 where the behaviour is shown. None derives the log-odds of
            the tokens with which answers to positive training prompts begin and those to negative ones do not.
        truncate, template_kwargs: as the activations were read.

    The reporting split is not looked at. Least bypass wins among candidates within the limits; those that a paired
    bootstrap over templates (pairs where unknown) cannot tell from the least are settled by the largest induce, equal
    ones by nearness to depth 0.6. Where none passes, the choice is that of `by_separability`, the reason's first words
    say so, and the measurement `causal_passed` is 0.

    Raises:
        DataError: pairs with answers, or whose answers do not part at a first token and no `behaviour` is given.
    """

    def choose(candidates: Candidates) -> Choice:
        def sides(split: str) -> tuple[list[Encoded], list[Encoded]]:
            return _encoded(candidates, split, truncate, template_kwargs)

        score = behaviour
        if score is None:
            score = derive_log_odds(candidates.model, *sides("train"), batch_size=batch_size)
        use = CausalUse(candidates.model, *sides(candidates.split), score, batch_size=batch_size)
        positive, negative = use.base_positive.mean(), use.base_negative.mean()
        if not positive > negative:
            raise DataError(
                f"{candidates.acts.concept.name}: the behaviour score of the positive {candidates.split} prompts"
                f" ({positive:.2f}) is not above that of the negative ones ({negative:.2f}); hand in another behaviour="
            )
        return _Search(candidates, use, limits, seed, on_candidate or (lambda _: None)).run()

    return choose


def _encoded(
    candidates: Candidates, split: str, truncate: bool, template_kwargs: dict[str, Any] | None
) -> tuple[list[Encoded], list[Encoded]]:
    """Both sides of a split, tokenised as the activations were read."""
    pairs, concept = candidates.acts.pairs(split), candidates.acts.concept
    positive, negative = (
        encode_for(candidates.model, side, raw=concept.raw, truncate=truncate, template_kwargs=template_kwargs)
        for side in ([p.positive for p in pairs], [p.negative for p in pairs])
    )
    if any(e.answer is not None for e in (*positive, *negative)):
        raise DataError(
            f"{concept.name}: select='causal' reads what the model would answer, but these pairs hold the answers"
            " already; select by separability or name a hook"
        )
    return positive, negative


class _Use(NamedTuple):
    """What one candidate does: scores of positive prompts under ablation, of negative ones under addition, and the KL
    of ablating it on negative ones."""

    bypass: PerPrompt
    induce: PerPrompt
    kl: PerPrompt


@dataclass(eq=False)
class _Search:
    """One selection in progress: what was left out and why, what each remaining candidate does."""

    candidates: Candidates
    use: CausalUse
    limits: Limits
    seed: int
    advance: Callable[[int], None]
    out: dict[str, str] = field(default_factory=dict)
    found: dict[str, _Use] = field(default_factory=dict)

    def run(self) -> Choice:
        separable = by_separability(self.candidates)
        gaps = {str(r.hook): r.value for r in separable.measurements if r.metric == "select_d_prime"}
        directions, cfg = self.candidates.directions, self.use.model.cfg
        self.out = left_out(directions, self.limits, n_layers=cfg.n_layers, d_model=cfg.d_model)
        for hook in in_order(directions, gaps, cfg.n_layers):
            passed = [directions[h] for h in self.found if h not in self.out]
            if hook not in self.out and (near := twin(directions[hook], passed, self.limits.near)):
                self.out[hook] = f"near-duplicate: cosine above {self.limits.near:g} with {near}"
            # the separable one is measured whatever speaks against it: it is what this choice is compared with
            compared = hook == separable.hook and ablatable(directions[hook], cfg.d_model)
            if hook not in self.out or compared:
                self._measure(directions[hook], whatever=compared)
            self.advance(1)
        passing = {hook: use for hook, use in self.found.items() if hook not in self.out}
        chosen, tie, controls = None, "", list[Measurement]()
        while passing and chosen is None:
            best, tie = self._best(passing)
            controls += self._against_random(best)
            if best in self.out:
                del passing[best]
            else:
                chosen = best
        rows = (*separable.measurements, *self._rows(separable.hook, len(passing)), *controls)
        if chosen is None:
            return Choice(separable.hook, f"{self._none()}; taken by separability: {separable.reason}", rows)
        return Choice(chosen, self._why(chosen, len(passing), separable.hook) + tie, rows)

    def _measure(self, direction: Direction, *, whatever: bool) -> None:
        hook, kl = direction.hook, self.use.kl(direction)
        if not kl.mean() <= self.limits.max_kl:
            self.out.setdefault(hook, f"KL too large: {kl.mean():.2g} nats, above {self.limits.max_kl:g}")
        if hook in self.out and not whatever:
            unknown = np.full(len(kl), NAN)
            self.found[hook] = _Use(unknown, unknown, kl)
            return
        induce = self.use.induce([direction], self.limits.coeff)[0]
        self.found[hook] = _Use(self.use.bypass(direction), induce, kl)
        if not induce.mean() >= self.limits.min_induce:
            self.out.setdefault(hook, f"does not induce: score {induce.mean():.2g}, below {self.limits.min_induce:g}")

    def _mean(self, values: PerPrompt) -> Interval:
        return clustered_mean(values, clusters_of(self.candidates.groups), seed=self.seed)

    def _best(self, passing: Mapping[str, _Use]) -> tuple[str, str]:
        """Least bypass; of those not told apart from it the largest induce; of equal ones the depth set beforehand."""
        least = min(passing, key=lambda h: float(passing[h].bypass.mean()))
        tied = [h for h in passing if not self._mean(passing[h].bypass - passing[least].bypass).low > 0]
        most = max(float(passing[h].induce.mean()) for h in tied)
        equal = [h for h in tied if float(passing[h].induce.mean()) >= most - 1e-6 * abs(most)]
        n_layers = self.use.model.cfg.n_layers
        best = min(equal, key=lambda h: (abs(depth(h, n_layers) - PREFERRED_DEPTH), depth(h, n_layers), h))
        if len(tied) == 1:
            return best, ""
        settled = "largest induce" if len(equal) == 1 else f"equal in induce too: nearest to depth {PREFERRED_DEPTH}"
        return best, f"; bypass not told apart from {', '.join(h for h in tied if h != best)}: {settled} taken"

    def _against_random(self, hook: str) -> list[Measurement]:
        """Leaves the candidate out where a random direction of its length does as much."""
        n = self.limits.controls
        if not n:
            return []
        like = self.candidates.directions[hook]
        controls = [random_direction(like, k, self.seed) for k in range(n)]
        bypass = [float(self.use.bypass(d).mean()) for d in controls]
        induce = [float(scores.mean()) for scores in self.use.induce(controls, self.limits.coeff)]
        found = self.found[hook]
        if not (found.bypass.mean() < min(bypass) and found.induce.mean() > max(induce)):
            self.out[hook] = f"no better than random: one of {n} directions of its length does as much"
        note = f"mean and range of {n} random directions"
        return [
            self._row("bypass_random", Interval(float(np.mean(bypass)), min(bypass), max(bypass)), hook, note),
            self._row("induce_random", Interval(float(np.mean(induce)), min(induce), max(induce)), hook, note),
        ]

    def _row(self, metric: str, value: Interval, hook: str | None = None, note: str | None = None) -> Measurement:
        n, split = len(self.candidates.groups), self.candidates.split
        return Measurement(self.candidates.acts.concept.name, metric, *value, n, hook, split, note=note)

    def _rows(self, separable: str, passed: int) -> list[Measurement]:
        rows = [
            self._row("behaviour_positive", self._mean(self.use.base_positive), note=self._score()),
            self._row("behaviour_negative", self._mean(self.use.base_negative), note=self._score()),
            self._row("chosen_by_separability", Interval(1.0, NAN, NAN), separable),
        ]
        for hook, use in self.found.items():
            known = {m: values for m, values in use._asdict().items() if np.isfinite(values).any()}
            rows += [self._row(metric, self._mean(values), hook) for metric, values in known.items()]
        for hook in self.candidates.directions:
            eligible = Interval(float(hook not in self.out), NAN, NAN)
            rows.append(self._row("causal_eligible", eligible, hook, self.out.get(hook)))
        return [*rows, self._row("causal_passed", Interval(float(passed), NAN, NAN))]

    def _score(self) -> str:
        score = self.use.behaviour
        if not isinstance(score, TokenLogOdds) or self.use.model.tokenizer is None:
            return getattr(score, "__name__", repr(score))
        words = [repr(self.use.model.tokenizer.decode([i])) for i in score.ids]
        more = f" and {len(words) - 6} more" if len(words) > 6 else ""
        behind = f" behind {self.use.model.tokenizer.decode(list(score.prefix))!r}" if score.prefix else ""
        return f"log-odds of {', '.join(words[:6])}{more}{behind} (total variation {score.distance:.2f})"

    def _left_out(self) -> str:
        kinds = Counter(why.partition(":")[0] for why in self.out.values())
        return ", ".join(f"{n} {kind}" for kind, n in kinds.items())

    def _none(self) -> str:
        known = [float(use.kl.mean()) for hook, use in self.found.items() if self.out[hook].startswith("KL")]
        hint = (
            f"; the least KL of those too large is {min(known):.2g}: a higher limit (--max-kl) lets it in"
            if known
            else ""
        )
        return f"NO hook of {len(self.candidates.directions)} passes the causal test ({self._left_out()}{hint})"

    def _why(self, chosen: str, passed: int, separable: str) -> str:
        use, split = self.found[chosen], self.candidates.split
        fitted = " (which the directions were fitted on)" if split == "train" else ""
        left_out = self._left_out()
        same = "as by separability" if chosen == separable else f"separability alone would take {separable}"
        return (
            f"ablating it leaves the least behaviour on the {split} pairs{fitted}: score {use.bypass.mean():.2f},"
            f" without an edit {self.use.base_positive.mean():.2f}; adding it brings negative prompts from"
            f" {self.use.base_negative.mean():.2f} to {use.induce.mean():.2f}; KL {use.kl.mean():.2g} nats; {passed} of"
            f" {len(self.candidates.directions)} hooks pass{f' ({left_out})' if left_out else ''}; {same}"
        )
