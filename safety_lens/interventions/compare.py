"""Methods at equal cost: each is tuned to the same benign KL, and only then is asked what it does.

A stronger edit does more and breaks more, so effects at strengths of one's own choosing compare nothing. Three sets of
prompts are kept apart: strengths are tuned on the first, what they cost is measured again on the second, and the effect
on the third, against the unedited model with the same random numbers. Beside the methods stand random directions tuned
to the same cost, and a sentence in the system prompt, which is the baseline to beat.

A gated edit that never fires on benign prompts costs nothing at any strength, so the target bounds it by nothing: it
stands at its strongest, and only the share of degenerate answers shows what it breaks where it does fire.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.bootstrap import mean_interval, ratio_interval
from safety_lens.data.pairs import last_user_text
from safety_lens.errors import DataError
from safety_lens.forced import Continuation, continuation_logprobs
from safety_lens.frames import Frame
from safety_lens.generation import generate
from safety_lens.interventions.comparison import NAN, Compared, EqualCost, Point, with_front
from safety_lens.interventions.edits import Edit
from safety_lens.interventions.fluency import degenerate
from safety_lens.interventions.scorers.completion import Completion, Scorer
from safety_lens.interventions.side_effects import BenignKL, benign_kl, benign_rows
from safety_lens.interventions.strength import MakeHooks, Solved, solve_strength
from safety_lens.interventions.sweeping.run import with_system
from safety_lens.models import named_hooks
from safety_lens.paired import paired_effect, per_prompt, sign_flip
from safety_lens.stats import Interval
from safety_lens.types import FwdHook, Prompt

GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
PART = 8
"""Rows whose next-token distributions are held at once."""


@dataclass(frozen=True)
class Method:
    """The intervention at a strength, and the largest strength that is tried (1 for ablation: all of it)."""

    make: MakeHooks
    largest: float = 1.0


def equal_cost(
    model: HookedTransformer,
    methods: Mapping[str, Method | MakeHooks],
    prompts: Sequence[Prompt],
    scorer: Scorer,
    *,
    tuning: Sequence[Prompt],
    benign: Sequence[Prompt],
    target_kl: float = 0.1,
    wanted: float = -1.0,
    random: Sequence[Method | MakeHooks] = (),
    instruction: str | None = None,
    also: Sequence[Scorer] = (),
    grid: Sequence[float] = GRID,
    seeds: Sequence[int] = (0,),
    temperature: float = 0.0,
    max_new_tokens: int = 32,
    raw: bool = False,
    seed: int = 0,
    on_method: Callable[[str], None] | None = None,
) -> EqualCost:
    """Tune every method to the same mean KL on `tuning`, then compare what it does to `prompts`.

    Args:
        methods: name → intervention by strength > 0, or a `Method` that says how far to go (default 1).
        scorer: the effect is the paired change of this score. wanted: its sign tells which change is wished for.
        tuning, benign: prompts that the edits are not meant for: strengths are tuned on the first, costs are measured
            on the second.
        random: the same intervention with random directions, at least 20 of them; each is tuned as well.
        instruction: a sentence for the system prompt, the prompt-only baseline.
        also: further scores to report beside the effect; degenerate answers are always counted.
        grid: multiples of the tuned strength that make up the Pareto plot.
        seeds, temperature: sampling; every cell draws the same numbers for the same prompt and seed.

    Raises:
        DataError: a set of prompts is empty or two share a prompt, a bad number, or what the scorer raises.
    """
    _check(prompts, tuning, benign, seeds, grid)
    run = _Run(model, list(prompts), scorer, also, seeds, temperature, max_new_tokens, raw, seed)
    run.tuning, run.held_out = (
        benign_rows(model, part, max_new_tokens=max_new_tokens, raw=raw) for part in (tuning, benign)
    )
    tell = on_method or (lambda _: None)
    found = []
    for name, method in methods.items():
        found.append(run.method(name, _as_method(method), target_kl, grid))
        tell(name)
    controls = []
    for k, method in enumerate(random):
        controls.append(run.method(f"random {k}", _as_method(method), target_kl, (1.0,)))
        tell(f"random {k}")
    prompted = [run.prompted(instruction, benign)] if instruction is not None else []
    results = run.judged([*found, *prompted], controls, wanted)
    return EqualCost(scorer.name, target_kl, wanted, with_front(results, wanted), run.baseline(), len(prompts), seed)


def _as_method(method: Method | MakeHooks) -> Method:
    return method if isinstance(method, Method) else Method(method)


def _check(
    prompts: Sequence[Prompt],
    tuning: Sequence[Prompt],
    benign: Sequence[Prompt],
    seeds: Sequence[int],
    grid: Sequence[float],
) -> None:
    sets = {"prompts": prompts, "tuning": tuning, "benign": benign}
    for name, part in sets.items():
        if not part:
            raise DataError(f"an equal-cost comparison needs {name}=: got no prompts")
    for (a, first), (b, second) in combinations(sets.items(), 2):
        if shared := {str(p) for p in first} & {str(p) for p in second}:
            raise DataError(f"{a} and {b} share {len(shared)} prompts ({sorted(shared)[0]!r}): keep them apart")
    if not seeds or len(set(seeds)) != len(seeds):
        raise DataError(f"seeds must be one or more different numbers, got {list(seeds)}")
    if any(not g > 0 for g in grid):
        raise DataError(f"the grid holds multiples of the tuned strength, above 0: got {list(grid)}")


@dataclass(eq=False)
class _Run:
    """One comparison in progress: the prompts, how they are answered, and the unedited answers' scores."""

    model: HookedTransformer
    prompts: list[Prompt]
    scorer: Scorer
    also: Sequence[Scorer]
    seeds: Sequence[int]
    temperature: float
    max_new_tokens: int
    raw: bool
    seed: int

    def __post_init__(self) -> None:
        self.tuning: list[Continuation] = []
        self.held_out: list[Continuation] = []
        self.base, self.base_others = self._scores(self.prompts, ())

    def baseline(self) -> dict[str, Interval]:
        """Means of the unedited answers, by scorer."""
        scores = {self.scorer.name: self.base, **self.base_others}
        return {name: mean_interval(_by_prompt(found), seed=self.seed) for name, found in scores.items()}

    def method(self, name: str, method: Method, target_kl: float, grid: Sequence[float]) -> Compared:
        """A method tuned, its cost on held-out prompts and its effect over the grid."""
        solved = solve_strength(self.model, self.tuning, method.make, target_kl, largest=method.largest)
        strengths = sorted({min(g * solved.strength, method.largest) for g in (*grid, 1.0)} - {0.0})
        if solved.strength == 0:  # a jump right above 0: nothing to measure
            return Compared(name, solved, (), None)
        edits = [method.make(s) for s in strengths]
        costs = benign_kl(self.model, self.held_out, edits, seed=self.seed)
        points = [self._point(s, kl, self.prompts, hooks) for s, kl, hooks in zip(strengths, costs, edits, strict=True)]
        tuned = strengths.index(solved.strength)
        points[tuned] = replace(points[tuned], firing=self._firing(edits[tuned]))
        return Compared(name, solved, tuple(points), tuned)

    def prompted(self, instruction: str, benign: Sequence[Prompt]) -> Compared:
        """The prompt-only baseline: it has no strength, so its cost is whatever it is."""
        told = encode_for(self.model, [with_system(p, instruction) for p in benign], raw=self.raw)
        others = [Continuation(tuple(e.ids), r.tokens) for e, r in zip(told, self.held_out, strict=True)]
        per_row = _kl_between(self.model, self.held_out, others)
        totals, counts = (np.array([f(x) for x in per_row], dtype=float) for f in (np.sum, len))
        every = np.concatenate(per_row)
        mean = ratio_interval(totals, counts, seed=self.seed)
        kl = BenignKL(mean, float(np.quantile(every, 0.95)), len(per_row), len(every))
        point = self._point(NAN, kl, [with_system(p, instruction) for p in self.prompts], ())
        return Compared("prompt only", None, (point,), 0)

    def _point(self, strength: float, kl: BenignKL, prompts: Sequence[Prompt], hooks: Sequence[FwdHook]) -> Point:
        scores, others = self._scores(prompts, hooks)
        effect = paired_effect(self.base, scores, seed=self.seed)
        change = per_prompt(self.base, scores).difference
        means = {name: mean_interval(_by_prompt(found), seed=self.seed) for name, found in others.items()}
        fluent = (np.where(o["degenerate"] > 0, NAN, x) for o, x in ((self.base_others, self.base), (others, scores)))
        means[f"effect_fluent/{self.scorer.name}"] = paired_effect(*fluent, seed=self.seed)
        return Point(strength, kl, effect, change, means)

    def _scores(
        self, prompts: Sequence[Prompt], hooks: Sequence[FwdHook]
    ) -> tuple[Float[np.ndarray, "prompt seed"], dict[str, Float[np.ndarray, "prompt seed"]]]:
        """Scores of the answers to every prompt with every seed; texts are not kept."""
        said = generate(
            self.model,
            [p for p in prompts for _ in self.seeds],
            hooks=hooks,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            streams=[(s, i) for i in range(len(prompts)) for s in self.seeds],
            raw=self.raw,
            read_first=getattr(self.scorer, "read_first", None),
        )
        asked = [p for p in self.prompts for _ in self.seeds]  # a scorer sees the prompt without the instruction
        texts = [Completion(last_user_text(p), g.text, g.tokens, g.first) for p, g in zip(asked, said, strict=True)]
        shape = (len(prompts), len(self.seeds))
        others = {"degenerate": degenerate(texts).astype(float).reshape(shape)}
        others |= {s.name: s(texts).reshape(shape) for s in self.also}
        return self.scorer(texts).reshape(shape), others

    def _firing(self, hooks: Sequence[FwdHook]) -> float:
        """Share of held-out tokens within the scope at which a gated edit fires; NaN for a method without gates."""
        seen = np.zeros(2)

        def counting(edit: Edit) -> Edit:
            def watch(frame: Frame, _: Any, touched: Any) -> None:
                seen[:] += int(touched.sum()), int(edit.scope(frame).sum())

            return edit.watched(watch)

        named = named_hooks(self.model, hooks)
        if not any(isinstance(fn, Edit) and fn.gate is not None for _, fn in named):
            return NAN
        watched = [(n, counting(fn) if isinstance(fn, Edit) and fn.gate is not None else fn) for n, fn in named]
        for k in range(0, len(self.held_out), PART):
            continuation_logprobs(self.model, self.held_out[k : k + PART], hooks=watched)
        return float(seen[0] / seen[1]) if seen[1] else NAN

    def judged(self, results: Sequence[Compared], controls: Sequence[Compared], wanted: float) -> list[Compared]:
        """p values at the tuned points, over all methods by max-T and against the random directions."""
        at = [r.point for r in results]
        known = [p.change if p is not None else np.full(len(self.prompts), NAN) for p in at]
        tested = sign_flip(np.stack(known), seed=self.seed) if known else None
        chance = np.array([np.sign(wanted) * p.effect.value for c in controls if (p := c.point) is not None])
        out = []
        for k, (result, point) in enumerate(zip(results, at, strict=True)):
            better = NAN
            if point is not None and len(chance):
                better = (1 + int((chance >= np.sign(wanted) * point.effect.value).sum())) / (1 + len(chance))
            alone, p_max = (float(tested.p[k]), float(tested.p_max[k])) if tested is not None else (NAN, NAN)
            out.append(replace(result, p=alone, p_max=p_max, p_random=better))
        return [*out, *([_pooled(controls, self.seed)] if controls else [])]


