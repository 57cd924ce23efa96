"""Overlap: closed forms, chance by simulation, and a correction: 1 for an unchanged model, 0 for an unrelated one."""

import numpy as np
import pytest
import torch
import zoo
from transformer_lens import HookedTransformer

from safety_lens.bootstrap import crossed_interval
from safety_lens.errors import DataError
from safety_lens.models import load_model
from safety_lens.probes.attribution.scores import Scores
from safety_lens.probes.groups import NeuronGroup, group_of
from safety_lens.probes.ranking import top
from safety_lens.probes.sharing import Halves, Overlap, corrected, normalised, overlap, overlap_rows, rank_overlap

Q, K = "blocks.1.attn.W_Q", "blocks.1.attn.W_K"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_model(zoo.make("llama"), check=False)


def of(model: HookedTransformer, name: str, **members: object) -> NeuronGroup:
    return group_of(model, name, "weight", {{"q": Q, "k": K}[k]: list(v) for k, v in members.items()})  # type: ignore[call-overload]


@pytest.mark.parametrize(("recall", "jaccard"), [(0.3909, 0.2429), (0.5067, 0.3393)])
def test_equal_sizes_tie_jaccard_to_recall(recall: float, jaccard: float) -> None:
    """T6, and the figures of the report that the seed reproduces."""
    both = Overlap(round(recall * 10_000), 10_000, 10_000, 10**6, 100.0, 10.0)
    assert both.found.recall == both.found.coefficient == pytest.approx(recall)
    assert both.found.jaccard == pytest.approx(jaccard, abs=5e-5) == pytest.approx(recall / (2 - recall), abs=5e-5)


def test_chance_is_hypergeometric() -> None:
    ten = Overlap(0, 10, 10, 1000, 10 * 10 / 1000, 0.3)
    assert ten.chance.coefficient == pytest.approx(0.01)  # T6
    assert ten.chance.jaccard == pytest.approx(0.005025, abs=1e-6)


def test_chance_by_matrix_is_what_random_groups_share(model: HookedTransformer) -> None:
    rng = np.random.default_rng(0)

    def drawn(k: int, n: int) -> list[int]:
        return rng.choice(n, k, replace=False).tolist()

    found = [overlap(of(model, "a", q=drawn(400, 4096), k=drawn(20, 2048)),
                     of(model, "b", q=drawn(600, 4096), k=drawn(200, 2048))) for _ in range(300)]  # fmt: skip
    one = found[0]
    assert one.expected == pytest.approx(400 * 600 / 4096 + 20 * 200 / 2048)
    assert one.universe == 4096 + 2048
    shared = np.array([o.both for o in found])
    assert shared.mean() == pytest.approx(one.expected, abs=4 * one.deviation / 300**0.5)
    assert shared.std() == pytest.approx(one.deviation, rel=0.15)
    assert abs(np.mean([o.z for o in found])) < 0.25
    pooled = 420 * 800 / 6144  # the negative control: chance over all matrices together is another number
    assert abs(shared.mean() - pooled) > 3


def test_a_group_shares_all_of_itself_and_nothing_with_the_rest(model: HookedTransformer) -> None:
    a, rest = of(model, "a", q=range(50)), of(model, "rest", q=range(50, 100))
    assert overlap(a, a).found == (1.0, 1.0, 1.0)
    assert overlap(a, rest).found == (0.0, 0.0, 0.0)
    small = overlap(of(model, "s", q=range(10)), a)
    assert (small.found.coefficient, small.found.recall, small.found.jaccard) == (1.0, 1.0, 0.2)
    assert overlap(a, of(model, "s", q=range(10))).found.recall == 0.2
    assert np.isnan(overlap(a, of(model, "none", q=[])).found.jaccard)


def test_units_that_cannot_be_compared_are_refused(model: HookedTransformer) -> None:
    with pytest.raises(DataError, match="no members in common"):
        overlap(of(model, "a", q=[1]), group_of(model, "n", "neuron", {"blocks.1.mlp": [1]}))


def noisy(true: torch.Tensor, noise: float, seed: int) -> Scores:
    """Scores that rank by truth and by the draw of examples."""
    generator = torch.Generator().manual_seed(seed)
    return Scores({Q: true + noise * torch.rand(true.shape, generator=generator)}, "weight", "snip", 8)


