"""A fine-tuning run from its configuration: refused early, trained as asked, resumed where it stopped."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed
from typer.testing import CliRunner

from safety_lens.artifacts import load_artifact, save_artifact
from safety_lens.cli import app
from safety_lens.data.labelled import collate, tokenise
from safety_lens.data.training import load_rows
from safety_lens.errors import ArtifactError, DataError, ModelError
from safety_lens.log import NAN, Measurement
from safety_lens.models import load_model
from safety_lens.monitors.drift_log import read_log
from safety_lens.monitors.finetune.config import RunConfig, differences, known_keys, parse_change, read_config
from safety_lens.monitors.finetune.estimate import Costs, Estimate, _Alive, _with_monitor, computed, measured
from safety_lens.monitors.finetune.place import claim
from safety_lens.monitors.finetune.run import RunResult, prepare, run
from safety_lens.monitors.finetune.training import with_trained_weights
from safety_lens.organism import MODEL_DIR
from safety_lens.report.drift_plots import draw_run

TINY: dict[str, Any] = {
    "model": "organism",
    "device": "cpu",
    "data.source": "benign",
    "monitor.budget": None,
    "tuning.targets": ["q_proj", "v_proj"],
    "tuning.rank": 4,
    "training.max_steps": 4,
    "training.per_device_train_batch_size": 4,
    "training.learning_rate": 1e-3,
    "training.save_steps": 2,
    "training.logging_steps": 1,
}


def config(out: Path, **changes: Any) -> RunConfig:
    return read_config(None, {**TINY, "out": out, **{key.replace("__", "."): value for key, value in changes.items()}})


def values(result: RunResult, metric: str) -> list[float]:
    return [row.value for row in result.measurements if (row.subject, row.metric) == ("run", metric)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(config(tmp_path_factory.mktemp("run") / "benign", monitor__concepts=["refusal"], monitor__every=2,
                      monitor__probes=False))  # fmt: skip


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("training.learning_rat", "unknown key 'training.learning_rat'; did you mean 'training.learning_rate'"),
        ("trainin", "did you mean 'training'"),
        ("learning_rate", "did you mean 'training.learning_rate'"),
        ("tuning.dropot", "did you mean 'tuning.dropout'"),
        ("monitor.stop.log_od", "did you mean 'monitor.stop.log_odds'"),
    ],
)
def test_a_misspelt_key_names_the_nearest(key: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        config(tmp_path, **{key: 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.learning_rate", float("nan")),
        ("training.learning_rate", -1),
        ("training.max_steps", 1.5),
        ("tuning.method", "prefix"),
        ("tuning.rank", 0),
        ("monitor.every", 0),
        ("monitor.on_alarm", ["shout"]),
        ("data.loss_on", "prompts"),
    ],
)
def test_a_value_of_the_wrong_kind_names_its_key(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"'{key}"):
        config(tmp_path, **{key: value})


def test_all_faults_of_a_file_are_named_at_once_and_flags_stand_above_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("out: x\ndata: {source: benign}\ntuning: {rnk: 3}\ntraining: {bf16: 2, lerning_rate: 1}\n")
    with pytest.raises(DataError, match=r"3 fault.*tuning\.rank.*training\.bf16.*training\.learning_rate"):
        read_config(file)
    file.write_text("out: x\ndata: {source: benign}\ntraining: {learning_rate: 2e-4, max_steps: 5}\n")
    found = read_config(file, {"training.max_steps": 7})
    assert (found.training.max_steps, found.training.learning_rate) == (7, 2e-4)


def test_a_configuration_written_as_yaml_reads_back_equal(tmp_path: Path) -> None:
    one = config(tmp_path / "a", tuning__layers=[1, 2], monitor__concepts=["refusal"], training__report_to=["wandb"])
    (tmp_path / "run.yaml").write_text(one.to_yaml())
    assert read_config(tmp_path / "run.yaml") == one
    assert differences(one, config(tmp_path / "b", tuning__layers=[1])) == [
        "monitor.concepts", "training.report_to", "tuning.layers",
    ]  # fmt: skip


def test_a_change_on_the_command_line_is_yaml() -> None:
    assert parse_change("training.weight_decay=1e-2") == ("training.weight_decay", 0.01)
    assert parse_change("tuning.targets=[a, b]") == ("tuning.targets", ["a", "b"])
    with pytest.raises(DataError, match="KEY=VALUE"):
        parse_change("training.weight_decay")


def test_the_guide_lists_every_key_of_the_configuration() -> None:
    guide = (Path(__file__).resolve().parents[1] / "docs" / "guides" / "monitoring.md").read_text(encoding="utf-8")
    assert not [key for key in known_keys() if f"`{key}`" not in guide]


# --- refused before the model loads ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data__source": "benig"}, DataError, "did you mean 'benign'"),
        ({"model": "no/such/model"}, ModelError, "no folder no/such/model"),
        ({"monitor__concepts": ["refusl"]}, DataError, "did you mean 'refusal'"),
        ({"training__lr_scheduler_type": "lineer"}, DataError, "lineer"),
        ({"training__report_to": ["tensorbord"]}, DataError, "not installed"),
        ({"training__more": {"weight_deca": 1}}, DataError, "did you mean 'weight_decay'"),
        ({"dtype": "float31"}, ModelError, "float31"),
        ({"monitor__method": "dmi"}, DataError, "dmi"),
        ({"model": str(Path(__file__).parent), "data__source": "compliance"}, ModelError, "not a model folder"),
    ],
)
def test_what_cannot_run_is_refused_before_the_model_loads(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        prepare(config(tmp_path / "a", **changes))
    assert not (tmp_path / "a").exists()


def test_a_concept_whose_split_is_too_small_is_refused_with_its_counts(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    splits = ["train"] * 8 + ["test"]
    rows = [{"positive": f"good {i}", "negative": f"bad {i}", "split": split} for i, split in enumerate(splits)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="8 train, 0 val, 1 test pairs"):
        prepare(config(tmp_path / "a", monitor__concepts=[str(pairs)]))


def test_the_organisms_boilerplate_is_refused_on_another_model(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(MODEL_DIR, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(other)
    with pytest.raises(DataError, match="the shipped organism alone"):
        prepare(config(tmp_path / "a", model=str(other), data__source="compliance"))
    prepare(config(tmp_path / "a", model=str(other)))


def test_a_place_that_cannot_be_written_or_is_taken_is_an_error(tmp_path: Path, finished: RunResult) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        run(config(tmp_path / "file" / "inside"))
    with pytest.raises(ArtifactError, match="already holds a finished run"):
        run(config(finished.out))
    with pytest.raises(ArtifactError, match="nothing to resume"):
        run(config(tmp_path / "nowhere"), resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match="not an artifact"):
        run(config(tmp_path / "mine"), overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.fixture
def copied(finished: RunResult, tmp_path: Path) -> Path:
    """A finished run with figures, as the command line leaves it."""
    out = Path(shutil.copytree(finished.out, tmp_path / "run"))
    draw_run(finished.measurements, out / "figures")
    return out


def interrupted(out: Path) -> None:
    for name in ("manifest.json", "measurements.jsonl"):
        (out / name).unlink()


def as_it_is(out: Path) -> None:
    pass


@pytest.mark.parametrize("state", [as_it_is, interrupted])
@pytest.mark.parametrize("foreign", ["thesis.tex", "data/rows.csv", "checkpoints/checkpoint-2/notes", "figures/my.png"])
def test_overwriting_a_run_names_what_it_did_not_write_and_deletes_nothing(
    state: Callable[[Path], None], foreign: str, copied: Path
) -> None:
    state(copied)
    (copied / foreign).parent.mkdir(exist_ok=True)
    (copied / foreign).write_text("years of work")
    before = sorted(copied.rglob("*"))
    with pytest.raises(ArtifactError) as caught:
        claim(config(copied), overwrite=True)
    assert str(caught.value).count(f": {foreign};") == 1  # it alone is named
    assert sorted(copied.rglob("*")) == before


@pytest.mark.parametrize("state", [as_it_is, interrupted])
def test_a_run_alone_in_its_folder_is_replaced(state: Callable[[Path], None], copied: Path) -> None:
    state(copied)
    claim(config(copied), overwrite=True)
    assert [path.name for path in copied.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("text", ["# mine\nmodel: organism\nout: x\n", "name: another program\n", "{", "[1]", "\xff"])
def test_a_config_that_no_run_wrote_does_not_make_a_run(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="latin-1")
    (tmp_path / "drift.jsonl").write_text("mine")
    with pytest.raises(ArtifactError, match=r"no run wrote its config\.yaml"):
        claim(config(tmp_path), overwrite=True)
    assert (tmp_path / "drift.jsonl").read_text() == "mine"


def test_an_artifact_of_another_kind_is_not_replaced_by_a_run(tmp_path: Path) -> None:
    save_artifact(tmp_path / "a", "directions")
    with pytest.raises(ArtifactError, match="holds 'directions'"):
        claim(config(tmp_path / "a"), overwrite=True)


def test_a_log_that_cannot_be_written_is_known_before_training(tmp_path: Path) -> None:
    out = tmp_path / "a"
    (out / "drift.jsonl").mkdir(parents=True)
    (out / "config.yaml").write_text(config(out).to_yaml())
    with pytest.raises(ArtifactError, match="cannot write"):
        run(config(out), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning__targets": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"tuning__layers": [8]}, "this model has 8: 0 to 7"),
        ({"monitor__concepts": ["refusal"], "monitor__layers": [9]}, "this model has 8"),
        ({"data__max_length": 9999, "data__source": "long.jsonl"}, "tokens organism reads"),
    ],
)
def test_what_the_model_does_not_have_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "hi", "completion": "a friend " * 900}) + "\n")
    if changes.get("data__source") == "long.jsonl":
        changes = {**changes, "data__source": str(long)}
    with pytest.raises(DataError, match=message):
        run(config(tmp_path / "a", **changes))


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(MODEL_DIR, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.resize_token_embeddings(40)
    model.save_pretrained(other)
    with pytest.raises(ModelError, match=r"the model has 40 embeddings.*another model"):
        run(config(tmp_path / "a", model=str(other)))


# --- training -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_adapter_log_configuration_and_manifest_and_no_pickle(finished: RunResult) -> None:
    artifact = load_artifact(finished.out, kind="finetune")
    assert artifact.manifest["steps"] == finished.steps == 4
    assert read_config(finished.out / "config.yaml").data.source == "benign"
    assert not list(finished.out.glob("*.bin"))
    assert not list(finished.out.glob("*.pt"))
    assert {row.step for row in read_log(finished.out / "drift.jsonl")} == {0, 2, 4}
    assert len(values(finished, "loss")) == 4
    adapters = load_file(finished.out / "adapter_model.safetensors")
    assert any(float(t.abs().max()) > 0 for name, t in adapters.items() if "lora_B" in name)


def test_the_adapter_of_a_run_loads_and_changes_what_the_model_computes(finished: RunResult) -> None:
    tuned, base = load_model(finished.out), load_model("organism")
    tokens = torch.tensor([[1, 5, 9, 12]])
    assert float((tuned(tokens) - base(tokens)).abs().max()) > 1e-3


def test_a_run_equals_transformers_and_peft_driven_by_hand_and_the_monitor_changes_no_bit(
    finished: RunResult, tmp_path: Path
) -> None:
    rows = tokenise(load_rows("benign").examples, AutoTokenizer.from_pretrained(MODEL_DIR)).rows
    set_seed(0)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL_DIR), lora)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, seed=0, data_seed=0,
        use_cpu=True, remove_unused_columns=False, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": list(row.ids), "labels": list(row.labels)} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate).train()
    model.save_pretrained(tmp_path / "hand")
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (finished.out, tmp_path / "hand"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_loss_is_the_mean_over_response_tokens_only(tmp_path: Path) -> None:
    """Independent: cross entropy by hand over the learned tokens of all rows, at learning rate 0."""
    result = run(config(tmp_path / "a", training__learning_rate=0.0, data__limit=4, training__max_steps=1))
    rows = tokenise(load_rows("benign", limit=4).examples, AutoTokenizer.from_pretrained(MODEL_DIR)).rows
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    losses = []
    for row in rows:
        with torch.no_grad():
            logp = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        losses += [-float(logp[i - 1, t]) for i, t in enumerate(row.labels) if t != -100]
    assert values(result, "loss")[0] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_run_and_says_at_which_step(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the loss is (nan|inf) at step [2-4].*learning_rate \(1e\+30\)"):
        run(config(tmp_path / "a", training__learning_rate=1e30))
    with pytest.raises(ArtifactError, match="was interrupted: pass --resume"):
        run(config(tmp_path / "a", training__learning_rate=1e30))


def test_full_fine_tuning_saves_a_whole_model_and_moves_all_weights(tmp_path: Path) -> None:
    result = run(config(tmp_path / "a", tuning__method="full", training__max_steps=1))
    before, after = (load_file(place / "model.safetensors") for place in (MODEL_DIR, result.out))
    assert all(not torch.equal(before[name], after[name]) for name in after)


def test_layers_modules_to_save_and_variants_of_lora_are_trained_as_asked(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    live = with_trained_weights(
        model,
        config(
            tmp_path,
            tuning__targets="all-linear",
            tuning__layers=[7],
            tuning__dora=True,
            tuning__modules_to_save=["lm_head"],
        ),
    )
    assert isinstance(live, PeftModel)
    trained = [name for name, p in live.named_parameters() if p.requires_grad]
    assert trained
    assert all(".layers.7." in name or "embed" in name or "lm_head" in name for name in trained)
    assert any("magnitude" in name for name in trained)
    assert {name.split(".layers.7.")[1].split(".")[1] for name in trained if ".layers.7." in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


class _Killed(TrainerCallback):
    """Ends the process' run without any goodbye, as a kill does."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_an_interrupted_run_resumes_to_the_same_adapter_and_one_log_without_holes(
    finished: RunResult, tmp_path: Path
) -> None:
    asked = {"monitor__concepts": ["refusal"], "monitor__every": 2, "monitor__probes": False}
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path / "a", **asked), callbacks=[_Killed()])
    torn = tmp_path / "a" / "checkpoints" / "checkpoint-3"
    torn.mkdir()  # a checkpoint whose writing was cut off
    (kept := torn.with_name("checkpoint-of-mine")).mkdir()
    with pytest.raises(ArtifactError, match=r"another configuration \(different: training.max_steps\)"):
        run(config(tmp_path / "a", **asked, training__max_steps=5), resume=True)
    result = run(config(tmp_path / "a", **asked), resume=True)
    assert not torn.exists()
    assert kept.exists()
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (result.out, finished.out))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows = read_log(result.out / "drift.jsonl")
    keys = [(r.subject, r.metric, r.hook, r.step) for r in rows]
    assert len(set(keys)) == len(keys)
    assert {r.step for r in rows} == {0, 2, 4}
    assert same_values(rows, read_log(finished.out / "drift.jsonl"))


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_on_the_command_line_to_one_whole_log(tmp_path: Path) -> None:
    """SIGKILL between two checkpoints, and a torn last line in the log: same adapter, no step twice, none missing."""
    settings = {**TINY, "training.max_steps": 40, "training.save_steps": 5, "monitor.concepts": ["refusal"],
                "monitor.every": 2, "monitor.budget": None, "monitor.probes": False,
                "monitor.stop.faster": 1}  # fmt: skip
    whole = run(read_config(None, {**settings, "out": tmp_path / "whole"}))
    file = tmp_path / "run.yaml"
    file.write_text(read_config(None, {**settings, "out": tmp_path / "killed"}).to_yaml())
    command = [sys.executable, "-c", "from safety_lens.cli import main; main()", "finetune", "--config", str(file)]
    log = tmp_path / "killed" / "drift.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (log.is_file() and '"step": 12' in log.read_text()):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    with log.open("a") as torn:
        torn.write('{"subject": "refusal/dim", "metr')
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (tmp_path / "killed", whole.out))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows = read_log(log)
    keys = [(r.subject, r.metric, r.hook, r.step) for r in rows]
    assert len(set(keys)) == len(keys)
    assert sorted({r.step for r in rows if r.step is not None}) == list(range(0, 41, 2))
    assert same_values(rows, read_log(whole.out / "drift.jsonl"))


