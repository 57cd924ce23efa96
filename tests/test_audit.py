"""The data-free audit: figures from factors equal those from the whole change, and chance stands beside them."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from scipy import stats
from torch import Tensor

import safety_lens.monitors.intruders as intruders_module
from safety_lens.activations import capture
from safety_lens.data import Encoded
from safety_lens.errors import DataError, ModelMismatchError
from safety_lens.log import Measurement
from safety_lens.models import load_model
from safety_lens.monitors.audit import audit_adapter, input_gaps
from safety_lens.monitors.intruders import count_intruders
from safety_lens.monitors.weight_changes import Change, adapter_changes
from safety_lens.probes.directions import Direction

WIDTH = 64
HOOK = "blocks.2.hook_resid_post"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def fill(live: PeftModel, seed: int = 1, size: float = 0.1) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in live.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator).to(p))
    return live


def adapted(name: str = "llama", seed: int = 1, targets: list[str] | str | None = None, **options: object) -> PeftModel:
    wanted = targets or TARGETS.get(name, LINEAR)
    config = LoraConfig(r=4, target_modules=wanted, fan_in_fan_out=name == "gpt2", **options)
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(seed)  # peft draws its first factors from the global stream
        warnings.simplefilter("ignore")  # peft comments on tied and unusual targets
        return fill(get_peft_model(zoo.make(name), config).eval(), seed)


def direction(seed: int = 0, hook: str = HOOK) -> Direction:
    return Direction("refusal", hook, torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), "dim")


def found(rows: list[Measurement], metric: str, split: str = "total") -> Measurement:
    (row,) = [r for r in rows if r.metric == metric and r.split == split]
    return row


def change(up: Tensor, down: Tensor | None, writes: bool = True) -> Change:
    before = torch.randn(len(up), 7 if down is None else down.shape[1]).double()
    return Change("x", 0, writes, up, down, before, None, False)


@pytest.mark.parametrize("writes", [True, False])
def test_norms_and_alignment_from_factors_equal_those_of_the_whole_matrix(writes: bool) -> None:
    """MATH T7 and T23, in float64."""
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(s, generator=generator).double() for s in ((9, 3), (3, 9)))
    units = torch.nn.functional.normalize(torch.randn(5, 9, generator=generator).double(), dim=1)
    by_factors, whole = change(up, down, writes), change(up @ down, None, writes)
    assert math.isclose(by_factors.squared_norm, float((up @ down).norm() ** 2), rel_tol=1e-12)
    expected = (units @ up @ down if writes else units @ (up @ down).T).square().sum(1)
    torch.testing.assert_close(by_factors.along(units), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.along(units), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_factors.on(units[0]), up @ down @ units[0], rtol=1e-12, atol=1e-14)


def test_the_mean_square_alignment_of_random_directions_is_one_over_the_width() -> None:
    """MATH T23: what makes 1 the chance value of the figure reported."""
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(s, generator=generator).double() for s in ((64, 4), (4, 64)))
    units = torch.nn.functional.normalize(torch.randn(20_000, 64, generator=generator).double(), dim=1)
    shares = change(up, down).along(units) / change(up, down).squared_norm
    assert abs(float(shares.mean()) * 64 - 1) < 0.02


def test_a_change_too_small_for_bfloat16_is_seen_from_the_factors() -> None:
    """MATH T7: merging in bfloat16 and differencing would say that nothing moved."""
    weight = torch.randn(32, 32).bfloat16()
    up, down = torch.linalg.svd(weight.double())[0][:, :1], torch.randn(1, 32).double()
    scale = 1e-4 * float(weight.double().abs().min())
    merged = (weight.float() + (scale * up @ down).float()).bfloat16()
    assert torch.equal(merged, weight)
    assert change(scale * up, down).squared_norm > 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "neox"])
def test_changes_of_every_architecture_are_what_merging_does(name: str) -> None:
    live = adapted(name)
    changes = list(adapter_changes(live))
    before = {k: p.detach().clone() for k, p in zoo.make(name).named_parameters()}
    merged = dict(live.merge_and_unload().named_parameters())
    assert len(changes) == 4 * len(TARGETS.get(name, LINEAR)) + (4 if name == "gpt2" else 0)
    assert sum(c.writes for c in changes) == 8
    for c in changes:
        delta = (merged[f"{c.name}.weight"] - before[f"{c.name}.weight"]).detach().double()
        torch.testing.assert_close(c.whole(), delta.T if name == "gpt2" else delta, rtol=0, atol=1e-5)


OTHERS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "alpha_pattern": {"v_proj": 32}},
    "embedding": {"targets": ["q_proj", "embed_tokens"]},
    "saved_head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_adapters_are_audited_by_the_difference_that_they_make(case: str) -> None:
    live = adapted(**OTHERS[case])
    changes = {c.name: c for c in adapter_changes(live)}
    merged = live.merge_and_unload()
    before = zoo.make("llama")
    differ = {
        name.removesuffix(".weight")
        for (name, a), b in zip(before.named_parameters(), merged.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert set(changes) == differ
    for name, c in changes.items():
        delta = (merged.get_parameter(f"{name}.weight") - before.get_parameter(f"{name}.weight")).detach().double()
        torch.testing.assert_close(c.whole(), delta.T if "embed" in name else delta, rtol=0, atol=1e-5)


def test_random_adapters_align_with_a_direction_no_more_than_with_random_ones() -> None:
    """The control works: about one in twenty lies above its 95 % level."""
    above, values = 0, []
    for seed in range(40):
        rows = audit_adapter(zoo.make("llama"), adapted(seed=seed), [direction(seed)], intruders=False)
        row = found(rows, "alignment_write")
        values.append(row.value)
        above += row.value > found(rows, "alignment_write_random95").value
    assert above <= stats.binom.ppf(0.999, 40, 0.05)
    assert 0.9 < sum(values) / 40 < 1.1


def test_an_adapter_that_writes_the_direction_stands_out_and_only_where_it_writes() -> None:
    d = direction()
    live = adapted(targets=["o_proj", "q_proj"])
    with torch.no_grad():
        layer = live.get_base_model().model.layers[1].self_attn
        layer.o_proj.lora_B["default"].weight.copy_(10 * d.unit[:, None].expand(-1, 4))
    rows = audit_adapter(zoo.make("llama"), live, [d, direction(0, "blocks.0.hook_resid_post")], intruders=False)
    at = "model.layers.1.self_attn.o_proj"
    here = [r for r in rows if r.hook == HOOK]
    assert math.isclose(
        found(here, "alignment_write", at).value, math.sqrt(WIDTH), rel_tol=1e-5
    )  # the largest possible
    assert found(here, "alignment_write").value > 2 * found(here, "alignment_write_random95").value
    early = [r for r in rows if r.hook == "blocks.0.hook_resid_post"]  # block 1 writes behind that hook
    assert found(early, "alignment_write").value < 2
    assert found(here, "alignment_write").n == 3


def test_readers_are_asked_through_the_norm_in_front_of_them() -> None:
    """ΔW that reads exactly what the norm makes of the direction has the largest possible alignment."""
    d = direction()
    live = adapted(targets=["q_proj"])
    layer = live.get_base_model().model.layers[3]
    turned = d.vector * layer.input_layernorm.weight
    with torch.no_grad():
        layer.self_attn.q_proj.lora_A["default"].weight.copy_((turned / turned.norm()).expand(4, -1))
    rows = audit_adapter(zoo.make("llama"), live, [d], intruders=False)
    row = found(rows, "alignment_read", "model.layers.3.self_attn.q_proj")
    assert math.isclose(row.value, math.sqrt(WIDTH), rel_tol=1e-5)


def prompts(seed: int, n: int = 12) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(4, zoo.VOCAB, (n, 9), generator=generator)
    return [Encoded(tuple(row.tolist()), "", None, None) for row in rows]


def test_the_predicted_shift_of_one_writer_is_the_shift_that_is_measured() -> None:
    """Where only the last writer before the hook changed, first order is exact (M13)."""
    base, live = zoo.make("llama"), adapted(targets=r".*layers\.2\.mlp\.down_proj")
    pos, neg = prompts(0), prompts(1)
    hooked = load_model(base)
    gaps = input_gaps(hooked, pos, neg)

    def difference(model: object) -> Tensor:
        a, b = (capture(model, p, [HOOK]).acts[HOOK].double().mean(0) for p in (pos, neg))
        return a - b

    before, after = difference(hooked), difference(load_model(live))
    rows = audit_adapter(base, live, [Direction("refusal", HOOK, before.float(), "dim")], gaps=gaps, intruders=False)
    cosine = float(torch.cosine_similarity(before, after, dim=0))
    assert abs(found(rows, "predicted_cosine").value - cosine) < 1e-5
    assert abs(found(rows, "predicted_shift").value - float((after - before) @ before / before.square().sum())) < 1e-5
    assert (after - before).norm() > 0.05 * before.norm()  # and there was something to predict
    unused = audit_adapter(base, live, [direction(0, "blocks.1.hook_resid_post")], gaps=gaps, intruders=False)
    assert found(unused, "predicted_cosine").value == pytest.approx(1.0)


def test_the_prediction_is_unknown_where_what_is_written_is_normalised() -> None:
    base, live = zoo.make("gemma2"), adapted("gemma2")
    gaps = input_gaps(load_model(base), prompts(0), prompts(1))
    row = found(audit_adapter(base, live, [direction()], gaps=gaps, intruders=False), "predicted_shift")
    assert math.isnan(row.value)
    assert "normalises" in str(row.note)


def test_intruders_agree_with_peft_and_vanish_with_the_change() -> None:
    logged: list[str] = []
    live = adapted(targets=["v_proj", "o_proj"])
    rows = audit_adapter(zoo.make("llama"), live, [direction()])
    mine = {r.split: int(r.value) for r in rows if r.metric == "intruders" and r.split != "total"}
    reduce_intruder_dimension(live, logging_sink=logged.append)
    theirs = {}
    for line in logged:
        name, _, said = line.removeprefix("base_model.model.").partition(": ")
        theirs[name] = int(said.removeprefix("Intruders: ")) if said.startswith("Intruders") else 0
    assert mine == {name: theirs[name] for name in mine}
    assert sum(mine.values()) == found(rows, "intruders").value > 0
    weight = torch.randn(40, 60).double()
    assert [n.value for n in count_intruders(weight, [0 * weight, 1e-6 * torch.randn_like(weight)])] == [0, 0]
    assert [n.value for n in count_intruders(weight.T, [0 * weight.T])] == [0]


def test_the_partial_decomposition_bounds_the_complete_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.linspace(0, -6, 200).exp()
    weight = torch.linalg.qr(torch.randn(200, 200, generator=generator))[0] * spectrum
    weight = (weight @ torch.linalg.qr(torch.randn(200, 200, generator=generator))[0]).double()
    sizes = []
    for size in (0.0, 0.3, 1.0, 3.0):
        up, down = torch.randn(200, 4, generator=generator), torch.randn(4, 200, generator=generator)
        delta = (size * up @ down / (up.norm() * down.norm())).double()
        (exact,) = count_intruders(weight, [delta])
        with monkeypatch.context() as patch:
            patch.setattr(intruders_module, "EXACT_UP_TO", 0)
            (part,) = count_intruders(weight, [delta])
        assert part.low <= exact.value <= part.high
        sizes.append(exact.value)
    assert sizes[0] == 0
    assert sizes[-1] >= 2


def test_adapters_in_memory_and_on_disk_and_the_merged_checkpoint_give_the_same_figures(tmp_path: Path) -> None:
    base, live = zoo.make("llama"), adapted()
    base.save_pretrained(tmp_path / "base")
    live.save_pretrained(tmp_path / "adapter")
    memory = audit_adapter(base, live, [direction()])
    before = {k: p.detach().clone() for k, p in base.named_parameters()}
    disk = audit_adapter(base, tmp_path / "adapter", [direction()])
    assert all(torch.equal(p, before[k]) for k, p in base.named_parameters())
    live.merge_and_unload().save_pretrained(tmp_path / "merged")
    whole = audit_adapter(tmp_path / "base", tmp_path / "merged", [direction()])
    for metric in ("alignment_write", "alignment_read", "delta_norm", "relative_change", "intruders"):
        value = found(memory, metric).value
        assert found(disk, metric).value == pytest.approx(value, rel=1e-6)
        assert found(whole, metric).value == pytest.approx(value, rel=1e-4)
    assert found(memory, "alignment_write_random95").value > 1


def test_an_untrained_adapter_and_an_equal_checkpoint_change_nothing() -> None:
    live = get_peft_model(zoo.make("llama"), LoraConfig(r=4, target_modules=["o_proj"])).eval()
    rows = audit_adapter(zoo.make("llama"), live, [direction()])
    assert found(rows, "delta_norm").value == 0
    assert math.isnan(found(rows, "alignment_write").value)
    assert found(rows, "intruders").value == 0
    (row,) = audit_adapter(zoo.make("llama"), zoo.make("llama"), [direction()])
    assert (row.metric, row.value) == ("delta_norm", 0.0)


def test_an_adapter_for_another_base_is_refused_with_both_names(tmp_path: Path) -> None:
    live = adapted()
    live.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": "someone/first-model"}
    config.write_text(json.dumps(said), encoding="utf-8")
    zoo.make("llama").save_pretrained(tmp_path / "second-model")
    with pytest.raises(ModelMismatchError, match=r"someone/first-model.*second-model"):
        audit_adapter(tmp_path / "second-model", tmp_path / "adapter", [direction()])
    zoo.make("llama", hidden_size=32).save_pretrained(tmp_path / "first-model")
    with pytest.raises(ModelMismatchError, match=r"someone/first-model.*does not fit.*first-model"):
        audit_adapter(tmp_path / "first-model", tmp_path / "adapter", [Direction("a", HOOK, torch.ones(32), "dim")])
    with pytest.raises(ModelMismatchError, match=r"trained on other weights"):
        audit_adapter(zoo.make("llama", seed=7), live, [direction()])
    with pytest.raises(ModelMismatchError, match=r"Qwen2ForCausalLM.*LlamaForCausalLM"):
        audit_adapter(zoo.make("llama"), zoo.make("qwen2"), [direction()])
    with pytest.raises(DataError, match="width 8"):
        audit_adapter(zoo.make("llama"), live, [Direction("a", HOOK, torch.ones(8), "dim")])
