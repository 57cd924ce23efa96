"""Claims about neuron drift: exact from factors, only what is adapted, beside matched partners, judged by intervals."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from peft import PeftModel
from torch import Tensor
from watched import adapted

from safety_lens.errors import DataError, ModelMismatchError
from safety_lens.interventions.freezing import freeze
from safety_lens.models import load_model
from safety_lens.monitors.neuron_drift.held import HeldGroups, held_share
from safety_lens.monitors.neuron_drift.matched import READS, part_of
from safety_lens.monitors.neuron_drift.moved import GroupDrift, Moved, Place
from safety_lens.monitors.neuron_drift.rows import drift_rows
from safety_lens.monitors.neuron_drift.statistics import answers, by_layer, compare, flip_p
from safety_lens.monitors.neuron_drift.watch import DriftWatch, neuron_drift
from safety_lens.probes.groups import NeuronGroup, group_of
from safety_lens.probes.matrices import matrices_of, weight_of
from safety_lens.stats import Interval

EVERYTHING = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def moved_model(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **lora: Any) -> PeftModel:
    """A model with adapters whose factors are random, as after some training."""
    live = adapted(seed, name, zoo.make(name, dtype=dtype), lora_dropout=0.0, **lora)
    move(live, seed)
    return live


def move(live: PeftModel, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for key, p in live.named_parameters():
            if "lora_B" in key:
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))


def made_of(live: PeftModel, unit: str, members: dict[str, list[int]], name: str = "safety") -> NeuronGroup:
    hf = live.get_base_model()
    if not hasattr(hf, "_hooked"):
        hf._hooked = [load_model(hf)]  # in a list: it is no submodule
    return group_of(hf._hooked[0], name, unit, members)


def some(n: int, of: int, seed: int = 0) -> list[int]:
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:n].tolist()


def dense(live: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and change of every matrix by the long way: peft's own merge, read through the hooked model."""
    hf = live.get_base_model()
    with live.disable_adapter():
        before = load_model(hf)
        old = {m.name: weight_of(before, m).clone() for m in matrices_of(before)}
    live.merge_adapter()
    after = load_model(hf)
    new = {m.name: weight_of(after, m).clone() for m in matrices_of(after)}
    live.unmerge_adapter()
    return {name: (old[name], new[name] - old[name]) for name in old}


def inside(matrix: Tensor, group: NeuronGroup, key: str, kind: str, d_head: int) -> Tensor:
    """One row per unit: all of its weights in a matrix, spelled out."""
    index = group.index[key]
    if group.unit == "weight":
        return matrix.flatten()[index][:, None]
    lines = matrix.T if kind in ("W_O", "W_out") else matrix
    return lines[index] if group.unit == "neuron" else lines.unflatten(0, (-1, d_head))[index].flatten(1)


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(EVERYTHING))
def test_changes_of_entries_neurons_and_heads_equal_those_of_the_merged_model(name: str) -> None:
    live = moved_model(name, target_modules=EVERYTHING[name], fan_in_fan_out=name == "gpt2")
    model = load_model(live.get_base_model())
    known, d_head = dense(live), model.cfg.d_head
    groups = [
        made_of(live, "weight", {m.name: some(37, m.numel, i) for i, m in enumerate(matrices_of(model))}),
        made_of(live, "neuron", {f"blocks.{b}.mlp": some(9, 128, b) for b in range(4)}, "neurons"),
        made_of(live, "head", {f"blocks.{b}.attn": [1, 2] for b in range(4)}, "heads"),
    ]
    for group, drift in zip(groups, DriftWatch(live, groups).live(live), strict=True):
        assert drift.outside == 0
        assert drift.matrices
        for place in drift.matrices:
            key = place.name if group.unit == "weight" else place.name.rpartition(".")[0]
            w, delta = (inside(x, group, key, place.name.rpartition(".")[2], d_head) for x in known[place.name])
            assert place.group.entries == w.numel()
            assert place.group.units == len(w)
            assert place.group.change == pytest.approx(float(delta.square().sum()), rel=1e-9)
            assert place.group.weight == pytest.approx(float(w.square().sum()), rel=1e-9)
            assert place.group.length == pytest.approx(float(delta.norm(dim=1).sum()), rel=1e-9)
        assert drift.total.group.rms > 1e-3  # and something had moved


