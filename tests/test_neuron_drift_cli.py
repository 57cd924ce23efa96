"""`safety-lens neurons drift` on runs of the organism, watched while they trained and measured again from the disk."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import zoo
from typer.testing import CliRunner

from safety_lens.artifacts import load_artifact
from safety_lens.cli.neurons_drift import drift
from safety_lens.errors import ArtifactError, DataError, ModelMismatchError
from safety_lens.models import load_model
from safety_lens.monitors.finetune.config import read_config
from safety_lens.monitors.finetune.run import prepare, run
from safety_lens.probes.groups import group_of, save_groups
from safety_lens.probes.matrices import matrices_of

SETTINGS = {
    "model": "organism", "device": "cpu", "data.source": "compliance", "tuning.rank": 4,
    "tuning.targets": ["q_proj", "down_proj"], "training.max_steps": 4, "training.learning_rate": 3e-3,
    "training.per_device_train_batch_size": 2, "training.save_steps": 2, "monitor.concepts": ["refusal"],
    "monitor.every": 2, "monitor.budget": None, "monitor.layers": [4], "monitor.probes": False,
}  # fmt: skip

app = typer.Typer()
app.command()(drift)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model("organism", device="cpu")
    generator = torch.Generator().manual_seed(0)
    entries = {m.name: torch.randperm(m.numel, generator=generator)[:64] for m in matrices_of(model)}
    neurons = {f"blocks.{b}.mlp": [5, 100, 300] for b in range(8)}
    made = [group_of(model, "entries", "weight", entries), group_of(model, "units", "neuron", neurons)]
    return save_groups(tmp_path_factory.mktemp("g") / "groups", made, model)


@pytest.fixture(scope="module")
def tuned(groups: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    watched = {"monitor.groups": [f"{groups}:entries", f"{groups}:units"]}
    return run(read_config(None, {**SETTINGS, **watched, "out": tmp_path_factory.mktemp("r") / "run"})).out


def command(*arguments: Any) -> Any:
    found = CliRunner().invoke(app, [str(a) for a in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def test_the_disk_gives_what_the_monitor_saw(groups: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "drift"
    said = command("organism", tuned, "--groups", groups, "--out", out, "--device", "cpu")
    artifact = load_artifact(out, kind="neuron-drift")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    figures = {f"figures/neurons-{name}.png" for name in ("steps", "distribution", "matrices")}
    assert names >= {"drift_analysis_report.txt", "statistical_results.json", "measurements.jsonl", *figures}
    assert said.stdout.startswith((out / "drift_analysis_report.txt").read_text(encoding="utf-8"))
    logged = load_artifact(tuned, kind="finetune").measurements
    key = ("rms_change", "rms_change_random", "unit_turn")
    live = {(r.subject, r.metric, r.split, r.step): r.value for r in logged if r.metric in key and r.step}
    saved = {(r.subject.partition(":")[2], r.metric, r.split, r.step): r.value
             for r in artifact.measurements if r.metric in key}  # fmt: skip
    assert live
    assert {k: saved[k] for k in live} == pytest.approx(live, rel=1e-5)
    assert max(live.values()) > 0


def test_what_a_run_froze_is_left_out_on_the_disk_as_while_it_trained(
    groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = {"monitor.groups": [f"{groups}:entries", f"{groups}:units"], "tuning.freeze": [f"{groups}:entries"]}
    out = run(read_config(None, {**SETTINGS, **watched, "training.max_steps": 2, "out": tmp_path / "run"})).out
    said = command("organism", out, "--groups", groups, "--device", "cpu").stdout
    assert "100.0% of its weights were frozen in the run run; they are left out" in said
    assert "Nothing of it could move, so there is nothing to compare" in said
    assert "withheld: single weights were frozen in its neurons (" in said
    assert "H1 (fragile safety: the group moves farther than random partners): withheld" in said
    rows = [r for r in load_artifact(out, kind="finetune").measurements if r.step == 2 and r.split == "total"]
    live = {
        (r.subject, r.metric): r.value for r in rows if r.metric in ("held_share", "rms_change", "rms_change_random")
    }
    results = json.loads(command("organism", out, "--groups", groups, "--json", "--device", "cpu").stdout)["groups"]
    assert live["neurons/entries", "held_share"] == 1
    for name, moved in ((name, found["final"]["run"]) for name, found in results.items()):
        assert results[name]["held_share"]["run"] == live[f"neurons/{name}", "held_share"]
        for side, end in (("group", ""), ("random", "_random")):
            here = moved[side]["rms_change"]
            assert (math.nan if here is None else here) == pytest.approx(
                live[f"neurons/{name}", f"rms_change{end}"], rel=1e-5, nan_ok=True
            )
    groups.rename(groups.with_name("elsewhere"))
    try:
        lost = command("organism", out, "--groups", groups.with_name("elsewhere"), "--device", "cpu").stdout
    finally:
        groups.with_name("elsewhere").rename(groups)
    assert f"this run froze {groups}:entries, which is not there now" in lost


def test_json_holds_the_whole_result(groups: Path, tuned: Path) -> None:
    results = json.loads(command("organism", tuned, "--groups", f"{groups}:units", "--json", "--device", "cpu").stdout)
    (name,) = results["groups"]
    assert name == "units"
    assert set(results["groups"]["units"]["hypotheses"]) == {"H1", "H2"}
    assert results["groups"]["units"]["outside_share"] == pytest.approx(2 / 3)


def test_groups_and_arguments_that_do_not_fit_are_refused(groups: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no group 'nobody'"):
        command("organism", tuned, "--groups", f"{groups}:nobody", "--device", "cpu")
    other = load_model(zoo.make("llama"))
    strange = group_of(other, "g", "weight", {"blocks.0.attn.W_Q": [1]})
    place = save_groups(tmp_path / "strange", [strange], other)
    with pytest.raises(ModelMismatchError):
        command("organism", tuned, "--groups", place, "--device", "cpu")
    watched = {**SETTINGS, "out": tmp_path / "x", "monitor.groups": [str(groups)]}
    with pytest.raises(ArtifactError, match="several groups"):
        prepare(read_config(None, watched))
    one = {**watched, "monitor.groups": [f"{groups}:units"]}
    with pytest.raises(DataError, match="trained as a whole"):
        prepare(read_config(None, {**one, "tuning.method": "full"}))
    with pytest.raises(DataError, match="needs a concept"):
        read_config(None, {**one, "monitor.concepts": []})
