"""Plots of drift during fine-tuning, from the monitor's rows. Concepts are compared at one and the same hook only."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from safety_lens.log import Measurement
from safety_lens.report.drift_tables import ALARM, Drift, Runs, digits_of
from safety_lens.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, save_figure, short_hook, whole_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ((BLUE, "o-"), (ORANGE, "s-"), (GREEN, "D-"), (PURPLE, "^-"), (SKY, "v-"), (GREY, "x-"))
METRICS = (
    ("cosine_to_baseline", "cosine to baseline"),
    ("cosine_cv", "cosine, corrected for noise"),
    ("retained_signal", "retained signal"),
    ("auroc_fixed", "AUROC, old direction"),
    ("auroc_current", "AUROC, new direction"),
    ("balanced_accuracy", "accuracy at the old threshold"),
    ("direction_norm", "norm, relative to step 0"),
    ("causal_use", "causal use, relative to step 0"),
)
"""Rows of the metric heat map; norms and causal use are divided by their value before training."""
RELATIVE = ("direction_norm", "causal_use")


def cosine_drift(rows: Sequence[Measurement], title: str = "") -> "Figure":
    """Cosine of every direction with its baseline over steps: a row of panels a concept, a column a common hook.

    Coloured: the cosine on the same pairs before and now. Black: the cosine corrected for the noise of estimating both,
    with its interval, where it is known. Dotted: a notice is given where the whole black interval lies below.
    """
    from matplotlib.figure import Figure

    d = Drift(rows)
    hooks = d.common or d.hooks[-1:]
    figure = Figure(figsize=(2.7 * len(hooks) + 0.9, 1.9 * len(d.subjects) + 1.3), layout="constrained")
    grid = figure.subplots(len(d.subjects), len(hooks), sharex=True, sharey="row", squeeze=False)
    for panels, subject, (color, style) in zip(grid, d.subjects, _cycle(len(d.subjects)), strict=True):
        for axes, hook in zip(panels, hooks, strict=True):
            _cosine_panel(axes, d, subject, hook, color, style)
        lowest = np.nanmin([d.curve(subject, "cosine_to_baseline", hook)[:, :2] for hook in hooks])
        panels[0].set(ylabel=subject, ylim=(max(-1.05, lowest - 0.1 * (1.02 - lowest)), 1.0 + 0.1 * (1.02 - lowest)))
    for axes, hook in zip(grid[0], hooks, strict=True):
        axes.set_title(short_hook(hook) + (" (headline)" if hook == d.headline else ""), fontsize=9)
    for axes in grid[-1]:
        whole_steps(axes)
    named = dict(zip(*reversed(grid[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{title}\ncosine of each direction with its baseline".strip(), fontsize=10)
    return figure


def _cosine_panel(axes: "Axes", d: Drift, subject: str, hook: str, color: str, style: str) -> None:
    fault = d.fault(subject, hook)
    color = GREY if fault else color
    _band(axes, d.steps, d.curve(subject, "cosine_to_baseline", hook), color, style, "on the same pairs, 95 % interval")
    corrected = np.array([d.known(subject, "cosine_cv", t, hook) for t in d.steps])
    _band(axes, d.steps, corrected, "black", "--", "corrected for noise, 95 % interval")
    axes.axhline(1, color="black", lw=0.6)
    if np.isfinite(limit := d.notice(subject)):
        axes.axhline(limit, color="black", lw=0.8, ls=":", label=f"notice: interval below {limit:g}")
    axes.spines[["top", "right"]].set_visible(False)
    if fault:
        axes.text(0.03, 0.05, "no result before training", transform=axes.transAxes, fontsize=7, color=ORANGE)


def layer_heatmap(rows: Sequence[Measurement], title: str = "", metric: str = "cosine_to_baseline") -> "Figure":
    """Layers × steps, one panel a concept, one colour scale for all. Hatched: the baseline there is no result."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    d = Drift(rows)
    grids = [np.array([[d.get(s, metric, t, h).value for t in d.steps] for h in d.hooks]) for s in d.subjects]
    low, high = (float(f(np.concatenate(grids))) for f in (np.nanmin, np.nanmax))
    width = max(2.6, 0.28 * len(d.steps) + 1)
    figure = Figure(figsize=(width * len(grids) + 1.6, max(3.0, 0.3 * len(d.hooks) + 1.6)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(grids), sharey=True))
    for axes, grid, subject in zip(panels, grids, d.subjects, strict=True):
        image = axes.imshow(grid, cmap="viridis", vmin=low, vmax=max(high, low + 1e-9), aspect="auto", origin="lower")
        axes.set_title(subject, fontsize=9)
        _step_ticks(axes, d.steps, width)
        for i, hook in enumerate(d.hooks):
            if d.fault(subject, hook):
                shape = Rectangle((-0.5, i - 0.5), len(d.steps), 1, fill=False, hatch="////", edgecolor="white", lw=0)
                axes.add_patch(shape)
    marks = [f"{short_hook(h)} ◂" if h in d.common else short_hook(h) for h in d.hooks]
    panels[0].set_yticks(range(len(d.hooks)), marks)
    figure.colorbar(image, ax=list(panels), label=metric.replace("_", " "))
    what = "◂ common hooks, at which concepts are compared; hatched: no result before training"
    figure.suptitle(f"{title}\n{what}".strip(), fontsize=10)
    return figure


