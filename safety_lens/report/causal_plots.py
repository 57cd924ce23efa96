"""Figure of a causal selection: bypass, induce and KL over the depth of the model."""

from typing import TYPE_CHECKING

import numpy as np

from safety_lens.log import Measurement
from safety_lens.report.plots import BLUE, GREEN, GREY, ORANGE, label_hooks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from safety_lens.probes.selection import Choice

CONTROL_MARKS = {"random": ("s", GREY), "shuffled": ("D", GREEN)}


def causal_sweep(choice: "Choice", *, title: str) -> "Figure | None":
    """Draw bypass, induce and KL at every hook that was measured; None for other selections.

    Changes are paired: each is of the same prompts with and without the edit, so that hooks of the first pass (hollow
    marks, few prompts), those measured on all selection prompts (filled) and controls can be compared. Dotted: the
    distance between the unedited levels of positive and negative prompts, which an edit would have to cover.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = choice.measurements
    hooks = [str(r.hook) for r in rows if r.metric == "causal_eligible"]
    if not any(r.metric == "bypass" for r in rows):
        return None
    figure = Figure(figsize=(min(11.0, max(7.0, 0.3 * len(hooks) + 3.5)), 6.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.4])
    positive, negative = (_value(rows, f"behaviour_{side}", None) for side in ("positive", "negative"))
    for sign, color, label in ((-1, BLUE, "down to the negative prompts"), (1, ORANGE, "up to the positive prompts")):
        top.axhline(sign * (positive - negative), color=color, ls=":", lw=1.2, label=label)
    top.axhline(0, color="black", lw=0.6)
    _points(top, rows, hooks, "bypass_change", BLUE, "bypass: positive, direction ablated")
    _points(top, rows, hooks, "induce_change", ORANGE, "induce: negative, direction added")
    for kind, (mark, color) in CONTROL_MARKS.items():
        for metric in ("bypass", "induce"):
            for row in (r for r in rows if r.metric == f"{metric}_{kind}" and r.hook in hooks):
                place = hooks.index(str(row.hook)) + (0.25 if kind == "random" else -0.25)
                # the mean of equal values may differ from them in the last digit
                spread = [[max(0.0, row.value - row.low)], [max(0.0, row.high - row.value)]]
                label = f"{kind} controls, range" if metric == "bypass" else ""
                change = row.value - _value(rows, f"{metric}_unedited", row.hook)
                top.errorbar(place, change, spread, fmt=mark, color=color, markersize=4, capsize=2, label=label)
    _points(bottom, rows, hooks, "kl", GREEN, "KL")
    top.set(ylabel="change of the behaviour's log-odds (nats)")
    bottom.set_ylabel("KL (nats)")
    if all(r.value > 0 for r in rows if r.metric == "kl"):  # a KL of exactly 0 has no place on a log scale
        bottom.set_yscale("log")
        bottom.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        bottom.yaxis.set_major_formatter("{x:g}")
        bottom.yaxis.set_minor_formatter(NullFormatter())
    label_hooks(bottom, hooks)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        if choice.causal:
            axes.axvline(hooks.index(choice.hook), color=BLUE, lw=6, alpha=0.12, zorder=1)
    chosen = f"chosen: {choice.hook}" if choice.causal else "no hook passes the causal test"
    top.set_title(f"{title}\n{chosen}", fontsize=10)
    handles, labels = top.get_legend_handles_labels()
    first = {label: handle for handle, label in reversed(list(zip(handles, labels, strict=True)))}
    figure.legend(first.values(), first.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _value(rows: tuple[Measurement, ...], metric: str, hook: str | None) -> float:
    return next(r.value for r in rows if (r.metric, r.hook) == (metric, hook))


def _points(axes: "Axes", rows: tuple[Measurement, ...], hooks: list[str], metric: str, color: str, label: str) -> None:
    found = sorted((r for r in rows if r.metric == metric and r.hook in hooks), key=lambda r: hooks.index(str(r.hook)))
    x = [hooks.index(str(r.hook)) for r in found]
    values = np.array([[r.value, r.low, r.high] for r in found])
    axes.plot(x, values[:, 0], "-", color=color, lw=1, alpha=0.6)
    spread = np.nan_to_num(np.abs(values[:, 1:] - values[:, :1]).T)
    axes.errorbar(x, values[:, 0], spread, fmt="none", ecolor=color, alpha=0.5, capsize=2)
    for final in (False, True):
        some = [i for i, r in enumerate(found) if (r.note is None) == final]
        face = color if final else "white"
        axes.plot(
            [x[i] for i in some], values[some, 0], "o", color=color, markerfacecolor=face, markersize=5,
            label=label if final or not any(r.note is None for r in found) else None, zorder=3,
        )  # fmt: skip
