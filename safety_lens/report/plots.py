"""Plots of measurements. Every curve is drawn with its interval, its nulls and its controls."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from safety_lens.log import Measurement
from safety_lens.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart by readers with colour-vision deficiency, and in grey by line style.
BLUE, ORANGE, GREEN, GREY, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#666666", "#CC79A7", "#56B4E9"
CONTROLS = (
    ("lexical_auroc", "bag of words", ORANGE, "--"),
    ("embedding_auroc", "token embeddings", PURPLE, "-."),
    ("length_auroc", "length", SKY, ":"),
)


MOST_TICKS = 16
"""Hooks that are labelled under a figure."""


def short_hook(hook: str) -> str:
    """Block and point of a hook, such as "14.resid_post"."""
    found = re.fullmatch(r"blocks\.(\d+)\.(?:attn\.|mlp\.)?hook_(.+)", hook)
    return f"{found[1]}.{found[2]}" if found else hook


def label_hooks(axes: "Axes", hooks: Sequence[str]) -> None:
    """Label an axis of hooks: by block alone where all are one point, and not too many of them."""
    short, what = [short_hook(hook) for hook in hooks], "hook"
    points = {name.partition(".")[2] for name in short}
    if len(points) == 1 and "" not in points:
        short, what = [name.partition(".")[0] for name in short], f"block ({points.pop()})"
    step = -(-len(hooks) // MOST_TICKS) or 1
    axes.set_xticks(range(0, len(hooks), step), short[::step])
    axes.set_xlabel(what)


def whole_steps(axes: "Axes") -> None:
    """Label the lower axis as steps: whole numbers, few enough to stand apart in a narrow panel."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))


def _series(rows: Sequence[Measurement], metric: str, hooks: Sequence[str]) -> Float[np.ndarray, "hook 3"]:
    by_hook = {row.hook: row for row in rows if row.metric == metric and row.split == "test"}
    none = Measurement("", metric, float("nan"))
    return np.array(
        [[r.value, r.low, r.high] for r in (by_hook.get(hook, none) for hook in hooks)], dtype=float
    ).reshape(-1, 3)


def _band(axes: "Axes", series: Float[np.ndarray, "hook 3"], color: str, label: str) -> None:
    x = np.arange(len(series))
    axes.plot(x, series[:, 0], "o-", color=color, label=label, markersize=4, zorder=3)
    axes.fill_between(x, series[:, 1], series[:, 2], color=color, alpha=0.18, linewidth=0, zorder=2)


def layer_sweep(rows: Sequence[Measurement], *, title: str) -> "Figure":
    """AUROC and d' at every hook with 95 % intervals; nulls and controls as lines; the chosen hook marked.

    rows: the measurements of one concept and method (`DirectionSet.measurements`).
    """
    from matplotlib.figure import Figure

    hooks = list(dict.fromkeys(row.hook for row in rows if row.metric == "auroc" and row.hook))
    chosen = next((row.hook for row in rows if row.metric == "chosen"), None)
    figure = Figure(figsize=(min(11.0, max(7.0, 0.3 * len(hooks) + 3)), 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _band(top, _series(rows, "auroc", hooks), BLUE, "direction, 95 % interval")
    x = np.arange(len(hooks))
    top.plot(x, _series(rows, "null_shuffled_q95", hooks)[:, 0], color=GREY, ls=":", label="shuffled labels, 95th pct.")
    top.plot(
        x, _series(rows, "null_random_q95", hooks)[:, 0], color=GREEN, ls=":", label="random directions, 95th pct."
    )
    for metric, label, color, style in CONTROLS:
        value, low, high = _series(rows, metric, hooks[:1])[0] if hooks else (np.nan,) * 3
        top.axhline(value, color=color, ls=style, lw=1.2, label=f"{label} {value:.2f} [{low:.2f}, {high:.2f}]")
    top.axhline(0.5, color="black", lw=0.6)
    drawn = [*(line.get_ydata() for line in top.lines), _series(rows, "auroc", hooks)[:, 1]]
    lowest = float(np.nanmin(np.concatenate(drawn).astype(float)))  # chance, where nothing is lower
    top.set(ylabel="AUROC on held-out pairs", ylim=(max(-0.02, lowest - 0.03), 1.02))
    _band(bottom, _series(rows, "d_prime", hooks), BLUE, "d'")
    bottom.axhline(0, color="black", lw=0.6)
    bottom.set(ylabel="d' (within-class SDs)")
    label_hooks(bottom, hooks)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        if chosen in hooks:
            axes.axvline(hooks.index(chosen), color=BLUE, lw=6, alpha=0.12, zorder=1)
    top.set_title(title + (f"\nchosen: {chosen}" if chosen else "\nno direction at any hook"), fontsize=10)
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def projection_histogram(
    pos: Float[np.ndarray, " n"], neg: Float[np.ndarray, " n"], *, title: str, area: Interval
) -> "Figure":
    """Held-out scores of both sides in within-class deviations of the fit; 0 is midway between the fitted means."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    edges = np.histogram_bin_edges(np.concatenate([pos, neg]), bins=min(30, max(8, len(pos) // 3)))
    axes.hist(neg, edges.tolist(), color=GREY, alpha=0.55, label=f"negative side (n={len(neg)})")
    axes.hist(pos, edges.tolist(), color=BLUE, alpha=0.55, label=f"positive side (n={len(pos)})")
    axes.axvline(0, color="black", lw=0.8)
    axes.set(
        xlabel="projection on the direction (within-class SDs, 0 = midpoint of the fitted means)", ylabel="prompts"
    )
    axes.set_title(f"{title}\nAUROC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}]", fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure as its suffix says (png at 150 dpi, or pdf), without the time of day, so that reruns are equal."""
    metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
    figure.savefig(path, dpi=150, metadata=metadata)
    return path
