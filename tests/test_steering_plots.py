"""Figures of a sweep show every number with its interval, its controls and its cost, from saved rows alone."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from rich.console import Console

from safety_lens.log import Measurement
from safety_lens.report.steering_plots import (
    FIGURES,
    coefficient_sweep,
    draw_all,
    layer_effectiveness,
    layer_heatmap,
    summary,
)
from safety_lens.report.steering_tables import cell_table, site_table

COEFFS = (-2.0, -1.0, 1.0, 2.0)
SITES = tuple(f"blocks.{i}.hook_resid_post" for i in range(3))


def effect(site: int, coeff: float) -> float:
    return 0.1 * coeff * (1 + site)


def cell(site: int, coeff: float, controls: bool, benign: bool) -> Iterator[Measurement]:
    place = {"hook": SITES[site], "coeff": coeff, "split": "test", "n": 30}
    value = effect(site, coeff)
    yield Measurement("joy/dim", "mood/effect", value, value - 0.05, value + 0.05, **place)
    yield Measurement("joy/dim", "mood/effect_fluent", value / 2, value - 0.1, value + 0.1, **place)
    yield Measurement("joy/dim", "mood/p_all", 0.01 if abs(value) > 0.2 else 0.5, **place)
    yield Measurement("joy/dim", "mood/improved", 0.6, 0.5, 0.7, **place)
    yield Measurement("joy/dim", "mood/worsened", 0.2, 0.1, 0.3, **place)
    yield Measurement("joy/dim", "degenerate", 0.5 if coeff == 2 else 0.0, 0.0, 0.6, **place)
    for label in ("easy", "hard"):
        yield Measurement(
            "joy/dim", "mood/effect", value, value - 0.1, value + 0.1, **{**place, "split": f"test:{label}"}
        )
    if controls:
        yield Measurement("joy/dim", "mood/random", 0.01, -0.03, 0.04, **place)
        yield Measurement("joy/dim", "mood/shuffled", -0.01, -0.06, 0.05, **place)
    if benign:
        place["split"] = "benign"
        yield Measurement("joy/dim", "benign_kl", 0.2 * coeff**2, 0.1 * coeff**2, 0.3 * coeff**2, **place)
        yield Measurement("joy/dim", "benign_kl_p95", coeff**2, **place)


def rows(*, controls: bool = True, benign: bool = True, chosen: bool = True) -> list[Measurement]:
    out = [
        Measurement("baseline", "mood/mean", 0.4, 0.3, 0.5, n=30, coeff=0.0, split="test"),
        Measurement("baseline", "degenerate", 0.0, 0.0, 0.1, n=30, coeff=0.0, split="test"),
        Measurement("system", "mood/effect", 0.07, 0.0, 0.1, n=30, coeff=0.0, split="test"),
    ]
    for site, hook in enumerate(SITES):
        for coeff in COEFFS:
            out += cell(site, coeff, controls, benign)
        place = {"hook": hook, "split": "test", "n": 30}
        out.append(Measurement("joy/dim", "mood/slope", 0.1 * (1 + site), 0.05, 0.4, **place))
        out.append(Measurement("joy/dim", "mood/anti_steerable", 0.1, 0.05, 0.2, **place))
    if chosen:
        out.append(Measurement("joy/dim", "chosen", 1.0, hook=SITES[1], coeff=1.0, split="selection", note="because"))
    return out


def line(axes: Axes, label: str) -> list[float]:
    found = next(x for x in axes.lines if str(x.get_label()).startswith(label))
    return np.asarray(found.get_ydata(), dtype=float).tolist()


def test_the_coefficient_sweep_draws_effect_controls_baseline_and_cost_at_the_chosen_site() -> None:
    top, bottom, right = coefficient_sweep(rows(), "joy/dim", "mood").axes
    wanted = [effect(1, c) for c in (-2, -1)] + [0.0] + [effect(1, c) for c in (1, 2)]
    assert line(top, "direction") == pytest.approx(wanted)
    assert line(top, "random directions") == [0.01, 0.01, 0.0, 0.01, 0.01]
    assert line(top, "shuffled labels") == [-0.01, -0.01, 0.0, -0.01, -0.01]
    assert line(top, "system prompt") == [0.07, 0.07]
    assert line(top, "only answers")[0] == pytest.approx(effect(1, -2) / 2)
    assert line(bottom, "KL on benign") == pytest.approx([0.8, 0.2, 0.0, 0.2, 0.8])
    assert np.asarray(right.lines[0].get_ydata(), dtype=float)[-1] == 0.5
    assert SITES[1] in top.get_title()
    band = top.collections[-1].get_paths()[0].vertices[:, 1]
    assert {round(effect(1, c) + 0.05, 6) for c in COEFFS} <= {round(float(y), 6) for y in band}


def test_without_controls_cost_or_choice_nothing_is_invented() -> None:
    bare = rows(controls=False, benign=False, chosen=False)
    top, bottom, _ = coefficient_sweep(bare, "joy/dim", "mood").axes
    labels = [str(x.get_label()) for x in (*top.lines, *bottom.lines)]
    assert not [name for name in labels if name.startswith(("random", "shuffled", "KL", "chosen"))]
    assert SITES[2] in top.get_title()  # the site with the largest effect
    cost = summary(bare, "joy/dim", "mood").axes[0]
    assert "cost is unknown" in cost.texts[0].get_text()
    named = [
        t for axes in layer_effectiveness(bare, "joy/dim", "mood").axes for t in axes.get_legend_handles_labels()[1]
    ]
    assert any("no random directions were run" in name for name in named)


def test_the_heat_map_holds_every_cell_and_marks_significance_breakage_and_the_choice() -> None:
    axes = layer_heatmap(rows(), "joy/dim", "mood").axes[0]
    shown = np.asarray(axes.images[0].get_array(), dtype=float)
    assert shown == pytest.approx(np.array([[effect(s, c) for c in COEFFS] for s in range(3)]))
    dots = {(round(x.get_xdata()[0]), round(x.get_ydata()[0])) for x in axes.lines}
    assert dots == {(c, s) for s in range(3) for c in range(4) if abs(effect(s, COEFFS[c])) > 0.2}
    patches = [p for p in axes.patches if isinstance(p, Rectangle)]
    assert sum(p.get_hatch() is not None for p in patches) == 3  # coefficient 2 at three sites
    frame = next(p for p in patches if p.get_hatch() is None)
    assert (round(frame.get_x() + 0.46), round(frame.get_y() + 0.46)) == (2, 1)


def test_the_layer_panel_shows_both_signs_of_the_chosen_strength_and_the_slope() -> None:
    top, bottom = layer_effectiveness(rows(), "joy/dim", "mood").axes
    signs = [np.asarray(c.lines[0].get_ydata(), dtype=float) for c in top.containers]
    assert signs[0] == pytest.approx([effect(s, 1.0) for s in range(3)])
    assert signs[1] == pytest.approx([effect(s, -1.0) for s in range(3)])
    slope = np.asarray(bottom.containers[0].lines[0].get_ydata(), dtype=float)
    assert slope == pytest.approx([0.1, 0.2, 0.3])


def test_the_summary_shows_cost_shares_and_every_subset() -> None:
    cost, shares, subsets = summary(rows(), "joy/dim", "mood").axes
    assert len(cost.containers) == 2
    assert cost.get_xlim()[1] > 0.8  # the costliest cell is inside
    assert [b.get_height() for b in shares.containers[0]] == [0.6] * 4
    assert [b.get_height() for b in shares.containers[1]] == [-0.2] * 4
    assert {str(x.get_label()) for x in subsets.lines} >= {"easy (n=30)", "hard (n=30)"}


def test_every_figure_is_written_and_is_the_same_when_written_again(tmp_path: Path) -> None:
    found = [draw_all(rows(), tmp_path / name, pdf=True) for name in ("a", "b")]
    assert len(found[0]) == 2 * len(FIGURES)
    assert {p.name for p in found[0] if p.suffix == ".png"} == {f"joy_dim-mood-{name}.png" for name in FIGURES}
    for one, two in zip(*found, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_the_tables_say_unknown_with_a_dash_and_mark_the_choice() -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(cell_table(rows(benign=False), "joy/dim", "mood"), site_table(rows(), "joy/dim", "mood"))
    console.file.close()
    text = console.export_text()
    assert "→ 1 " in text
    assert "0.20 [0.15, 0.25]" in text
    assert "–" in text
    assert "nan" not in text
    assert not math.isnan(len(text))
