"""Groups taken out of models: exact beside plainly zeroed weights, undone afterwards, and judged by their effect."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError, ModelMismatchError
from safety_lens.forced import Continuation
from safety_lens.interventions.neuron_effects import (
    Effect,
    Measure,
    ablation_agreement,
    broken_not_counted,
    causal_check,
    effect_rows,
    losses,
    spearman,
)
from safety_lens.interventions.neurons import ablated, kept, mean_activations
from safety_lens.models import load_model
from safety_lens.probes.attribution import attribute_neurons
from safety_lens.probes.attribution.scores import Scores
from safety_lens.probes.groups import NeuronGroup, group_of
from safety_lens.probes.matrices import matrices_of, weight_of

BATCH = zoo.ragged()
Q, DOWN = "blocks.1.attn.W_Q", "blocks.2.mlp.W_out"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_model(zoo.make("llama", dtype=torch.float64), check=False)


def rows(n: int = 6, seed: int = 0) -> list[Continuation]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 9, n)
    return [
        Continuation(tuple(rng.integers(4, 97, k).tolist()), tuple(rng.integers(4, 97, 4).tolist())) for k in lengths
    ]


# --- exactness --------------------------------------------------------------------------------------------------------


def test_ablated_weights_give_the_logits_of_a_model_whose_weights_are_zero(model: HookedTransformer) -> None:
    group = group_of(model, "g", "weight", {Q: [3, 70, 4095], DOWN: range(0, 8192, 7)})
    hf = zoo.make("llama", dtype=torch.float64)
    with torch.no_grad():
        hf.model.layers[1].self_attn.q_proj.weight.view(-1)[[3, 70, 4095]] = 0
        hf.model.layers[2].mlp.down_proj.weight.view(-1)[::7] = 0
    before = zoo.hooked_logits(model, BATCH)
    with ablated(model, group):
        assert torch.allclose(zoo.hooked_logits(model, BATCH), zoo.hf_logits(hf, BATCH), atol=1e-5)
        assert (zoo.hooked_logits(model, BATCH) - before).abs().max() > 1e-3
    assert torch.equal(zoo.hooked_logits(model, BATCH), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "neox", "phi3"])
@pytest.mark.parametrize("unit", ["neuron", "head"])
def test_an_ablated_neuron_or_head_is_one_whose_writing_weights_are_zero(name: str, unit: str) -> None:
    model = load_model(zoo.make(name, dtype=torch.float64), check=False)
    part = {"neuron": "mlp", "head": "attn"}[unit]
    group = group_of(model, "g", unit, {f"blocks.1.{part}": [1, 3], f"blocks.3.{part}": [0]})
    writes = {k: v for k, v in group.entries().items() if k.endswith(("W_out", "W_O"))}
    weights = group_of(model, "w", "weight", writes)
    with ablated(model, group):
        by_hook = zoo.hooked_logits(model, BATCH)
    with ablated(model, weights):
        assert torch.allclose(zoo.hooked_logits(model, BATCH), by_hook, atol=1e-9)
    assert (zoo.hooked_logits(model, BATCH) - by_hook).abs().max() > 1e-3


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_keeping_a_group_is_ablating_the_rest(model: HookedTransformer, unit: str) -> None:
    key, n = {"weight": (DOWN, 8192), "neuron": ("blocks.2.mlp", 128)}[unit]
    group = group_of(model, "g", unit, {key: range(0, n, 3)})
    rest = group_of(model, "rest", unit, {key: [i for i in range(n) if i % 3]})
    with kept(model, group):
        left = zoo.hooked_logits(model, BATCH)
    with ablated(model, rest):
        assert torch.equal(zoo.hooked_logits(model, BATCH), left)
    with ablated(model, group):
        assert not torch.equal(zoo.hooked_logits(model, BATCH), left)


@pytest.mark.parametrize("unit", ["neuron", "head"])
def test_means_are_over_real_tokens_and_stand_in_for_the_group_everywhere(model: HookedTransformer, unit: str) -> None:
    part, hook = {"neuron": ("mlp", "hook_post"), "head": ("attn", "hook_z")}[unit]
    group = group_of(model, "g", unit, {f"blocks.1.{part}": [2]})
    examples = rows()
    means = mean_activations(model, examples, group)
    seen = []
    for row in examples:  # one by one: no padding
        _, cache = model.run_with_cache(torch.tensor([[*row.prompt, *row.tokens[:-1]]]))
        seen.append(cache[f"blocks.1.{part}.{hook}"][0])
    expected = torch.cat(seen).mean(0)
    assert torch.allclose(means[f"blocks.1.{part}"].double(), expected, atol=1e-6)
    with ablated(model, group, means=means):
        _, cache = model.run_with_cache(BATCH[0][:1])
    there = cache[f"blocks.1.{part}.{hook}"][0]
    assert (there[:, 2] - means[f"blocks.1.{part}"][2]).abs().max() == 0
    assert there[:, 1].std(0).max() > 0


def test_the_model_is_left_as_it_was_also_after_an_exception(model: HookedTransformer) -> None:
    group = group_of(model, "g", "weight", {m.name: range(0, m.numel, 5) for m in matrices_of(model)})
    before = {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}

    def fail() -> None:
        assert all((weight_of(model, m).flatten()[::5] == 0).all() for m in matrices_of(model))
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"), ablated(model, group):
        fail()
    heads = group_of(model, "h", "head", {"blocks.0.attn": [1]})
    with pytest.raises(DataError, match="empty"), ablated(model, heads):
        causal_check(
            model, [group_of(model, "none", "head", {"blocks.0.attn": []})], [Measure("x", lambda _: np.ones(3))]
        )
    for name, parameter in model.named_parameters():
        identity, pointer, values = before[name]
        assert (id(parameter), parameter.data_ptr()) == (identity, pointer)
        assert torch.equal(parameter, values)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_loaded_models_own_tensors_are_never_written() -> None:
    hf = zoo.make("llama")
    before = copy.deepcopy(hf.state_dict())
    model = load_model(hf, check=False)
    with ablated(model, group_of(model, "g", "weight", {Q: range(4096)})):
        assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())


def test_groups_that_cannot_be_ablated_are_refused(model: HookedTransformer) -> None:
    none = group_of(model, "none", "weight", {Q: []})
    with pytest.raises(DataError, match="'none' is empty"), ablated(model, none):
        pass
    weights = group_of(model, "w", "weight", {Q: [1]})
    with pytest.raises(DataError, match="no mean activation"), ablated(model, weights, means={}):
        pass
    with pytest.raises(DataError, match="no activation"):
        mean_activations(model, rows(), weights)
    neurons = group_of(model, "n", "neuron", {"blocks.1.mlp": [1]})
    with pytest.raises(DataError, match="no mean activation of blocks"), ablated(model, neurons, means={}):
        pass
    other = load_model(zoo.make("gpt2"), check=False)
    gate = group_of(model, "g", "weight", {"blocks.0.mlp.W_gate": [1]})
    with pytest.raises(ModelMismatchError), ablated(other, gate):
        pass


# --- what is made of it -----------------------------------------------------------------------------------------------


def made_up(mine: float, theirs: float, draws: int = 20, n: int = 40, spread: float = 0.5, seed: int = 0) -> Effect:
    rng = np.random.default_rng(seed)
    before = rng.normal(size=n)
    random = before + theirs + spread * rng.normal(size=(draws, n)) + spread * rng.normal(size=(draws, 1))
    group = NeuronGroup("g", "weight", {Q: torch.arange(41)}, {Q: (64, 64)})
    measure = Measure("odds", lambda model: before)
    return Effect(group, measure, before, before + mine + spread * rng.normal(size=n), random)


def test_an_effect_beyond_random_has_an_interval_without_0() -> None:
    found = made_up(-2.0, -0.2)
    assert -2.5 < found.beyond_random.low < found.beyond_random.high < -1
    assert found.p == pytest.approx(1 / 21)
    assert found.change.low <= found.change.value <= found.change.high


def test_a_group_that_does_what_random_ones_do_is_rarely_told_from_them() -> None:
    told = [
        not (e.beyond_random.low <= 0 <= e.beyond_random.high) for e in (made_up(-1, -1, seed=s) for s in range(60))
    ]
    assert sum(told) <= 7


def test_broken_answers_count_as_unchanged() -> None:
    found = made_up(-2.0, 0.0)
    text = replace(found, measure=Measure("text", lambda model: found.before), edited=(np.arange(40) % 4 == 0) * 1.0)
    counted = broken_not_counted(found, text)
    assert counted.change.value == pytest.approx((found.edited - found.before)[::4].sum() / 40)
    assert np.array_equal(counted.edited[1::4], found.before[1::4])
    assert counted.measure.name == "odds_in_text"
    with pytest.raises(DataError, match="not read on the same prompts"):
        broken_not_counted(found, made_up(-2.0, 0.0))


def test_without_random_groups_nothing_is_said_about_them() -> None:
    alone = made_up(-2.0, 0.0, draws=0)
    rows = {row.metric: row for row in effect_rows([alone])}
    assert np.isnan(alone.p)
    assert np.isnan(rows["odds_beyond_random"].value)
    assert rows["odds_change"].value == pytest.approx(-2.0, abs=0.2)
    assert rows["odds"].coeff == pytest.approx(0.01, rel=0.01)
    assert rows["odds_before"].value == pytest.approx(alone.before.mean())


def test_a_group_that_carries_the_loss_does_more_than_random_ones_and_a_random_one_does_not(
    model: HookedTransformer,
) -> None:
    examples = rows(8)
    base = losses(model, examples)
    measure = Measure("moved", lambda edited: np.abs(losses(edited, examples) - base))
    scores = attribute_neurons(model, examples, unit="neuron")
    values = torch.cat(list(scores.values.values()))
    limit = float(values.sort(descending=True).values[7])
    best = {key: found for key, v in scores.values.items() if len(found := (v >= limit).nonzero().flatten())}
    important = group_of(model, "important", "neuron", best)
    random = group_of(model, "random", "neuron", {key: range(40, 40 + len(v)) for key, v in best.items()})
    strong, weak = causal_check(model, [important, random], [measure], draws=12)
    assert strong.p == pytest.approx(1 / 13)
    assert strong.beyond_random.low > 0
    assert weak.beyond_random.low < 0 < weak.beyond_random.high
    assert strong.random.shape == (12, 8)
    assert not strong.before.any()
    guard = causal_check(model, [random], [Measure("moved", measure.read, controlled=False)], draws=2)[0]
    assert guard.random.shape == (0, 8)


@pytest.mark.parametrize("signed", [False, True])
def test_attribution_ranks_neurons_as_true_ablation_does_and_shuffled_scores_do_not(
    model: HookedTransformer, signed: bool
) -> None:
    examples = rows(4)
    scores = attribute_neurons(model, examples, unit="neuron", signed=signed)
    found = ablation_agreement(model, scores, examples, units=60)
    assert found.rho.low > 0.3
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(list(scores.values.values()))
    every = values[torch.randperm(len(values), generator=generator)].split(128)
    mixed = dict(zip(scores.values, every, strict=True))
    shuffled = ablation_agreement(model, Scores(mixed, "neuron", "x", 4, signed), examples, units=60)
    assert abs(shuffled.rho.value) < 0.3
    assert np.array_equal(shuffled.effect, found.effect)
    with pytest.raises(DataError, match="at least 4 units"):
        ablation_agreement(model, scores, examples, units=2)


def test_spearman_is_scipys_and_its_interval_narrows_with_n() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    b = b + a
    small, large = spearman(a, b), spearman(np.tile(a, 8), np.tile(b, 8))
    assert small.value == pytest.approx(stats.spearmanr(a, b).statistic)
    assert large.high - large.low < small.high - small.low
    assert np.isnan(spearman(a, np.ones(50)).value)
