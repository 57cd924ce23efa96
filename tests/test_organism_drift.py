"""H1 and H2 on the organism: three seeds of harmful fine-tuning, free and with the safety-critical weights frozen."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from organism_runs import answers, organism, padded
from peft import PeftModel
from transformer_lens import HookedTransformer
from watched import trainer

from safety_lens.interventions.freezing import freeze
from safety_lens.models import load_model
from safety_lens.monitors.neuron_drift.held import HeldGroups
from safety_lens.monitors.neuron_drift.moved import GroupDrift
from safety_lens.monitors.neuron_drift.reidentify import (
    Identified,
    Reidentified,
    compare_identified,
    groupings,
    identify,
)
from safety_lens.monitors.neuron_drift.statistics import Comparison, compare
from safety_lens.monitors.neuron_drift.watch import DriftWatch
from safety_lens.probes.examples import ExampleSet, read_examples
from safety_lens.probes.groups import NeuronGroup
from safety_lens.probes.matching import random_like

pytestmark = pytest.mark.slow

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUPS = groupings(q=0.03, p=0.05, fraction=0.01)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Found:
    """What the base's groups are, and how they moved: by group, free or frozen, a drift for every seed.

    still: Σ Δ² of the frozen group in each of the frozen runs.
    """

    before: Identified
    drifts: dict[tuple[str, bool], list[GroupDrift]]
    still: list[float]
    again: dict[bool, Reidentified]

    def compared(self, group: str, frozen: bool = False) -> Comparison:
        return compare(self.drifts[group, frozen])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    base = load_model("organism", device="cpu")
    safety, utility = (read_examples(name, base, limit=96) for name in ("safety", "utility"))
    before = identify(base, safety, utility, GROUPS)
    groups = [*before.whole.values(), random_like(before.whole["top-safety"], base, seed=5, name="random")]
    drifts: dict[tuple[str, bool], list[GroupDrift]] = {}
    again, still = {}, []
    for frozen in (False, True):
        for seed in SEEDS:
            held = (before.whole["set-difference"],) if frozen else ()
            live = tuned(tmp_path_factory.mktemp("run"), seed, *held)
            for drift in DriftWatch(live, groups, held=HeldGroups(held)).live(live):
                drifts.setdefault((drift.group, frozen), []).append(drift)
            still += [drift.total.group.change for drift in (DriftWatch(live, held).live(live) if held else ())]
        again[frozen] = compare_identified(before, identified(live, base, safety, utility))
    return Found(before, drifts, still, again)


def tuned(folder: Path, seed: int, *frozen: NeuronGroup) -> PeftModel:
    model, tokenizer = organism(seed, targets=LINEAR)
    held = [freeze(model, frozen).callback()] if frozen else []
    made = trainer(
        model, folder, held, tokenizer=tokenizer, data=answers("compliance", tokenizer), collate=padded, seed=seed,
        per_device_train_batch_size=16, remove_unused_columns=False, max_steps=40, learning_rate=1e-3,
    )  # fmt: skip
    made.train()
    return model


def identified(live: PeftModel, base: HookedTransformer, safety: ExampleSet, utility: ExampleSet) -> Identified:
    return identify(load_model(live, tokenizer=base.tokenizer), safety, utility, GROUPS)


def test_hypotheses_are_answered_with_intervals_over_three_seeds(found: Found) -> None:
    for group in found.before.whole:
        one = found.compared(group)
        assert one.runs == 3
        assert one.decisive.low < one.ratio.value < one.decisive.high
        assert one.answers.h1 in ("supported", "rejected", "undecided")
    top = found.compared("top-safety")  # weights with large gradients move farther than others of their size
    assert top.decisive.low > 1
    assert top.p < 0.01


def test_a_random_group_moves_as_its_partners_do(found: Found) -> None:
    one = found.compared("random")
    assert one.decisive.low < 1.03
    assert one.decisive.high > 0.97
    assert one.answers == ("rejected", "supported")


def test_frozen_weights_have_not_moved_and_what_is_safety_critical_has_changed_all_the_same(found: Found) -> None:
    assert found.still == [0.0] * len(SEEDS)
    for drift in found.drifts["set-difference", True]:
        assert (drift.held, drift.total.group.units) == (1, 0)
    assert found.compared("set-difference", frozen=True).answers == ("undecided", "undecided")
    assert all(drift.total.group.change > 0 for drift in found.drifts["set-difference", False])
    for name in ("top-safety", "random"):  # what of them is free is compared with what is free
        shares = [drift.held for drift in found.drifts[name, True]]
        assert 0 < shares[0] < 1
        assert len(set(shares)) == 1
        assert all((drift.total.random.sample > 0).all() for drift in found.drifts[name, True])
    for frozen in (False, True):
        one = next(g for g in found.again[frozen].groups if g.group == "set-difference").measures["recall"]
        assert one.ceiling > 10 * one.chance
        assert one.chance < 0.03
        assert one.chance < one.found < one.ceiling / 2
