"""The scores of a sweep as arrays, and the cell that the selection prompts choose."""

from collections.abc import Sequence
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
from jaxtyping import Float

from safety_lens.interventions.sweeping.plan import Arm, Plan
from safety_lens.log import Measurement
from safety_lens.paired import paired_effect, per_prompt, slopes
from safety_lens.probes.selection import PREFERRED_DEPTH, depth

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

    def controls(self, kind: str, site: int) -> list[Arm]:
        return [arm for arm in self.plan.arms if arm.kind == kind and arm.site == site]

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


def chosen_rows(grid: Grid, rows: Sequence[Measurement]) -> list[Measurement]:
    """Per direction: the cell that moves the first scorer furthest the wanted way on the selection prompts.

    Empty without selection prompts. `selection_penalty` is how much smaller the effect is on the test prompts: what
    choosing on few prompts flatters.
    """
    plan = grid.plan
    if not any(p.split == "selection" for p in plan.prompts):
        return []
    return [
        row
        for subject in dict.fromkeys(site.subject for site in plan.sites)
        for row in _choice_of(grid, subject, plan.scorers[0], rows)
    ]


def _choice_of(grid: Grid, subject: str, metric: str, rows: Sequence[Measurement]) -> list[Measurement]:
    plan = grid.plan
    base = grid.scores(metric, grid.baseline, "selection")
    arms = [Arm("steer", i, c) for i, s in enumerate(plan.sites) if s.subject == subject for c in grid.coeffs]
    effects = {arm: paired_effect(base, grid.scores(metric, arm, "selection")) for arm in arms}
    n = int(np.isfinite(base).any(1).sum())
    out = [
        Measurement(
            subject, f"{metric}/effect", *e, n=n, hook=plan.sites[a.site].name, coeff=a.coeff, split="selection"
        )
        for a, e in effects.items()
    ]
    sign = WANTED[plan.goal]
    allowed = [arm for arm in arms if _allowed(grid, arm)]
    gain = {a: (sign * effects[a].value if sign else abs(effects[a].value)) for a in allowed}
    gain = {a: g for a, g in gain.items() if isfinite(g) and g > 1e-12}
    within = f"{len(allowed)} of {len(arms)} cells are within the limits"
    if not gain:
        broken = sum(grid.too_broken(arm) for arm in arms)
        note = f"no cell moved {metric} the wanted way ({plan.goal}) on {n} selection prompts; {within}"
        if (end := _end(base)) is not None:
            note += f"; {metric} is {end:g} in every unsteered answer"
        if broken:
            note += f"; {broken} of {len(arms)} cells break the text: try smaller coefficients, or another scope"
        return [*out, Measurement(subject, "chosen", NAN, split="selection", note=note)]
    top = max(gain.values())
    tied = [a for a, g in gain.items() if g >= top - 1e-12]
    best = min(tied, key=lambda a: _preference(grid, a))
    note = f"moves {metric} furthest ({plan.goal}) on {n} selection prompts; {within}, {len(gain)} of them move it so"
    if len(tied) > 1:
        note += f"; {len(tied)} cells tie: the lowest benign KL, the weakest, the nearest to depth {PREFERRED_DEPTH}"
    name = plan.sites[best.site].name
    out.append(Measurement(subject, "chosen", 1.0, n=n, hook=name, coeff=best.coeff, split="selection", note=note))
    test = next(
        r for r in rows
        if (r.subject, r.metric, r.hook, r.coeff, r.split) == (subject, f"{metric}/effect", name, best.coeff, "test")
    )  # fmt: skip
    lost = abs(effects[best].value) - float(np.sign(effects[best].value)) * test.value
    what = "effect on the selection prompts minus effect on the test prompts, in the direction chosen"
    return [*out, Measurement(subject, f"{metric}/selection_penalty", lost, hook=name, coeff=best.coeff, note=what)]


def _end(scores: Float[np.ndarray, "prompt seed"]) -> float | None:
    """The one value that all known scores have, where it is 0 or 1: an end of a share's scale."""
    known = set(scores[np.isfinite(scores)].tolist())
    return known.pop() if len(known) == 1 and known <= {0.0, 1.0} else None


def floor_notes(plan: Plan, records: Sequence[dict[str, Any]]) -> list[str]:
    """Remarks on scorers by which all unsteered answers stand at 0 or at 1: only one direction is left to move."""
    grid, out = Grid(plan, records, ()), []
    for name in plan.scorers:
        end = _end(np.concatenate([grid.scores(name, grid.baseline, split) for split in ("selection", "test")]))
        if end is None:
            continue
        out.append(f"{name} is {end:g} in every unsteered answer: no edit can {'raise' if end else 'lower'} it")
        if name == plan.scorers[0] and plan.goal == ("higher" if end else "lower"):
            out[-1] += f", so the goal {plan.goal!r} cannot be met on these prompts"
    return out


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
