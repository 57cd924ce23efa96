"""Causal selection: the hook whose direction the model uses, not the one that separates best.

A direction may separate two sides perfectly and do nothing: the AUROC only says that the information is there. Here
each candidate is ablated where the model shows the behaviour (bypass), added where it does not (induce), and charged
for what its ablation changes there (KL), as Arditi et al. 2024 choose the refusal direction.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from safety_lens.activations import encode_for
from safety_lens.data import Concept, Encoded
from safety_lens.errors import DataError
from safety_lens.interventions.behaviours import Behaviour
from safety_lens.interventions.causality.after import measure_after
from safety_lens.interventions.causality.controls import CONTROLS, other_concepts
from safety_lens.interventions.causality.limits import FEWEST, Limits, ablatable, in_order, left_out, twin
from safety_lens.interventions.causality.use import CausalUse, PerPrompt, clustered_mean
from safety_lens.interventions.named_behaviours import behaviour_named
from safety_lens.log import Measurement
from safety_lens.probes.directions import Direction
from safety_lens.probes.extract import DirectionSet
from safety_lens.probes.selection import PREFERRED_DEPTH, Candidates, Choice, by_separability, depth
from safety_lens.stats import UNKNOWN, Interval
from safety_lens.types import Prompt

LOG = logging.getLogger("safety_lens.causality")
NAN = float("nan")
STANDARD = Limits()
FEW_HOOKS = 12
"""Hooks up to which the first pass measures all of them; of more it takes every second one, then their neighbours."""
NEARLY = 0.75
"""Part of the least induce that is enough on few prompts: they must not ask for a larger coefficient than all do."""
FILL = 16
"""Training prompts that are labelled at once where selection prompts are too few."""
TOGETHER = 12
"""Draws that are measured together, so that the unedited blocks before their hook run once for all of them."""
PARTS = {
    "derivation": "the model answers requests, to see with which openings it shows the behaviour",
    "search": "hooks are ablated and added, few prompts first",
    "controls": "random and shuffled directions at the chosen hook",
    "report": "answers to reporting prompts, with and without the direction",
}
"""Parts that are timed one by one, and what the log says as each begins."""
LEAST = 2
"""Prompts of a side without which nothing is measured."""


def causal_selector(
    behaviour: Behaviour | str | None = None,
    *,
    limits: Limits = STANDARD,
    truncate: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    batch_size: int | str = "auto",
    seed: int = 0,
    on_candidate: Callable[[int], None] | None = None,
) -> "CausalSelector":
    """Make a selector for `extract_directions(select=...)` that measures the effects of each direction.

    Only selection pairs are used, and of them the positive prompts whose answers show the behaviour and the negative
    ones whose answers do not. A first pass measures few prompts at many hooks, a second pass all prompts at the best.
    Among those within the limits least bypass wins; those that a paired bootstrap over templates (pairs where unknown)
    cannot tell from the least are settled by the largest induce, equal ones by nearness to depth 0.6. The winner must
    then beat directions of equal length: random ones that match the variance, and refits on shuffled labels.

    Where no behaviour can be derived or no hook passes, the choice is that of `by_separability`, the first words of the
    reason say so, and the measurement `causal_passed` is 0.

    Args:
        behaviour: A behaviour, or what names one (`named_behaviours.FORMS`). None takes the one that belongs to the
            concept, derived from the model's answers to built-in prompts, and else derives one from its answers to the
            training pairs, labelled by side.
        limits: Limits of the choice and size of the search.
        truncate: As the activations were read.
        template_kwargs: As the activations were read.
        batch_size: Trees in a forward pass, or "auto".
        seed: Seed of the bootstrap, of the order of the prompts and of the controls.
        on_candidate: Called with 1 for each hook that is done, for a progress bar.
    """
    reading = {"truncate": truncate, "template_kwargs": template_kwargs}
    return CausalSelector(behaviour, limits, reading, batch_size, seed, on_candidate or (lambda _: None))


@dataclass(eq=False)
class CausalSelector:
    """A selector that keeps what it derived.

    Attributes:
        behaviours: Concept → the behaviour that was read.
        seconds: CPU seconds of each of `PARTS`.
    """

    wanted: Behaviour | str | None
    limits: Limits
    reading: dict[str, Any]
    batch_size: int | str
    seed: int
    advance: Callable[[int], None]
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, candidates: Candidates) -> Choice:
        """Choose a hook; see `causal_selector`."""
        separable = by_separability(candidates)
        behaviour = self._behaviour(candidates)
        try:
            if behaviour.openings is None:
                raise DataError(f"no behaviour can be read: {behaviour.fault}")
            with self.timed("search"):
                sides = tuple(_side(candidates, behaviour, self, name) for name in ("positive", "negative"))
                shown, other = (side.prompts for side in sides)
                use = CausalUse(candidates.model, shown, other, behaviour.openings, batch_size=self.batch_size)
                _check_order(candidates, use)
        except DataError as error:  # the directions that were read are worth keeping without a causal choice
            passed = Measurement(candidates.acts.concept.name, "causal_passed", 0.0, split=candidates.split)
            reason = f"NO causal choice: {error}; taken by separability: {separable.reason}"
            return Choice(separable.hook, reason, (*separable.measurements, passed), behaviour.entry())
        choice = _Search(candidates, use, self, sides, separable).run()
        return replace(choice, behaviour=behaviour.entry())

    def _behaviour(self, candidates: Candidates) -> Behaviour:
        name = candidates.acts.concept.name
        if isinstance(self.wanted, Behaviour):
            self.behaviours[name] = self.wanted
        elif name not in self.behaviours:
            with self.timed("derivation"):
                self.behaviours[name] = behaviour_named(
                    self.wanted,
                    candidates.model,
                    candidates.acts.concept,
                    seed=self.seed,
                    template_kwargs=self.reading["template_kwargs"],
                )
        return self.behaviours[name]

    def encoded(self, candidates_model: Any, concept: Concept, prompts: Sequence[Prompt]) -> list[Encoded]:
        """Prompts as the activations were read.

        Raises:
            DataError: Prompts that hold their answers already.
        """
        found = encode_for(candidates_model, prompts, raw=concept.raw, **self.reading)
        if any(e.answer is not None for e in found):
            raise DataError(f"the pairs of {concept.name} hold the answers already, so that nothing can be answered")
        return found

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the CPU seconds of a block to a part; the log says when a part begins."""
        start = time.process_time()
        if part not in self.seconds:
            LOG.info("causal choice: %s", PARTS[part])
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - start

    def report(self, model: Any, concept: Concept, found: DirectionSet, *, most: int = 32) -> DirectionSet:
        """Add what the chosen direction does on reporting pairs, which the selection did not see.

        Args:
            model: The model that was read.
            concept: The concept with its reporting pairs.
            found: Directions that this selector chose from.
            most: Prompts of each side at most.

        Returns:
            The same directions with more measurements; unchanged where the choice is not a causal one.
        """
        if found.choice is None or not found.choice.causal:
            return found
        coeffs = (r.coeff for r in found.choice.measurements if (r.metric, r.hook) == ("induce", found.choice.hook))
        coeff = next(c for c in coeffs if c is not None)
        sides = [[getattr(pair, side) for pair in concept.test[:most]] for side in ("positive", "negative")]
        with self.timed("report"):
            rows = measure_after(
                model,
                [(prompts, self.encoded(model, concept, prompts)) for prompts in sides],
                found.best,
                self.behaviours[concept.name],
                coeff=coeff,
                scope=self.limits.scope,
                seed=self.seed,
            )
        subject = f"{found.concept}/{found.method}"
        rows = [replace(row, subject=subject, seed=self.seed) for row in rows]
        choice = replace(found.choice, measurements=(*found.choice.measurements, *rows))
        return replace(found, choice=choice, measurements=(*found.measurements, *rows))


