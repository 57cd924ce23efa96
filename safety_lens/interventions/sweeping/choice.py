"""The scores of a sweep as arrays, and the cell that the selection prompts choose."""

from collections.abc import Sequence
from functools import cached_property
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from safety_lens.interventions.sweeping.plan import Arm, Plan
from safety_lens.log import Measurement
from safety_lens.paired import paired_effect, per_prompt, slopes
from safety_lens.probes.selection import PREFERRED_DEPTH, depth
from safety_lens.stats import Interval

NAN = float("nan")
MORE_DEGENERATE = 0.1
"""A cell that breaks this share of answers more than the baseline has is not chosen."""
WANTED = {"lower": -1.0, "higher": 1.0, "either": 0.0}


class Grid:
    """Scores by arm: arrays [prompt, seed], NaN where an answer was not scored or an arm not run."""

    def __init__(self, plan: Plan, records: Sequence[dict[str, Any]], checks: Sequence[dict[str, Any]]) -> None:
        self.plan = plan
        self.baseline = Arm("baseline")
        self.coeffs = [c for c in plan.coeffs if c != 0]
        self.kl: dict[str, dict[str, Any]] = {c["arm"]: c for c in checks if c["what"] == "benign_kl"}
        self._ran = {(record["arm"], plan.prompts[record["prompt"]].split) for record in records}
        self._seed = {seed: column for column, seed in enumerate(plan.seeds)}
        self._all: dict[tuple[str, str], Float[np.ndarray, "prompt seed"]] = {}
        for record in records:
            for name, value in {**record["scores"], "degenerate": record["degenerate"]}.items():
                table = self._table(name, record["arm"])
                table[record["prompt"], self._seed[record["seed"]]] = NAN if value is None else float(value)

    def _table(self, metric: str, arm: str) -> Float[np.ndarray, "prompt seed"]:
        shape = (len(self.plan.prompts), len(self.plan.seeds))
        return self._all.setdefault((metric, arm), np.full(shape, NAN))

    def scores(self, metric: str, arm: Arm, split: str, label: str | None = None) -> Float[np.ndarray, "prompt seed"]:
        """Scores of the prompts of one role (and of one label)."""
        keep = [p.split == split and label in (None, p.label) for p in self.plan.prompts]
        found: Float[np.ndarray, "prompt seed"] = self._table(metric, arm.key)[np.array(keep)]
        return found

    def degenerate(self, arm: Arm, split: str) -> Float[np.ndarray, "prompt seed"]:
        """1 where an answer is empty or loops, 0 where it does not, NaN where there is none."""
        return self.scores("degenerate", arm, split)

    @cached_property
    def labels(self) -> list[str]:
        """Labels of the test prompts, where there are several."""
        found = list(dict.fromkeys(p.label for p in self.plan.prompts if p.split == "test" and p.label is not None))
        return found if len(found) > 1 else []

    def ran(self, arm: Arm, split: str) -> bool:
        """Look for answers of an arm to prompts of this role."""
        return (arm.key, split) in self._ran

    def steered(self, subject: str, split: str) -> list[Arm]:
        """The cells of one direction that ran on prompts of this role."""
        sites = [i for i, site in enumerate(self.plan.sites) if site.subject == subject]
        return [arm for i in sites for c in self.coeffs if self.ran(arm := Arm("steer", i, c), split)]

    def controls(self, kind: str, site: int) -> list[Arm]:
        """The control arms of one kind that ran at a site."""
        every = self.plan.controls_at(site, self.coeffs)
        return [arm for arm in every if arm.kind == kind and self.ran(arm, "test")]

    def polarity(self, metric: str, site: int) -> tuple[float, str]:
        """Which way a larger coefficient is expected to move the score, and why: never read off the test prompts."""
        if not any(p.split == "selection" for p in self.plan.prompts):
            return 1.0, "a larger coefficient is expected to raise the score"
        curves = []
        for coeff in self.plan.coeffs:
            found = self.scores(metric, self.baseline if coeff == 0 else Arm("steer", site, coeff), "selection")
            curves.append(per_prompt(np.zeros_like(found), found).difference)
        slope = slopes(np.array(self.plan.coeffs), np.stack(curves)).mean.value
        if slope < 0:
            return -1.0, "a larger coefficient lowers the score on the selection prompts"
        return 1.0, "a larger coefficient raises the score on the selection prompts, or does not move it"

    def wanted(self, metric: str, arm: Arm) -> float:
        """1 where the score should rise in this cell, −1 where it should fall."""
        return WANTED[self.plan.goal] or self.polarity(metric, arm.site)[0] * float(np.sign(arm.coeff))

    def too_broken(self, arm: Arm) -> bool:
        """Whether selection prompts' answers are degenerate more often than the baseline's, by `MORE_DEGENERATE`."""
        shares = [np.nanmean(self.degenerate(a, "selection")) for a in (arm, self.baseline)]
        return bool(shares[0] > shares[1] + MORE_DEGENERATE)


class Ranking(NamedTuple):
    """The cells of one direction on the selection prompts, by the first scorer.

    effects: of every cell that ran. allowed: cells within the limits. gain: by how much those move the score the wanted
    way, where they do. best: None where none does. tied: how many cells gain as much as the best.
    """

    effects: dict[Arm, Interval]
    allowed: list[Arm]
    gain: dict[Arm, float]
    best: Arm | None
    tied: int


