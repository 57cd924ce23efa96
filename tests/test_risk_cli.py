"""`safety-lens risk`: forecast, figures, row risks, scoring, and what it says when it cannot."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from safety_lens.artifacts import load_artifact
from safety_lens.cli import app
from safety_lens.cli.risk_score import show_score
from safety_lens.errors import ArtifactError, DataError, SafetyLensError
from safety_lens.log import Measurement, write_measurements
from safety_lens.monitors.forecasting.growth import Curve
from safety_lens.monitors.forecasting.scoring import Measured, score_forecast
from safety_lens.stats import Interval

PLAN = [
    *("--model", "organism", "--data", "compliance", "--max-steps", "20", "--learning-rate", "1e-3", "--device", "cpu"),
    *("--set", "tuning.targets=[q_proj, v_proj]", "--set", "training.lr_scheduler_type=constant", "--rank", "4"),
    *("--set", "data.limit=32", "--n-safety", "12", "--batches", "2"),
]


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["risk", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return str(result.output)


@pytest.fixture(scope="module")
def forecast(tmp_path_factory: Any) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("risk") / "forecast"
    return out, _run(*PLAN, "--rehearse", "2", "--rows", "--ancestor", "--out", str(out))


def test_a_forecast_is_printed_and_written_with_its_figures(forecast: tuple[Path, str]) -> None:
    out, said = forecast
    assert "closed form" in said
    assert "extrapolated" in said
    assert "the law's own error" in said
    names = {path.name for path in out.iterdir()}
    figures = {"forecast.png", "sensitivity.png", "spectrum.png", "row_risk.png"}
    assert figures | {"row_risk.jsonl", "risk.safetensors", "measurements.jsonl"} <= names
    saved = load_artifact(out, kind="risk")
    assert saved.manifest["safety"]["n"] == 12
    assert {row.subject for row in saved.measurements} >= {
        "risk/closed_form",
        "risk/overlap",
        "ancestor/alignment-risk",
    }


def test_row_risks_carry_the_lines_of_the_file(forecast: tuple[Path, str]) -> None:
    rows = [json.loads(line) for line in (forecast[0] / "row_risk.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    assert [row["risk"] for row in rows] == sorted((row["risk"] for row in rows), reverse=True)
    assert rows[0]["risk"] > 0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [Measurement("behaviour/harmful", "token_kl", 1e-6 * step**4, step=step) for step in range(0, 21, 4)]
    write_measurements(folder / "drift.jsonl", rows)
    return folder


def test_a_saved_forecast_is_scored_against_a_run(forecast: tuple[Path, str], run: Path, tmp_path: Path) -> None:
    out = tmp_path / "score"
    rows = _run("--forecast", str(forecast[0]), "--score", str(run), "--out", str(out), "--json").splitlines()
    found = {(r["subject"], r["metric"]): r["value"] for r in map(json.loads, rows)}
    assert found["score/measured", "log_slope"] == pytest.approx(4.0)
    assert found["score/closed_form", "calibration"] > 0
    assert load_artifact(out, kind="risk-score").measurements
    assert "closed form" in _run("--forecast", str(forecast[0]), "--score", str(run))


def test_what_is_printed_of_a_score_does_not_contradict_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """The run breaks at step 12.6: abstention is no "yes", and a warning that was not given is named."""
    steps = np.arange(1.0, 101.0)
    kl = 0.1 * (steps / 20) ** 4
    close = Curve(steps, kl, kl, kl, Interval(20.0, 11.0, 40.0), float("inf"), taken=5)
    curves = {"rehearsal": close, "closed_form": replace(close, valid=6.0, reaches=Interval(20.0, 18.0, 22.0), taken=0)}
    at = np.arange(2.0, 60.0, 2.0)
    show_score(score_forecast(curves, Measured(at, 4e-6 * at**4, {}), limit=0.1, level="amber"))
    lines = capsys.readouterr().out.splitlines()
    rehearsal, closed = (next(line for line in lines if name in line).split() for name in ("rehearsal", "closed"))
    assert rehearsal.count("yes") == 2
    assert closed.count("no") + closed.count("no:") == 2
    assert "yes" not in closed
    assert any(
        line.startswith("MISSED WARNING the level was amber; the limit was reached at step 13") for line in lines
    )
    show_score(score_forecast(curves, Measured(at, 4e-6 * at**4, {}), limit=0.1, level="red"))
    assert "MISSED" not in capsys.readouterr().out


def test_several_runs_are_ranked(forecast: tuple[Path, str], run: Path) -> None:
    pairs = ["--forecast", str(forecast[0]), "--score", str(run)] * 3
    rows = [json.loads(line) for line in _run(*pairs, "--json").splitlines()]
    assert any(row["metric"] == "rank_runs" and row["subject"] == "score/mean_loss" for row in rows)


def test_a_run_of_ours_is_scored_from_its_own_configuration(run: Path) -> None:
    from safety_lens.monitors.finetune.config import read_config

    changes = {"out": str(run), "data.source": "compliance", "data.limit": 32, "training.max_steps": 20}
    config = read_config(None, {**changes, "tuning.rank": 4, "tuning.targets": ["v_proj"], "device": "cpu"})
    (run / "config.yaml").write_text(config.to_yaml())
    said = _run("--score", str(run), "--n-safety", "8", "--batches", "2")
    assert "Forecasts beside what was measured" in said


def test_a_dry_run_counts_passes_and_forecasts_nothing(tmp_path: Path) -> None:
    found = json.loads(_run(*PLAN, "--rehearse", "3", "--dry-run", "--json"))
    assert found["plan_steps"] == 20
    assert found["training_batches"] == 2 * 3 + 3
    assert found["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["--data", "compliance", "--set", "tuning.targets=[nothing]"], DataError, "no module 'nothing'"),
        (["--data", "compliance", "--directions", "50"], DataError, "rank 50"),
        (["--data", "compliance", "--no-closed-form"], DataError, "nothing to forecast with"),
        (["--data", "compliance", "--optim", "adafactor"], DataError, "sgd and adamw"),
        (["--forecast", "somewhere"], DataError, "--score"),
        (["--score", "nowhere"], ArtifactError, "no config.yaml"),
    ],
)
def test_what_cannot_be_forecast_is_said_in_one_sentence(
    arguments: list[str], error: type[SafetyLensError], says: str
) -> None:
    with pytest.raises(error, match=says):
        _run("--max-steps", "5", "--n-safety", "8", "--batches", "2", "--device", "cpu", *arguments)