class _Side(NamedTuple):
    """Prompts of one side that the model answers as their side says.

    Attributes:
        name: "positive" or "negative".
        prompts: Of the selection pairs; where those are too few, of training pairs, too.
        clusters: Template of each.
        counts: Split → how many prompts were taken, and how many answers were labelled.
    """

    name: str
    prompts: list[Encoded]
    clusters: list[str]
    counts: dict[str, tuple[int, int]]

    @property
    def labelled(self) -> int:
        """Answers that were labelled."""
        return sum(labelled for _, labelled in self.counts.values())

    def counted(self) -> str:
        """The counts, in words."""
        return " and ".join(f"{n} of {m} {self.name} {split} prompts" for split, (n, m) in self.counts.items())


def _side(candidates: Candidates, behaviour: Behaviour, selector: "CausalSelector", name: str) -> _Side:
    """Prompts of the selection pairs, filtered by the labels of their answers where a reader knows them.

    Where fewer than `FEWEST` are left, training pairs fill them up.

    Raises:
        DataError: Too few are left.
    """
    concept, found = candidates.acts.concept, _Side(name, [], [], {})
    wanted = float(name == "positive")
    most = selector.limits.positives if wanted else selector.limits.negatives
    for split in dict.fromkeys((candidates.split, "train")):
        pairs = candidates.acts.pairs(split)
        order = np.random.default_rng(selector.seed).permutation(len(pairs))[:most]
        step = len(order) if split == candidates.split else FILL
        for chunk in np.split(order, range(step, len(order), step)):
            if split != candidates.split and len(found.prompts) >= FEWEST:
                break
            prompts = [getattr(pairs[i], name) for i in chunk]
            encoded = selector.encoded(candidates.model, concept, prompts)
            labels = behaviour.labels(candidates.model, prompts, encoded=encoded)
            fits = labels == wanted if np.isfinite(labels).any() else np.ones(len(prompts), dtype=bool)
            found.prompts.extend(e for e, fit in zip(encoded, fits, strict=True) if fit)
            found.clusters.extend(
                pairs[i].template or f"{split} {i}" for i, fit in zip(chunk, fits, strict=True) if fit
            )
            taken, labelled = found.counts.get(split, (0, 0))
            found.counts[split] = (taken + int(fits.sum()), labelled + len(prompts))
    if len(found.prompts) < LEAST:
        state = "do" if wanted else "do not"
        raise DataError(f"{found.counted()} of {concept.name}, by their answers, {state} show {behaviour.name}")
    return found


