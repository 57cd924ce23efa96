"""Folding: the hooked model has the live adapter's effect, and the live model never notices."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import zoo
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

import safety_lens.loading.merging as merging
from safety_lens.artifacts import fingerprint
from safety_lens.errors import ModelError, WeightSyncError
from safety_lens.folding import LoraFolder, Shadow
from safety_lens.models import load_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def fill(model: nn.Module, seed: int) -> None:
    """Give every trainable tensor a random push, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                push = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(push.to(parameter))


def adapted(name: str, config: object, seed: int = 1, dtype: torch.dtype = torch.float32) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft comments on the unusual settings that these tests are about
        model = get_peft_model(zoo.make(name, dtype=dtype), config).eval()
    fill(model, seed)
    return model


def targets(name: str) -> list[str]:
    return TARGETS.get(name, LINEAR)


def state(model: nn.Module) -> dict[str, object]:
    """Everything about a live model that a monitor could disturb."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "pointers": [p.data_ptr() for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "types": [type(module) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key, value in before.items():
        other = after[key]
        if key == "weights":
            assert list(value) == list(other)
            assert all(torch.equal(tensor, other[name]) for name, tensor in value.items()), key
        elif key == "rng":
            assert torch.equal(value, other)
        elif key == "grads":
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(value, other, strict=True))
        else:
            assert value == other, key


def gap(model: nn.Module, live: nn.Module) -> float:
    batch = zoo.ragged()
    return float((zoo.hooked_logits(model, batch) - zoo.hf_logits(live, batch)).abs().max())


def effect(live: PeftModel) -> float:
    """How much the adapter moves logits: parity would be trivial without it."""
    batch = zoo.ragged()
    with_adapter = zoo.hf_logits(live, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with bias="all" the base biases were trained too, says peft
        with live.disable_adapter():
            return float((with_adapter - zoo.hf_logits(live, batch)).abs().max())


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_lora_on_every_linear_of_every_architecture_equals_live_peft_after_each_update(name: str) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets(name), fan_in_fan_out=name == "gpt2")
    live = adapted(name, config)
    model = load_model(live)
    folder = LoraFolder(model, live)
    assert gap(model, live) <= 1e-4
    for seed in (2, 3):
        fill(live, seed)
        stale = gap(model, live)
        folder.fold()
        assert stale > 0.1  # the negative control: without folding the hooked model is wrong
        assert gap(model, live) <= 1e-4
    assert effect(live) > 0.1


CASES: dict[str, tuple[str, Callable[[], object]]] = {
    "rslora_patterns": (
        "llama",
        lambda: LoraConfig(
            r=4, use_rslora=True, target_modules=LINEAR, rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 32}
        ),
    ),
    "dora": ("llama", lambda: LoraConfig(r=4, use_dora=True, target_modules=LINEAR)),
    "dora_fused": ("phi3", lambda: LoraConfig(r=4, use_dora=True, target_modules=TARGETS["phi3"])),
    "lora_bias": ("qwen2", lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "lora_bias_without_base_bias": ("llama", lambda: LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)),
    "bias_all": ("qwen2", lambda: LoraConfig(r=4, target_modules=LINEAR, bias="all")),
    "bias_all_gpt2": (
        "gpt2",
        lambda: LoraConfig(r=4, target_modules=TARGETS["gpt2"], bias="all", fan_in_fan_out=True),
    ),
    "layers_to_transform": ("llama", lambda: LoraConfig(r=4, target_modules=LINEAR, layers_to_transform=[2])),
    "lm_head": ("llama", lambda: LoraConfig(r=4, target_modules=[*LINEAR, "lm_head"])),
    "embedding": ("llama", lambda: LoraConfig(r=4, target_modules=[*LINEAR, "embed_tokens"])),
    "embedding_gemma": ("gemma2", lambda: LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])),
    "modules_to_save_head": ("llama", lambda: LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head"])),
    "modules_to_save_norm": ("gemma2", lambda: LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["norm"])),
    "trainable_tokens": (
        "llama",
        lambda: LoraConfig(r=4, target_modules=LINEAR, trainable_token_indices={"embed_tokens": [5, 6, 7]}),
    ),
    "trainable_tokens_alone": (
        "llama",
        lambda: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5, 6, 7]),
    ),
    "norms": ("llama", lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "saved_and_tied": (
        "llama_tied",
        lambda: LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "one_parameter": (
        "llama",
        lambda: LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.gate_proj.weight"]),
    ),
    "ia3": (
        "llama",
        lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ia3_bias": ("qwen2", lambda: IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])),
    "loha": ("llama", lambda: LoHaConfig(r=4, target_modules=LINEAR)),
    "lokr": ("llama", lambda: LoKrConfig(r=4, target_modules=LINEAR)),
    "vera": ("llama_mha", lambda: VeraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])),
    "adalora": ("llama", lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=LINEAR)),
    "oft": ("llama", lambda: OFTConfig(r=0, oft_block_size=16, target_modules=["q_proj", "o_proj"])),
    "boft": ("llama", lambda: BOFTConfig(boft_block_size=4, target_modules=["q_proj"])),
}


@pytest.mark.parametrize("case", CASES)
def test_every_mergeable_adapter_equals_live_peft_and_leaves_it_bit_identical(case: str) -> None:
    name, config = CASES[case]
    live = adapted(name, config())
    before = state(live)
    model = load_model(live)
    folder = LoraFolder(model, live)
    folder.fold()
    assert_same(before, state(live))
    assert gap(model, live) <= 1e-4
    assert effect(live) > 0.1
    fill(live, 5)
    folder.fold()
    assert gap(model, live) <= 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_adapted_embeddings_follow_peft_with_tied_and_untied_heads(tied: bool) -> None:
    for config in (
        LoraConfig(r=4, target_modules=[*LINEAR, "embed_tokens"]),
        LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["embed_tokens"]),
    ):
        live = adapted("llama_tied" if tied else "llama", config)
        assert gap(load_model(live), live) <= 1e-4


def test_a_naive_product_would_be_wrong_for_dora() -> None:
    live = adapted("llama", LoraConfig(r=4, use_dora=True, target_modules=LINEAR))
    layer = live.get_base_model().model.layers[0].self_attn.q_proj
    naive = layer.base_layer.weight + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    plain = Shadow(live).model.model.layers[0].self_attn.q_proj
    assert (plain.weight - naive).abs().max() > 0.01


def test_several_active_adapters_and_a_switched_one_are_followed() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR))
    live.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    live.base_model.set_adapter(["default", "other"])
    fill(live, 4)
    model = load_model(live)
    folder = LoraFolder(model, live)
    assert gap(model, live) <= 1e-4
    for active in ("default", "other", ["other", "default"]):
        live.base_model.set_adapter(active)
        assert gap(model, live) > 0.1 or active == ["other", "default"]
        folder.fold()
        assert gap(model, live) <= 1e-4


def test_one_adapter_of_a_peft_model_can_be_named_without_switching_it() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR))
    live.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    live.base_model.set_adapter("other")
    fill(live, 4)
    live.base_model.set_adapter("default")
    model = load_model(live, adapter="other")
    assert live.active_adapters == ["default"]
    live.base_model.set_adapter("other")
    assert gap(model, live) <= 1e-4


def test_disabled_and_merged_adapters_are_read_as_peft_reads_them() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR))
    model = load_model(live)
    folder = LoraFolder(model, live)
    with live.disable_adapter():
        folder.fold()
        assert gap(model, live) <= 1e-4
    folder.fold()
    assert gap(model, live) <= 1e-4
    live.merge_adapter()
    folder.fold()
    assert gap(model, live) <= 1e-4


def test_adapters_injected_without_a_peft_model_are_folded_too() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR)).get_base_model()
    assert gap(load_model(live), live) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR), dtype=dtype)
    before = state(live)
    model = load_model(live)
    folder = LoraFolder(model, live)
    for _ in range(20):
        folder.fold()
    assert_same(before, state(live))
    layer = live.get_base_model().model.layers[1].mlp.down_proj
    wide = [t.detach().float() for t in (layer.lora_B["default"].weight, layer.lora_A["default"].weight)]
    expected = torch.addmm(layer.base_layer.weight.float(), *wide, alpha=layer.scaling["default"]).to(dtype)
    assert torch.equal(model.blocks[1].mlp.W_out.T, expected)


def test_a_model_in_training_keeps_gradients_modes_hooks_and_random_streams() -> None:
    live = get_peft_model(zoo.make("llama"), LoraConfig(r=4, target_modules=LINEAR, lora_dropout=0.5)).train()
    live.get_base_model().model.layers[0].eval()  # a mixed state must come back mixed
    calls: list[int] = []
    live.get_base_model().model.register_forward_hook(lambda *_: calls.append(1))
    fill(live, 1)
    tokens, _, _ = zoo.ragged()
    live(input_ids=tokens, labels=tokens).loss.backward()
    calls.clear()
    before = state(live)
    model = load_model(live)
    folder = LoraFolder(model, live)
    folder.fold()
    model(tokens)
    assert_same(before, state(live))
    assert not calls
    live.eval()
    assert gap(model, live) <= 1e-4


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [KeyboardInterrupt, _Stop])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_an_interrupt_in_the_middle_of_a_fold_leaves_the_live_model_bit_identical(
    stop: type[BaseException], config: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR, **config))
    model = load_model(live)
    folder = LoraFolder(model, live)
    fill(live, 2)
    before = state(live)
    calls = 0

    def interrupted(*args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        original(*args, **kwargs)
        if calls == 3:
            raise stop

    target = "safety_lens.loading.merging._merge_clone" if config else "safety_lens.loading.merging._add_lora"
    original = getattr(merging, target.rsplit(".", 1)[1])
    with monkeypatch.context() as patch:
        patch.setattr(target, interrupted)
        with pytest.raises(stop):
            folder.fold()
    assert_same(before, state(live))
    folder.fold()
    assert gap(model, live) <= 1e-4


def test_full_fine_tuning_is_visible_without_folding_and_moved_storage_after_it() -> None:
    live = zoo.make("gemma3")
    model = load_model(live)
    folder = LoraFolder(model, live)
    optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2)
    tokens, _, _ = zoo.ragged()
    first = zoo.hf_logits(live, zoo.ragged())
    live(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert (zoo.hf_logits(live, zoo.ragged()) - first).abs().max() > 0.1
    assert gap(model, live) <= 1e-4
    live.to(torch.float64)
    folder.fold()
    assert model.cfg.dtype == torch.float64
    assert gap(model, live) <= 1e-4
    live.resize_token_embeddings(zoo.VOCAB + 7, mean_resizing=False)
    folder.fold()
    assert model.cfg.d_vocab == zoo.VOCAB + 7
    assert gap(model, live) <= 1e-4


def test_moved_storage_of_a_peft_model_is_noticed() -> None:
    live = adapted("phi3", LoraConfig(r=4, target_modules=TARGETS["phi3"]))
    model = load_model(live)
    folder = LoraFolder(model, live)
    for parameter in live.parameters():
        parameter.data = parameter.data.clone() + 0.01
    assert gap(model, live) > 0.1
    folder.fold()
    assert gap(model, live) <= 1e-4


def test_a_hooked_model_with_its_own_copies_is_made_equal_by_folding_too() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR))
    model = load_model(live, share=False)
    folder = LoraFolder(model, live)
    fill(live, 2)
    folder.fold()
    assert gap(model, live) <= 1e-4


def test_a_hooked_model_in_a_chosen_dtype_keeps_it_and_follows() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR))
    model = load_model(live, dtype="bf16")
    folder = LoraFolder(model, live)
    fill(live, 2)
    folder.fold()
    layer = live.get_base_model().model.layers[1].mlp.down_proj
    factors = [layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()]
    expected = torch.addmm(layer.base_layer.weight, *factors, alpha=layer.scaling["default"]).bfloat16()
    assert model.cfg.dtype == torch.bfloat16
    assert torch.equal(model.blocks[1].mlp.W_out.T, expected)


def test_weights_of_another_dtype_are_copies_that_folding_refreshes() -> None:
    live = zoo.make("gemma2", dtype=torch.bfloat16)
    for layer in live.model.layers:
        layer.input_layernorm.float()
    model = load_model(live)
    folder = LoraFolder(model, live)
    for _ in range(2):
        with torch.no_grad():
            live.model.layers[1].input_layernorm.weight.add_(0.5)
        expected = live.model.layers[1].input_layernorm.weight.bfloat16()
        assert not torch.equal(model.blocks[1].ln1.w, expected)
        folder.fold()
        assert torch.equal(model.blocks[1].ln1.w, expected)


def test_folding_a_base_loaded_model_gives_it_the_adapter() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR))
    with live.disable_adapter():
        model = load_model(copy.deepcopy(zoo.make("llama")))
        assert gap(model, live) <= 1e-4
    LoraFolder(model, live)
    assert gap(model, live) <= 1e-4


def test_folding_costs_only_the_adapted_matrices() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    owned = Shadow(live).owned_bytes
    attention = [layer.self_attn for layer in live.get_base_model().model.layers]
    expected = sum(4 * (attn.q_proj.weight.numel() + attn.v_proj.weight.numel()) for attn in attention)
    assert owned == expected


def test_a_folder_takes_over_the_merged_weights_that_loading_made_and_brings_them_up_to_date() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=["q_proj"]))
    model = load_model(live, check=False)
    before = model.blocks[0].attn.W_Q.data_ptr()
    fill(live, 9)  # trained on between loading and folding
    folder = LoraFolder(model, live)
    assert model.blocks[0].attn.W_Q.data_ptr() == before
    assert gap(model, live) < 1e-4
    fill(live, 10)
    assert gap(model, live) > 1e-3  # the control: nothing is folded by itself
    folder.fold()
    assert gap(model, live) < 1e-4
    LoraFolder(model, live)
    assert model.blocks[0].attn.W_Q.data_ptr() != before  # the first folder owns them
    assert gap(model, live) < 1e-4


def test_gradients_taken_in_the_hooked_model_never_reach_the_live_one() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR)).train()
    model = load_model(live)
    seen = {}

    def watch(act: torch.Tensor, hook: object) -> torch.Tensor:
        seen["act"] = act.detach().requires_grad_(True)
        return seen["act"]

    tokens, _, _ = zoo.ragged()
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_post", watch)])[:, -1].sum().backward()
    assert seen["act"].grad.abs().sum() > 0
    assert all(p.grad is None for p in live.parameters())


KINDS: dict[str, dict[str, object]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "dora": {"use_dora": True},
    "two_adapters": {},
    "modules_to_save": {"modules_to_save": ["head"]},
}
HEADS = {"neox": "embed_out"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "neox"])
def test_every_family_with_every_kind_of_lora_gives_the_logits_of_live_peft(name: str, kind: str) -> None:
    options = {"r": 4, "target_modules": targets(name), "fan_in_fan_out": name == "gpt2", **KINDS[kind]}
    if kind == "modules_to_save":
        options |= {"modules_to_save": [HEADS.get(name, "lm_head")], "ensure_weight_tying": False}
    live = adapted(name, LoraConfig(**options))
    if kind == "two_adapters":
        live.add_adapter("other", LoraConfig(**{**options, "r": 2, "lora_alpha": 3}))
        live.base_model.set_adapter(["default", "other"])
    fill(live, 4)
    model = load_model(live)
    folder = LoraFolder(model, live)
    fill(live, 5)
    folder.fold()
    assert gap(model, live) <= 1e-4
    assert effect(live) > 0.1


def test_a_hundred_folds_while_training_in_bfloat16_touch_nothing_and_equal_a_fresh_load_each_time() -> None:
    live = get_peft_model(zoo.make("llama", dtype=torch.bfloat16), LoraConfig(r=4, target_modules=LINEAR)).train()
    base = {name: p.detach().clone() for name, p in live.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=1e-2)
    model = load_model(live)
    folder = LoraFolder(model, live)
    tokens, _, _ = zoo.ragged()
    first = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(100):
        live(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before = torch.get_rng_state()
        folder.fold()
        assert torch.equal(before, torch.get_rng_state())
        fresh = dict(load_model(live, check=False).named_parameters())
        assert all(torch.equal(p, fresh[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, base[name]) for name, p in live.named_parameters() if name in base)
    assert not torch.equal(first["blocks.1.mlp.W_out"], model.blocks[1].mlp.W_out)


def test_only_matrices_with_an_adapter_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]))
    folder = LoraFolder(load_model(live), live)
    seen: list[str] = []
    monkeypatch.setattr("safety_lens.folding.fold_slot", lambda slot, names: seen.append(slot.name))
    folder.fold()
    assert len(seen) == 8
    assert all(name.endswith(("q_proj", "v_proj")) for name in seen)


@pytest.mark.parametrize("case", ["lora", "dora", "bias", "gpt2"])
def test_a_streamed_model_has_the_live_effect_with_the_memory_of_one_block(case: str) -> None:
    options = {"lora": {}, "dora": {"use_dora": True}, "bias": {"bias": "all"}, "gpt2": {"fan_in_fan_out": True}}[case]
    name = {"bias": "qwen2", "gpt2": "gpt2"}.get(case, "llama")
    live = adapted(name, LoraConfig(r=4, target_modules=targets(name), **options))
    before = state(live)
    streamed, whole = load_model(live, stream=True), load_model(live)
    assert gap(streamed, live) <= 1e-4
    assert fingerprint(streamed) == fingerprint(whole)
    assert_same(before, state(live))
    folder = LoraFolder(streamed, live)
    fill(live, 3)
    folder.fold()
    assert gap(streamed, live) <= 1e-4
    assert gap(whole, live) > 0.1
    assert Shadow(live, streamed=True).owned_bytes * 4 == Shadow(live).owned_bytes


def test_between_blocks_a_streamed_model_holds_no_weights_even_after_an_error() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR))
    model = load_model(live, stream=True)
    filled: list[list[int]] = []

    def look(act: torch.Tensor, hook: object) -> None:
        filled.append([i for i, block in enumerate(model.blocks) if block.mlp.W_out.device.type != "meta"])

    def fail(act: torch.Tensor, hook: object) -> None:
        raise _Stop

    tokens, _, _ = zoo.ragged()
    model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{i}.mlp.hook_post", look) for i in range(4)])
    assert filled == [[0], [1], [2], [3]]
    with pytest.raises(_Stop):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.mlp.hook_post", fail)])
    look(tokens, None)
    assert filled[-1] == []
    assert gap(model, live) <= 1e-4


def test_a_streamed_model_follows_moved_storage_and_refuses_gradients_and_copies() -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR))
    model = load_model(live, stream=True)
    folder = LoraFolder(model, live)
    live.to(torch.float64)
    folder.fold()
    assert gap(model, live) <= 1e-4
    with pytest.raises(ModelError, match="gradient was asked through block 2"):
        model.run_with_hooks(
            zoo.ragged()[0], fwd_hooks=[("blocks.1.hook_resid_pre", lambda act, hook: act.detach().requires_grad_())]
        )
    with pytest.raises(ModelError, match="share=False"):
        load_model(live, stream=True, share=False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PREFIX_TUNING"),
        (AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2), "ADAPTION_PROMPT"),
    ],
)
def test_adapters_without_weights_are_refused_by_name(config: object, words: str) -> None:
    live = get_peft_model(zoo.make("llama"), config)
    with pytest.raises(ModelError, match=words):
        load_model(live)


def test_adapters_that_cannot_be_merged_are_refused_by_layer() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match=r"self_attn\.q_proj: a LORA adapter \(default\) cannot be folded"):
        load_model(get_peft_model(zoo.make("llama"), config).eval())
    with pytest.raises(ModelError, match=r"a LILY adapter"):
        load_model(get_peft_model(zoo.make("llama_mha"), LilyConfig(r=4, target_modules=["q_proj"])).eval())
    gate_bias = adapted("llama", LoraConfig(r=4, target_modules=["gate_proj"], lora_bias=True))
    with pytest.raises(ModelError, match="gate_proj has a bias"):
        load_model(gate_bias)


def test_a_folder_whose_merge_is_wrong_is_refused_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    live = adapted("llama", LoraConfig(r=4, target_modules=LINEAR, use_dora=True))
    model = load_model(live)
    monkeypatch.setattr(merging, "is_plain_lora", lambda layer, names: True)  # the naive product
    with pytest.raises(WeightSyncError, match="difference"):
        LoraFolder(model, live)


def test_folder_refuses_a_model_of_another_kind() -> None:
    with pytest.raises(ModelError, match=r"load_model\(trained\)"):
        LoraFolder(load_model(zoo.make("gpt2")), zoo.make("llama"))