def test_normalised_overlap_is_about_1_for_an_unchanged_model_and_0_for_an_unrelated_one(
    model: HookedTransformer,
) -> None:
    truth = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    other = torch.rand(64, 64, generator=torch.Generator().manual_seed(1))

    def chosen(true: torch.Tensor, seed: int) -> NeuronGroup:
        return top(noisy(true, 0.4, seed), model, 0.1)

    before = Halves(chosen(truth, 10), chosen(truth, 11))
    same, gone = Halves(chosen(truth, 12), chosen(truth, 13)), Halves(chosen(other, 14), chosen(other, 15))
    for measure in ("jaccard", "coefficient", "recall"):
        still = corrected(before.first, same.first, before, same, measure)
        lost = corrected(before.first, gone.first, before, gone, measure)
        assert still.found < 0.75  # the negative control: uncorrected, an unchanged model looks half gone
        assert still.normalised == pytest.approx(1.0, abs=0.1)
        assert lost.normalised == pytest.approx(0.0, abs=0.1)
        assert lost.chance == pytest.approx(lost.found, abs=0.05)
    with pytest.raises(DataError, match="no overlap measure"):
        corrected(before.first, same.first, before, same, "dice")


def test_a_ceiling_that_is_not_above_chance_says_nothing() -> None:
    assert np.isnan(normalised(0.3, 0.2, [0.2, 0.2]))
    assert np.isnan(normalised(0.3, 0.2, [0.1]))
    assert normalised(0.6, 0.2, [0.8, 0.45]) == pytest.approx(1.0)


def test_rank_overlap_is_1_for_any_monotone_change_and_chance_for_unrelated_scores(model: HookedTransformer) -> None:
    a, b = (
        Scores({Q: torch.rand(64, 64, generator=torch.Generator().manual_seed(s))}, "weight", "snip", 1) for s in (0, 1)
    )
    squared = Scores({Q: a.values[Q].pow(3)}, "weight", "wanda", 1)
    same, unrelated = rank_overlap(a, squared), rank_overlap(a, b)
    assert same.spearman == pytest.approx(1.0)
    assert same.top_weighted == pytest.approx(1.0)
    assert abs(unrelated.spearman) < 0.05
    assert unrelated.top_weighted == pytest.approx(unrelated.chance, abs=0.03)
    assert sum(unrelated.by_fraction.values()) / len(unrelated.by_fraction) == pytest.approx(unrelated.top_weighted)


def test_top_weighted_overlap_sees_what_spearman_does_not() -> None:
    """Scores that agree on the top hundredth only: 1 − 6 Σd²/n³ is near 0, the weighted overlap is not."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(64, 64, generator=generator) for _ in range(2))
    a.view(-1)[:41] += 2 + torch.arange(41)
    b.view(-1)[:41] += 2 + torch.arange(41)
    found = rank_overlap(*(Scores({Q: v}, "weight", "snip", 1) for v in (a, b)))
    assert found.spearman < 0.1
    assert found.by_fraction[0.001] == 1.0
    assert found.top_weighted > found.chance + 0.3


def test_rows_carry_chance_beside_every_measure(model: HookedTransformer) -> None:
    rows = {r.metric: r for r in overlap_rows("a~b", overlap(of(model, "a", q=range(9)), of(model, "b", q=range(3))))}
    assert {"jaccard", "jaccard_chance", "coefficient_chance", "recall", "z"} <= set(rows)
    assert rows["recall"].value == pytest.approx(1 / 3)
    assert rows["recall"].n == 9


def test_the_crossed_interval_covers_a_mean_over_groups_and_prompts() -> None:
    rng = np.random.default_rng(0)
    hits = plain = 0
    for trial in range(200):
        values = rng.normal(size=(20, 1)) + rng.normal(size=(1, 30)) + rng.normal(size=(20, 30))
        found = crossed_interval(values, repeats=400, seed=trial)
        hits += found.low <= 0 <= found.high
        naive = values.std() / values.size**0.5 * 1.96  # the negative control: as if all 600 were independent
        plain += abs(values.mean()) <= naive
    assert hits >= 0.92 * 200
    assert plain < 0.6 * 200
    assert np.isnan(crossed_interval(np.ones((1, 5))).low)
    assert np.isnan(crossed_interval(np.ones((0, 5))).value)