def _check_order(candidates: Candidates, use: CausalUse) -> None:
    positive, negative = use.base_positive.mean(), use.base_negative.mean()
    if not positive > negative:
        raise DataError(
            f"the log-odds of the positive {candidates.split} prompts ({positive:.2f}) are not above those of the"
            f" negative ones ({negative:.2f})"
        )


class _Use(NamedTuple):
    """Effects of one candidate on each prompt.

    Attributes:
        bypass: Log-odds of positive prompts under ablation.
        induce: Log-odds of negative prompts under addition.
        kl: KL of ablation on negative prompts, in nats.
        coeff: Coefficient of the addition.
    """

    bypass: PerPrompt
    induce: PerPrompt
    kl: PerPrompt
    coeff: float


@dataclass(eq=False)
class _Search:
    """One selection in progress: candidates that were left out and why, and effects of the others."""

    candidates: Candidates
    use: CausalUse
    selector: CausalSelector
    sides: tuple[_Side, ...]
    separable: Choice
    out: dict[str, str] = field(default_factory=dict)
    found: dict[str, _Use] = field(default_factory=dict)
    finalists: set[str] = field(default_factory=set)

    @property
    def limits(self) -> Limits:
        return self.selector.limits

    @cached_property
    def few(self) -> CausalUse:
        """The prompts of the first pass."""
        return self.use.part(stop=self.limits.coarse)

    def run(self) -> Choice:
        with self.selector.timed("search"):
            self._first_pass()
            self._second_pass()
        passing = {hook: use for hook, use in self.found.items() if hook not in self.out and hook in self.finalists}
        passed, chosen, tie, controls = len(passing), None, "", list[Measurement]()
        while passing and chosen is None:
            best, tie = self._best(passing)
            with self.selector.timed("controls"):
                controls += self._against_controls(best)
            if best in self.out:
                del passing[best]
            else:
                chosen = best
        rows = (*self.separable.measurements, *self._rows(passed if chosen else 0), *controls)
        if chosen is None:
            reason = f"{self._none()}; taken by separability: {self.separable.reason}"
            return Choice(self.separable.hook, reason, rows)
        return Choice(chosen, self._why(chosen, passed) + tie, rows)

    def _first_pass(self) -> None:
        """Measure few prompts at many hooks."""
        cfg, directions = self.use.model.cfg, self.candidates.directions
        gaps = {str(r.hook): r.value for r in self.separable.measurements if r.metric == "select_d_prime"}
        self.out = left_out(directions, self.limits, n_layers=cfg.n_layers, d_model=cfg.d_model)
        order = [hook for hook in in_order(directions, gaps, cfg.n_layers) if hook not in self.out]
        by_depth = sorted(order, key=lambda hook: (depth(hook, cfg.n_layers), hook))
        step = 1 if len(order) <= FEW_HOOKS else 2
        self._look_at(sorted(by_depth[::step], key=order.index))
        if step > 1:
            places = [by_depth.index(hook) for hook in self._ranked()[:2]]
            self._look_at([hook for place in places for hook in by_depth[max(0, place - 1) : place + 2]])
        for hook in by_depth:
            if hook not in self.found:
                self.out.setdefault(hook, "not measured: hooks next to it do less than others")
        # the separable one is measured whatever speaks against it: it is what this choice is compared with
        if self.separable.hook not in self.found and ablatable(directions[self.separable.hook], cfg.d_model):
            self._measure(self.separable.hook)

    def _look_at(self, hooks: Sequence[str]) -> None:
        """Measure hooks on few prompts, but for near-duplicates of hooks within the limits."""
        directions = self.candidates.directions
        for hook in hooks:
            within = [directions[h] for h, use in self.found.items() if h not in self.out and not self._failure(use)]
            if hook in self.found or hook in self.out:
                continue
            if near := twin(directions[hook], within, self.limits.near):
                self.out[hook] = f"near-duplicate: cosine above {self.limits.near:g} with {near}"
            else:
                self._measure(hook, least=-np.inf if hook == self.separable.hook else self.limits.min_bypass / 2)

    def _second_pass(self) -> None:
        """Measure all prompts at the best hooks, and judge them by the limits."""
        for hook in self._ranked()[: self.limits.finalists]:
            self._complete(hook)
            self.finalists.add(hook)
        for hook, use in self.found.items():
            late = "" if hook in self.finalists else "not a finalist: others do more on few prompts"
            if failure := self._failure(use) or late:
                self.out.setdefault(hook, failure)

    def _failure(self, use: _Use) -> str:
        """The first limit that a candidate does not keep, or an empty text."""
        limits, kl, (down, up) = self.limits, use.kl.mean(), self._shares(use)
        if not kl <= limits.max_kl:
            return f"KL too large: {kl:.2g} nats, above {limits.max_kl:g}"
        if not down >= limits.min_bypass:
            return f"does not bypass: {down:.0%} of the way, below {limits.min_bypass:.0%}"
        if not up >= limits.min_induce:
            return f"does not induce: {up:.0%} of the way, below {limits.min_induce:.0%}"
        return ""

    def _measure(self, hook: str, least: float = -np.inf) -> None:
        """Measure a hook on few prompts; what bypasses less than `least` is left out, and neither added nor charged."""
        direction, few = self.candidates.directions[hook], self.few
        bypass, unknown = few.bypass(direction), np.full(len(few.negative), NAN)
        found = self.found[hook] = _Use(bypass, unknown, unknown, self.limits.coeffs[0])
        if (down := self._shares(found)[0]) < least:
            self.out[hook] = f"does not bypass: {down:.0%} of the way on few prompts"
        else:
            self.found[hook] = found._replace(induce=self._added(few, hook, found.coeff), kl=few.kl(direction))
        self.selector.advance(1)

    def _added(self, use: CausalUse, hook: str, coeff: float) -> PerPrompt:
        return use.induce([self.candidates.directions[hook]], coeff, self.limits.scope)[0]

    def _complete(self, hook: str) -> None:
        """Take the first coefficient that nearly induces enough on few prompts, and measure the remaining prompts."""
        self._strengthen(hook, self.few, NEARLY * self.limits.min_induce)
        found, rest = self.found[hook], self.use.part(self.limits.coarse)
        direction = self.candidates.directions[hook]
        if rest.positive:
            found = found._replace(bypass=np.concatenate([found.bypass, rest.bypass(direction)]))
        if rest.negative:
            induce = np.concatenate([found.induce, self._added(rest, hook, found.coeff)])
            found = found._replace(induce=induce, kl=np.concatenate([found.kl, rest.kl(direction)]))
        self.found[hook] = found
        self._strengthen(hook, self.use, self.limits.min_induce)

    def _strengthen(self, hook: str, use: CausalUse, enough: float) -> None:
        """Raise the coefficient of the addition until it induces this share of the way, or all are tried."""
        for coeff in self.limits.coeffs[self.limits.coeffs.index(self.found[hook].coeff) + 1 :]:
            if self._shares(self.found[hook])[1] >= enough:
                return
            self.found[hook] = self.found[hook]._replace(induce=self._added(use, hook, coeff), coeff=coeff)

    def _ranked(self) -> list[str]:
        """Measured hooks that may be chosen: those within the KL limit first, then by the sum of both shares."""

        def rank(hook: str) -> tuple[bool, float]:
            use = self.found[hook]
            return bool(use.kl.mean() > self.limits.max_kl), -sum(min(share, 1.0) for share in self._shares(use))

        return sorted((hook for hook in self.found if hook not in self.out), key=rank)

    def _shares(self, use: _Use) -> tuple[float, float]:
        """Parts of the way between the levels of the same prompts: down under ablation, up under addition."""
        positive = self.use.base_positive[: len(use.bypass)].mean()
        negative = self.use.base_negative[: len(use.induce)].mean()
        way = positive - negative
        return float((positive - use.bypass.mean()) / way), float((use.induce.mean() - negative) / way)

    def _mean(self, values: PerPrompt, side: int) -> Interval:
        return clustered_mean(values, self.sides[side].clusters[: len(values)], seed=self.selector.seed)

    def _best(self, passing: Mapping[str, _Use]) -> tuple[str, str]:
        """Least bypass; of those not told apart from it the largest induce; of equal ones the depth set beforehand."""
        least = min(passing, key=lambda h: float(passing[h].bypass.mean()))
        tied = [h for h in passing if not self._mean(passing[h].bypass - passing[least].bypass, 0).low > 0]
        most = max(float(passing[h].induce.mean()) for h in tied)
        equal = [h for h in tied if float(passing[h].induce.mean()) >= most - 1e-6 * abs(most)]
        n_layers = self.use.model.cfg.n_layers
        best = min(equal, key=lambda h: (abs(depth(h, n_layers) - PREFERRED_DEPTH), depth(h, n_layers), h))
        if len(tied) == 1:
            return best, ""
        settled = "largest induce" if len(equal) == 1 else f"equal in induce too: nearest to depth {PREFERRED_DEPTH}"
        return best, f"; bypass not told apart from {', '.join(h for h in tied if h != best)}: {settled} taken"

    def _against_controls(self, hook: str) -> list[Measurement]:
        """Compare the direction with controls of its length on few prompts, and leave it out where they do as much."""
        if not self.limits.draws:
            return []
        few, real = self.use.part(stop=self.limits.control_prompts), self.candidates.directions[hook]
        own = self.found[hook]
        mine = (own.bypass[: len(few.positive)].mean(), own.induce[: len(few.negative)].mean())
        unedited = (few.base_positive.mean(), few.base_negative.mean())
        on = f"on the same {len(few.positive)} positive and {len(few.negative)} negative prompts"
        rows = [
            self._row(f"{metric}_{kind}", Interval(value, NAN, NAN), hook, f"{what}, {on}")
            for kind, what, found in (("unedited", "no edit", unedited), ("same", "the direction itself", mine))
            for metric, value in zip(("bypass", "induce"), found, strict=True)
        ]
        for kind, (make, title) in CONTROLS.items():
            drawn = make(self.candidates, real, self.limits.draws, self.selector.seed)
            effects, p = self._drawn(few, drawn, mine)
            for k, metric in enumerate(("bypass", "induce")):
                values, note = effects[:, k], f"mean and range of {len(effects)} {title}"
                spread = Interval(values.mean(), values.min(), values.max()) if len(values) else UNKNOWN
                rows.append(self._row(f"{metric}_{kind}", spread, hook, note))
                rows.append(self._row(f"{metric}_{kind}_p", Interval(p[k], NAN, NAN), hook))
            if max(p) > self.limits.max_p:
                self.out[hook] = f"no better than {kind}: {title} of its length do as much (p = {max(p):.2g})"
                return rows
        others = other_concepts(self.use.model, real, self.candidates.acts.positions)
        for name, found in zip(others, self._effects(few, list(others.values())) if others else [], strict=True):
            rows += [
                self._row(f"{metric}_concept", Interval(value, NAN, NAN), hook, name)
                for metric, value in zip(("bypass", "induce"), found, strict=True)
            ]
        return rows

    def _drawn(
        self, few: CausalUse, drawn: Iterator[Direction], mine: tuple[float, float]
    ) -> tuple[np.ndarray, tuple[float, float]]:
        """Bypass and induce of each draw, and p of both; drawing ends where p can no longer be small enough."""
        most = self.limits.max_p * (self.limits.draws + 1) - 1
        effects, extreme = list[tuple[float, float]](), np.zeros(2)
        while (part := list(islice(drawn, TOGETHER))) and extreme.max() <= most:
            for values in self._effects(few, part):
                effects.append(values)
                extreme += [values[0] <= mine[0], values[1] >= mine[1]]
        p = (1 + extreme) / (1 + len(effects))
        return np.array(effects).reshape(-1, 2), (float(p[0]), float(p[1]))

    def _effects(self, use: CausalUse, directions: Sequence[Direction]) -> list[tuple[float, float]]:
        """Mean bypass and mean induce of directions at one hook, added as often as the candidate there."""
        added = use.induce(directions, self.found[directions[0].hook].coeff, self.limits.scope)
        return [(float(use.bypass(d).mean()), float(a.mean())) for d, a in zip(directions, added, strict=True)]

    def _row(
        self, metric: str, value: Interval, hook: str | None = None, note: str | None = None, n: int | None = None
    ) -> Measurement:
        concept, split = self.candidates.acts.concept.name, self.candidates.split
        low, high = float(value.low), float(value.high)
        return Measurement(concept, metric, float(value.value), low, high, n, hook, split, note=note)

    def _rows(self, passed: int) -> list[Measurement]:
        use, notes = self.use, self._behaviour_note()
        levels = (use.base_positive, use.base_negative)
        rows = [
            self._row(f"behaviour_{side.name}", self._mean(levels[k], k), note=notes, n=len(side.prompts))
            for k, side in enumerate(self.sides)
        ]
        rows += [
            self._row(
                f"selection_prompts_{side.name}",
                Interval(float(len(side.prompts)), NAN, NAN),
                note=side.counted(),
                n=side.labelled,
            )
            for side in self.sides
        ]
        rows.append(self._row("chosen_by_separability", Interval(1.0, NAN, NAN), self.separable.hook))
        for hook, effects in self.found.items():
            shares, note = self._shares(effects), None if hook in self.finalists else "first pass"
            for metric, side in (("bypass", 0), ("induce", 1), ("kl", 1)):
                values = getattr(effects, metric)
                if not np.isfinite(values).all():
                    continue
                row = self._row(metric, self._mean(values, side), hook, note, len(values))
                rows.append(replace(row, coeff=effects.coeff) if metric == "induce" else row)
            for side, (metric, share) in enumerate(zip(("bypass", "induce"), shares, strict=True)):
                if np.isfinite(share):
                    change = getattr(effects, metric) - levels[side][: len(getattr(effects, metric))]
                    rows.append(self._row(f"{metric}_share", Interval(share, NAN, NAN), hook, note))
                    rows.append(self._row(f"{metric}_change", self._mean(change, side), hook, note, len(change)))
        for hook in self.candidates.directions:
            eligible = Interval(float(hook not in self.out), NAN, NAN)
            rows.append(self._row("causal_eligible", eligible, hook, self.out.get(hook)))
        return [*rows, self._row("causal_passed", Interval(float(passed), NAN, NAN))]

    def _behaviour_note(self) -> str:
        behaviour = self.selector.behaviours[self.candidates.acts.concept.name]
        return f"{behaviour.name}: log-odds of {self.use.openings.listed()}"

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

    def _why(self, chosen: str, passed: int) -> str:
        use, split, (down, up) = self.found[chosen], self.candidates.split, self._shares(self.found[chosen])
        fitted = " (which the directions were fitted on)" if split == "train" else ""
        left_out, separable = self._left_out(), self.separable.hook
        same = "as by separability" if chosen == separable else f"separability alone would take {separable}"
        fewest = min(len(side.prompts) for side in self.sides)
        few = f"; REMARK: fewer than {FEWEST} selection prompts on a side" if fewest < FEWEST else ""
        shown, other = (side.counted() for side in self.sides)
        return (
            f"on the {split} pairs{fitted}: {shown} show the behaviour and {other} do not; ablating it brings the"
            f" log-odds from {self.use.base_positive.mean():.2f} to {use.bypass.mean():.2f} ({down:.0%} of the way to"
            f" the other level), adding it {use.coeff:g} times from {self.use.base_negative.mean():.2f} to"
            f" {use.induce.mean():.2f} ({up:.0%}); KL"
            f" {use.kl.mean():.2g} nats; {passed} of {len(self.candidates.directions)} hooks pass"
            f"{f' ({left_out})' if left_out else ''}; {same}{few}"
        )
