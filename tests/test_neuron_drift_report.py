"""Claims about watching groups in training, and about what is written of their drift afterwards."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from peft import PeftModel
from synthetic import chat_tokenizer
from watched import PAIRS, adapted, tiny_concepts, trainer

from safety_lens.errors import DataError, ModelMismatchError
from safety_lens.forced import Continuation
from safety_lens.log import Measurement
from safety_lens.models import load_model
from safety_lens.monitors import MonitorCallback
from safety_lens.monitors.drift_log import read_log
from safety_lens.monitors.neuron_drift.reidentify import compare_identified, groupings, identify, reidentified_rows
from safety_lens.monitors.neuron_drift.rows import drift_rows
from safety_lens.monitors.neuron_drift.saved import saved_drift
from safety_lens.monitors.neuron_drift.summary import summary
from safety_lens.monitors.neuron_drift.watch import DriftWatch
from safety_lens.probes.examples import Example, ExampleSet
from safety_lens.probes.groups import NeuronGroup, group_of
from safety_lens.probes.matrices import matrices_of
from safety_lens.report.neuron_drift_plots import NeuronRows, draw_neuron_drift
from safety_lens.report.neuron_drift_text import drift_report


def groups_of(live: PeftModel) -> list[NeuronGroup]:
    model = load_model(live.get_base_model(), tokenizer=chat_tokenizer())
    generator = torch.Generator().manual_seed(3)
    entries = {m.name: torch.randperm(m.numel, generator=generator)[:50] for m in matrices_of(model)}
    return [
        group_of(model, "entries", "weight", entries),
        group_of(model, "neurons", "neuron", {f"blocks.{b}.mlp": [1, 40, 77] for b in range(4)}),
    ]


def callback(live: PeftModel, folder: Path, **more: Any) -> MonitorCallback:
    settings: dict[str, Any] = {
        "every": 2,
        "budget": None,
        "log": folder / "drift.jsonl",
        "probes": None,
        "pairs": PAIRS,
    }
    return MonitorCallback(tiny_concepts(), **{**settings, "groups": groups_of(live), **more})


def neuron_rows(path: Path) -> list[Measurement]:
    return [row for row in read_log(path) if row.subject.startswith("neurons/")]


# --- in training ------------------------------------------------------------------------------------------------------


def test_the_monitor_logs_the_drift_of_groups_at_its_interval(tmp_path: Path) -> None:
    live = adapted()
    trainer(live, tmp_path, [callback(live, tmp_path)], max_steps=4).train()
    rows = neuron_rows(tmp_path / "drift.jsonl")
    found = NeuronRows(rows)
    assert found.groups == ["entries", "neurons"]
    assert found.steps == [0, 2, 4]
    moved = found.curve("entries", "rms_change")[:, 0]
    assert moved[0] == 0  # fresh adapters have no effect
    assert 0 < moved[1] < moved[2]
    after = {row.metric: row.value for row in drift_rows(DriftWatch(live, groups_of(live)).live(live), 4)
             if row.subject == "neurons/entries" and row.split == "total"}  # fmt: skip
    assert found.get("entries", "rms_change", 4)[0] == pytest.approx(after["rms_change"], rel=1e-12)
    assert {row.metric for row in rows if row.subject == "neurons/neurons"} >= {
        "unit_cosine",
        "unit_turn",
        "turn_ratio",
    }


def test_watching_groups_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    weights = []
    for name, watching in (("a", True), ("b", False)):
        live = adapted()
        calls = [callback(live, tmp_path / name)] if watching else []
        trainer(live, tmp_path / name, calls, max_steps=2).train()
        weights.append([p.detach().clone() for p in live.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_resumed_run_measures_the_same_partners(tmp_path: Path) -> None:
    whole = adapted()
    trainer(whole, tmp_path / "whole", [callback(whole, tmp_path / "whole")], max_steps=4).train()
    for steps, resume in ((2, None), (4, str(tmp_path / "cut" / "checkpoint-2"))):
        live = adapted()
        made = trainer(
            live, tmp_path / "cut", [callback(live, tmp_path / "cut")], max_steps=steps, save_strategy="steps",
            save_steps=2,
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
    mine, theirs = (neuron_rows(tmp_path / name / "drift.jsonl") for name in ("whole", "cut"))
    assert [r.to_json() for r in mine] == [r.to_json() for r in theirs]


def test_groups_in_full_fine_tuning_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    live = adapted()
    whole = zoo.make("llama")
    with pytest.raises(DataError, match="trained as a whole"):
        trainer(whole, tmp_path, [callback(live, tmp_path)]).train()


# --- afterwards -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, list[str]]:
    """Two short runs with different seeds, checkpoints and all."""
    places = []
    for seed in (0, 1):
        live = adapted(seed, model=zoo.make("llama"))
        place = tmp_path_factory.mktemp(f"seed{seed}")
        trainer(live, place, save_strategy="steps", save_steps=2, max_steps=4, seed=seed).train()
        live.save_pretrained(place)
        places.append(str(place))
    return live, places


def test_saved_runs_are_measured_at_every_checkpoint(runs: tuple[PeftModel, list[str]], tmp_path: Path) -> None:
    live, places = runs
    found = saved_drift(live.get_base_model(), places, groups_of(live), other_base=True)
    assert [len(states) for states in found.runs.values()] == [3, 3]  # two checkpoints and the end
    name = list(found.runs)[1]
    (direct, _) = DriftWatch(live, groups_of(live)).live(live)
    assert found.final[name][0].total.group.change == pytest.approx(direct.total.group.change, rel=1e-9)
    written = draw_neuron_drift(found.rows(name), tmp_path / "figures", "two runs")
    assert [path.name for path in written] == ["neurons-steps.png", "neurons-distribution.png", "neurons-matrices.png"]
    assert all(path.stat().st_size > 5000 for path in written)
    assert draw_neuron_drift([Measurement("run", "loss", 1.0, step=1)], tmp_path / "none") == []


def test_the_statistics_are_json_without_nan_and_the_report_says_what_follows(
    runs: tuple[PeftModel, list[str]],
) -> None:
    live, places = runs
    found = saved_drift(live.get_base_model(), places, groups_of(live), other_base=True)
    results = json.loads(json.dumps(summary(found.final), allow_nan=False))
    entries = results["groups"]["entries"]
    assert entries["outside_share"] == pytest.approx(4 / 7)  # q, v and down have adapters
    assert entries["final"][next(iter(found.runs))]["group"]["cosine"] is None
    test = entries["tests"]["change"]
    assert test["runs"] == 2
    assert test["ratio_decisive"]["low"] <= test["ratio_over_layers"]["low"]
    assert test["pooled_d_is"].startswith("descriptive")
    assert set(results["groups"]["neurons"]["hypotheses"]["H1"]["by_quantity"]) == {"change", "turn"}
    text = drift_report(results)
    assert "57.1% of its weights lie in matrices without an adapter" in text
    for said in ("H1", "H2", "Hedges' g", "descriptive only", "signs flipped by matrix"):
        assert said in text
    assert "one run" not in text
    ratio = f"mean over {test['matrices']} matrices: {test['ratio_over_layers']['value']:.3g}"
    assert ratio in text
    assert f"all as one: {test['ratio_of_totals']:.3g}" in text
    first = next(iter(found.runs))
    alone = drift_report(summary({first: found.final[first]}))
    assert "! one run: the intervals are over its layers, and another seed may move otherwise" in alone
    assert alone.count("in this one run") == 4  # two hypotheses of two groups


def test_a_group_that_could_not_move_is_reported_as_such() -> None:
    live = adapted(target_modules=["q_proj"])
    drift = DriftWatch(live, groups_of(live)[1:]).live(live)
    text = drift_report(summary({"run": drift}))
    assert "no matrix of the group was adapted" in text


# --- identified again -------------------------------------------------------------------------------------------------


def examples(seed: int, n: int = 24) -> ExampleSet:
    rng = np.random.default_rng(seed)
    rows = [[int(t) for t in rng.integers(4, zoo.VOCAB, 10)] for _ in range(n)]
    made = tuple(Example("", "", Continuation(tuple(row[:6]), tuple(row[6:])), None, i) for i, row in enumerate(rows))
    return ExampleSet(made, "random", None)


def test_an_unchanged_model_is_found_again_up_to_its_own_ceiling_and_another_one_by_chance() -> None:
    safety, utility, made = examples(0), examples(1), groupings(q=0.05, p=0.05, fraction=0.02)
    same, other = load_model(zoo.make("llama")), load_model(zoo.make("llama", seed=5))
    before = identify(same, safety, utility, made)
    unchanged = compare_identified(before, identify(same, safety, utility, made))
    strange = compare_identified(before, identify(other, safety, utility, made))
    for found, wrong in zip(unchanged.groups, strange.groups, strict=True):
        one = found.measures["recall"]
        assert one.whole == 1
        assert one.found == pytest.approx(one.ceiling, rel=0.02)  # halves differ, whoever is scored
        assert one.normalised == pytest.approx(1, abs=0.05)
        assert one.ceiling > one.chance + 0.1
        assert wrong.measures["recall"].normalised < 0.3
    assert unchanged.ranks[0].found == pytest.approx(unchanged.ranks[0].ceiling, rel=0.02)
    assert abs(strange.ranks[0].found) < 0.2
    rows = reidentified_rows(unchanged, step=7)
    assert {"recall", "recall_chance", "recall_ceiling", "recall_normalised"} <= {row.metric for row in rows}
    assert all(row.step == 7 for row in rows)
    with pytest.raises(DataError, match="halved"):
        identify(same, examples(0, 1), utility, made)


def test_reidentification_reads_the_merged_weights_not_the_base_under_the_adapter() -> None:
    """The ancestor scored the unmerged model: base weights times the adapter's gradients."""
    live = adapted(model=zoo.make("llama"))
    safety, utility, made = examples(0), examples(1), groupings(q=0.05, p=0.05, fraction=0.02)
    before = identify(load_model(live.get_base_model()), safety, utility, made)
    with torch.no_grad():
        for key, p in live.named_parameters():
            if "lora_B" in key:
                p.normal_(generator=torch.Generator().manual_seed(0))
    after = identify(load_model(live), safety, utility, made)
    merged = load_model(live.merge_and_unload())
    again = identify(merged, safety, utility, made)
    assert list(after.whole) == list(before.whole)
    for name in after.whole:
        assert all(torch.equal(after.whole[name].index[k], again.whole[name].index[k]) for k in again.whole[name].index)
    found = compare_identified(before, after).groups[0].measures["recall"]
    assert found.normalised < 0.9
    assert not math.isnan(found.ceiling)


def test_groups_of_another_model_are_refused_by_name(runs: tuple[PeftModel, list[str]]) -> None:
    live, places = runs
    wide = load_model(zoo.make("llama_head_dim"))
    strange = group_of(wide, "g", "weight", {"blocks.0.mlp.W_in": [3], "blocks.0.attn.W_Q": [8191]})
    with pytest.raises(ModelMismatchError, match=r"another model: blocks\.0\.attn\.W_Q"):
        saved_drift(live.get_base_model(), places, [strange], other_base=True)
    with pytest.raises(DataError, match="nothing was named"):
        saved_drift(live.get_base_model(), [], groups_of(live))
