"""Groups in pictures: where their members are, and what a model does without them as they grow."""

import re
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from safety_lens.log import Measurement
from safety_lens.probes.groups import NeuronGroup
from safety_lens.report.plots import BLUE, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "refusal_log_odds": "refusal log-odds (nats)",
    "refusal_log_odds_in_text": "refusal log-odds, broken answers as unchanged",
    "coherence": "answers to harmless requests that are text",
    "coherence_harmful": "answers to harmful requests that are text",
    "facts_accuracy": "facts answered correctly",
    "safety_loss": "loss on safety answers (nats/token)",
    "utility_loss": "loss on utility answers (nats/token)",
}
SHARES = ("coherence", "coherence_harmful", "facts_accuracy")
PER_ROW = 4
COLOURS = (BLUE, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def where_members_are(groups: Sequence[NeuronGroup]) -> "Figure":
    """Heat maps of layers × matrices: the share of each matrix (or block) that belongs to each group."""
    from matplotlib.figure import Figure

    rows, columns = -(-len(groups) // PER_ROW), min(PER_ROW, len(groups))
    layers = 1 + max(int(key.split(".")[1]) for group in groups for key in group.index)
    figure = Figure(figsize=(1.0 + 2.6 * columns, 0.6 + rows * (1.3 + 0.2 * layers)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, group in zip(panels, groups, strict=False):
        kinds = list(dict.fromkeys(_kind(key) for key in group.index))
        shares = np.full((layers, len(kinds)), np.nan)
        for key, members in group.index.items():
            shares[int(key.split(".")[1]), kinds.index(_kind(key))] = len(members) / group.count(key)
        image = axes.imshow(100 * shares, aspect="auto", origin="lower", cmap="viridis", vmin=0)
        axes.set_xticks(range(len(kinds)), kinds, rotation=60, fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_ylabel("block", fontsize=8)
        axes.set_title(f"{group.name}\n{group.size:,} {group.unit}s", fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    figure.suptitle("members, percent of each matrix", fontsize=10)
    return figure


def _kind(key: str) -> str:
    return key.split(".", 2)[2].removeprefix("attn.").removeprefix("mlp.")


def faithfulness(rows: Sequence[Measurement], *, title: str) -> "Figure":
    """One panel a measure: its value over the size of the edited group, beside random groups of the same size.

    rows: of `effect_rows`. Bars are 95 % intervals over prompts, the band one over random groups and prompts. The line
    is the unedited model.
    """
    from matplotlib.figure import Figure

    at = {(r.subject, r.metric): r for r in rows}
    measures = list(dict.fromkeys(r.metric for r in rows if (r.subject, f"{r.metric}_before") in at))
    lines = -(-len(measures) // 2)
    figure = Figure(figsize=(9.6, 0.8 + 2.3 * lines), layout="constrained")
    panels = figure.subplots(lines, min(2, len(measures)), sharex=True, squeeze=False).flatten()
    for axes, measure in zip(panels, measures, strict=False):
        _panel(axes, rows, measure)
    for axes in panels[max(len(measures) - 2, 0) : len(measures)]:
        axes.set_xlabel("percent of weights, neurons or heads in the group", fontsize=8)
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in panels[len(measures) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _panel(axes: "Axes", rows: Sequence[Measurement], measure: str) -> None:
    """Groups that differ in size alone (`set-difference-0.01`) share a line; any other is a point with its name."""
    from matplotlib.ticker import NullLocator

    _, before = _series(rows, f"{measure}_before")
    axes.axhline(before[0, 0], color="black", lw=0.8, label="nothing edited")
    ticks: list[float] = []
    for color, family in zip(cycle(COLOURS), _families(rows), strict=False):
        mine = [row for row in rows if _family(row) == family]
        sizes, value = _series(mine, measure)
        _, random = _series(mine, f"{measure}_change_random")
        bars = np.abs(value[:, 1:] - value[:, :1]).T
        axes.errorbar(sizes, value[:, 0], bars, fmt="o-", color=color, ms=4, capsize=2, label=family)
        if len(random):
            level = before[:1, :1] + random
            axes.plot(sizes, level[:, 0], "s--", ms=3, color=GREY, label="random groups of the same sizes")
            axes.fill_between(sizes, level[:, 1], level[:, 2], color=GREY, alpha=0.25, linewidth=0)
        ticks += sizes.tolist()
    axes.set_xscale("log")
    if len(set(ticks)) == 1:  # a logarithmic axis around one point has no width
        axes.set_xlim(ticks[0] / 2, ticks[0] * 2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(set(ticks)), [f"{size:.2g}" for size in sorted(set(ticks))], fontsize=8)
    if measure in SHARES:
        axes.set_ylim(-0.03, 1.05)
    axes.set_title(NAMES.get(measure, measure.replace("_", " ")), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _family(row: Measurement) -> str:
    return re.sub(r"-[0-9.]+$", "", row.subject.removeprefix("group/"))


def _families(rows: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(_family(row) for row in rows))


def _series(rows: Sequence[Measurement], metric: str) -> tuple[Float[np.ndarray, " size"], Float[np.ndarray, "size 3"]]:
    mine = sorted((r for r in rows if r.metric == metric), key=lambda r: r.coeff or 0.0)
    values = np.array([[r.value, r.low, r.high] for r in mine], dtype=float).reshape(-1, 3)
    return np.array([100 * (r.coeff or 0.0) for r in mine], dtype=float), values
