"""Groups: what they hold, how they are chosen, what random ones share with them, and that the disk gives them back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import ArtifactError, DataError, ModelMismatchError
from safety_lens.models import load_model
from safety_lens.probes.attribution.scores import Scores
from safety_lens.probes.groups import NeuronGroup, group_of, load_groups, save_groups
from safety_lens.probes.matching import DECILES, class_counts, random_groups, random_like, size_classes, sizes
from safety_lens.probes.matrices import matrices_of, named_matrix, weight_of
from safety_lens.probes.ranking import kth_largest, set_difference, top
from safety_lens.probes.sharing import difference, intersection, union

Q, UP = "blocks.1.attn.W_Q", "blocks.2.mlp.W_in"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_model(zoo.make("llama"), check=False)


@pytest.fixture(scope="module")
def own_keys() -> HookedTransformer:
    """Every query head has its own keys and values; the MLP has no gate."""
    return load_model(zoo.make("gpt2"), check=False)


def random_scores(model: HookedTransformer, seed: int = 0, unit: str = "weight") -> Scores:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {m.name: m.shape for m in matrices_of(model)}
    if unit == "neuron":
        shapes = {f"blocks.{layer}.mlp": (model.cfg.d_mlp or 0,) for layer in range(model.cfg.n_layers)}
    if unit == "head":
        shapes = {f"blocks.{layer}.attn": (model.cfg.n_heads,) for layer in range(model.cfg.n_layers)}
    values = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return Scores(values, unit, "snip", 8)


def tiny(values: Tensor, model: HookedTransformer, name: str = Q) -> Scores:
    """Scores of one matrix, zero but for the first row's beginning."""
    full = torch.zeros(named_matrix(model, name).shape)
    full[0, : len(values)] = values
    return Scores({name: full}, "weight", "snip", 1)


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_set_difference_is_the_top_for_safety_without_the_top_for_utility(model: HookedTransformer) -> None:
    safety, utility = tiny(torch.tensor([9.0, 8, 7, 1]), model), tiny(torch.tensor([0.0, 5, 0, 0]), model)
    n = safety.numel
    found = set_difference(safety, utility, model, q=3.5 / n, p=1.5 / n)
    assert found.index[Q].tolist() == [0, 2]  # T5: S_s = {a, b, c}, S_u = {b} leaves {a, c}


def test_negated_scores_are_refused_and_signed_ones_in_a_set_difference(model: HookedTransformer) -> None:
    good = tiny(torch.tensor([9.0, 8, 7]), model)
    with pytest.raises(DataError, match="negated scores would pick the least important"):
        Scores({Q: -good.values[Q]}, "weight", "snip", 1)
    signed = Scores({Q: -good.values[Q]}, "weight", "snip", 1, signed=True)
    with pytest.raises(DataError, match="these safety scores are signed"):
        set_difference(signed, good, model, q=0.1, p=0.1)


@pytest.mark.parametrize("scope", ["matrix", "layer", "global", "row"])
def test_the_top_is_what_sorting_gives_in_every_scope(model: HookedTransformer, scope: str) -> None:
    scores = random_scores(model)
    found = top(scores, model, 0.03, scope=scope)
    pools = {
        "matrix": [[name] for name in scores.values],
        "layer": [[n for n in scores.values if f".{layer}." in n] for layer in range(4)],
        "global": [list(scores.values)],
        "row": [],
    }[scope]
    for names in pools:
        every = torch.cat([scores.values[name].flatten() for name in names])
        k = int(0.03 * len(every))
        limit = every.sort(descending=True).values[k - 1]
        assert sum(len(found.index[name]) for name in names) == k
        assert all((scores.values[name].flatten()[found.index[name]] >= limit).all() for name in names)
    if scope == "row":
        for name, values in scores.values.items():
            per_row = found.mask(name).sum(1)
            assert (per_row == int(0.03 * values.shape[1])).all()
            best = values.topk(int(per_row[0]), dim=1).indices
            assert found.mask(name).gather(1, best).all()