def ranked(grid: Grid, subject: str) -> Ranking:
    """Rank the cells of a direction that ran on selection prompts."""
    metric, sign = grid.plan.scorers[0], WANTED[grid.plan.goal]
    base, arms = grid.scores(metric, grid.baseline, "selection"), grid.steered(subject, "selection")
    effects = {arm: paired_effect(base, grid.scores(metric, arm, "selection")) for arm in arms}
    allowed = [arm for arm in arms if _allowed(grid, arm)]
    gain = {a: (sign * effects[a].value if sign else abs(effects[a].value)) for a in allowed}
    gain = {a: g for a, g in gain.items() if isfinite(g) and g > 1e-12}
    tied = [a for a, g in gain.items() if g >= max(gain.values()) - 1e-12]
    best = min(tied, key=lambda a: _preference(grid, a)) if tied else None
    return Ranking(effects, allowed, gain, best, len(tied))


def chosen_rows(grid: Grid, rows: Sequence[Measurement]) -> list[Measurement]:
    """Per direction: the cell that moves the first scorer furthest the wanted way on the selection prompts.

    Empty without selection prompts. `selection_penalty` is how much smaller the effect is on the test prompts: what
    choosing on few prompts flatters.
    """
    plan = grid.plan
    if not any(p.split == "selection" for p in plan.prompts):
        return []
    subjects = dict.fromkeys(site.subject for site in plan.sites)
    return [row for subject in subjects for row in _choice_of(grid, subject, plan.scorers[0], rows)]


def _choice_of(grid: Grid, subject: str, metric: str, rows: Sequence[Measurement]) -> list[Measurement]:
    plan, found = grid.plan, ranked(grid, subject)
    n = int(np.isfinite(grid.scores(metric, grid.baseline, "selection")).any(1).sum())
    out = _selection_rows(grid, subject)
    within = f"{len(found.allowed)} of {len(found.effects)} cells are within the limits"
    if found.best is None:
        note = f"no cell moved {metric} the wanted way ({plan.goal}) on {n} selection prompts; {within}"
        broken = sum(grid.too_broken(arm) for arm in found.effects)
        if (floor := floor_note(grid, metric)) is not None:
            note = f"{note}; {floor}" if found.effects else floor
        if broken:
            note += (
                f"; {broken} of {len(found.effects)} cells break the text: try smaller coefficients, or another scope"
            )
        return [*out, Measurement(subject, "chosen", NAN, split="selection", note=note)]
    best, moved = found.best, f"{len(found.gain)} of them move it so"
    note = f"moves {metric} furthest ({plan.goal}) on {n} selection prompts; {within}, {moved}"
    if found.tied > 1:
        note += f"; {found.tied} cells tie: the lowest benign KL, the weakest, the nearest to depth {PREFERRED_DEPTH}"
    name = plan.sites[best.site].name
    out.append(Measurement(subject, "chosen", 1.0, n=n, hook=name, coeff=best.coeff, split="selection", note=note))
    test = next(
        r for r in rows
        if (r.subject, r.metric, r.hook, r.coeff, r.split) == (subject, f"{metric}/effect", name, best.coeff, "test")
    )  # fmt: skip
    effect = found.effects[best].value
    lost = abs(effect) - float(np.sign(effect)) * test.value
    what = "effect on the selection prompts minus effect on the test prompts, in the direction chosen"
    return [*out, Measurement(subject, f"{metric}/selection_penalty", lost, hook=name, coeff=best.coeff, note=what)]


def _selection_rows(grid: Grid, subject: str) -> list[Measurement]:
    """Effects of every scorer in every cell that ran on selection prompts."""
    out = []
    for metric in grid.plan.scorers:
        base = grid.scores(metric, grid.baseline, "selection")
        for arm in grid.steered(subject, "selection"):
            scores = grid.scores(metric, arm, "selection")
            place: dict[str, Any] = {"hook": grid.plan.sites[arm.site].name, "coeff": arm.coeff, "split": "selection"}
            effect, n = paired_effect(base, scores), per_prompt(base, scores).n
            out.append(Measurement(subject, f"{metric}/effect", *effect, n=n, **place))
    return out


def _floor(grid: Grid, metric: str) -> float | None:
    """The one score, 0 or 1, of all unsteered answers: an end of a share's scale. None where they differ."""
    scores = [grid.scores(metric, grid.baseline, split) for split in ("selection", "test")]
    known = {float(x) for x in np.concatenate(scores).ravel() if isfinite(x)}
    return known.pop() if len(known) == 1 and known <= {0.0, 1.0} else None


def out_of_reach(grid: Grid) -> bool:
    """Say whether all unsteered answers stand at the end of the scale that the goal asks for."""
    end = _floor(grid, grid.plan.scorers[0])
    return end is not None and grid.plan.goal == ("higher" if end else "lower")


def floor_note(grid: Grid, metric: str) -> str | None:
    """Remark on a scorer by which all unsteered answers stand at 0, or at 1; None for any other."""
    end = _floor(grid, metric)
    if end is None:
        return None
    note = f"{metric} is {end:g} in every unsteered answer: no edit can {'raise' if end else 'lower'} it"
    if metric == grid.plan.scorers[0] and out_of_reach(grid):
        note += f", so the goal {grid.plan.goal!r} cannot be met on these prompts"
    return note


def _allowed(grid: Grid, arm: Arm) -> bool:
    cost = grid.kl.get(arm.key)
    within = grid.plan.max_kl is None or (cost is not None and cost["mean"][0] <= grid.plan.max_kl)
    return within and not grid.too_broken(arm)


def _preference(grid: Grid, arm: Arm) -> tuple[float, float, float, str, float]:
    """Lowest cost first; what is equal in all that matters is settled by name, as the reason says."""
    cost = grid.kl.get(arm.key)
    site = grid.plan.sites[arm.site]
    off = abs(depth(site.parts[0].hook, grid.plan.n_layers) - PREFERRED_DEPTH)
    return (0.0 if cost is None else cost["mean"][0], abs(arm.coeff), off, site.name, -arm.coeff)