def test_the_cosine_of_a_neuron_is_that_of_all_its_weights_and_keeps_its_digits() -> None:
    live = moved_model(target_modules=EVERYTHING["llama"])
    with torch.no_grad():
        for key, p in live.named_parameters():
            if "lora_B" in key:
                p.mul_(1e-6)
    group = made_of(live, "neuron", {"blocks.2.mlp": [3, 40, 99]})
    (drift,) = DriftWatch(live, [group]).live(live)
    known, chords = dense(live), []
    for k in (3, 40, 99):
        parts = [(f"blocks.2.mlp.{kind}", kind) for kind in ("W_gate", "W_in", "W_out")]
        w, d = (torch.cat([(known[n][i].T if c == "W_out" else known[n][i])[k] for n, c in parts]) for i in (0, 1))
        across = d - w * (w @ d) / (w @ w)
        chords.append(float(across.square().sum() / (w + d).square().sum()))  # sin² = 2 (1 − cos) for tiny angles
    turn = drift.whole.group.turned
    assert turn == pytest.approx(math.sqrt(np.mean(chords)), rel=1e-6)
    assert 0 < turn < 1e-6
    assert drift.cosine == pytest.approx(1, abs=1e-12)
    assert [p.name for p in drift.blocks] == ["blocks.2.mlp"]


def test_factors_see_what_a_half_precision_merge_rounds_away() -> None:
    """MATH T7: ΔW = 1e-4 · W."""
    live = moved_model(dtype=torch.bfloat16, target_modules=["q_proj"], r=64, lora_alpha=64)
    base: Any = live.get_base_model()
    for block in base.model.layers:
        layer = block.self_attn.q_proj
        layer.lora_A["default"].weight.data = layer.base_layer.weight.data.float()
        layer.lora_B["default"].weight.data = 1e-4 * torch.eye(64)
    group = made_of(live, "weight", {"blocks.1.attn.W_Q": some(200, 64 * 64)})
    assert all(not delta.any() for _, delta in dense(live).values())  # merged, nothing has changed at all
    (drift,) = DriftWatch(live, [group]).live(live)
    assert drift.total.group.relative == pytest.approx(1e-4, rel=1e-3)


def test_frozen_entries_have_moved_by_exactly_nothing_and_their_partners_have() -> None:
    live = adapted(0, "llama", zoo.make("llama"), target_modules=EVERYTHING["llama"])
    members = {m.name: some(60, m.numel, 3) for m in matrices_of(load_model(live.get_base_model()))}
    group = made_of(live, "weight", members)
    freeze(live, group)
    move(live)
    (drift,) = DriftWatch(live, [group]).live(live)
    assert drift.total.group.change == 0
    assert drift.total.random.rms > 1e-3
    found = compare([drift])
    assert found.ratio == Interval(0, 0, 0)
    assert found.answers == ("rejected", "rejected")


def frozen_model(*groups: NeuronGroup) -> PeftModel:
    live = adapted(0, "llama", zoo.make("llama"), target_modules=EVERYTHING["llama"])
    freeze(live, groups)
    move(live)
    return live


