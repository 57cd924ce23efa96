"""Drift figures and tables show what the rows say, mark what is no result, and leave out what is unknown."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from safety_lens.log import NAN, Measurement
from safety_lens.report import drift_plots
from safety_lens.report.drift_tables import Drift, behaviour_table, digits_of, drift_table, remarks, show_runs, verdicts

HOOKS = [f"blocks.{i}.hook_resid_post" for i in range(4)]
STEPS = (0, 10, 20)
FAULT = "before training this direction did not tell held-out pairs apart: AUROC 0.50 [0.40, 0.60]"


def made(speed: float = 0.1, probed: bool = True) -> list[Measurement]:
    """Rows as the monitor writes them: refusal turns by `speed` a measurement, more in deeper blocks."""
    rows = [Measurement("run", "headline", 1.0, hook=HOOKS[2], step=0)]
    rows += [Measurement("run", "common", 1.0, hook=hook, step=0) for hook in HOOKS[1:3]]
    for k, step in enumerate(STEPS):
        for depth, hook in enumerate(HOOKS, 1):
            for name, note in (("refusal", None), ("lies", FAULT)):
                cosine = 1 - speed * k * depth / 4
                at = {"hook": hook, "step": step, "note": note}
                rows.append(
                    Measurement(f"{name}/dim", "cosine_to_baseline", cosine, cosine - 0.05, cosine + 0.01, **at)
                )
                cv = Measurement(f"{name}/dim", "cosine_cv", cosine + 0.5, *((NAN, NAN) if note else (0.4, 1.6)), **at)
                rows += [cv, Measurement(f"{name}/dim", "direction_norm", 8.0 - 2 * k, **at)]
                rows.append(Measurement(f"{name}/dim", "auroc_fixed", 0.9, 0.8, 0.95, **at))
                if step == 0:
                    rows.append(Measurement(f"{name}/dim", "noise_floor", 0.92, **at))
        if probed:
            for name, sign in (("harmful", -1), ("harmless", 1)):
                odds = 5.0 + sign * 2 * k
                rows.append(Measurement(f"behaviour/{name}", "refusal_log_odds", odds, odds - 1, odds + 1, step=step))
                change = Measurement(f"behaviour/{name}", "refusal_log_odds_change", sign * 2.0 * k, step=step)
                rows += [change, Measurement(f"behaviour/{name}", "refusal_rate", 1 - k / 2, 0.0, 1.0, step=step)]
        rows.append(Measurement("run", "level", 2.0 * (k > 1), step=step, note="refusals fell"))
    return rows


def text(*parts: object) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    return console.export_text()


def test_curves_are_the_rows_in_the_order_of_the_steps() -> None:
    d = Drift(list(reversed(made())))
    assert d.steps == list(STEPS)
    assert d.headline == HOOKS[2]
    curve = d.curve("refusal/dim", "cosine_to_baseline", HOOKS[3])
    assert curve[:, 0].tolist() == pytest.approx([1.0, 0.9, 0.8])
    assert np.isnan(d.curve("refusal/dim", "retained_signal", HOOKS[3])).all()
    assert d.floor("refusal/dim", HOOKS[1]) == 0.92


def test_a_baseline_that_is_no_result_is_known_as_one_and_an_interval_that_failed_hides_the_value() -> None:
    d = Drift(made())
    assert d.fault("lies/dim", HOOKS[2]) == FAULT
    assert d.fault("refusal/dim", HOOKS[2]) is None
    assert math.isnan(d.known("lies/dim", "cosine_cv", 20, HOOKS[2]).value)
    assert d.known("refusal/dim", "cosine_cv", 20, HOOKS[2]).value == pytest.approx(1.35)


def test_the_cosine_figure_draws_curve_interval_floor_and_marks_faults() -> None:
    figure = drift_plots.cosine_drift(made())
    panels = {axes.get_ylabel() or i: axes for i, axes in enumerate(figure.axes)}
    assert len(figure.axes) == 2 * 2, "a row a concept, a column a common hook"
    refusal = panels["refusal/dim"]
    assert refusal.lines[0].get_ydata().tolist() == pytest.approx([1.0, 0.95, 0.9])
    floor = next(p for p in refusal.patches if p.get_label().startswith("re-drawn pairs"))
    assert (floor.get_y(), floor.get_y() + floor.get_height()) == pytest.approx((0.92, 1.0))
    assert any("no result" in t.get_text() for t in panels["lies/dim"].texts)
    assert not any("no result" in t.get_text() for t in refusal.texts)
    low, high = refusal.get_ylim()
    assert low < 0.85
    assert high > 1


def test_the_heat_maps_hold_the_numbers_of_the_rows() -> None:
    layers = drift_plots.layer_heatmap(made()).axes[0].images[0].get_array()
    assert layers.shape == (4, 3)
    assert layers[3].tolist() == pytest.approx([1.0, 0.9, 0.8])
    figure = drift_plots.metric_heatmap(made())
    cells = figure.axes[0].images[0].get_array()
    assert cells[0].tolist() == pytest.approx([1.0, 0.925, 0.85])
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    norm = cells[labels.index("norm, relative to step 0")]
    assert norm.tolist() == pytest.approx([1.0, 0.75, 0.5])
    faulty = figure.axes[1].images[0].get_array()[labels.index("cosine, corrected for noise")]
    assert np.isnan(np.ma.filled(faulty, np.nan)).all(), "a value without an interval is not shown"


def test_the_refusal_figure_marks_the_first_alarm() -> None:
    figure = drift_plots.refusal_odds(made())
    marks = [line for line in figure.axes[0].lines if line.get_label().startswith("first alarm")]
    assert [line.get_xdata()[0] for line in marks] == [20]
    quiet = [row for row in made() if row.metric != "level"]
    assert not [x for x in drift_plots.refusal_odds(quiet).axes[0].lines if x.get_label().startswith("first alarm")]


def test_runs_are_compared_at_one_hook_with_one_curve_each() -> None:
    figure = drift_plots.run_comparison({"slow": made(0.01), "fast": made(0.2)})
    ends = {
        line.get_label(): line.get_ydata()[-1] for line in figure.axes[0].lines if line.get_label() in ("slow", "fast")
    }
    assert ends["slow"] == pytest.approx(1 - 0.01 * 2 * 3 / 4)
    assert ends["fast"] == pytest.approx(1 - 0.2 * 2 * 3 / 4)


def test_all_figures_are_written_and_those_of_behaviour_only_where_it_was_measured(tmp_path: Path) -> None:
    probed = drift_plots.draw_runs({"a": made()}, tmp_path / "one")
    assert [path.name for path in probed] == [f"drift-{name}.png" for name in drift_plots.FIGURES]
    assert all(path.stat().st_size > 4000 for path in probed)
    both = drift_plots.draw_runs({"a": made(probed=False), "b": made(probed=False)}, tmp_path / "two")
    assert len(both) == 2 * 3 + 1
    assert not (tmp_path / "two" / "a" / "drift-refusal.png").exists()


def test_figures_are_also_written_as_pdf(tmp_path: Path) -> None:
    written = drift_plots.draw_run(made(probed=False), tmp_path, pdf=True)
    assert {path.suffix for path in written} == {".png", ".pdf"}


def test_tables_give_the_last_step_with_its_interval_and_a_mark_for_no_result() -> None:
    said = text(drift_table({"mine": made()}))
    assert "0.85" in said
    assert "[0.80, 0.86]" in said
    assert "dim !" in said
    behaviour = text(behaviour_table({"mine": made()}))
    assert "-4.00" in behaviour
    assert remarks({"mine": made()}) == [f"! lies/dim at 2.resid_post: {FAULT}"]
    assert verdicts({"mine": made()}) == ["mine: ALARM at step 20: refusals fell"]
    assert verdicts({"mine": made()}, told=["mine"]) == ["mine: ALARM at step 20, and at 1 of 3 measurements"]
    assert len(show_runs({"mine": made(probed=False)})) == 3, "no behaviour table where none was measured"


def test_every_run_has_a_verdict_and_a_notice_is_one() -> None:
    quiet = [row for row in made() if row.metric != "level"]
    calm = [*quiet, *(Measurement("run", "level", 0.0, step=step) for step in STEPS)]
    noticed = [*calm, Measurement("run", "level", 1.0, step=30, note="direction refusal/dim turned")]
    assert verdicts({"calm": calm, "noticed": noticed, "unjudged": quiet}) == [
        "calm: no alarm and no notice in 3 measurements",
        "noticed: NOTICE at step 30: direction refusal/dim turned",
    ]


def test_the_headline_table_names_the_hook_that_turned_most_and_two_decimals_hide_nothing() -> None:
    said = text(drift_table({"mine": made()}))
    assert "0.80" in said, "0.85 at the headline hook, 0.80 at the last"
    assert "3.resid_post" in said
    assert (digits_of(0.98, 0.9795, 0.9812), digits_of(0.85, 0.80, 0.86), digits_of(0.9971), digits_of(1.0)) == (
        3, 2, 3, 2,
    )  # fmt: skip


def test_saved_weights_without_a_recorded_step_are_called_the_end() -> None:
    rows = [*made(), Measurement("run", "unknown_step", 1.0, step=20)]
    assert Drift(rows).label(20) == "end"
    assert Drift(rows).label(10) == "10"
    assert "ALARM at step end" in verdicts({"mine": rows})[0]


def test_step_axes_and_labels_do_not_mislead() -> None:
    bottom = drift_plots.refusal_odds(made()).axes[1]
    bottom.set_xlim(0, 3)
    assert all(tick == int(tick) for tick in bottom.get_xticks())
    axes = drift_plots.drift_and_behaviour(made()).axes[0]
    assert not axes.texts, "labels of several concepts would lie on each other"
    assert "the last step, 20" in axes.get_title()
