"""Plots and tables: they show what was measured, with its interval, its controls and its gaps."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from safety_lens.log import Measurement
from safety_lens.probes.directions import Evidence
from safety_lens.probes.extract import DirectionSet
from safety_lens.report.plots import layer_sweep, projection_histogram, save_figure
from safety_lens.report.tables import direction_table, hook_table, number, p_value, with_interval
from safety_lens.stats import UNKNOWN, Interval

NAN = float("nan")
HOOKS = [f"blocks.{i}.hook_resid_post" for i in range(8)]


def rows(areas: Sequence[float], chosen: int | None = 2) -> list[Measurement]:
    out = []
    for hook, area in zip(HOOKS, areas, strict=False):
        known = not math.isnan(area)
        out += [
            Measurement("joy/dim", "auroc", area, area - 0.1, min(1.0, area + 0.05), hook=hook, split="test"),
            Measurement("joy/dim", "d_prime", 2 * area, area, 3 * area, hook=hook, split="test"),
            Measurement("joy/dim", "null_shuffled_q95", 0.6 if known else NAN, hook=hook, split="test"),
            Measurement("joy/dim", "null_random_q95", 0.65 if known else NAN, hook=hook, split="test"),
            Measurement("joy/dim", "lexical_auroc", 0.71, 0.6, 0.8, hook=hook, split="test"),
            Measurement("joy/dim", "embedding_auroc", 0.55, 0.4, 0.7, hook=hook, split="test"),
            Measurement("joy/dim", "length_auroc", 0.5, 0.4, 0.6, hook=hook, split="test"),
            Measurement("joy/dim", "select_auroc", 0.99, 0.9, 1.0, hook=hook, split="val"),
        ]
    if chosen is not None:
        out.append(Measurement("joy/dim", "chosen", 1.0, hook=HOOKS[chosen]))
    return out


def axes(figure: Figure) -> list[Axes]:
    return list(figure.axes)


def line(axis: Axes, label: str) -> np.ndarray:
    return np.asarray(next(x for x in axis.lines if str(x.get_label()).startswith(label)).get_ydata(), dtype=float)


def test_the_sweep_draws_every_measured_value_with_its_band_nulls_and_controls() -> None:
    areas = [0.55, 0.7, 0.95, 0.9]
    top, bottom = axes(layer_sweep(rows(areas), title="joy · dim"))
    assert line(top, "direction").tolist() == areas
    assert line(bottom, "d'").tolist() == [2 * a for a in areas]
    band = top.collections[0].get_paths()[0].vertices
    assert {round(float(a) - 0.1, 6) for a in areas} <= {round(float(y), 6) for y in band[:, 1]}
    assert line(top, "shuffled").tolist() == [0.6] * 4
    assert line(top, "random").tolist() == [0.65] * 4
    assert set(line(top, "bag of words 0.71 [0.60, 0.80]").tolist()) == {0.71}
    assert set(line(top, "token embeddings").tolist()) == {0.55}
    assert "chosen: blocks.2.hook_resid_post" in top.get_title()


@pytest.mark.parametrize("areas", [[NAN, 0.8, NAN, 0.9], [NAN] * 4, [0.7], [0.5] * 8, []])
def test_unknown_values_are_gaps_and_nothing_warns(areas: list[float], tmp_path: Path) -> None:
    figure = layer_sweep(rows(areas, chosen=None), title="joy · dim")
    assert "no direction at any hook" in axes(figure)[0].get_title()
    drawn = line(axes(figure)[0], "direction").tolist()
    assert [math.isnan(x) for x in drawn] == [math.isnan(x) for x in areas]
    assert save_figure(figure, tmp_path / "sweep.png").stat().st_size > 5000


def test_the_reporting_split_is_drawn_and_not_the_one_that_chose() -> None:
    assert 0.99 not in line(axes(layer_sweep(rows([0.6, 0.7, 0.8]), title="x"))[0], "direction")


def test_the_histogram_counts_every_prompt_of_both_sides(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pos, neg = rng.normal(2, 1, 30), rng.normal(0, 1, 30)
    figure = projection_histogram(pos, neg, title="joy", area=Interval(0.93, 0.85, 0.98))
    counts = [sum(bar.get_height() for bar in group) for group in axes(figure)[0].containers]
    assert counts == [30, 30]
    assert "AUROC 0.930 [0.850, 0.980]" in axes(figure)[0].get_title()
    assert save_figure(figure, tmp_path / "h.pdf").stat().st_size > 1000


def test_equal_measurements_give_equal_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "a.pdf", "b.pdf"):
        save_figure(layer_sweep(rows([0.6, 0.7]), title="joy"), tmp_path / name)
    for suffix in ("png", "pdf"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


# --- tables ---------------------------------------------------------------------------------------------------------


def test_unknown_numbers_are_dashes_and_p_is_never_written_as_zero() -> None:
    assert [number(NAN), with_interval(UNKNOWN), p_value(NAN)] == ["–", "–", "–"]
    assert with_interval(Interval(0.5, NAN, NAN)) == "0.50 [no interval]"
    assert with_interval(Interval(0.956, 0.9, 1.0)) == "0.96 [0.90, 1.00]"
    assert [p_value(1.0), p_value(0.0421), p_value(1e-4)] == ["1.0000", "0.0421", "1e-04"]
    assert float(p_value(1e-9)) > 0


def printed(table: object) -> str:
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_a_set_without_a_direction_says_so_in_both_tables() -> None:
    empty = DirectionSet("joy [bold]", "dim", {}, {HOOKS[0]: Evidence(notes=("no direction",))}, None, ())
    assert "no direction" in printed(direction_table([empty]))
    assert HOOKS[0] in printed(hook_table(empty))
    for table in (direction_table([empty]), hook_table(empty)):
        assert "[bold]" in printed(table)  # a name is text, not markup