def test_neither_members_nor_partners_are_frozen_entries() -> None:
    live = adapted(0, "llama", zoo.make("llama"))
    name = "blocks.1.attn.W_Q"
    held = made_of(live, "weight", {name: some(1500, 4096, 1)}, "held")
    group = made_of(live, "weight", {name: some(200, 4096, 2)})
    still = set(held.index[name].tolist())
    inside = set(group.index[name].tolist()) & still
    assert len(inside) > 50
    live = frozen_model(held)
    told = DriftWatch(live, [group], held=HeldGroups((held,)))
    (drift,), (untold,) = told.live(live), DriftWatch(live, [group]).live(live)
    assert not set(told.partners(group, name).tolist()) & still
    assert drift.held == pytest.approx(len(inside) / 200)
    assert drift.withheld is None
    assert drift.total.group.units == 200 - len(inside)
    assert drift.total.random.units == 4 * (200 - len(inside))
    assert min(drift.total.group.sample.min(), drift.total.random.sample.min()) > 0
    assert (untold.total.random.sample == 0).mean() > 0.2  # the control: without being told, partners are frozen ones
    free = made_of(live, "weight", {name: sorted(set(group.index[name].tolist()) - still)}, "safety")
    (alone,) = DriftWatch(live, [free], held=HeldGroups((held,))).live(live)
    assert compare([drift]).ratio.value == compare([alone]).ratio.value


def test_neurons_frozen_as_such_are_left_out_and_single_frozen_weights_withhold_the_answer() -> None:
    live = adapted(0, "llama", zoo.make("llama"))
    key = "blocks.1.mlp"
    group = made_of(live, "neuron", {key: some(12, 96, 2)})
    others = sorted({*range(96)} - {*group.index[key].tolist()})
    whole = made_of(live, "neuron", {key: [*group.index[key].tolist()[:5], *others[:20]]}, "whole")
    tuned = frozen_model(whole)
    watch = DriftWatch(tuned, [group], held=HeldGroups((whole,)))
    (drift,) = watch.live(tuned)
    assert drift.held == pytest.approx(5 / 12)
    assert drift.withheld is None
    assert not set(watch.partners(group, key).tolist()) & {*whole.index[key].tolist(), *group.index[key].tolist()}
    single = made_of(live, "weight", {f"{key}.W_in": some(2000, 96 * 64, 3)}, "single")
    tuned = frozen_model(single)
    (drift,) = DriftWatch(tuned, [group], held=HeldGroups((single,))).live(tuned)
    assert drift.held == 0
    assert drift.withheld is not None
    assert "single weights were frozen in its neurons (1" in drift.withheld  # a third of one of three matrices
    found = compare([drift])
    assert found.answers == ("withheld", "withheld")
    assert any("withheld: single weights" in (row.note or "") for row in drift_rows([drift], 1))


def test_a_frozen_group_that_is_not_found_again_withholds_the_answer() -> None:
    live = moved_model(target_modules=["q_proj"])
    group = made_of(live, "weight", {"blocks.1.attn.W_Q": some(60, 4096)})
    (drift,) = DriftWatch(live, [group], held=HeldGroups((), ("gone:group",))).live(live)
    assert compare([drift]).answers == ("withheld", "withheld")
    assert "froze gone:group, which is not there now" in str(drift.withheld)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "neox"])
@pytest.mark.parametrize("unit", ["head", "neuron"])
def test_parts_of_a_unit_are_the_entries_that_its_group_names(name: str, unit: str) -> None:
    """Key and value rows are a head's only where every query head has its own: the group says so, drift follows it."""
    model = load_model(zoo.make(name))
    key, last = {"head": ("blocks.1.attn", model.cfg.n_heads - 1), "neuron": ("blocks.1.mlp", model.cfg.d_mlp - 1)}[
        unit
    ]
    group = group_of(model, "g", unit, {key: [0, last]})
    entries = group.entries()
    seen = {}
    for matrix in matrices_of(model):
        if (part := part_of(group, matrix.name)) is None:
            continue
        lines = set(part.spelled(group.index[part.key]).tolist())
        flat = torch.arange(matrix.numel).view(matrix.shape)
        rows = part.read is READS["rows"]
        chosen = flat[sorted(lines)] if rows else flat[:, sorted(lines)]
        seen[matrix.name] = chosen.flatten().sort().values
        assert part.each * 2 == chosen.numel()
        assert held_share(group, key, entries).tolist() == [float(i in (0, last)) for i in range(group.count(key))]
    assert {n: flat.tolist() for n, flat in seen.items()} == {
        n: flat.sort().values.tolist() for n, flat in entries.items()
    }
    own = model.cfg.n_key_value_heads in (None, model.cfg.n_heads)
    assert (f"{key}.W_K" in seen) is (unit == "head" and own)