def test_equal_scores_are_broken_by_index(model: HookedTransformer) -> None:
    flat = Scores({name: torch.ones(s) for name, s in random_scores(model).shapes.items()}, "weight", "snip", 1)
    found = top(flat, model, 0.01)
    assert all(members.tolist() == list(range(len(members))) for members in found.index.values())
    everywhere = top(flat, model, 0.01, scope="global")
    assert next(k for k, m in everywhere.index.items() if len(m)) == next(iter(flat.values))
    assert top(flat, model, 0.05, scope="row").mask(Q)[:, :3].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kth_largest_of_scores_of_both_signs_is_what_sorting_gives(
    model: HookedTransformer, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    values = {Q: torch.randn(named_matrix(model, Q).shape, generator=generator, dtype=dtype) * 1e-20}
    values[Q][0, :4] = torch.tensor([0.0, -0.0, 3.0, -3.0], dtype=dtype)
    found = top(Scores(values, "weight", "snip", 1, signed=True), model, 0.3)
    order = values[Q].flatten().sort(descending=True, stable=True).indices[: found.size]
    assert found.index[Q].tolist() == order.sort().values.tolist()
    assert kth_largest([torch.tensor([5, 1]), torch.tensor([3])], 2) == 3


def test_fractions_outside_0_and_1_and_sets_that_are_empty_are_refused(model: HookedTransformer) -> None:
    a, b = random_scores(model, 0), random_scores(model, 1)
    for p, q in [(0.0, 0.1), (1.0, 0.1), (0.1, 0.0), (0.1, 1.5), (float("nan"), 0.1)]:
        with pytest.raises(DataError, match="share between 0 and 1"):
            set_difference(a, b, model, q=q, p=p)
    with pytest.raises(DataError, match="not one weight anywhere"):
        top(a, model, 1e-6)
    with pytest.raises(DataError, match="no safety-critical weight is left"):
        set_difference(a, a, model, q=0.01, p=0.02)


@pytest.mark.parametrize(
    ("unit", "scope"), [("neuron", "row"), ("neuron", "matrix"), ("head", "matrix"), ("weight", "x")]
)
def test_scopes_that_a_unit_does_not_have_are_refused_with_the_reason(
    model: HookedTransformer, unit: str, scope: str
) -> None:
    with pytest.raises(DataError, match=f"scope '{scope}' is undefined for {unit}s"):
        top(random_scores(model, unit=unit), model, 0.25, scope=scope)


def test_scores_of_other_models_units_and_matrices_are_refused(
    model: HookedTransformer, own_keys: HookedTransformer
) -> None:
    scores = random_scores(model)
    with pytest.raises(ModelMismatchError, match="another model"):
        top(scores, own_keys, 0.1)
    with pytest.raises(DataError, match="differ in unit: weight and neuron"):
        set_difference(scores, random_scores(model, unit="neuron"), model, q=0.1, p=0.1)
    with pytest.raises(DataError, match="other matrices"):
        set_difference(scores, tiny(torch.tensor([1.0]), model), model, q=0.1, p=0.1)
    theirs = Scores(scores.values, "weight", "snip", 1, source={"model": {"weights_sha256": "x"}})
    with pytest.raises(ModelMismatchError, match="different models"):
        set_difference(scores, theirs, model, q=0.1, p=0.1)


# --- what a group holds -----------------------------------------------------------------------------------------------


def test_a_neuron_is_its_gate_row_its_up_row_and_its_down_column(model: HookedTransformer) -> None:
    group = group_of(model, "one", "neuron", {"blocks.2.mlp": [5]})
    entries = group.entries(model)
    assert set(entries) == {"blocks.2.mlp.W_gate", UP, "blocks.2.mlp.W_out"}
    for name in ("blocks.2.mlp.W_gate", UP):
        expected = torch.zeros(128, 64, dtype=torch.bool)
        expected[5] = True
        assert torch.equal(group.mask(name), expected)
    assert torch.equal(group.mask("blocks.2.mlp.W_out"), expected.T)
    assert sum(map(len, entries.values())) == 3 * 64


def test_a_head_is_query_rows_and_output_columns_and_keys_only_where_they_are_its_own(
    model: HookedTransformer, own_keys: HookedTransformer
) -> None:
    shared = group_of(model, "one", "head", {"blocks.1.attn": [2]})
    assert set(shared.entries()) == {Q, "blocks.1.attn.W_O"}
    assert shared.mask(Q)[32:48].all()
    assert shared.mask(Q).sum() == 16 * 64
    assert shared.mask("blocks.1.attn.W_O")[:, 32:48].all()
    own = group_of(own_keys, "one", "head", {"blocks.1.attn": [2]})
    assert set(own.entries()) == {f"blocks.1.attn.{kind}" for kind in ("W_Q", "W_K", "W_V", "W_O")}


def test_entries_and_masks_say_the_same_for_weights(model: HookedTransformer) -> None:
    group = top(random_scores(model), model, 0.02)
    for name, flat in group.entries(model).items():
        assert torch.equal(group.mask(named_matrix(model, name)).flatten().nonzero().flatten(), flat)
    assert group.size == sum(int(group.mask(m).sum()) for m in matrices_of(model))
    assert group.share == pytest.approx(0.02, rel=0.01)


def test_members_that_are_outside_twice_or_unsorted_are_refused(model: HookedTransformer) -> None:
    shapes = {Q: (64, 64)}
    for members in ([-1, 2], [4096], [3, 3], [5, 2]):
        with pytest.raises(DataError):
            NeuronGroup("g", "weight", {Q: torch.tensor(members)}, shapes)
    with pytest.raises(DataError, match="no shape"):
        NeuronGroup("g", "weight", {UP: torch.tensor([1])}, shapes)
    with pytest.raises(DataError, match="d_head"):
        NeuronGroup("g", "head", {"blocks.1.attn": torch.tensor([1])}, shapes)
    with pytest.raises(DataError, match="holds no heads"):
        group_of(model, "g", "head", {"blocks.9.attn": [0]})


def test_a_group_of_another_model_is_refused(model: HookedTransformer, own_keys: HookedTransformer) -> None:
    group = group_of(model, "g", "weight", {"blocks.0.mlp.W_gate": [3], Q: []})
    with pytest.raises(ModelMismatchError, match=r"members in blocks\.0\.mlp\.W_gate, which this model has not"):
        group.entries(own_keys)
    smaller = load_model(zoo.make("llama", intermediate_size=64), check=False)
    with pytest.raises(ModelMismatchError, match=r"shape \(128, 64\) there and \(64, 64\) here"):
        group.check_fits(smaller)
    group_of(model, "g", "weight", {Q: [1], "blocks.3.mlp.W_in": []}).check_fits(matrices_of(model, layers=[1]))


def test_sets_of_members(model: HookedTransformer) -> None:
    a = group_of(model, "a", "weight", {Q: [1, 2, 3], UP: [7]})
    b = group_of(model, "b", "weight", {Q: [3, 4]})
    assert intersection(a, b).entries() == {Q: torch.tensor([3])}
    assert union(a, b).index[Q].tolist() == [1, 2, 3, 4]
    assert union(a, b).index[UP].tolist() == [7]
    assert difference(a, b).index[Q].tolist() == [1, 2]
    assert difference(b, a).size == 1
    with pytest.raises(DataError, match="no members in common"):
        intersection(a, group_of(model, "n", "neuron", {"blocks.2.mlp": [1]}))


# --- random groups ----------------------------------------------------------------------------------------------------


def test_random_groups_have_the_sizes_of_the_group_in_every_matrix_and_none_of_its_members(
    model: HookedTransformer,
) -> None:
    large = Scores({m.name: weight_of(model, m).abs() for m in matrices_of(model)}, "weight", "snip", 1)
    group = difference(top(large, model, 0.06), top(random_scores(model), model, 0.5), "large")
    for random in random_groups(group, model, range(3)):
        assert intersection(random, group).size == 0
        assert {k: len(v) for k, v in random.index.items()} == {k: len(v) for k, v in group.index.items()}
        theirs, mine = class_counts(random, model), class_counts(group, model)
        assert all((theirs[key] == mine[key]).all() for key in mine)
        assert random.source["unmatched"] == 0.0
    assert all(mine[key][-1] == mine[key].sum() for key in mine)  # the negative control: all of it is large weights


def test_an_unmatched_draw_would_have_had_other_sizes(model: HookedTransformer) -> None:
    large = Scores({m.name: weight_of(model, m).abs() for m in matrices_of(model)}, "weight", "snip", 1)
    group, other = top(large, model, 0.05), top(random_scores(model), model, 0.05)

    def mean_size(g: NeuronGroup) -> float:
        return float(torch.cat([weight_of(model, n).flatten()[i].abs() for n, i in g.entries().items()]).mean())

    matched = random_like(group, model)
    assert mean_size(other) < 0.5 * mean_size(group) < mean_size(matched) < mean_size(group)


def test_a_class_without_enough_others_borrows_from_the_next_and_says_so(model: HookedTransformer) -> None:
    large = Scores({m.name: weight_of(model, m).abs() for m in matrices_of(model)}, "weight", "snip", 1)
    group = top(large, model, 0.08)  # eight tenths of the top decile
    random = random_like(group, model)
    assert random.source["unmatched"] == pytest.approx(0.75, abs=0.02)
    counts = class_counts(random, model)[Q]
    assert counts[-1] + counts[-2] == len(group.index[Q])
    assert counts[:-2].sum() == 0
    with pytest.raises(DataError, match="not as many others are left"):
        random_like(top(large, model, 0.6), model)


@pytest.mark.parametrize("unit", ["weight", "neuron", "head"])
def test_equal_seeds_give_equal_draws_and_others_do_not(model: HookedTransformer, unit: str) -> None:
    group = top(random_scores(model, unit=unit), model, 0.3 if unit == "head" else 0.05)
    one, same, other = (
        random_like(group, model),
        random_groups(group, model, [0, 1])[0],
        random_like(group, model, seed=1),
    )
    assert all(torch.equal(one.index[k], same.index[k]) for k in group.index)
    assert any(not torch.equal(one.index[k], other.index[k]) for k in group.index)
    assert one.unit == unit
    assert one.size == group.size


def test_a_neurons_size_is_the_norm_of_all_its_weights(model: HookedTransformer) -> None:
    group = group_of(model, "g", "neuron", {"blocks.2.mlp": [0]})
    mlp = model.blocks[2].mlp
    parts = [mlp.W_gate, mlp.W_in, mlp.W_out.T]
    expected = torch.cat(parts).pow(2).sum(0).sqrt()
    assert torch.allclose(sizes(group, model, "blocks.2.mlp"), expected, rtol=1e-5)
    assert int(size_classes(sizes(group, model, "blocks.2.mlp")).max()) == 128 // 20 - 1 < DECILES


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_groups_come_back_from_disk_as_they_were(model: HookedTransformer, tmp_path: Path) -> None:
    groups = [
        top(random_scores(model), model, 0.002, name="few"),
        top(random_scores(model), model, 0.2, name="many"),
        top(random_scores(model, unit="neuron"), model, 0.1, name="neurons"),
        top(random_scores(model, unit="head"), model, 0.3, name="heads"),
    ]
    save_groups(tmp_path / "g", groups, model, arguments={"seed": 0})
    for before, after in zip(groups, load_groups(tmp_path / "g", model), strict=True):
        assert (before.name, before.unit, before.d_head, before.shapes) == (
            after.name, after.unit, after.d_head, after.shapes,
        )  # fmt: skip
        assert before.source == after.source
        assert list(before.index) == list(after.index)
        assert all(torch.equal(before.index[key], after.index[key]) for key in before.index)


def test_masks_are_compact(model: HookedTransformer, tmp_path: Path) -> None:
    many = top(random_scores(model), model, 0.2, name="many")
    few = top(random_scores(model), model, 0.002, name="few")
    n = many.universe
    for group, most in ((many, n / 8), (few, 4 * few.size)):
        save_groups(tmp_path / group.name, [group], model)
        assert (tmp_path / group.name / "groups.safetensors").stat().st_size < most + 5000
    assert n / 8 > 5000


def test_groups_on_disk_refuse_another_model_and_damage(model: HookedTransformer, tmp_path: Path) -> None:
    group = top(random_scores(model), model, 0.01)
    save_groups(tmp_path / "g", [group], model)
    with pytest.raises(ModelMismatchError, match="same shape, other weights"):
        load_groups(tmp_path / "g", load_model(zoo.make("llama", seed=5), check=False))
    with pytest.raises(ArtifactError, match="share a name"):
        save_groups(tmp_path / "h", [group, group], model)
    manifest = tmp_path / "g" / "manifest.json"
    entry = json.loads(manifest.read_text())
    entry["kind"] = "directions"
    manifest.write_text(json.dumps(entry))
    with pytest.raises(ArtifactError, match="holds 'directions', not 'groups'"):
        load_groups(tmp_path / "g")


def test_a_random_draw_covers_a_class_evenly(model: HookedTransformer) -> None:
    """Over many draws every other weight of a class is taken about equally often."""
    group = group_of(model, "g", "weight", {Q: list(range(0, 4096, 41))})
    drawn = np.zeros(4096)
    for random in random_groups(group, model, range(300)):
        drawn[random.index[Q].numpy()] += 1
    others = np.setdiff1d(np.arange(4096), group.index[Q].numpy())
    classes = size_classes(weight_of(model, Q).abs().float().flatten()).numpy()
    wanted = np.bincount(classes[group.index[Q].numpy()], minlength=DECILES)
    expected = 300 * wanted[classes[others]] / np.bincount(classes[others], minlength=DECILES)[classes[others]]
    z = (drawn[others] - expected) / np.sqrt(expected)
    assert abs(z.mean()) < 0.1
    assert 0.9 < z.std() < 1.1
