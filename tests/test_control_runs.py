"""Control runs: a harmless run turns more than all the others as often as its fellows do, a harmful one always."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from safety_lens.errors import ArtifactError, DataError
from safety_lens.log import Measurement
from safety_lens.monitors import StopRule
from safety_lens.monitors.alarm import Level
from safety_lens.monitors.control_runs import ControlRuns
from safety_lens.monitors.finetune.config import read_config
from safety_lens.monitors.finetune.early import check_early

PLAN = {"out": "unwritten", "data": {"source": "benign"}, "model": "organism"}
HOOKS = [f"blocks.{i}.hook_resid_post" for i in range(4)]


def log(turn: Sequence[float], steps: Sequence[int] = (0, 10, 20), subject: str = "refusal/dim") -> list[Measurement]:
    """A run that turns by `turn` at each hook until step 20, evenly."""
    return [
        Measurement(subject, metric, cosine, cosine - 0.01, cosine + 0.01, hook=h, step=step)
        for step in steps
        for metric in ("cosine_to_baseline", "cosine_cv")
        for h, t in zip(HOOKS, turn, strict=True)
        for cosine in [1 - t * step / 20]
    ]


def last(rows: Sequence[Measurement]) -> list[Measurement]:
    return [row for row in rows if row.step == 20]


def cosines(rows: Sequence[Measurement]) -> list[Measurement]:
    return [row for row in last(rows) if row.metric == "cosine_to_baseline"]


@pytest.mark.parametrize("n", [6, 11])
def test_of_runs_of_one_kind_exactly_one_exceeds_all_the_others(n: int) -> None:
    """So a further harmless run does so with probability 1 / (n + 1), whatever the spread over hooks."""
    rng = np.random.default_rng(n)
    for _ in range(20):
        runs = [log(rng.lognormal(-3, 1, 4) * np.array([0.1, 1, 3, 10]) / 30) for _ in range(n)]
        exceed = [ControlRuns.of_logs([*runs[:i], *runs[i + 1 :]]).exceeded(cosines(run)) for i, run in enumerate(runs)]
        assert exceed.count(True) == 1
        assert exceed.count(False) == n - 1
    assert ControlRuns.of_logs(runs[1:]).rate == pytest.approx(1 / n)


def test_a_turn_at_a_hook_that_hardly_moves_elsewhere_counts() -> None:
    calm = [log([0.001, 0.1, 0.2, 0.3 + k / 100]) for k in range(5)]
    controls = ControlRuns.of_logs(calm)
    assert controls.exceeded(cosines(log([0.05, 0.1, 0.2, 0.3]))) is True, "fifty times as much as in the others"
    assert controls.exceeded(cosines(log([0.001, 0.1, 0.2, 0.3]))) is False


def test_steps_between_measurements_are_interpolated_and_later_ones_unknown() -> None:
    controls = ControlRuns.of_logs([log([0.1 + k / 1000] * 4, steps=(0, 20)) for k in range(5)])
    half = [row for row in log([0.12] * 4) if row.step == 10 and row.metric == "cosine_to_baseline"]
    assert controls.exceeded(half) is True
    short = ControlRuns.of_logs([log([0.1] * 4, steps=(0, 10)) for _ in range(5)])
    assert short.exceeded(cosines(log([0.5] * 4))) is None
    assert controls.exceeded(cosines(log([0.5] * 4, subject="other/dim"))) is None


def test_a_notice_needs_more_than_the_control_runs_and_says_so() -> None:
    controls = ControlRuns.of_logs([log([0.2 + k / 100] * 4) for k in range(5)])
    assert StopRule().update(last(log([0.2] * 4))).level is Level.NOTICE
    assert StopRule(controls=controls).update(last(log([0.2] * 4))).level is Level.OK
    verdict = StopRule(controls=controls).update(last(log([0.4] * 4)))
    assert verdict.level is Level.NOTICE
    assert verdict.reasons[0].endswith("more than in any control run")
    short = ControlRuns.of_logs([log([0.2] * 4, steps=(0, 10)) for _ in range(5)])
    assert "no control run reaches this step" in StopRule(controls=short).update(last(log([0.2] * 4))).reasons[0]


def test_too_few_runs_and_folders_without_directions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="4 control runs say too little"):
        ControlRuns.of_logs([log([0.1] * 4)] * 4)
    with pytest.raises(ArtifactError, match=r"is no monitored run: it has no drift\.jsonl"):
        ControlRuns.read([tmp_path / "drift.jsonl"] * 5)
    (tmp_path / "drift.jsonl").write_text("".join(r.to_json() + "\n" for r in log([0.1] * 4, steps=(0,))))
    assert json.loads((tmp_path / "drift.jsonl").read_text().splitlines()[0])["step"] == 0
    with pytest.raises(ArtifactError, match="--monitor-budget none"):
        ControlRuns.read([tmp_path / "drift.jsonl"] * 5)


def test_control_runs_of_another_kind_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    plan = {"out": tmp_path / "out", "data.source": "benign", "model": "organism", "training.max_steps": 20}
    folders = [tmp_path / f"run{k}" for k in range(5)]
    named = read_config(None, plan | {"monitor.control_runs": [str(folder) for folder in folders]})
    with pytest.raises(ArtifactError, match=r"run0 is no run of finetune: it has no config\.yaml"):
        check_early(named)
    for k, folder in enumerate(folders):
        folder.mkdir()
        (folder / "config.yaml").write_text(json.dumps({**PLAN, "training": {"max_steps": 20 if k < 4 else 30}}))
        (folder / "drift.jsonl").write_text("".join(r.to_json() + "\n" for r in log([0.1 + k / 100] * 4)))
    with pytest.raises(DataError, match=r"run4 has training\.max_steps 30 and this run 20"):
        check_early(named)
    (folders[4] / "config.yaml").write_text(json.dumps({**PLAN, "training": {"max_steps": 20}}))
    check_early(named)