def metric_heatmap(rows: Sequence[Measurement], title: str = "") -> "Figure":
    """Metric × step, one panel a concept, all at the headline hook. Every cell shows its number; empty: unknown."""
    from matplotlib.figure import Figure

    d = Drift(rows)
    hook = d.headline or d.hooks[-1]
    shown = [(m, label) for m, label in METRICS if any(d.row(s, m, d.last, hook) for s in d.subjects)]
    width = max(2.4, 0.4 * min(len(d.steps), 24))
    size = (width * len(d.subjects) + 3.0, 0.32 * len(shown) + 1.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(d.subjects), sharey=True))
    for axes, subject in zip(panels, d.subjects, strict=True):
        grid = np.array([_relative(d, subject, metric, hook) for metric, _ in shown])
        image = axes.imshow(grid, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            if len(d.steps) <= 24 and np.isfinite(value):
                ink = "black" if 0.12 < value < 0.88 else "white"
                axes.text(j, i, f"{value:.{digits_of(value)}f}", ha="center", va="center", fontsize=6, color=ink)
        axes.set_title(subject + (" (no result before training)" if d.fault(subject, hook) else ""), fontsize=8)
        _step_ticks(axes, d.steps, width)
    panels[0].set_yticks(range(len(shown)), [label for _, label in shown], fontsize=8)
    figure.colorbar(image, ax=list(panels), label="colours end at 0 and 1")
    figure.suptitle(
        f"{title}\nat {hook}; 1: as before training (AUROC and accuracy: 0.5 is chance)".strip(), fontsize=10
    )
    return figure


def refusal_odds(rows: Sequence[Measurement], title: str = "") -> "Figure":
    """Refusal log-odds of the first response token on harmful and harmless prompts, and below the refusal rates."""
    from matplotlib.figure import Figure

    d = Drift(rows)
    figure = Figure(figsize=(6.6, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, color, style in (("harmful", ORANGE, "s-"), ("lookalike", PURPLE, "^-"), ("harmless", BLUE, "o-")):
        for axes, metric in ((top, "refusal_log_odds"), (bottom, "refusal_rate")):
            curve = d.behaviour(name, metric)
            if np.isfinite(curve[:, 0]).any():
                _band(axes, d.probed, curve, color, style, f"{name} prompts")
    top.axhline(0, color="black", lw=0.6)
    top.set(ylabel="refusal log-odds (nats)")
    bottom.set(ylabel="share of prompts refused", ylim=(-0.03, 1.03))
    whole_steps(bottom)
    facts = d.behaviour("facts", "accuracy")
    if np.isfinite(facts[:, 0]).any():
        _band(bottom, d.probed, facts, GREEN, "D-", "facts answered rightly")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    alarm = next((t for t in d.probed if d.get("run", "level", t).value >= ALARM), None)
    if alarm is not None:
        for axes in (top, bottom):
            axes.axvline(alarm, color="black", ls="--", lw=1, label=f"first alarm, step {alarm}")
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{title}\nshaded: 95 % interval over prompts".strip(), fontsize=10)
    return figure


def drift_and_behaviour(rows: Sequence[Measurement], title: str = "") -> "Figure":
    """Cosine of every concept (headline hook) against the change of refusal log-odds, one point a step, with intervals.

    Points go from step 0 (upper right) along a line. A concept that moves while behaviour does not, or the reverse, is
    what the figure is for: it shows whether this drift says anything about this behaviour.
    """
    from matplotlib.figure import Figure

    d = Drift(rows)
    change = d.curve("behaviour/harmful", "refusal_log_odds_change")
    figure = Figure(figsize=(6.8, 4.8), layout="constrained")
    axes = figure.subplots()
    for subject, (color, style) in zip(d.subjects, _cycle(len(d.subjects)), strict=True):
        fault = d.fault(subject, d.headline)
        cosine = d.curve(subject, "cosine_to_baseline", d.headline)
        x_error, y_error = (np.abs(c[:, 1:] - c[:, :1]).T for c in (cosine, change))
        axes.errorbar(
            cosine[:, 0], change[:, 0], np.nan_to_num(y_error), np.nan_to_num(x_error),
            fmt=style, color=color, ms=4, lw=1, elinewidth=0.6, alpha=0.3 if fault else 1.0,
            label=subject + (" (no result before training)" if fault else ""),
        )  # fmt: skip
        axes.scatter(cosine[-1:, 0], change[-1:, 0], s=70, facecolors="none", edgecolors=color)
    axes.axhline(0, color="black", lw=0.6)
    axes.axvline(1, color="black", lw=0.6)
    axes.set(
        xlabel=f"cosine to baseline at {d.headline}", ylabel="change of refusal log-odds\non harmful prompts (nats)"
    )
    axes.set_title(f"{title}\n95 % intervals; ringed: the last step, {d.label(d.last)}".strip(), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def run_comparison(runs: Runs, title: str = "") -> "Figure":
    """Several runs side by side: cosine of each concept at the headline hook, and below refusals of harmful prompts."""
    from matplotlib.figure import Figure

    read = {name: Drift(rows) for name, rows in runs.items()}
    subjects = list(dict.fromkeys(s for d in read.values() for s in d.subjects))
    figure = Figure(figsize=(3.2 * max(2, len(subjects)) + 0.6, 6.0), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1])
    panels = np.atleast_1d(upper.subplots(1, len(subjects), sharey=True))
    for axes, subject in zip(panels, subjects, strict=True):
        for (name, d), (color, style) in zip(read.items(), _cycle(len(read)), strict=True):
            _band(axes, d.steps, d.curve(subject, "cosine_to_baseline", d.headline), color, style, name)
        first = next(iter(read.values()))
        axes.set_title(
            subject + ("\n(no result before training)" if first.fault(subject, first.headline) else ""), fontsize=9
        )
    panels[0].set(ylabel="cosine to baseline")
    for axes in panels:
        whole_steps(axes)
    below = lower.subplots(1, 2)
    for axes, metric, label in zip(
        below,
        ("refusal_rate", "refusal_log_odds_change"),
        ("harmful prompts refused", "change of refusal\nlog-odds (nats)"),
        strict=True,
    ):
        for (name, d), (color, style) in zip(read.items(), _cycle(len(read)), strict=True):
            _band(axes, d.probed, d.behaviour("harmful", metric), color, style, name)
        axes.set(ylabel=label)
        whole_steps(axes)
    below[0].set_ylim(-0.03, 1.03)
    below[1].axhline(0, color="black", lw=0.6)
    for axes in (*panels, *below):
        axes.spines[["top", "right"]].set_visible(False)
    hook = next((d.headline for d in read.values()), None)
    figure.suptitle(f"{title}\ndirections at {hook}; shaded: 95 % interval".strip(), fontsize=10)
    lower.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


FIGURES: dict[str, Callable[..., "Figure"]] = {
    "cosine": cosine_drift,
    "layers": layer_heatmap,
    "metrics": metric_heatmap,
    "refusal": refusal_odds,
    "behaviour": drift_and_behaviour,
}
"""What is drawn of one run."""
PROBED = ("refusal", "behaviour")
"""Figures that need behaviour probes."""


def draw_run(rows: Sequence[Measurement], folder: Path, title: str = "", *, pdf: bool = False) -> list[Path]:
    """Every figure of one run, as `drift-<name>.png`; those of behaviour only where it was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    probed = any(row.subject == "behaviour/harmful" for row in rows)
    ends = (".png", ".pdf") if pdf else (".png",)
    return [
        save_figure(draw(rows, title=title), folder / f"drift-{name}{end}")
        for name, draw in FIGURES.items()
        if probed or name not in PROBED
        for end in ends
    ]


def draw_runs(runs: Runs, folder: Path, *, pdf: bool = False) -> list[Path]:
    """The figures of every run, in a folder of its name where there are several, and their comparison."""
    if len(runs) == 1:
        return [path for name, rows in runs.items() for path in draw_run(rows, folder, name, pdf=pdf)]
    written = [path for name, rows in runs.items() for path in draw_run(rows, folder / name, name, pdf=pdf)]
    for end in (".png", ".pdf") if pdf else (".png",):
        written.append(save_figure(run_comparison(runs), folder / f"drift-comparison{end}"))
    return written


def _cycle(n: int) -> list[tuple[str, str]]:
    return [STYLES[i % len(STYLES)] for i in range(n)]


def _band(
    axes: "Axes", steps: Sequence[int], curve: Float[np.ndarray, "step 3"], color: str, style: str, label: str
) -> None:
    known = np.isfinite(curve[:, 0])
    x = np.array(steps)[known]
    axes.plot(x, curve[known, 0], style, color=color, ms=4, label=label)
    axes.fill_between(x, curve[known, 1], curve[known, 2], color=color, alpha=0.18, lw=0)


def _step_ticks(axes: "Axes", steps: Sequence[int], width: float) -> None:
    """Label the columns of a heat map of this many inches, as many of them as fit next to one another."""
    most = max(1, int(width / (0.08 * len(str(max(steps))) + 0.1)))
    every = -(-len(steps) // most)
    axes.set_xlabel("step")
    axes.set_xticks(range(0, len(steps), every), [str(s) for s in steps[::every]], fontsize=8)


def _relative(d: Drift, subject: str, metric: str, hook: str) -> Float[np.ndarray, " step"]:
    read = d.known if metric == "cosine_cv" else d.get
    values = np.array([read(subject, metric, step, hook).value for step in d.steps])
    start = d.get(subject, metric, 0, hook).value
    return values / start if metric in RELATIVE and start else values
