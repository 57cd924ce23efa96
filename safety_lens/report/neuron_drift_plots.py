"""Plots of how neuron groups move in training, from measurement rows; every group beside its random partners."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from safety_lens.log import NAN, Measurement
from safety_lens.report.plots import BLUE, GREEN, GREY, save_figure, whole_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUBJECT = "neurons/"
SIDES = (("", BLUE, "o-", "group"), ("_random", GREY, "s--", "random partners"))
QUANTILES = ("q05", "q25", "q50", "q75", "q95")
KINDS = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out")
SIMILAR = (1 / 1.1, 1.1)
"""Ratios that count as similar, unless another margin is asked for (`drift_statistics.MARGIN`)."""
CURVES = (
    ("rms_change", "RMS change of a weight,\nall matrices as one"),
    ("unit_turn", "turn of a unit\n(√ mean 2(1 − cos))"),
)


class NeuronRows:
    """Rows of neuron groups, found by group, metric, place and step; other rows are left out."""

    def __init__(self, rows: Sequence[Measurement]) -> None:
        mine = [row for row in rows if row.subject.startswith(SUBJECT) and row.step is not None]
        self.at = {(r.subject.removeprefix(SUBJECT), r.metric, r.split, r.step): r for r in mine}
        self.groups = list(dict.fromkeys(group for group, metric, *_ in self.at if metric == "outside_share"))
        self.steps = sorted({step for _, metric, _, step in self.at if metric == "outside_share" and step is not None})

    def get(self, group: str, metric: str, step: int, place: str = "total") -> tuple[float, float, float]:
        """Value and limits; NaN where there is none."""
        row = self.at.get((group, metric, place, step))
        return (NAN, NAN, NAN) if row is None else (row.value, row.low, row.high)

    def curve(self, group: str, metric: str) -> Float[np.ndarray, "step 3"]:
        return np.array([self.get(group, metric, step) for step in self.steps], dtype=float).reshape(-1, 3)

    def places(self, group: str) -> list[str]:
        """Adapted matrices of a group."""
        found = [p for g, metric, p, _ in self.at if g == group and metric == "rms_change" and p != "total"]
        return list(dict.fromkeys(str(place) for place in found))


def drift_over_steps(rows: Sequence[Measurement], title: str = "") -> "Figure":
    """How far each group and its partners have moved by every step, and their ratio with its interval over layers."""
    from matplotlib.figure import Figure

    found = NeuronRows(rows)
    shown = [c for c in CURVES if any(np.isfinite(found.curve(g, c[0])).any() for g in found.groups)]
    figure = Figure(figsize=(3.1 * len(found.groups) + 0.8, 1.9 * (len(shown) + 1) + 1), layout="constrained")
    grid = figure.subplots(len(shown) + 1, len(found.groups), sharex=True, sharey="row", squeeze=False)
    for column, group in enumerate(found.groups):
        for axes, (metric, label) in zip(grid[:, column], shown, strict=False):
            for suffix, color, style, name in SIDES:
                axes.plot(found.steps, found.curve(group, metric + suffix)[:, 0], style, color=color, ms=3, label=name)
            if not np.isfinite(found.curve(group, metric)).any():
                axes.text(0.5, 0.5, "single weights\nhave no angle", transform=axes.transAxes, ha="center", fontsize=8)
            axes.set(ylabel=label if column == 0 else "")
        _ratio_panel(grid[-1, column], found, group)
        grid[0, column].set_title(group, fontsize=9)
    grid[-1, 0].set(ylabel="group / random,\nmean over matrices")
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    lines = dict(zip(*reversed(grid[0, 0].get_legend_handles_labels()), strict=True))
    lines |= dict(zip(*reversed(grid[-1, 0].get_legend_handles_labels()), strict=True))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{title}\nadapted matrices only; shaded: 95 % over layers".strip(), fontsize=10)
    return figure


def _ratio_panel(axes: "Axes", found: NeuronRows, group: str) -> None:
    curve = found.curve(group, "change_ratio")
    known = np.isfinite(curve[:, 0])
    x = np.array(found.steps)[known]
    axes.plot(x, curve[known, 0], "D-", color=GREEN, ms=3, label="group / random, mean over matrices")
    axes.fill_between(x, curve[known, 1], curve[known, 2], color=GREEN, alpha=0.18, lw=0)
    axes.axhline(1, color="black", lw=0.6)
    axes.axhspan(*SIMILAR, color="black", alpha=0.08, lw=0, label="similar (within a factor 1.1)")
    whole_steps(axes)


def change_distribution(rows: Sequence[Measurement], title: str = "") -> "Figure":
    """How far single units of each group and of its partners moved by the last step: 5, 25, 50, 75 and 95 %."""
    from matplotlib.figure import Figure

    found = NeuronRows(rows)
    last = found.steps[-1]
    figure = Figure(figsize=(max(4.0, 1.5 * len(found.groups) + 1.6), 3.8), layout="constrained")
    axes = figure.subplots()
    for i, group in enumerate(found.groups):
        for k, (suffix, color, _, name) in enumerate(SIDES):
            values = [found.get(group, f"change_{q}{suffix}", last)[0] for q in QUANTILES]
            if np.isfinite(values).all():
                _box(axes, i + 0.36 * (k - 0.5), values, color, name if i == 0 else "_")
    if any(found.get(group, "change_q95", last)[0] > 0 for group in found.groups):
        axes.set_yscale("log")
    axes.set_xticks(range(len(found.groups)), found.groups, fontsize=8)
    axes.set(ylabel="|Δ| of a unit (weight, neuron or head)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}\nstep {last}; box: middle half, line: 5 to 95 %".strip(), fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _box(axes: "Axes", x: float, values: Sequence[float], color: str, label: str) -> None:
    low, quarter, middle, three, high = values
    axes.plot([x, x], [low, high], color=color, lw=1)
    axes.bar(x, three - quarter, 0.28, bottom=quarter, color=color, alpha=0.5, label=label)
    axes.plot([x - 0.14, x + 0.14], [middle, middle], color="black", lw=1.2)


def drift_by_matrix(rows: Sequence[Measurement], title: str = "") -> "Figure":
    """Layers × matrices at the last step, a panel a group: who moved farther. Crossed out: without an adapter."""
    from matplotlib.figure import Figure

    found = NeuronRows(rows)
    names = {place for group in found.groups for place in found.places(group)}
    kinds = [kind for kind in KINDS if any(name.endswith(f".{kind}") for name in names)]
    layers = list(range(max((int(name.split(".")[1]) for name in names), default=0) + 1))
    n = len(found.groups)
    size = (max(2.2, 0.5 * len(kinds) + 0.8) * n + 1.4, max(2.8, 0.27 * len(layers) + 1.6))
    figure = Figure(figsize=size, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, n, sharey=True))
    for axes, group in zip(panels, found.groups, strict=True):
        grid = np.array([[_contrast(found, group, layer, kind) for kind in kinds] for layer in layers])
        image = axes.imshow(
            grid.reshape(len(layers), -1), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", origin="lower"
        )
        for i, j in np.argwhere(~np.isfinite(grid)):
            axes.text(j, i, "×", ha="center", va="center", fontsize=7, color=GREY)
        axes.set_xticks(range(len(kinds)), kinds, rotation=60, fontsize=7)
        axes.set_title(group, fontsize=9)
    panels[0].set(ylabel="layer")
    panels[0].set_yticks(layers[:: max(1, len(layers) // 12)])
    bar = figure.colorbar(image, ax=list(panels), ticks=[-1, -0.5, 0, 0.5, 1])
    bar.ax.set_yticklabels(["only random", "1/3", "equal", "3×", "only group"], fontsize=7)
    figure.suptitle(
        f"{title}\nRMS change of the group by that of its partners; ×: none of it moves there".strip(), fontsize=10
    )
    return figure


def _contrast(found: NeuronRows, group: str, layer: int, kind: str) -> float:
    place = f"blocks.{layer}.{'mlp' if kind in KINDS[4:] else 'attn'}.{kind}"
    mine, theirs = (found.get(group, f"rms_change{end}", found.steps[-1], place)[0] for end in ("", "_random"))
    return (mine - theirs) / (mine + theirs) if mine + theirs > 0 else NAN


FIGURES = {"steps": drift_over_steps, "distribution": change_distribution, "matrices": drift_by_matrix}


def draw_neuron_drift(rows: Sequence[Measurement], folder: Path, title: str = "", *, pdf: bool = False) -> list[Path]:
    """Every figure as `neurons-<name>.png`; none where no group was watched."""
    if not NeuronRows(rows).groups:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    ends = (".png", ".pdf") if pdf else (".png",)
    return [
        save_figure(draw(rows, title=title), folder / f"neurons-{name}{end}")
        for name, draw in FIGURES.items()
        for end in ends
    ]
