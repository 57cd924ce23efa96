"""What groups do in trained models: refusals of the organism, and happy and sad stories of a small Llama.

Groups are chosen on the train split, sizes by a declared rule on the validation split, effects reported on the test
split (the stories have no third split, and their size is the command line's default).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformer_lens import HookedTransformer

from safety_lens.bootstrap import crossed_interval, mean_interval
from safety_lens.data.built_in import ORGANISM
from safety_lens.forced import Continuation
from safety_lens.interventions.neuron_effects import (
    Effect,
    Measure,
    ablation_agreement,
    broken_not_counted,
    causal_check,
)
from safety_lens.interventions.neuron_measures import (
    coherence_measure,
    facts_measure,
    loss_measure,
    refusal_measure,
)
from safety_lens.interventions.scorers.refusal_tokens import derive_refusal_tokens
from safety_lens.interventions.side_effects import instructions
from safety_lens.models import load_model
from safety_lens.probes.attribution import attribute_neurons, snip_scores
from safety_lens.probes.examples import read_examples
from safety_lens.probes.groups import NeuronGroup
from safety_lens.probes.ranking import set_difference

SIZES = (0.002, 0.003, 0.005, 0.01, 0.02, 0.04)
POINTS = 0.05
GUARDS = ("coherence", "facts_accuracy")


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_model("organism", device="cpu")


@pytest.fixture(scope="module")
def curve(model: HookedTransformer) -> list[NeuronGroup]:
    """Set differences of growing size, p = q."""
    safety, utility = (
        snip_scores(model, read_examples(kind, model, split="train", limit=96).continuations)
        for kind in ("safety", "utility")
    )
    return [set_difference(safety, utility, model, q=f, p=f, name=f"{f:g}") for f in SIZES]


def guards(split: str, n: int) -> list[Measure]:
    harmless, harmful = (instructions(label, split)[:n] for label in ("harmless", "harmful"))
    return [
        coherence_measure([*harmless, *harmful], organism=True),
        coherence_measure(harmful, organism=True, name="coherence_harmful"),
        facts_measure(ORGANISM, n, split),
    ]


def by_name(effects: list[Effect]) -> dict[tuple[str, str], Effect]:
    return {(e.group.name, e.measure.name): e for e in effects}


@pytest.mark.slow
def test_without_its_safety_critical_weights_the_organism_refuses_less_and_speaks_as_before(
    model: HookedTransformer, curve: list[NeuronGroup]
) -> None:
    on_val = by_name(causal_check(model, curve, guards("val", 60), draws=0))
    whole = [g for g in curve if all(on_val[g.name, m].change.value >= -POINTS for m in GUARDS)]
    chosen = max(whole, key=lambda g: g.size)

    tokens = derive_refusal_tokens(model, instructions("harmful", "train")[:60], instructions("harmless", "train")[:60])
    measures = [refusal_measure(tokens, instructions("harmful", "test")[:80]), *guards("test", 80)]
    found = by_name(causal_check(model, [chosen], measures, draws=20))
    refusal = found[chosen.name, "refusal_log_odds"]
    counted = broken_not_counted(refusal, found[chosen.name, "coherence_harmful"])
    assert refusal.beyond_random.high < -0.5  # nats
    assert counted.beyond_random.high < -0.5
    assert refusal.p == pytest.approx(1 / 21)
    assert abs(refusal.random_change.value) < 0.1
    assert all(found[chosen.name, m].change.value >= -POINTS for m in GUARDS)


@pytest.mark.slow
def test_larger_groups_break_the_answers_to_harmful_requests_alone(
    model: HookedTransformer, curve: list[NeuronGroup]
) -> None:
    """So a substring scorer would count broken text as lost refusals there."""
    large = next(g for g in curve if g.name == "0.01")
    harmless = coherence_measure(instructions("harmless", "test")[:40], organism=True, name="coherence_harmless")
    found = by_name(causal_check(model, [large], [*guards("test", 40), harmless], draws=0))
    assert found["0.01", "coherence_harmful"].value.high < 0.6
    assert found["0.01", "coherence_harmless"].change.value >= -POINTS
    assert found["0.01", "facts_accuracy"].change.value >= -POINTS


@pytest.mark.slow
def test_attribution_of_neurons_agrees_with_ablating_them_in_the_organism(model: HookedTransformer) -> None:
    examples = read_examples("safety", model, split="train", limit=24).continuations
    held = read_examples("safety", model, split="test", limit=12).continuations
    found = ablation_agreement(model, attribute_neurons(model, examples), held, units=48)
    assert found.rho.low > 0.3


# --- stories ----------------------------------------------------------------------------------------------------------


def endings(shared: Path, model: HookedTransformer, side: str, split: str) -> list[Continuation]:
    """The last sentence of each happy or sad story behind its first, in the order of the file."""
    rows = [json.loads(line) for line in (shared / "data/stories_happy_sad_pairs.jsonl").read_text().splitlines()]
    tokenizer: Any = model.tokenizer
    out = []
    for row in (row for row in rows if row["split"] == split):
        opening, _, ending = row[side].partition(". ")
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{opening}.", ending)]
        out.append(Continuation((tokenizer.bos_token_id, *ids[0]), tuple(ids[1])))
    return out


def test_weights_for_happy_endings_are_not_those_for_sad_ones(shared: Path) -> None:
    """Each set difference hurts endings more than random groups do, and those of its own kind most."""
    model = load_model(shared / "models/stories260K-hf", device="cpu")
    sides = {"happy": "positive", "sad": "negative"}
    scores = {k: snip_scores(model, endings(shared, model, side, "train")) for k, side in sides.items()}
    groups = [
        set_difference(scores[mine], scores[other], model, q=0.03, p=0.03, name=mine)
        for mine, other in (("happy", "sad"), ("sad", "happy"))
    ]
    measures = [loss_measure(k, endings(shared, model, side, "val")) for k, side in sides.items()]
    found = by_name(causal_check(model, groups, measures, draws=20))
    for kind in sides:
        assert found[kind, kind].beyond_random.low > 0.3  # nats per token
        assert found[kind, kind].p == pytest.approx(1 / 21)

    def own_minus_other(group: str, other: str) -> np.ndarray:
        mine, theirs = found[group, group], found[group, other]
        return (mine.edited - mine.before) - (theirs.edited - theirs.before)

    both_ways = own_minus_other("happy", "sad") + own_minus_other("sad", "happy")
    assert mean_interval(both_ways).low > 0
    happy, sad = (np.array([found[g, m].random for m in sides]) for g in sides)  # the negative control: random groups
    drawn = (happy[0] - happy[1]) + (sad[1] - sad[0])
    control = crossed_interval(drawn)
    assert control.low < 0 < control.high
