"""What methods do and what they cost: one curve a method, its tuned strength, the front that nothing beats."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from safety_lens.log import Measurement
from safety_lens.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = tuple(
    (color, marker, line)
    for line in ("-", "--")
    for color, marker in ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (SKY, "v"))
)
EFFECT = "effect/"
NOTHING = 1e-4
"""Nats per token below which the axis is linear down to 0."""


class _Spot(NamedTuple):
    cost: Measurement
    effect: Measurement
    front: bool
    tuned: Measurement | None


def pareto(rows: Sequence[Measurement], *, title: str, target_kl: float | None = None) -> "Figure":
    """Effect against benign KL with 95 % intervals in both, for rows of `EqualCost.measurements`.

    Filled markers stand at the tuned strength; a cross marks a method that does not reach the target. Points on the
    Pareto front are joined by a grey line. Random directions and the prompt-only baseline are grey.
    """
    from matplotlib.figure import Figure

    scorer = next((r.metric.removeprefix(EFFECT) for r in rows if r.metric.startswith(EFFECT)), "score")
    methods = {name: _spots(rows, name) for name in dict.fromkeys(r.subject for r in rows)}
    methods = {name: spots for name, spots in methods.items() if spots}
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="black", lw=0.6)
    if target_kl is not None:
        axes.axvline(target_kl, color="black", lw=0.8, ls=":")
        axes.annotate(
            f" target {target_kl:g}", (target_kl, 1), xycoords=("data", "axes fraction"), fontsize=8, va="top"
        )
    front = sorted((s for spots in methods.values() for s in spots if s.front), key=lambda s: s.cost.value)
    axes.plot(
        [s.cost.value for s in front], [s.effect.value for s in front], color=GREY, lw=5, alpha=0.25, zorder=1,
        label="Pareto front",
    )  # fmt: skip
    styles = iter(STYLES * (1 + len(methods) // len(STYLES)))
    for name, spots in methods.items():
        control = name.startswith(("random", "prompt"))
        _curve(axes, name, spots, (GREY, "X" if name.startswith("random") else "P", ":") if control else next(styles))
    axes.set_xscale("symlog", linthresh=NOTHING)  # gated methods cost exactly 0 at small strengths
    axes.set_xlim(left=0)
    axes.set(
        xlabel="KL from the unedited model on benign prompts (nats per token)", ylabel=f"change of {scorer}, paired"
    )
    axes.set_title(f"{title}\nfilled: tuned to the target; ×: target not reached, costliest strength", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _spots(rows: Sequence[Measurement], name: str) -> list[_Spot]:
    """The points of one method by strength; one whose cost or effect is unknown is not drawn."""
    mine = [r for r in rows if r.subject == name]
    by = {(r.metric.split("/")[0], r.coeff): r for r in mine}
    strengths = sorted({r.coeff for r in mine if r.metric.startswith(EFFECT)}, key=lambda c: (c is not None, c or 0.0))
    spots = []
    for c in strengths:
        front, tuned = by.get(("on_front", c)), by.get(("equal_cost", c))
        spot = _Spot(by[("benign_kl", c)], by[("effect", c)], front is not None and front.value > 0, tuned)
        if spot.cost.value == spot.cost.value and spot.effect.value == spot.effect.value:
            spots.append(spot)
    return spots


def _curve(axes: "Axes", name: str, spots: Sequence[_Spot], style: tuple[str, str, str]) -> None:
    color, marker, line = style
    x, y = ([getattr(s, part).value for s in spots] for part in ("cost", "effect"))
    tuned = next((s for s in spots if s.tuned is not None), None)
    missed = tuned is not None and tuned.tuned is not None and tuned.tuned.value == 0 and tuned.cost.coeff is not None
    axes.plot(x, y, ls=line, color=color, marker=marker, mfc="white", ms=5, lw=1.2, zorder=3,
              label=f"{name} (target not reached)" if missed else name)  # fmt: skip
    for spot in spots:
        axes.plot([spot.cost.value] * 2, [spot.effect.low, spot.effect.high], color=color, lw=0.9, alpha=0.45, zorder=2)
        axes.plot([spot.cost.low, spot.cost.high], [spot.effect.value] * 2, color=color, lw=0.9, alpha=0.45, zorder=2)
    if tuned is not None:
        axes.plot(
            [tuned.cost.value], [tuned.effect.value], marker="x" if missed else marker, color=color, ms=9, zorder=4
        )