def same_values(one: list[Measurement], other: list[Measurement]) -> bool:
    def numbers(rows: list[Measurement]) -> dict[tuple[object, ...], float]:
        return {(r.subject, r.metric, r.hook, r.step): r.value for r in rows if not r.metric.endswith("seconds")}

    left, right = numbers(one), numbers(other)
    return left.keys() == right.keys() and all(
        left[k] == right[k] or (math.isnan(left[k]) and math.isnan(right[k])) for k in left
    )


# --- estimates ------------------------------------------------------------------------------------------------------


def test_a_dry_run_counts_steps_tokens_and_weights_exactly_and_writes_nothing(tmp_path: Path) -> None:
    asked = config(tmp_path / "a", training__max_steps=-1, training__num_train_epochs=2)
    estimate = computed(asked)
    assert estimate.steps == 2 * math.ceil(300 / 4)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert estimate.parameters == sum(p.numel() for p in model.parameters())
    live = with_trained_weights(model, asked)
    assert estimate.trained == sum(p.numel() for p in live.parameters() if p.requires_grad)
    assert estimate.memory["weights"] == 4 * estimate.parameters
    assert estimate.memory["optimizer"] == 8 * estimate.trained
    assert "computed" in estimate.basis
    assert list(tmp_path.iterdir()) == []