# --- what takes part --------------------------------------------------------------------------------------------------


def test_only_adapted_matrices_take_part_and_the_share_outside_is_told() -> None:
    live = moved_model(target_modules=["q_proj", "v_proj"])
    matrices = matrices_of(load_model(live.get_base_model()))
    group = made_of(live, "weight", {m.name: some(10, m.numel) for m in matrices})
    (drift,) = DriftWatch(live, [group]).live(live)
    assert {p.name.rpartition(".")[2] for p in drift.matrices} == {"W_Q", "W_V"}
    assert len(drift.matrices) == 8
    assert drift.size == 280
    assert drift.outside == pytest.approx(5 / 7)
    rows = drift_rows([drift], 3)
    assert next(r.value for r in rows if r.metric == "outside_share") == pytest.approx(5 / 7)


def test_a_group_without_adapted_matrices_is_said_to_be_unable_to_move() -> None:
    live = moved_model(target_modules=["q_proj"])
    (drift,) = DriftWatch(live, [made_of(live, "neuron", {"blocks.0.mlp": [1, 5]})]).live(live)
    rows = {row.metric: row for row in drift_rows([drift], 1)}
    assert drift.outside == 1
    assert "cannot move" in (rows["outside_share"].note or "")
    assert math.isnan(rows["rms_change"].value)
    assert "change_ratio" not in rows
    assert compare([drift]).answers == ("undecided", "undecided")


def test_the_cosine_of_single_weights_is_refused_with_the_reason() -> None:
    live = moved_model(target_modules=["q_proj"])
    (drift,) = DriftWatch(live, [made_of(live, "weight", {"blocks.0.attn.W_Q": [1, 2, 3]})]).live(live)
    with pytest.raises(DataError, match="sign"):
        _ = drift.cosine
    with pytest.raises(DataError, match="sign"):
        compare([drift], "turn")
    assert not any("cosine" in row.metric for row in drift_rows([drift], 1))


def test_groups_that_do_not_belong_are_refused() -> None:
    live = moved_model(target_modules=["q_proj"])
    good = made_of(live, "weight", {"blocks.0.attn.W_Q": [1, 2, 3]})
    with pytest.raises(ModelMismatchError, match=r"blocks\.9\.attn\.W_Q"):
        DriftWatch(
            live, [replace(good, index={"blocks.9.attn.W_Q": torch.tensor([1])}, shapes={"blocks.9.attn.W_Q": (8, 8)})]
        )
    with pytest.raises(ModelMismatchError, match="shape"):
        DriftWatch(live, [replace(good, shapes={"blocks.0.attn.W_Q": (8, 8)})])
    with pytest.raises(DataError, match="two groups are named"):
        DriftWatch(live, [good, good])
    with pytest.raises(DataError, match="empty"):
        DriftWatch(live, [made_of(live, "weight", {"blocks.0.attn.W_Q": []})])
    with pytest.raises(DataError, match="no group"):
        DriftWatch(live, [])
    with pytest.raises(DataError, match="trained as a whole"):
        DriftWatch(zoo.make("llama"), [good]).live(zoo.make("llama"))


def test_a_checkpoint_is_compared_with_its_base() -> None:
    base, tuned = zoo.make("llama"), zoo.make("llama")
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight[7] += 0.5
    group = group_of(load_model(base), "safety", "neuron", {"blocks.1.mlp": [7]})
    (drift,) = neuron_drift(base, tuned, [group])
    assert [p.name for p in drift.matrices] == ["blocks.1.mlp.W_in"]
    assert drift.total.group.rms == pytest.approx(0.5, rel=1e-5)
    assert drift.total.random.rms == 0
    assert drift.matrices[0].contrast == 1


# --- partners ---------------------------------------------------------------------------------------------------------


