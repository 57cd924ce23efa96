"""What an equal-cost comparison found: a table, a Pareto front, and the rows that both are drawn from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float

from safety_lens.interventions.side_effects import BenignKL
from safety_lens.interventions.strength import Solved
from safety_lens.log import Measurement
from safety_lens.stats import Interval

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Point:
    """One method at one strength.

    kl: its cost on held-out benign prompts. effect: mean paired change of the score. change: of each prompt. others:
    further means (share of degenerate answers, ...). firing: share of tokens at which a gate fires, NaN without one.
    on_front: no other point costs as little and does as much.
    """

    strength: float
    kl: BenignKL
    effect: Interval
    change: Float[np.ndarray, " prompt"] = field(repr=False)
    others: dict[str, Interval] = field(default_factory=dict)
    firing: float = NAN
    on_front: bool = False


@dataclass(frozen=True, eq=False)
class Compared:
    """One method over its grid.

    solved: how its strength was tuned, None for the prompt-only baseline. tuned: index of the point at that strength,
    None where nothing could be measured. p, p_max: two-sided, that the effect is 0, alone and over all methods.
    p_random: share of random directions at the same cost that do as much, the method counted among them.
    """

    name: str
    solved: Solved | None
    points: tuple[Point, ...]
    tuned: int | None
    p: float = NAN
    p_max: float = NAN
    p_random: float = NAN

    @property
    def point(self) -> Point | None:
        """The point at the tuned strength."""
        return None if self.tuned is None else self.points[self.tuned]


@dataclass(frozen=True, eq=False)
class EqualCost:
    """Methods at one benign KL. baseline: means of the unedited answers by scorer. n: prompts with an effect."""

    scorer: str
    target_kl: float
    wanted: float
    results: tuple[Compared, ...]
    baseline: dict[str, Interval]
    n: int
    seed: int = 0

    def __getitem__(self, name: str) -> Compared:
        return next(r for r in self.results if r.name == name)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Every number as a row: subject is the method, coeff its strength."""
        first = [
            Measurement("unedited", name, *value, n=self.n, split="test", seed=self.seed)
            for name, value in self.baseline.items()
        ]
        return (*first, *(row for result in self.results for row in self._rows(result)))

    def _rows(self, result: Compared) -> Iterator[Measurement]:
        for k, point in enumerate(result.points):
            at = Measurement(result.name, "", NAN, n=len(point.change), split="test", seed=self.seed)
            at = replace(at, coeff=None if np.isnan(point.strength) else point.strength)
            values = {
                f"effect/{self.scorer}": point.effect,
                "benign_kl": point.kl.mean,
                "benign_kl_p95": Interval(point.kl.p95, NAN, NAN),
                "on_front": Interval(float(point.on_front), NAN, NAN),
                **point.others,
            }
            if k == result.tuned:
                values |= {
                    "equal_cost": Interval(float(result.solved is not None and result.solved.reached), NAN, NAN),
                    "p": Interval(result.p, NAN, NAN),
                    "p_max": Interval(result.p_max, NAN, NAN),
                    "p_random": Interval(result.p_random, NAN, NAN),
                    "firing_rate": Interval(point.firing, NAN, NAN),
                }
            note = _note(result, self.target_kl)
            for metric, (value, low, high) in values.items():
                told = note if metric == "equal_cost" else None
                n = point.kl.n if metric.startswith("benign") else at.n
                yield replace(at, metric=metric, value=value, low=low, high=high, note=told, n=n)
        if not result.points:
            told = _note(result, self.target_kl)
            yield Measurement(result.name, "equal_cost", 0.0, split="test", seed=self.seed, note=told)


def _note(result: Compared, target: float) -> str | None:
    if result.solved is None:
        return f"has no strength: not tuned to {target:g}"
    return result.solved.note


def non_dominated(cost: Float[np.ndarray, " n"], gain: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which points no other point beats: none costs no more and gains no less, with one of the two strictly better."""
    cheaper = cost[:, None] <= cost
    better = gain[:, None] >= gain
    strict = (cost[:, None] < cost) | (gain[:, None] > gain)
    best: Bool[np.ndarray, " n"] = ~np.any(cheaper & better & strict, axis=0)
    return best


def with_front(results: Sequence[Compared], wanted: float) -> tuple[Compared, ...]:
    """The same results with the points on the common Pareto front marked."""
    points = [p for r in results for p in r.points]
    if not points:
        return tuple(results)
    cost = np.array([p.kl.mean.value for p in points])
    gain = np.array([np.sign(wanted) * p.effect.value for p in points])
    marks = iter(non_dominated(cost, gain).tolist())
    return tuple(replace(r, points=tuple(replace(p, on_front=next(marks)) for p in r.points)) for r in results)
