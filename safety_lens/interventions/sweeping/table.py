"""A sweep's answers as measurements: effects with intervals, controls, side effects, and the choice of a cell.

Everything is paired with the unsteered answers to the same prompts and seeds; the unit of inference is the prompt.
Effects of a scorer S are the metrics `S/effect`, `S/p`, … listed in `EFFECTS`; a row's `hook` is the site, its `coeff`
the coefficient. Rows of the split "selection" chose, rows of the split "test" report. Cells that no test prompt ran in
have rows of the split "selection" alone.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from safety_lens.bootstrap import mean_interval
from safety_lens.interventions.sweeping.choice import Grid, chosen_rows, floor_note
from safety_lens.interventions.sweeping.plan import Arm, Plan
from safety_lens.log import Measurement
from safety_lens.paired import (
    any_above,
    expected_maximum,
    holm,
    monotone,
    paired_effect,
    per_prompt,
    shares,
    sign_flip,
    slopes,
)
from safety_lens.stats import UNKNOWN, Interval, wilson

NAN = float("nan")
EFFECTS = {
    "mean": "mean score under the edit",
    "effect": "mean change against the same prompts' and seeds' unsteered answers",
    "effect_fluent": "the same, over answers that are not degenerate on either side",
    "p": "two-sided sign-flip p of the effect",
    "p_holm": "p, Holm over the coefficients of this site",
    "p_max": "p, max-T over the sites at this coefficient",
    "p_all": "p_max, Holm over coefficients: corrected for the whole grid",
    "improved": "share of prompts that moved the wanted way",
    "worsened": "share of prompts that moved the other way",
    "random": "mean effect of random directions; low and high: 2.5th and 97.5th percentile of directions",
    "random_mean": "the same mean with its interval over prompts",
    "p_random": "share of random directions with an effect as large, itself included",
    "slope_random": "mean slope of random directions; low and high: percentiles of directions",
    "p_slope": "share of random directions as steep, itself included",
    "shuffled": "mean effect of refits on shuffled labels; low and high: percentiles of refits",
    "expected_maximum": "mean over prompts of the highest of their seeds",
    "any_half": "share of prompts with a score of 0.5 or more in some seed",
}
TABLE_COLUMNS = ("effect", "effect_fluent", "p", "p_holm", "p_max", "p_all", "random", "p_random", "shuffled")


def summarise(plan: Plan, records: Sequence[dict[str, Any]], checks: Sequence[dict[str, Any]]) -> list[Measurement]:
    """Every number of a sweep, in an order that its plan fixes."""
    grid = Grid(plan, records, checks)
    rows = _identity_rows(plan, checks)
    for metric in plan.scorers:
        rows += _baseline_rows(grid, metric)
        for site in dict.fromkeys(arm.site for arm in _tested(grid)):
            rows += _site_rows(grid, metric, site)
        rows += _p_rows(grid, metric)
    rows += _side_effect_rows(grid)
    return rows + chosen_rows(grid, rows)


def _tested(grid: Grid) -> list[Arm]:
    """The cells that ran on test prompts, site by site."""
    return [arm for s in dict.fromkeys(x.subject for x in grid.plan.sites) for arm in grid.steered(s, "test")]


def _identity_rows(plan: Plan, checks: Sequence[dict[str, Any]]) -> list[Measurement]:
    note = "coefficient 0 through the steered path gave the unsteered path's tokens; n: tokens compared"
    found = [c for c in checks if c["what"] == "identity"]
    sites = [plan.sites[c["site"]] for c in found]
    return [
        Measurement(s.subject, "identity", 1.0, n=c["tokens"], hook=s.name, coeff=0.0, note=note)
        for s, c in zip(sites, found, strict=True)
    ]


def _row(grid: Grid, metric: str, what: str, arm: Arm, interval: Interval, n: int, **more: Any) -> Measurement:
    """A row of one arm, of the test prompts unless `more` names another split."""
    more = {"split": "test", **more}
    site = grid.plan.sites[arm.site] if arm.site >= 0 else None
    return Measurement(
        arm.kind if site is None else site.subject,
        f"{metric}/{what}",
        *interval,
        n=n,
        hook=None if site is None else site.name,
        coeff=arm.coeff,
        **more,
    )


def _baseline_rows(grid: Grid, metric: str) -> list[Measurement]:
    """The unsteered answers, and those to the prompt-only baseline where there is one."""
    rows = []
    base = grid.scores(metric, grid.baseline, "test")
    arms = [grid.baseline] + ([Arm("system")] if grid.plan.system else [])
    for arm in arms:
        found = grid.scores(metric, arm, "test")
        mean, *others = _level_rows(grid, metric, arm, found)
        rows += [replace(mean, note=floor_note(grid, metric)) if arm.kind == "baseline" else mean, *others]
        if arm.kind == "system":
            n = per_prompt(base, found).n
            note = f"prompt-only baseline, no edit: system prompt {grid.plan.system!r}"
            rows.append(_row(grid, metric, "effect", arm, paired_effect(base, found), n, note=note))
    return rows


def _level_rows(grid: Grid, metric: str, arm: Arm, found: Float[np.ndarray, "prompt seed"]) -> list[Measurement]:
    own = per_prompt(np.zeros_like(found), found)
    level = mean_interval(own.difference)
    known = own.difference[np.isfinite(own.difference)]
    if len(known) and known.min() >= 0 and known.max() <= 1:  # a share stays one
        level = level._replace(low=max(0.0, level.low), high=min(1.0, level.high))
    rows = [_row(grid, metric, "mean", arm, level, own.n)]
    if len(grid.plan.seeds) > 1:
        n = int(np.isfinite(found.max(1)).sum())
        rows.append(_row(grid, metric, "expected_maximum", arm, expected_maximum(found), n))
        rows.append(_row(grid, metric, "any_half", arm, any_above(found), n))
    return rows


def _site_rows(grid: Grid, metric: str, site: int) -> list[Measurement]:
    rows = []
    for arm in _tested(grid):
        if arm.site == site:
            rows += _cell_rows(grid, metric, arm)
            rows += _control_rows(grid, metric, site, arm.coeff)
    return rows + _dose_rows(grid, metric, site)


def _cell_rows(grid: Grid, metric: str, arm: Arm) -> list[Measurement]:
    base, found = grid.scores(metric, grid.baseline, "test"), grid.scores(metric, arm, "test")
    gap = per_prompt(base, found)
    rows = _level_rows(grid, metric, arm, found)
    rows.append(_row(grid, metric, "effect", arm, paired_effect(base, found), gap.n))
    fluent = np.where(grid.degenerate(grid.baseline, "test") + grid.degenerate(arm, "test") > 0, NAN, found)
    kept = per_prompt(base, fluent).n
    rows.append(_row(grid, metric, "effect_fluent", arm, paired_effect(base, fluent), kept))
    moved = shares(gap.difference, wanted=grid.wanted(metric, arm))
    rows.append(_row(grid, metric, "improved", arm, moved.improved, moved.n))
    rows.append(_row(grid, metric, "worsened", arm, moved.worsened, moved.n))
    for label in grid.labels:
        part, before = grid.scores(metric, arm, "test", label), grid.scores(metric, grid.baseline, "test", label)
        n = per_prompt(before, part).n
        rows.append(_row(grid, metric, "effect", arm, paired_effect(before, part), n, split=f"test:{label}"))
    return rows


def _control_rows(grid: Grid, metric: str, site: int, coeff: float) -> list[Measurement]:
    """What directions that mean nothing do at the same place and coefficient; nothing where none were run."""
    rows = []
    base, steered = grid.scores(metric, grid.baseline, "test"), Arm("steer", site, coeff)
    for kind, what in (("random", "random"), ("shuffled", "shuffled")):
        arms = [a for a in grid.controls(kind, site) if a.coeff == coeff]
        if not arms:
            continue
        gaps = np.stack([per_prompt(base, grid.scores(metric, a, "test")).difference for a in arms])
        known, read = np.isfinite(gaps).any(1), np.isfinite(gaps).any(0)
        means = np.array([np.nanmean(gap) for gap in gaps[known]])
        band = UNKNOWN if not len(means) else Interval(float(means.mean()), *_percentiles(means))
        effect = paired_effect(base[read], grid.scores(metric, steered, "test")[read]).value
        n = f"{int(read.sum())} of {len(read)} test prompts, where the direction's effect is {effect:.2f}"
        note = None if read.all() else f"controls ran on {n}"
        rows.append(_row(grid, metric, what, steered, band, len(means), note=note))
        if kind == "random" and len(means):
            over = mean_interval(np.array([np.nanmean(c) if np.isfinite(c).any() else NAN for c in gaps.T]))
            rows.append(_row(grid, metric, "random_mean", steered, over, int(read.sum())))
            p = float((1 + (np.abs(means) >= abs(effect) - 1e-12).sum()) / (1 + len(means)))
            rows.append(_row(grid, metric, "p_random", steered, UNKNOWN._replace(value=p), len(means), note=note))
    return rows


def _percentiles(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _dose_rows(grid: Grid, metric: str, site: int) -> list[Measurement]:
    """Slopes per prompt over all coefficients that ran here, 0 included."""
    tested = {arm.coeff: arm for arm in _tested(grid) if arm.site == site} | {0.0: grid.baseline}
    coeffs, arms = np.array(sorted(tested)), [tested[c] for c in sorted(tested)]
    curves = [per_prompt(np.zeros_like(s), s).difference for s in (grid.scores(metric, a, "test") for a in arms)]
    wanted, why = grid.polarity(metric, site)
    found, order = slopes(coeffs, np.stack(curves), wanted=wanted), monotone(coeffs, np.stack(curves))
    trust = "" if found.trusted else "; a share of anti-steerable prompts of 0.4 or more is not ruled out: do not trust"
    named = {
        "slope": (found.mean, found.n),
        "steerable": (found.steerable, found.n),
        "flat": (found.flat, found.n),
        "anti_steerable": (found.anti_steerable, found.n),
        "monotone": (order.mean, order.n),
    }
    place = plan_site(grid.plan, site)
    rows = [
        Measurement(*(place[0], f"{metric}/{what}"), *i, n=n, hook=place[1], split="test", note=why + trust)
        for what, (i, n) in named.items()
    ]
    return rows + _slope_controls(grid, metric, site)


def _slope_controls(grid: Grid, metric: str, site: int) -> list[Measurement]:
    """The slope of random directions, and how many are as steep, over the coefficients that the controls ran at.

    What any push does, whatever its direction, is alike for both signs and cancels here.
    """
    controls = grid.controls("random", site)
    coeffs = sorted({0.0, *(arm.coeff for arm in controls)})
    if len(coeffs) < 3:
        return []
    own = _mean_slope(grid, metric, Arm("steer", site), coeffs)
    drawn = [
        _mean_slope(grid, metric, Arm("random", site, 0.0, k), coeffs) for k in sorted({a.number for a in controls})
    ]
    random = np.array([slope for slope in drawn if np.isfinite(slope)])
    if not len(random) or not np.isfinite(own):
        return []
    p = float((1 + (np.abs(random) >= abs(own) - 1e-12).sum()) / (1 + len(random)))
    subject, name = plan_site(grid.plan, site)
    place: dict[str, Any] = {"n": len(random), "hook": name, "split": "test"}
    band = Interval(float(random.mean()), *_percentiles(random))
    note = f"over coefficients {', '.join(f'{c:g}' for c in coeffs)}"
    said = "share of random directions as steep, itself included"
    return [
        Measurement(subject, f"{metric}/slope_random", *band, note=note, **place),
        Measurement(subject, f"{metric}/p_slope", p, note=said, **place),
    ]


def _mean_slope(grid: Grid, metric: str, like: Arm, coeffs: Sequence[float]) -> float:
    arms = [grid.baseline if c == 0 else Arm(like.kind, like.site, c, like.number) for c in coeffs]
    levels = [grid.scores(metric, arm, "test") for arm in arms]
    curves = [per_prompt(np.zeros_like(level), level).difference for level in levels]
    return slopes(np.array(coeffs), np.stack(curves)).mean.value


def plan_site(plan: Plan, site: int) -> tuple[str, str]:
    """Subject and name of a site."""
    return plan.sites[site].subject, plan.sites[site].name


def _p_rows(grid: Grid, metric: str) -> list[Measurement]:
    """Sign-flip p of every cell: alone, over coefficients, over sites, over both."""
    tested, base = _tested(grid), grid.scores(metric, grid.baseline, "test")
    shape = (len(grid.coeffs), len(grid.plan.sites))
    alone, over_sites = np.full(shape, NAN), np.full(shape, NAN)
    for k, coeff in enumerate(grid.coeffs):
        arms = [arm for arm in tested if arm.coeff == coeff]
        if arms:
            gaps = np.stack([per_prompt(base, grid.scores(metric, a, "test")).difference for a in arms])
            sites = [arm.site for arm in arms]
            alone[k, sites], over_sites[k, sites] = sign_flip(gaps)
    by_coeff = np.stack([holm(column) for column in alone.T], axis=1)
    both = np.stack([holm(column) for column in over_sites.T], axis=1)
    table = {"p": alone, "p_holm": by_coeff, "p_max": over_sites, "p_all": both}
    n = int(np.isfinite(base).any(1).sum())
    return [
        _row(grid, metric, what, arm, UNKNOWN._replace(value=float(values[grid.coeffs.index(arm.coeff), arm.site])), n)
        for arm in tested
        for what, values in table.items()
    ]


def _side_effect_rows(grid: Grid) -> list[Measurement]:
    rows = []
    searched = [arm for s in dict.fromkeys(x.subject for x in grid.plan.sites) for arm in grid.steered(s, "selection")]
    for arm in dict.fromkeys([grid.baseline, *_tested(grid), *searched]):
        subject, hook = ("baseline", None) if arm.site < 0 else plan_site(grid.plan, arm.site)
        place: dict[str, Any] = {"hook": hook, "coeff": arm.coeff}
        for split in (s for s in ("test", "selection") if grid.ran(arm, s)):
            broken = grid.degenerate(arm, split)
            known = broken[np.isfinite(broken)]
            share = wilson(int(known.sum()), len(known))
            rows.append(Measurement(subject, "degenerate", *share, n=len(known), split=split, **place))
        cost = grid.kl.get(arm.key)
        if cost is not None:
            place["split"] = "benign"
            mean = Interval(*(NAN if v is None else v for v in cost["mean"]))
            rows.append(Measurement(subject, "benign_kl", *mean, n=cost["n"], note="nats per token", **place))
            rows.append(Measurement(subject, "benign_kl_p95", cost["p95"], n=cost["n"], **place))
    return rows


def table_csv(rows: Iterable[Measurement], scorers: Sequence[str]) -> str:
    """One line per scorer, site and coefficient, of the test prompts; empty where a number is unknown."""
    cells: dict[tuple[str, str, float], dict[str, Measurement]] = {}
    for row in rows:
        if row.hook is not None and row.coeff and row.split in ("test", "benign"):
            cells.setdefault((row.subject, row.hook, row.coeff), {})[row.metric] = row
    names = [n for c in TABLE_COLUMNS for n in ([c] if c.startswith("p") else [c, f"{c}_low", f"{c}_high"])]
    costs = ("degenerate", "benign_kl", "benign_kl_p95")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["direction", "site", "coeff", "scorer", "prompts", *names, *costs])
    for (subject, hook, coeff), found in cells.items():
        if not any(f"{scorer}/effect" in found for scorer in scorers):
            continue  # a cell that the search left: no test prompt ran in it
        for scorer in scorers:
            values = [v for c in TABLE_COLUMNS for v in _numbers(found.get(f"{scorer}/{c}"), c)]
            effect = found.get(f"{scorer}/effect")
            extra = [_number(found[c].value) if c in found else "" for c in costs]
            writer.writerow([subject, hook, f"{coeff:g}", scorer, "" if effect is None else effect.n, *values, *extra])
    return out.getvalue()


def _numbers(row: Measurement | None, column: str) -> list[str]:
    width = 1 if column.startswith("p") else 3
    return [""] * width if row is None else [_number(v) for v in (row.value, row.low, row.high)[:width]]


def _number(value: float) -> str:
    return "" if value != value else f"{value:.6g}"