def test_partners_are_others_of_the_same_decile_and_the_same_every_time() -> None:
    live = moved_model(target_modules=["q_proj"])
    name = "blocks.1.attn.W_Q"
    w = dense(live)[name][0].abs().flatten()
    group = made_of(live, "weight", {name: w.topk(60).indices.tolist()})  # the largest weights: what scores pick
    watch = DriftWatch(live, [group], draws=5)
    drawn = watch.partners(group, name)
    assert len(drawn) == 300
    assert not set(drawn.tolist()) & set(group.index[name].tolist())
    assert float(w[drawn].min()) >= float(w.quantile(0.9)) - 1e-6  # unmatched ones would lie anywhere
    assert float(w[drawn].max()) < float(w[group.index[name]].min()) + 1e-6
    assert torch.equal(DriftWatch(live, [group], draws=5).partners(group, name), drawn)
    assert not torch.equal(DriftWatch(live, [group], draws=5, seed=1).partners(group, name), drawn)


def test_partners_come_from_the_nearest_decile_where_a_group_takes_a_whole_one() -> None:
    live = moved_model(target_modules=["q_proj"])
    name = "blocks.1.attn.W_Q"
    w = dense(live)[name][0].abs().flatten()
    whole = made_of(live, "weight", {name: w.topk(820).indices.tolist()})  # a fifth of 4096
    drawn = DriftWatch(live, [whole], draws=1).partners(whole, name)
    assert float(w[drawn].min()) >= float(w.quantile(0.69))
    everything = made_of(live, "weight", {name: list(range(4096))})
    (drift,) = DriftWatch(live, [everything]).live(live)
    assert drift.matrices[0].random.units == 0
    assert math.isnan(compare([drift]).ratio.value)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_sign_flips_count_every_pattern_up_to_twenty_matrices() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(0.4, 1, 9)
    signs = np.array(list(itertools.product([1, -1], repeat=9)))
    brute = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12)
    assert flip_p(d) == pytest.approx(brute)
    assert flip_p(np.ones(20)) == pytest.approx(2 / 2**20)  # nothing smaller is possible
    assert flip_p(np.ones(21)) == pytest.approx(1 / 10_001)  # draws from here on
    assert flip_p(np.zeros(5)) == 1
    assert math.isnan(flip_p(np.zeros(0)))


def test_sign_flips_reject_a_true_null_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    p = np.array([flip_p(row) for row in rng.normal(0, 1, (400, 12))])
    assert 0.02 <= (p < 0.05).mean() <= 0.08
    moved = np.array([flip_p(row) for row in rng.normal(1, 1, (100, 12))])
    assert (moved < 0.05).mean() > 0.8


def test_intervals_resample_layers_not_matrices() -> None:
    """Matrices of a layer that agree are one observation: the interval must not shrink with their number."""
    rng = np.random.default_rng(2)
    by = rng.normal(0, 1, 8)
    one = by_layer(by, np.arange(8))
    seven = by_layer(np.repeat(by, 7), np.repeat(np.arange(8), 7))
    assert seven.high - seven.low == pytest.approx(one.high - one.low, rel=0.02)
    assert math.isnan(by_layer(by, np.zeros(8)).low)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(1.5, 1.2, 1.9), ("supported", "rejected")),
        (Interval(1.0, 0.95, 1.05), ("rejected", "supported")),
        (Interval(0.5, 0.4, 0.7), ("rejected", "rejected")),  # moved less: neither
        (Interval(1.1, 0.9, 1.3), ("undecided", "undecided")),
        (Interval(1.0, 0.7, 1.05), ("rejected", "undecided")),
        (Interval(1.5, math.nan, math.nan), ("undecided", "undecided")),
    ],
)
def test_hypotheses_are_answered_from_the_interval(interval: Interval, expected: tuple[str, str]) -> None:
    assert answers(interval) == expected


def test_the_margin_is_not_an_absolute_difference() -> None:
    """An absolute margin of 0.01 never separates means of 5e-5. Here the scale of Δ makes no difference."""
    small, large = (made([3.0] * 6, scale=scale) for scale in (1e-6, 1.0))
    assert compare([small]).answers == compare([large]).answers == ("supported", "rejected")
    with pytest.raises(DataError, match="margin"):
        compare([small], margin=0.0).answers  # noqa: B018


