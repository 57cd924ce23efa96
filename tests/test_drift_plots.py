"""Drift figures and tables show what the rows say, mark what is no result, and leave out what is unknown."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from safety_lens.bootstrap import mean_interval
from safety_lens.log import NAN, Measurement
from safety_lens.power import detectable_mean, detectable_share, difference_of_means, difference_of_rates
from safety_lens.report import drift_plots
from safety_lens.report.drift_tables import (
    Drift,
    behaviour_table,
    digits_of,
    drift_table,
    remarks,
    show_runs,
    unpredicted,
    unseen_changes,
    verdicts,
)

HOOKS = [f"blocks.{i}.hook_resid_post" for i in range(4)]
STEPS = (0, 10, 20)
FAULT = "before training this direction did not tell held-out pairs apart: AUROC 0.50 [0.40, 0.60]"


def made(speed: float = 0.1, probed: bool = True) -> list[Measurement]:
    """Rows as the monitor writes them: refusal turns by `speed` a measurement, more in deeper blocks."""
    rows = [Measurement("run", "headline", 1.0, hook=HOOKS[2], step=0)]
    rows += [Measurement(name, "notice_below", limit, step=0) for name, limit in (("run", 0.95), ("lies", 0.9))]
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
                    rows.append(Measurement(f"{name}/dim", "reliability", 0.81, 0.72, 0.88, **at))
        if probed:
            for name, sign in (("harmful", -1), ("harmless", 1)):
                odds = 5.0 + sign * 2 * k
                rows.append(Measurement(f"behaviour/{name}", "refusal_log_odds", odds, odds - 1, odds + 1, step=step))
                change = Measurement(f"behaviour/{name}", "refusal_log_odds_change", sign * 2.0 * k, step=step)
                rows += [change, Measurement(f"behaviour/{name}", "refusal_rate", 1 - k / 2, 0.0, 1.0, step=step)]
                rows.append(Measurement(f"behaviour/{name}", "token_kl", 0.1 * k, 0.0, 1.0, step=step))
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
    assert [d.notice(name) for name in ("refusal/dim", "lies/dim")] == [0.95, 0.9]


def test_a_baseline_that_is_no_result_is_known_as_one_and_an_interval_that_failed_hides_the_value() -> None:
    d = Drift(made())
    assert d.fault("lies/dim", HOOKS[2]) == FAULT
    assert d.fault("refusal/dim", HOOKS[2]) is None
    assert math.isnan(d.known("lies/dim", "cosine_cv", 20, HOOKS[2]).value)
    assert d.known("refusal/dim", "cosine_cv", 20, HOOKS[2]).value == pytest.approx(1.35)


def test_the_cosine_figure_draws_both_curves_and_where_a_notice_begins_and_marks_faults() -> None:
    figure = drift_plots.cosine_drift(made())
    panels = {axes.get_ylabel() or i: axes for i, axes in enumerate(figure.axes)}
    assert len(figure.axes) == 2 * 2, "a row a concept, a column a common hook"
    refusal = panels["refusal/dim"]
    assert refusal.lines[0].get_ydata().tolist() == pytest.approx([1.0, 0.95, 0.9])
    assert refusal.lines[1].get_ydata().tolist() == pytest.approx([1.5, 1.45, 1.4]), "corrected for noise"
    limits = {axes: next(x for x in axes.lines if x.get_label().startswith("notice")) for axes in figure.axes}
    assert limits[refusal].get_ydata()[0] == 0.95
    assert limits[panels["lies/dim"]].get_ydata()[0] == 0.9
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


def test_a_turn_that_the_audit_does_not_predict_is_named_and_one_that_it_does_is_not() -> None:
    at = {"hook": HOOKS[2], "step": 20, "split": "total"}
    measured = Drift(made()).get("refusal/dim", "cosine_to_baseline", 20, HOOKS[2]).value
    blind, sound = ([*made(), Measurement("refusal/dim", "predicted_cosine", v, **at)] for v in (1.0, measured + 0.01))
    [line] = unpredicted({"blind": blind, "sound": sound})
    assert line.startswith("blind: the weights alone predict a cosine of 1.00 for refusal/dim, and 0.85 was measured")


def test_every_run_has_a_verdict_and_a_notice_is_one() -> None:
    quiet = [row for row in made() if row.metric != "level"]
    calm = [*quiet, *(Measurement("run", "level", 0.0, step=step) for step in STEPS)]
    unread = [row for row in calm if not row.subject.startswith("behaviour/")]
    assert verdicts({"unread": unread}) == [
        "unread: no alarm and no notice in 3 measurements; behaviour was not read, so it could raise none"
    ]
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


def test_light_measurements_are_drawn_and_tables_say_when_directions_were_last_measured() -> None:
    light = [
        Measurement("behaviour/harmful", "refusal_log_odds", 0.5, 0.0, 1.0, n=12, step=30),
        Measurement("behaviour/harmful", "token_kl", 0.5, 0.4, 0.6, n=12, step=30),
    ]
    rows = [*made(), *light]
    d = Drift(rows)
    assert (d.last, d.last_answered, d.probed[-1]) == (20, 20, 30)
    curve = drift_plots.refusal_odds(rows).axes[0].lines[0]
    assert curve.get_xdata().tolist() == [0, 10, 20, 30]
    assert "! directions were last measured at step 20, behaviour at step 30" in remarks({"mine": rows})


def test_next_to_no_change_stands_the_smallest_change_that_would_have_been_seen() -> None:
    at = {"step": 20, "n": 48}
    still = [*made(), Measurement("behaviour/harmful", "refusal_rate_change", 0.0, -0.07, 0.07, **at)]
    (line,) = unseen_changes({"mine": still})
    assert "refuses harmful" in line
    assert "points (n = 48)" in line
    moved = [*made(), Measurement("behaviour/harmful", "refusal_rate_change", -0.4, -0.5, -0.3, **at)]
    assert unseen_changes({"mine": moved}) == []


def test_the_smallest_share_is_seen_with_80_percent_power_and_a_smaller_one_is_not() -> None:
    n = 48
    share = detectable_share(n)
    rng = np.random.default_rng(0)
    seen = [mean_interval(rng.binomial(1, share, n).astype(float)).low > 0 for _ in range(300)]
    assert 0.7 < np.mean(seen) < 0.9
    half = [mean_interval(rng.binomial(1, share / 2, n).astype(float)).low > 0 for _ in range(300)]
    assert np.mean(half) < 0.6
    assert detectable_share(200) < detectable_share(48) < detectable_share(12)
    change = rng.normal(0, 2.0, n)
    least = detectable_mean(mean_interval(change))
    assert least == pytest.approx(2.8 * 2.0 / np.sqrt(n), rel=0.3)


def test_differences_of_two_samples_cover_their_truth() -> None:
    a, b = np.array([1.0] * 30 + [0.0] * 18), np.array([1.0] * 4 + [0.0] * 44)
    found = difference_of_rates(a, b)
    assert found.value == pytest.approx(26 / 48)
    assert 0.3 < found.low < found.value < found.high < 0.75
    same = difference_of_rates(a, a)
    assert same.low < 0 < same.high
    means = difference_of_means(a, b)
    assert means.low == pytest.approx(found.low, abs=0.05)