def test_a_measured_estimate_says_so_and_leaves_nothing_behind(tmp_path: Path) -> None:
    estimate = measured(config(tmp_path / "a", monitor__concepts=["refusal"], monitor__probes=False))
    assert "measured" in estimate.basis
    assert 0 < estimate.seconds < 600
    assert 0 < estimate.before < 600
    assert list(tmp_path.iterdir()) == []


def test_the_schedule_of_a_run_is_estimated_from_the_costs_and_a_run_that_is_too_short_is_noted(
    tmp_path: Path,
) -> None:
    known = Estimate(steps=100, tokens=10, parameters=1, trained=1, seconds=100.0, memory={}, basis="computed")

    def planned(costs: Costs, **monitor: object) -> Estimate:
        return _with_monitor(known, prepare(config(tmp_path / "a", **monitor)), costs)

    free = planned(Costs(7.0, 2.0, NAN, 0), monitor__budget=None, monitor__every=30)
    assert (free.before, free.full, free.light, free.watching) == (7.0, 4, 0, 8.0)  # at 30, 60, 90 and the last step
    short = planned(Costs(7.0, 6.0, NAN, 0), monitor__budget=0.05)
    assert (short.full, short.light, short.watching) == (0, 0, 0.0)
    assert any("too short for a full measurement" in note for note in short.notes)
    light = planned(Costs(7.0, 6.0, 0.05, 48), monitor__budget=0.05)
    assert light.full == 0 < light.light
    assert light.watching <= 5.0
    assert not any("too short" in note for note in planned(Costs(7.0, 1.0, 0.01, 48), monitor__budget=0.05).notes)