def _by_prompt(scores: Float[np.ndarray, "prompt seed"]) -> Float[np.ndarray, " prompt"]:
    known = np.isfinite(scores)
    total = np.where(known, scores, 0.0).sum(1)
    means: Float[np.ndarray, " prompt"] = np.divide(
        total, known.sum(1), out=np.full(len(scores), NAN), where=known.any(1)
    )
    return means


def _pooled(controls: Sequence[Compared], seed: int) -> Compared:
    """All random directions as one row: what they do on average, what they cost on average."""
    at = [p for c in controls if (p := c.point) is not None]
    name = f"random directions ({len(at)})"
    if not at:
        return Compared(name, None, (), None)
    change = np.mean([p.change for p in at], axis=0)
    kl = np.array([p.kl.mean.value for p in at])
    cost = BenignKL(mean_interval(kl, seed=seed), float(np.mean([p.kl.p95 for p in at])), at[0].kl.n, at[0].kl.tokens)
    others = {n: mean_interval(np.array([p.others[n].value for p in at]), seed=seed) for n in at[0].others}
    strength = float(np.mean([p.strength for p in at]))
    missed = sum(c.solved is not None and not c.solved.reached for c in controls)
    note = f"{missed} of {len(controls)} do not reach the target" if missed else None
    reached = Solved(strength, float(kl.mean()), (), missed == 0, note)
    return Compared(name, reached, (Point(strength, cost, mean_interval(change, seed=seed), change, others),), 0)


def _kl_between(
    model: HookedTransformer, rows: Sequence[Continuation], others: Sequence[Continuation]
) -> list[Float[np.ndarray, " new"]]:
    """KL(behind row ‖ behind other) at every token, where both hold the same tokens behind different prompts."""
    out = []
    for k in range(0, len(rows), PART):
        pairs = zip(*(continuation_logprobs(model, part[k : k + PART]) for part in (rows, others)), strict=True)
        for p, q in ((a.double(), b.double()) for a, b in pairs):
            out.append((p.exp() * (p - q)).nan_to_num(0.0).sum(-1).clamp(min=0.0).numpy())
    return out