def moved(rms: float, n: int = 100) -> Moved:
    return Moved(n, n, float(n), n * rms**2, n * rms, math.nan, math.nan, np.full(n, rms))


def made(ratios: Sequence[float], scale: float = 1.0, group: str = "g") -> GroupDrift:
    """A drift of given ratios, two matrices a layer."""
    places = tuple(
        Place(f"blocks.{i // 2}.attn.W_{'QV'[i % 2]}", moved(r * scale * (1 + i / 9)), moved(scale * (1 + i / 9)))
        for i, r in enumerate(ratios)
    )
    return GroupDrift(group, "weight", places, (), 100 * len(places), 0.0)


def test_runs_with_other_seeds_widen_what_is_decided() -> None:
    rng = np.random.default_rng(3)
    runs = [made(1.5 * np.exp(0.02 * rng.normal(size=16))) for _ in range(3)]
    together = compare(runs)
    assert together.runs == 3
    assert together.ratio.value == pytest.approx(1.5, rel=0.02)
    assert together.decisive.low <= together.ratio.low
    assert together.answers.h1 == "supported"
    apart = [made([r] * 16) for r in (1.0, 1.5, 2.2)]  # each run is sure, and they do not agree
    assert compare([apart[2]]).answers.h1 == "supported"
    assert compare(apart).answers.h1 == "undecided"
    with pytest.raises(DataError, match="different groups"):
        compare([runs[0], made([1.0], group="h")])
    with pytest.raises(DataError, match="different matrices"):
        compare([runs[0], made([1.0] * 4)])


def test_the_ratio_that_decides_is_a_mean_over_matrices_and_the_one_of_sums_stands_beside_it() -> None:
    drift = made([1.0, 1.0, 1.0, 4.0])
    found = compare([drift])
    assert found.ratio_of_totals == pytest.approx(drift.total.group.rms / drift.total.random.rms)
    contrast = np.mean([p.contrast for p in drift.matrices])
    assert found.ratio.value == pytest.approx((1 + contrast) / (1 - contrast))
    assert found.ratio_of_totals > 1.3 * found.ratio.value


def test_effect_sizes_are_over_matrices_and_the_pooled_one_is_over_units() -> None:
    rng = np.random.default_rng(4)
    ratios = 1.2 * np.exp(0.3 * rng.normal(size=10))
    drift = made(ratios)
    d = np.array([p.group.rms**2 - p.random.rms**2 for p in drift.matrices])
    found = compare([drift])
    assert found.d == pytest.approx(d.mean() / d.std(ddof=1))
    assert found.g == pytest.approx(found.d * (1 - 3 / (4 * 9 - 1)))
    s, r = (np.concatenate([getattr(p, side).sample for p in drift.matrices]) for side in ("group", "random"))
    assert found.pooled_d == pytest.approx((s.mean() - r.mean()) / np.sqrt((s.var() + r.var()) / 2))


def test_a_group_drawn_at_random_is_not_found_to_drift_more() -> None:
    """The negative control: thirty random groups in a model where rows move very unequally."""
    live = moved_model(target_modules=EVERYTHING["llama"])
    matrices = matrices_of(load_model(live.get_base_model()))
    groups = [made_of(live, "weight", {m.name: some(40, m.numel, 97 * s + i) for i, m in enumerate(matrices)}, f"r{s}")
              for s in range(30)]  # fmt: skip
    found = [compare([drift]) for drift in DriftWatch(live, groups).live(live)]
    assert sum(c.answers.h1 == "supported" for c in found) <= 2
    assert np.mean([c.p < 0.05 for c in found]) <= 0.14
    largest = {name: delta.abs().flatten().topk(40).indices.tolist() for name, (_, delta) in dense(live).items()}
    (drift,) = DriftWatch(live, [made_of(live, "weight", largest, "moved")]).live(live)
    assert compare([drift]).answers.h1 == "supported"
    assert compare([drift]).p < 1e-3