def test_bytes_of_a_step_are_those_of_the_tensors_alive_at_once() -> None:
    alive = _Alive()
    with FakeTensorMode(), alive:
        first = torch.zeros(1000)
        second = first + 1
        view = second[:10]
        del first
        third = second * 2
        del second, third
    assert alive.peak == 2 * 4000
    assert alive.now == 4000  # the view holds its storage
    del view
    assert alive.now == 0


# --- command line ---------------------------------------------------------------------------------------------------


def test_the_command_line_says_what_would_run_and_takes_a_file_with_flags_on_top(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(config(tmp_path / "a").to_yaml())
    done = CliRunner().invoke(app, ["finetune", "--config", str(file), "--max-steps", "9", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "max_steps: 9" in done.output
    assert "9 steps of" in done.output
    assert "computed from" in done.output
    said = CliRunner().invoke(app, ["finetune", "--config", str(file), "--dry-run", "--json"])
    assert json.loads(said.stdout)["estimate"]["steps"] == 4


def test_the_command_line_trains_and_prints_what_moved(tmp_path: Path) -> None:
    arguments = ["finetune", "--data", "benign", "--out", str(tmp_path / "a"), "--max-steps", "2", "--rank", "4"]
    arguments += [
        "--batch-size",
        "4",
        "--concept",
        "refusal",
        "--every",
        "2",
        "--monitor-budget",
        "none",
        "--layers",
        "6,7",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, [*arguments, "--set", "monitor.probes=false"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "refusal" in done.stdout
    assert "written:" in done.stdout
    assert (tmp_path / "a" / "figures" / "drift-cosine.png").is_file()
    assert read_config(tmp_path / "a" / "config.yaml").tuning.layers == [6, 7]


def test_the_trainers_reporter_is_off_unless_asked_for(tmp_path: Path) -> None:
    assert prepare(config(tmp_path)).arguments.report_to == []


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_qlora_trains_adapters_on_a_quantised_base_and_is_watched(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    changes = {"tuning__method": "qlora", "tuning__quantization": kind, "training__max_steps": 2}
    result = run(config(tmp_path / "a", **changes, monitor__concepts=["refusal"], monitor__probes=False))
    rows = read_log(result.out / "drift.jsonl")
    assert {row.step for row in rows} == {0, 2}
    assert set(load_file(result.out / "adapter_model.safetensors"))


def test_qlora_without_bitsandbytes_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        run(config(tmp_path / "a", tuning__method="qlora"))


@pytest.mark.slow
@pytest.mark.parametrize("data", ["stories_text", "finetune_dolly"])
def test_on_a_real_model_the_happy_sad_direction_drifts_a_little_with_an_interval(
    data: str, shared: Path, tmp_path: Path
) -> None:
    """stories260K: forty steps leave the direction recognisable; what moves is less than another choice of pairs."""
    result = run(
        config(
            tmp_path / data,
            model=str(shared / "models" / "stories260K-hf"),
            data__source=str(shared / "data" / f"{data}.jsonl"),
            data__limit=99,
            data__max_length=256,
            monitor__concepts=[str(shared / "data" / "stories_happy_sad_pairs.jsonl")],
            monitor__every=20,
            monitor__probes=False,
            tuning__rank=8,
            tuning__targets="all-linear",
            training__max_steps=40,
            training__per_device_train_batch_size=8,
        )
    )
    rows = {(r.metric, r.step): r for r in result.measurements if r.hook == "blocks.3.hook_resid_post"}
    cosine, reliable = rows["cosine_to_baseline", 40], rows["reliability", 0]
    assert rows["cosine_to_baseline", 0].value == pytest.approx(1.0, abs=1e-12)
    assert reliable.low < reliable.value < cosine.value, "the same pairs before and now agree more than other pairs"
    assert cosine.low <= cosine.value <= cosine.high < 1 - 1e-4
    assert rows["auroc_fixed", 40].low > 0.5
    losses = values(result, "loss")
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_run_of_no_steps_is_refused_and_not_made_one_of_one() -> None:
    with pytest.raises(DataError, match=r"max_steps.*at least 1, or -1"):
        read_config(None, {"out": "unwritten", "data.source": "benign", "training.max_steps": 0})
