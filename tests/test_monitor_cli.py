"""Saved fine-tunes measured after the fact: the same numbers as during training, and no adapter of another base."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from safety_lens.artifacts import load_artifact
from safety_lens.cli import app
from safety_lens.errors import ArtifactError, ModelError, ModelMismatchError
from safety_lens.models import load_hf
from safety_lens.monitors.drift_log import read_log
from safety_lens.monitors.finetune.config import read_config
from safety_lens.monitors.finetune.run import run
from safety_lens.monitors.saved import SavedRun, find_states, measure_saved, run_names
from safety_lens.organism import MODEL_DIR

HOOKS = ["blocks.3.hook_resid_post", "blocks.7.hook_resid_post"]


def tune(out: Path, data: str = "compliance", **changes: Any) -> Path:
    settings = {
        "model": "organism", "device": "cpu", "data.source": data, "out": out, "tuning.rank": 8,
        "tuning.targets": ["q_proj", "v_proj", "o_proj"], "training.max_steps": 6, "training.learning_rate": 3e-3,
        "training.per_device_train_batch_size": 4, "training.lr_scheduler_type": "constant", "training.save_steps": 3,
    }  # fmt: skip
    return run(read_config(None, {**settings, **changes})).out


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(
        tmp_path_factory.mktemp("runs") / "compliance",
        **{
            "monitor.concepts": ["refusal"],
            "monitor.every": 3,
            "monitor.budget": None,
            "monitor.layers": [3, 7],
            "monitor.probes": False,
        },
    )


def measured(base: str | Path, *sources: Path) -> list[SavedRun]:
    return measure_saved(base, sources, ["refusal"], hooks=lambda n: HOOKS, probes=None, device="cpu")


@pytest.fixture(scope="module")
def saved(watched: Path) -> SavedRun:
    return measured("organism", watched)[0]


def cosines(rows: Any) -> dict[tuple[str | None, int | None], float]:
    return {(r.hook, r.step): r.value for r in rows if r.metric == "cosine_to_baseline" and r.step is not None}


def test_checkpoints_of_a_run_are_found_in_order_and_its_end_is_not_taken_twice(watched: Path) -> None:
    states = find_states(watched)
    assert [state.step for state in states] == [3, 6]
    assert all(state.is_adapter for state in states)
    shutil.rmtree(watched.parent / "alone", ignore_errors=True)
    shutil.copytree(watched, watched.parent / "alone", ignore=shutil.ignore_patterns("checkpoints"))
    assert [state.step for state in find_states(watched.parent / "alone")] == [6]


def test_a_saved_adapter_gives_the_numbers_that_were_measured_while_it_was_trained(
    watched: Path, saved: SavedRun
) -> None:
    then, now = cosines(read_log(watched / "drift.jsonl")), cosines(saved.measurements)
    assert now.keys() <= then.keys(), "the run may have measured more often, after a notice"
    assert {step for _, step in now} == {0, 3, 6}
    assert max(abs(then[at] - now[at]) for at in now) < 1e-6
    assert min(now.values()) < 1 - 1e-3, "there was something to measure"


def test_a_merged_model_is_measured_as_its_adapter_is(watched: Path, saved: SavedRun, tmp_path: Path) -> None:
    live, tokenizer = load_hf("organism", adapter=watched, device="cpu")
    live.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    found = measured("organism", tmp_path / "merged")[0]
    assert not found.states[0].is_adapter
    merged, adapter = cosines(found.measurements), cosines(saved.measurements)
    assert max(abs(merged[hook, 1] - adapter[hook, 6]) for hook in HOOKS) < 1e-5


def test_an_untrained_adapter_has_not_moved_anything(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL_DIR), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "zero")
    rows = measured("organism", tmp_path / "zero")[0].measurements
    assert cosines(rows)[HOOKS[0], 1] == pytest.approx(1.0, abs=1e-9)
    assert next(r.value for r in rows if r.metric == "level") == 0


def test_the_audit_comes_first_and_needs_no_forward_through_the_adapter(saved: SavedRun) -> None:
    metrics = [row.metric for row in saved.measurements if row.step != 0]
    assert metrics.index("relative_change") < metrics.index("cosine_to_baseline")
    assert {"alignment_write", "alignment_read", "predicted_cosine", "intruders"} <= set(metrics)


def test_an_adapter_for_another_base_names_both(watched: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(MODEL_DIR, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(other)
    with pytest.raises(ModelError, match=rf"was made for {MODEL_DIR}.*{other} is another model"):
        measured(other, watched)
    shutil.copytree(MODEL_DIR, tmp_path / "same")
    assert measured(tmp_path / "same", watched)[0].notes == ()


def test_an_adapter_whose_base_cannot_be_compared_is_measured_with_a_note(watched: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(watched / name, adapter / name)
    said = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": "someone/base"}))
    assert "names someone/base as its base" in measured("organism", adapter)[0].notes[0]


def test_an_adapter_that_does_not_fit_and_a_model_of_another_shape_are_named(tmp_path: Path) -> None:
    model = get_peft_model(zoo.make("llama"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"adapter was made for .*, not for"):
        measured("organism", tmp_path / "adapter")
    zoo.make("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="is no fine-tune of"):
        measured("organism", tmp_path / "model")


def test_another_tokenizer_is_an_error_that_gives_both_sizes(watched: Path, tmp_path: Path) -> None:
    shutil.copytree(watched, tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoints"))
    zoo.tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"another tokenizer \(97 tokens\)"):
        measured("organism", tmp_path / "adapter")


def test_a_folder_with_nothing_in_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter, model or checkpoint"):
        find_states(tmp_path)


def test_names_of_runs_are_as_short_as_they_can_be_and_differ() -> None:
    assert run_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert run_names(["x/lora", "y/lora"]) == ["x/lora", "y/lora"]
    assert run_names(["same/a", "same/a"]) == ["a (1)", "a (2)"]


def test_the_command_compares_runs_in_tables_and_writes_an_artifact_with_figures(watched: Path, tmp_path: Path) -> None:
    places = [str(watched / "checkpoints" / f"checkpoint-{step}") for step in (3, 6)]
    arguments = ["monitor", "organism", *places, "--device", "cpu"]
    arguments += ["--concepts", "refusal", "--layers", "3,7", "--probe-prompts", "8", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for text in ("Audit of the weights", "Directions at", "Behaviour", "checkpoint-3", "checkpoint-6"):
        assert text in done.stdout
    artifact = load_artifact(tmp_path / "out", kind="monitor")
    assert {row.subject.split(":")[0] for row in artifact.measurements} == {"checkpoint-3", "checkpoint-6"}
    assert (tmp_path / "out" / "figures" / "drift-comparison.png").is_file()


def test_the_commands_errors_are_one_line_and_exit_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safety_lens.cli import main

    monkeypatch.setattr("sys.argv", ["safety-lens", "monitor", "organism", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2


def test_drift_is_read_from_logs_runs_and_artifacts_alike(watched: Path, tmp_path: Path) -> None:
    from safety_lens.cli.drift_source import by_run, holds_drift, read_runs

    assert holds_drift(watched)
    assert holds_drift(watched / "drift.jsonl")
    assert not holds_drift(tmp_path)
    one, two = read_runs([watched]), read_runs([watched / "drift.jsonl"])
    assert one["compliance"] == two["drift"]
    named = [replace(row, subject=f"mine:{row.subject}") for row in one["compliance"]]
    assert by_run(named) == {"mine": one["compliance"]}
    with pytest.raises(ArtifactError, match="holds no drift"):
        read_runs([tmp_path])


def test_runs_and_the_monitor_share_one_stored_baseline_and_name_what_does_not_fit(
    saved: SavedRun, tmp_path: Path
) -> None:
    watch = {"monitor.concepts": ["refusal"], "monitor.layers": [3, 7], "monitor.probes": False, "monitor.budget": None}
    shared = {**watch, "monitor.baseline": tmp_path / "base", "training.max_steps": 2, "monitor.seed": 0}
    first, second = (tune(tmp_path / str(seed), **shared, seed=seed) for seed in (0, 1))
    logs = [read_log(run / "drift.jsonl") for run in (first, second)]
    start = [[row for row in log if row.step == 0] for log in logs]
    assert start[0] == start[1]  # its seconds, too: the second run did not measure
    assert cosines(logs[0]) != cosines(logs[1])
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "base").iterdir())
    again = measure_saved(
        "organism", [second], ["refusal"], hooks=lambda n: HOOKS, probes=None, device="cpu", stored=tmp_path / "base"
    )[0]
    assert [r for r in again.measurements if r.step == 0 and r.metric == "seconds"] == [
        r for r in start[0] if r.metric == "seconds"
    ]
    then, now = cosines(logs[1]), cosines(again.measurements)
    assert max(abs(then[at] - now[at]) for at in now) < 1e-6
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "base").iterdir())
    with pytest.raises(ModelMismatchError, match="another seed"):
        tune(tmp_path / "other", **{**shared, "monitor.seed": 1})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"--baseline: .* is not an artifact; choose another --baseline"):
        tune(tmp_path / "other", **{**shared, "monitor.baseline": tmp_path / "notes"})
