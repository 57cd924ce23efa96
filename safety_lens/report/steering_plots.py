"""Plots of a steering sweep, drawn from its saved measurements: every effect beside its controls and its cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from safety_lens.log import Measurement
from safety_lens.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, save_figure, short_hook
from safety_lens.report.steering_tables import Cells, searched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Float[np.ndarray, "point 3"]
BROKEN = 0.1
"""Cells with this share of degenerate answers above the baseline's are hatched: a score of broken text says little."""


def coefficient_sweep(rows: Sequence[Measurement], subject: str, scorer: str) -> "Figure":
    """Effect over coefficients at one site, with its 95 % band, the random and shuffled controls, and the cost below.

    The site is the one that the selection prompts chose, else the one with the largest effect.
    """
    from matplotlib.figure import Figure

    cells = Cells(rows, subject, scorer)
    site, x = cells.shown_site, _with_zero(cells.coeffs)
    figure = Figure(figsize=(7.2, 6.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _control(top, x, _curve(cells, site, x, "random"), GREY, "random directions, mean and 95 % of them", "//")
    _control(top, x, _curve(cells, site, x, "shuffled"), PURPLE, "shuffled labels, mean and 95 % of them", "\\\\")
    _line(top, x, _curve(cells, site, x, "effect"), BLUE, "direction, 95 % interval over prompts")
    fluent = _curve(cells, site, x, "effect_fluent")
    top.plot(x, fluent[:, 0], ls=":", color=BLUE, lw=1.4, label="only answers that are not degenerate")
    if cells.system is not None:
        top.axhline(cells.system.value, color=GREEN, ls="-.", lw=1.2, label="system prompt, no edit")
    top.axhline(0, color="black", lw=0.6)
    top.set(ylabel=f"change of {scorer}")
    _mark_chosen(top, cells, site)
    _cost(bottom, cells, site, x)
    base = "" if cells.baseline is None else f"; unsteered {scorer} {cells.baseline.value:.2f}"
    n = next((r.n for c in cells.coeffs if (r := cells.row(site, c, "effect"))), None)
    top.set_title(f"{subject} at {site}\n{n} test prompts{base}{cells.remark}", fontsize=10)
    bottom.set(xlabel="coefficient")
    _plain(top, bottom)
    _legend(figure, top, bottom, columns=2)
    return figure


def layer_heatmap(rows: Sequence[Measurement], subject: str, scorer: str) -> "Figure":
    """Effect at every site and coefficient; a dot where p < 0.05 over the whole grid, hatched where answers break.

    Of the test prompts, or of the selection prompts where a search looked at more sites than it reports.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    looked = searched(rows, subject, scorer)
    cells = looked or Cells(rows, subject, scorer)
    values = np.array([[cells.get(site, c, "effect").value for c in cells.coeffs] for site in cells.sites])
    limit = float(np.nanmax(np.abs(values), initial=1e-9))
    figure = Figure(
        figsize=(max(6.0, 0.75 * len(cells.coeffs) + 2.6), max(3.2, 0.42 * len(cells.sites) + 2)), layout="constrained"
    )
    axes = figure.subplots()
    colors = colormaps["RdBu_r"].with_extremes(bad="#dddddd")
    image = axes.imshow(values, cmap=colors, vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    figure.colorbar(image, ax=axes, label=f"change of {scorer}")
    for row, site in enumerate(cells.sites):
        for column, coeff in enumerate(cells.coeffs):
            if _is_broken(cells, rows, site, coeff):
                ink = "white" if abs(values[row, column]) > limit / 2 else "#444444"
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="///", edgecolor=ink, lw=0))
            if cells.get(site, coeff, "p_all").value < 0.05:
                axes.plot(column, row, "o", color="black", markeredgecolor="white", markersize=6)
            if cells.is_chosen(site, coeff):
                axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="black", lw=2))
    axes.set_xticks(range(len(cells.coeffs)), [f"{c:g}" for c in cells.coeffs])
    axes.set_yticks(range(len(cells.sites)), [short_hook(site) for site in cells.sites])
    axes.set(xlabel="coefficient", ylabel="site")
    mark = "dot: p < 0.05 over the whole grid" if looked is None else "grey: not tried"
    axes.set_title(
        f"{subject} → {scorer}, {cells.split} prompts\n{mark}; frame: chosen; hatched: answers break{cells.remark}",
        fontsize=10,
    )
    return figure


def layer_effectiveness(rows: Sequence[Measurement], subject: str, scorer: str) -> "Figure":
    """Both signs of one strength at every site with intervals and random controls; below, the slope over all strengths.

    The strength is the chosen one, else the one with the largest mean effect. Where a search looked at more sites than
    it reports: the strength it tried at most sites, on the selection prompts, without slopes.
    """
    from matplotlib.figure import Figure

    looked = searched(rows, subject, scorer)
    cells = looked or Cells(rows, subject, scorer)
    strength = _strength(cells) if looked is None else _commonest(cells)
    x = np.arange(len(cells.sites), dtype=float)
    figure = Figure(figsize=(max(7.0, 0.5 * len(x) + 3), 6.6 if looked is None else 4.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2]) if looked is None else [figure.subplots()]
    top, bottom = panels[0], panels[-1]
    for sign, color, marker, shift in ((1, BLUE, "o", -0.12), (-1, ORANGE, "s", 0.12)):
        coeff = sign * strength
        if coeff not in cells.coeffs:
            continue
        effect = np.array([cells.get(site, coeff, "effect") for site in cells.sites])
        control = np.array([cells.get(site, coeff, "random") for site in cells.sites])
        known = np.isfinite(control).all(1)
        for k in np.flatnonzero(known):
            top.fill_between(x[k] + shift + np.array([-0.1, 0.1]), *control[k, 1:], color=color, alpha=0.18, lw=0)
        shaded = "shaded: 95 % of random directions" if known.any() else "no random directions were run"
        _bars(top, x + shift, effect, color, marker, f"coefficient {coeff:+g} ({shaded})")
    top.axhline(0, color="black", lw=0.6)
    top.set(ylabel=f"change of {scorer}")
    if looked is None:
        slope = np.array([cells.get(site, None, "slope") for site in cells.sites])
        _bars(bottom, x, slope, GREEN, "D", "slope over all coefficients, 95 % interval over prompts")
        bottom.axhline(0, color="black", lw=0.6)
        bottom.set(ylabel=f"{scorer} per unit")
    bottom.set(xlabel="site")
    many = len(x) > 6
    bottom.set_xticks(
        x, [short_hook(s) for s in cells.sites], rotation=45 if many else 0, ha="right" if many else "center"
    )
    title = f"{subject} → {scorer} at every site, both signs, {cells.split} prompts{cells.remark}"
    top.set_title(title, fontsize=10)
    _plain(*panels)
    _legend(figure, *panels, columns=1)
    return figure


def summary(rows: Sequence[Measurement], subject: str, scorer: str) -> "Figure":
    """Three views of one direction: what cells do and cost, what they do prompt by prompt, and to each subset."""
    from matplotlib.figure import Figure

    cells = Cells(rows, subject, scorer)
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    cost, prompts, subsets = figure.subplots(1, 3)
    _cost_and_effect(cost, cells)
    _prompt_shares(prompts, cells)
    _subsets(subsets, rows, cells)
    figure.suptitle(f"{subject} → {scorer}, test prompts{cells.remark}", fontsize=11)
    _plain(cost, prompts, subsets)
    return figure


def _cost_and_effect(axes: "Axes", cells: Cells) -> None:
    points = np.array(
        [[cells.get(s, c, "benign_kl").value, *cells.get(s, c, "effect"), c] for s in cells.sites for c in cells.coeffs]
    )
    known = points[np.isfinite(points[:, :2]).all(1)]
    axes.axhline(0, color="black", lw=0.6)
    axes.set(xlabel="KL on benign prompts (nats per token)", ylabel=f"change of {cells.scorer}")
    axes.set_title("effect against cost", fontsize=10)
    if not len(known):
        axes.text(0.5, 0.5, "no benign prompts were given:\nthe cost is unknown", ha="center", transform=axes.transAxes)
        return
    if known[:, 0].max() > 0.1:
        axes.set_xscale("symlog", linthresh=0.01)
    for sign, color, marker in ((1, BLUE, "o"), (-1, ORANGE, "s")):
        part = known[np.sign(known[:, 4]) == sign]
        if len(part):
            errors = np.abs(part[:, 2:4] - part[:, 1:2]).T
            label = f"{'positive' if sign > 0 else 'negative'} coefficients"
            axes.errorbar(part[:, 0], part[:, 1], errors, fmt=marker, color=color, ms=4, lw=0.8, alpha=0.7, label=label)
    if cells.chosen is not None and cells.chosen.hook is not None:
        at = str(cells.chosen.hook), cells.chosen.coeff
        place = cells.get(*at, "benign_kl").value, cells.get(*at, "effect").value
        axes.plot(*place, "*", color="black", ms=13, label="chosen", zorder=5)
    axes.set_xlim(0, 1.3 * float(known[:, 0].max()))
    _legend_below(axes)


def _prompt_shares(axes: "Axes", cells: Cells) -> None:
    site, x = cells.shown_site, np.array(cells.coeffs)
    places = np.arange(len(x))
    better = np.array([cells.get(site, c, "improved").value for c in cells.coeffs])
    worse = np.array([cells.get(site, c, "worsened").value for c in cells.coeffs])
    axes.bar(places, better, color=GREEN, label="moved the wanted way")
    axes.bar(places, -worse, color=ORANGE, label="moved the other way")
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xticks(places, [f"{c:g}" for c in cells.coeffs], rotation=45 if len(x) > 7 else 0)
    axes.set(xlabel="coefficient", ylabel="share of prompts", ylim=(-1.02, 1.02))
    anti = cells.get(site, None, "anti_steerable")
    note = "" if np.isnan(anti.value) else f"\nanti-steerable {anti.value:.2f} [{anti.low:.2f}, {anti.high:.2f}]"
    axes.set_title(f"prompt by prompt at {short_hook(site)}{note}", fontsize=10)
    _legend_below(axes)


def _subsets(axes: "Axes", rows: Sequence[Measurement], cells: Cells) -> None:
    site, x = cells.shown_site, _with_zero(cells.coeffs)
    found = [r for r in rows if r.subject == cells.subject and r.hook == site and r.metric == f"{cells.scorer}/effect"]
    labels = list(dict.fromkeys(str(r.split) for r in found if str(r.split).startswith("test:")))
    styles = zip((BLUE, ORANGE, GREEN, PURPLE, GREY), ("o-", "s--", "D-.", "^:", "v-"), strict=True)
    for split, (color, style) in zip(labels or ["test"], styles, strict=False):
        part = {r.coeff: r for r in found if r.split == split}
        at = [c for c in x.tolist() if c == 0 or c in part]
        curve = np.array([[part[c].value, part[c].low, part[c].high] if c else [0.0] * 3 for c in at])
        n = max((r.n or 0) for r in part.values())
        name = split.removeprefix("test:") if labels else "all prompts"
        axes.plot(at, curve[:, 0], style, color=color, ms=4, label=f"{name} (n={n})")
        axes.fill_between(at, curve[:, 1], curve[:, 2], color=color, alpha=0.15, lw=0)
    axes.axhline(0, color="black", lw=0.6)
    axes.set(xlabel="coefficient", ylabel=f"change of {cells.scorer}", xlim=(x.min(), x.max()))
    axes.set_title(f"subsets of prompts at {short_hook(site)}", fontsize=10)
    _legend_below(axes)


def _legend_below(axes: "Axes") -> None:
    """Legend under the panel, where it covers no bar or error bar."""
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def _with_zero(coeffs: Sequence[float]) -> Float[np.ndarray, " coeff"]:
    return np.array(sorted({0.0, *coeffs}))


def _curve(cells: Cells, site: str, x: Float[np.ndarray, " coeff"], what: str) -> Curve:
    """Value and limits over coefficients; at 0 an effect is 0 by the identity that the sweep has checked."""
    return np.array([(0.0, 0.0, 0.0) if c == 0 else cells.get(site, float(c), what) for c in x], dtype=float)


def _line(axes: "Axes", x: Float[np.ndarray, " coeff"], curve: Curve, color: str, label: str) -> None:
    axes.plot(x, curve[:, 0], "o-", color=color, markersize=4, label=label, zorder=4)
    axes.fill_between(x, curve[:, 1], curve[:, 2], color=color, alpha=0.2, linewidth=0, zorder=3)


def _control(axes: "Axes", x: Float[np.ndarray, " coeff"], curve: Curve, color: str, label: str, hatch: str) -> None:
    known = np.isfinite(curve[:, 0])
    if known.sum() < 2:  # coefficient 0 alone: the control was not run here
        return
    axes.plot(x[known], curve[known, 0], ".--", color=color, lw=1.2, label=label)
    axes.fill_between(
        x[known], curve[known, 1], curve[known, 2], facecolor="none", edgecolor=color, alpha=0.4, lw=0, hatch=hatch
    )


def _cost(axes: "Axes", cells: Cells, site: str, x: Float[np.ndarray, " coeff"]) -> None:
    kl, tail = _curve(cells, site, x, "benign_kl"), _curve(cells, site, x, "benign_kl_p95")
    if np.isfinite(kl[:, 0]).sum() > 1:
        _line(axes, x, kl, ORANGE, "KL on benign prompts, mean per token")
        axes.plot(x, tail[:, 0], ":", color=ORANGE, label="its 95th percentile over tokens")
    axes.set(ylabel="KL (nats per token)")
    other = axes.twinx()
    broken = [cells.get(site, float(c), "degenerate").value if c else np.nan for c in x]
    other.plot(x, broken, "x", color="black", ms=5, label="degenerate answers (right axis)")
    other.set(ylim=(-0.02, 1.02), ylabel="share degenerate")
    other.spines[["top"]].set_visible(False)
    axes.plot([], [], "x", color="black", ms=5, label="degenerate answers (right axis)")


def _bars(
    axes: "Axes",
    x: Float[np.ndarray, " site"],
    values: Float[np.ndarray, "site 3"],
    color: str,
    marker: str,
    label: str,
) -> None:
    errors = np.abs(values[:, 1:] - values[:, :1]).T
    axes.errorbar(x, values[:, 0], errors, fmt=marker, color=color, ms=5, lw=1.2, capsize=2, label=label)


def _strength(cells: Cells) -> float:
    if cells.chosen is not None and cells.chosen.coeff is not None:
        return abs(cells.chosen.coeff)
    sizes = sorted({abs(c) for c in cells.coeffs})
    mean = {a: np.nanmean([abs(cells.get(s, c, "effect").value) for s in cells.sites for c in (a, -a)]) for a in sizes}
    return max(sizes, key=lambda a: float(mean[a]))


def _commonest(cells: Cells) -> float:
    """The strength that was tried at most sites; the weaker of two."""
    sizes = sorted({abs(c) for c in cells.coeffs})
    return max(sizes, key=lambda a: sum(cells.row(s, c, "effect") is not None for s in cells.sites for c in (a, -a)))


def _is_broken(cells: Cells, rows: Sequence[Measurement], site: str, coeff: float) -> bool:
    base = next((r.value for r in rows if r.subject == "baseline" and r.metric == "degenerate"), 0.0)
    return cells.get(site, coeff, "degenerate").value > base + BROKEN


def _mark_chosen(axes: "Axes", cells: Cells, site: str) -> None:
    if cells.chosen is not None and cells.chosen.hook == site and cells.chosen.coeff is not None:
        axes.axvline(cells.chosen.coeff, color=BLUE, lw=6, alpha=0.12, zorder=1, label="chosen on selection prompts")


def _legend(figure: "Figure", *panels: "Axes", columns: int) -> None:
    named = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles, labels = [handle for handle, _ in named], [label for _, label in named]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _plain(*panels: "Axes") -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)


FIGURES = {
    "sweep": coefficient_sweep,
    "heatmap": layer_heatmap,
    "layers": layer_effectiveness,
    "summary": summary,
}


def draw_all(rows: Sequence[Measurement], folder: Path, *, pdf: bool = False) -> list[Path]:
    """Every figure of every direction and scorer of a sweep, as png and, where asked for, pdf.

    Where a search chose no cell, no test prompt was steered: then the figures of the selection prompts alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = dict.fromkeys(
        (r.subject, r.metric.removesuffix("/effect")) for r in rows if r.metric.endswith("/effect") and r.hook
    )
    written = []
    for subject, scorer in found:
        tested = bool(Cells(rows, subject, scorer).sites)
        for name, draw in FIGURES.items():
            if not tested and draw not in (layer_heatmap, layer_effectiveness):
                continue
            stem = f"{subject}-{scorer}-{name}".replace("/", "_").replace(" ", "_")
            figure = draw(rows, subject, scorer)
            written += [save_figure(figure, folder / f"{stem}{end}") for end in (".png", *([".pdf"] if pdf else []))]
    return written
