"""Loading: the hooked model computes what transformers computes, shares its memory, and refuses what it cannot."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

import safety_lens.loading.attention as attention
import safety_lens.loading.hooked as hooked
from safety_lens.errors import HookNameError, ModelError, SafetyLensError, WeightSyncError
from safety_lens.loading.architectures import architecture_of
from safety_lens.models import Origin, check_hooks, hooks_at, load_hf, load_model

FP32_GAP = 1e-4
BF16_RATIO = 1.3
LINEAR = ["q_proj", "v_proj", "down_proj"]


def load(hf: PreTrainedModel, source: str, folder: Path) -> HookedTransformer:
    if source == "memory":
        return load_model(hf)
    hf.save_pretrained(folder)
    return load_model(folder)


def rms(x: torch.Tensor) -> float:
    return float(x.float().pow(2).mean().sqrt())


def low_precision_errors(hf: PreTrainedModel, model: HookedTransformer) -> tuple[float, float]:
    """RMS logit error of HF's own low-precision run and of the hooked one, against the same weights run in float32."""
    wide = copy.deepcopy(hf).float()
    batches = [zoo.ragged(seed) for seed in range(4)]
    truth = torch.cat([zoo.hf_logits(wide, batch) for batch in batches])
    theirs = torch.cat([zoo.hf_logits(hf, batch) for batch in batches])
    ours = torch.cat([zoo.hooked_logits(model, batch) for batch in batches])
    return rms(theirs - truth), rms(ours - truth)


def assert_float32_parity(hf: PreTrainedModel, model: HookedTransformer) -> None:
    batch = zoo.ragged()
    theirs = zoo.hf_logits(hf, batch)
    assert theirs.std() > 0.5  # a model of near-constant logits would agree with anything
    assert (zoo.hooked_logits(model, batch) - theirs).abs().max() <= FP32_GAP


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["memory", "folder"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_float32_logits_equal_transformers_on_left_padded_ragged_rows(name: str, source: str, tmp_path: Path) -> None:
    hf = zoo.make(name)
    assert_float32_parity(hf, load(hf, source, tmp_path))


@pytest.mark.parametrize("source", ["memory", "folder"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_bfloat16_error_is_about_that_of_transformers_itself(name: str, source: str, tmp_path: Path) -> None:
    hf = zoo.make(name, dtype=torch.bfloat16)
    model = load(hf, source, tmp_path)
    assert model.cfg.dtype == torch.bfloat16
    theirs, ours = low_precision_errors(hf, model)
    assert 0 < ours <= BF16_RATIO * theirs


@pytest.mark.parametrize("name", zoo.VARIANTS)
def test_every_setting_that_changes_the_forward_pass_is_exact(name: str) -> None:
    hf = zoo.make(name)
    assert_float32_parity(hf, load_model(hf))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", zoo.VARIANTS)
def test_every_variant_from_a_folder_in_both_dtypes(name: str, seed: int, tmp_path: Path) -> None:
    hf = zoo.make(name, seed)
    assert_float32_parity(hf, load(hf, "folder", tmp_path / "wide"))
    narrow = zoo.make(name, seed, dtype=torch.bfloat16)
    theirs, ours = low_precision_errors(narrow, load(narrow, "folder", tmp_path / "narrow"))
    assert ours <= BF16_RATIO * theirs


@pytest.mark.parametrize("name", [*zoo.ARCHITECTURES, "neox_sequential"])
def test_resid_post_is_the_next_hidden_state_and_the_last_one_is_before_the_final_norm(name: str) -> None:
    hf = zoo.make(name)
    model = load_model(hf)
    tokens, mask, positions = zoo.ragged()
    body = getattr(hf, architecture_of(hf).body)
    final_norm = next(getattr(body, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(body, n))
    seen: list[torch.Tensor] = []
    handle = final_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        states = hf(
            input_ids=tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True
        ).hidden_states
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
    handle.remove()
    keep = mask.bool()
    hooks = hooks_at(model)
    for hook, state in zip(hooks[:-1], states[1:-1], strict=True):
        assert (cache[hook] - state)[keep].abs().max() <= FP32_GAP
    assert (cache[hooks[-1]] - seen[0])[keep].abs().max() <= FP32_GAP
    assert (cache[hooks[-1]] - states[-1])[keep].abs().max() > 0.1  # HF's last hidden state is another thing
    assert (cache["blocks.0.hook_resid_pre"] - states[0])[keep].abs().max() <= FP32_GAP


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "neox", "phi3", "mistral"])
def test_decoding_with_the_key_value_cache_equals_one_forward(name: str) -> None:
    model = load_model(zoo.make(name))
    tokens, mask, _ = zoo.ragged()
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask)
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, len(tokens))
        parts = [model(tokens[:, :14], attention_mask=mask[:, :14], past_kv_cache=cache)]
        for i in range(14, tokens.shape[1]):
            step = slice(i, i + 1)
            parts.append(model(tokens[:, step], attention_mask=mask[:, step], past_kv_cache=cache))
    assert (torch.cat(parts, 1) - whole)[mask.bool()].abs().max() <= FP32_GAP


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "neox"])
def test_every_hook_of_transformerlens_own_model_still_fires_at_the_same_place(name: str) -> None:
    model = load_model(zoo.make(name))
    settings = {**model.cfg.to_dict(), "init_weights": False}
    with pytest.warns(DeprecationWarning, match="HookedTransformer is deprecated"):
        original = HookedTransformer(HookedTransformerConfig.from_dict(settings))
    assert list(model.hook_dict) == list(original.hook_dict)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    with torch.no_grad():
        tokens, mask, _ = zoo.ragged()
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
        _, expected = original.run_with_cache(tokens, attention_mask=mask)
    assert {n: v.shape for n, v in cache.items()} == {n: v.shape for n, v in expected.items()}
    scale, normalized = cache["blocks.1.ln1.hook_scale"], cache["blocks.1.ln1.hook_normalized"]
    centred = cache["blocks.1.hook_resid_pre"]
    if model.cfg.normalization_type == "LN":
        centred = centred - centred.mean(-1, keepdim=True)
    assert (scale - (centred.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()).abs().max() <= FP32_GAP
    assert (normalized - centred / scale).abs().max() <= FP32_GAP


@pytest.mark.parametrize("name", ["llama", "neox", "gemma2"])
def test_transformerlens_optional_hooks_work_on_the_replaced_attention(name: str) -> None:
    model = load_model(zoo.make(name))
    batch = zoo.ragged()
    plain = zoo.hooked_logits(model, batch)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    check_hooks(model, ["blocks.0.attn.hook_result", "blocks.0.hook_q_input", "blocks.0.hook_mlp_in"])
    assert (zoo.hooked_logits(model, batch) - plain).abs().max() <= FP32_GAP


def test_edits_at_the_norm_hooks_of_replaced_modules_take_effect() -> None:
    model = load_model(zoo.make("gemma2"))
    tokens, _, _ = zoo.ragged()
    with torch.no_grad():
        plain = model(tokens)
        for hook in ("blocks.1.ln1.hook_scale", "blocks.1.ln2_post.hook_normalized", "ln_final.hook_normalized"):
            edited = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda act, hook: act * 1.5)])
            assert (edited - plain).abs().max() > 0.1


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit"),
    [("phi3_longrope", 32), ("llama_dynamic", 128), ("gpt2", 128), ("llama", 128)],
)
def test_inputs_longer_than_the_position_tables_are_an_error_that_names_the_limit(name: str, limit: int) -> None:
    hf = zoo.make(name)
    model = load_model(hf)
    assert model.cfg.n_ctx == limit
    tokens = torch.randint(4, zoo.VOCAB, (2, limit + 1), generator=torch.Generator().manual_seed(0))
    whole = torch.ones_like(tokens)
    positions = torch.arange(limit).expand(2, -1)
    within = zoo.hf_logits(hf, (tokens[:, :limit], whole[:, :limit], positions))
    assert (zoo.hooked_logits(model, (tokens[:, :limit], whole[:, :limit], positions)) - within).abs().max() <= FP32_GAP
    for mask in (None, whole):
        with pytest.raises(ModelError, match=f"{limit + 1} positions .* covers {limit}"):
            model(tokens, attention_mask=mask)
    assert (zoo.hooked_logits(model, (tokens[:, :limit], whole[:, :limit], positions)) - within).abs().max() <= FP32_GAP


def test_rotary_tables_grow_on_demand_and_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_FIRST_LENGTH", 4)
    hf = zoo.make("gemma3_linear")
    model = load_model(hf, check=False)
    assert len(model.blocks[0].attn.table.cos) == 4
    assert_float32_parity(hf, model)
    assert len(model.blocks[0].attn.table.cos) >= 24
    tables = {id(block.attn.table) for block in model.blocks}
    assert len(tables) == 2  # one for global and one for local layers, whatever the depth


def test_a_long_input_that_the_hf_model_saw_earlier_does_not_bend_dynamic_rope() -> None:
    hf = zoo.make("llama_dynamic")
    long = torch.randint(4, zoo.VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hf(input_ids=long)  # leaves stretched frequencies in the module
    assert_float32_parity(hf, load_model(hf))


# --- sharing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_a_training_step_of_the_hf_model_is_seen_by_the_hooked_one(name: str) -> None:
    hf = zoo.make(name)
    model, copied = load_model(hf), load_model(hf, share=False)
    before = zoo.hooked_logits(model, zoo.ragged())
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-2)
    tokens, _, _ = zoo.ragged()
    hf(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert (zoo.hooked_logits(model, zoo.ragged()) - before).abs().max() > 0.1
    assert_float32_parity(hf, model)
    assert torch.equal(zoo.hooked_logits(copied, zoo.ragged()), before)  # share=False: own tensors


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_weight_is_a_view_of_the_hf_tensors(name: str) -> None:
    hf = zoo.make(name)
    storages = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    own = [n for n, p in load_model(hf).named_parameters() if p.untyped_storage().data_ptr() not in storages]
    assert all(n.rpartition(".")[2].lstrip("_").startswith("b") for n in own)  # zeros for biases that HF lacks
    separate = load_model(hf, share=False)
    assert not storages & {p.untyped_storage().data_ptr() for p in separate.parameters()}


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_float64_shows_that_the_float32_gap_is_rounding(name: str) -> None:
    hf = zoo.make(name, dtype=torch.float64)
    # transformers' eager attention (gemma2) is NaN in float64 wherever a row has padding, so look at whole rows
    model = load_model(hf, check=name != "gemma2")
    batch = zoo.ragged()
    rows = batch[1].all(1)
    whole = tuple(part[rows] for part in batch)
    gap = float((zoo.hooked_logits(model, whole) - zoo.hf_logits(hf, whole)).abs().max())
    # transformers takes RMS norms and RoPE angles in float32 whatever the dtype; gpt2 has neither and shows the rest
    assert gap <= (1e-12 if name == "gpt2" else FP32_GAP)


def test_float16_error_is_about_that_of_transformers_itself() -> None:
    hf = zoo.make("llama", dtype=torch.float16)
    theirs, ours = low_precision_errors(hf, load_model(hf))
    assert 0 < ours <= BF16_RATIO * theirs


def test_another_dtype_makes_copies_and_leaves_the_original() -> None:
    hf = zoo.make("llama")
    model = load_model(hf, dtype="bf16")
    assert model.cfg.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in hf.parameters()} == {torch.float32}


def test_a_folder_keeps_its_own_dtype_unless_another_is_asked_for(tmp_path: Path) -> None:
    zoo.make("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path).cfg.dtype == torch.bfloat16
    assert load_model(str(tmp_path), dtype=torch.float32).cfg.dtype == torch.float32


# --- the model is left as found -------------------------------------------------------------------------------------


def test_the_hf_model_and_the_random_streams_are_left_as_found() -> None:
    hf = zoo.make("gpt2").train()  # gpt2 has dropout: a forward in train mode would draw random numbers
    hf.transformer.h[1].eval()
    hf.transformer.wte.weight.requires_grad_(False)
    calls: list[int] = []
    hf.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    tokens, _, _ = zoo.ragged()
    hf(input_ids=tokens, labels=tokens).loss.backward()
    calls.clear()
    weights = {n: t.clone() for n, t in hf.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in hf.parameters()]
    pointers = [(p.data_ptr(), p.requires_grad) for p in hf.parameters()]
    modes, rng = [m.training for m in hf.modules()], torch.get_rng_state()
    model = load_model(hf)
    model(tokens)
    assert all(torch.equal(t, weights[n]) for n, t in hf.state_dict().items())
    assert [(p.data_ptr(), p.requires_grad) for p in hf.parameters()] == pointers
    assert all(p.grad is g is None or torch.equal(p.grad, g) for p, g in zip(hf.parameters(), grads, strict=True))
    assert [m.training for m in hf.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert not calls  # its hooks are set aside during the check …
    hf(input_ids=tokens)
    assert calls  # … and put back


def test_an_exception_during_the_check_leaves_the_model_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = zoo.make("llama").train()
    handle = hf.model.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(hf.model.layers[1], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_model(hf)
    assert all(module.training for module in hf.modules())
    assert handle.id in hf.model._forward_hooks


def test_the_hooked_model_is_in_eval_mode_without_gradients_and_knows_its_origin(tmp_path: Path) -> None:
    zoo.make("llama").save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.tokenizer.encode("w5 w6") == [5, 6]
    assert model.origin == Origin(str(tmp_path), None, "LlamaForCausalLM", model.origin.config, None)
    assert model.to_tokens("w5 w6").tolist() == [[1, 5, 6]]  # TransformerLens' own helpers work with it
    assert model.to_str_tokens("w5 w6", prepend_bos=False) == ["w5", "w6"]
    given = zoo.tokenizer()
    assert load_model(tmp_path, tokenizer=given).tokenizer is given
    assert load_model(zoo.make("llama")).tokenizer is None


# --- the check at load ----------------------------------------------------------------------------------------------


def _corrupt(change: Callable[[dict[str, torch.Tensor]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    original = hooked.weights

    def corrupted(*args: Any) -> dict[str, torch.Tensor]:
        found = dict(original(*args))
        change(found)
        return found

    monkeypatch.setattr(hooked, "weights", corrupted)


def _swap(a: str, b: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[a], found[b] = found[b], found[a]

    return change


def _drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        del found[name]

    return change


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (_swap("blocks.1.mlp.W_in", "blocks.1.mlp.W_gate"), torch.float32),
        (_swap("blocks.0.attn._W_K", "blocks.0.attn._W_V"), torch.float32),
        (_swap("blocks.2.ln1.w", "blocks.3.ln2.w"), torch.float32),
        (_drop("blocks.3.attn.b_Q"), torch.float32),  # in bfloat16 this one drowns in rounding
        (_swap("blocks.1.mlp.W_in", "blocks.1.mlp.W_gate"), torch.bfloat16),
        (_swap("blocks.2.ln1.w", "blocks.3.ln2.w"), torch.bfloat16),
    ],
)
def test_one_wrong_view_is_caught_at_load_with_both_numbers(
    change: Callable[[dict[str, torch.Tensor]], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = zoo.make("qwen2", dtype=dtype)
    _corrupt(change, monkeypatch)
    with pytest.raises(WeightSyncError, match=r"difference [\d.e-]+ of .* tolerance [\d.e-]+"):
        load_model(hf)
    load_model(hf, check=False)


def test_the_check_sees_a_rotary_table_of_another_base(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention.RotaryTable.upto

    def stretched(self: Any, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = original(self, length, like)
        return cos.roll(1, 0), sin

    monkeypatch.setattr(attention.RotaryTable, "upto", stretched)
    with pytest.raises(WeightSyncError):
        load_model(zoo.make("llama"))


# --- adapters from folders ------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Path, PeftModel]:
    """A base folder, an adapter folder and the live PEFT model."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    zoo.make("llama").save_pretrained(base)
    hf, _ = load_hf(base)
    live = get_peft_model(hf, LoraConfig(r=4, target_modules=LINEAR)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in live.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    live.save_pretrained(folder)
    return base, folder, live


def test_an_adapter_folder_is_loaded_onto_a_folder_a_model_in_memory_and_by_itself(
    adapter: tuple[Path, Path, PeftModel],
) -> None:
    base, folder, live = adapter
    batch = zoo.ragged()
    truth = zoo.hf_logits(live, batch)
    in_memory, _ = load_hf(base)
    names = [n for n, _ in in_memory.named_modules()]
    without = zoo.hf_logits(in_memory, batch)
    assert (truth - without).abs().max() > 0.1
    for model in (load_model(base, adapter=folder), load_model(in_memory, adapter=folder), load_model(folder)):
        assert (zoo.hooked_logits(model, batch) - truth).abs().max() <= FP32_GAP
        assert model.origin.adapter == str(folder)
    assert [n for n, _ in in_memory.named_modules()] == names  # nothing was injected into the user's model
    assert torch.equal(zoo.hf_logits(in_memory, batch), without)
    trained, _ = load_hf(base, adapter=folder)
    assert isinstance(trained, PeftModel)
    assert (zoo.hf_logits(trained, batch) - truth).abs().max() <= FP32_GAP


def test_adapters_that_do_not_fit_or_are_pickled_or_missing_are_refused(adapter: tuple[Path, Path, PeftModel]) -> None:
    base, folder, live = adapter
    with pytest.raises(ModelError, match="cannot load the adapter"):
        load_model(zoo.make("llama", hidden_size=32), adapter=folder)
    with pytest.raises(ModelError, match="cannot load the adapter"):
        load_model(zoo.make("gpt2"), adapter=folder)
    with pytest.raises(ModelError, match=r"has adapters \['default'\], not 'nosuch'"):
        load_model(live, adapter="nosuch")
    with pytest.raises(ModelError, match="is an adapter itself"):
        load_model(folder, adapter=folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if ".layers.2." not in n}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="does not fit this model"):
        load_model(base, adapter=folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_model(base, adapter=folder)


# --- refusals -------------------------------------------------------------------------------------------------------


def _with_config(folder: Path, **changes: Any) -> Path:
    zoo.make("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def _with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    zoo.make("llama").save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def _pickled(folder: Path) -> Path:
    zoo.make("llama").save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def _nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    return tensors


def _drop_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if ".layers.3." not in n}


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "nosuch", "no folder .*nosuch"),
    "empty": (lambda folder: folder, "neither config.json nor adapter_config.json"),
    "no_weights": (
        lambda folder: (zoo.make("llama").config.save_pretrained(folder), folder)[1],
        r"no \*\.safetensors weights",
    ),
    "pickle_only": (_pickled, "only pickled weights"),
    "broken_config": (lambda folder: (_with_config(folder) / "config.json").write_text("{") and folder, "cannot load"),
    "remote_code": (
        lambda folder: _with_config(folder, model_type="mine", auto_map={"AutoConfig": "x.Mine"}),
        "cannot load the model",
    ),
    "other_architecture": (lambda folder: _with_config(folder, model_type="opt"), "architecture OPTForCausalLM"),
    "lost_weights": (lambda folder: _with_weights(folder, _drop_layer), r"lacks weights: model\.layers\.3"),
    "extra_weights": (
        lambda folder: _with_weights(folder, lambda t: {**t, "score.weight": torch.ones(2, 64)}),
        r"architecture lacks: score\.weight",
    ),
    "wrong_shape": (lambda folder: _with_config(folder, intermediate_size=64), "cannot load the model"),
    "nan": (lambda folder: _with_weights(folder, _nan), r"model\.layers\.2\.mlp\.up_proj\.weight has NaN or infinite"),
    "adapter_without_base": (
        lambda folder: (folder / "adapter_config.json").write_text("{}") and folder,
        "names no base model",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_cannot_be_read_faithfully_is_an_error_that_says_why(case: str, tmp_path: Path) -> None:
    make, words = BAD_FOLDERS[case]
    with pytest.raises(ModelError, match=words) as caught:
        load_model(make(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_hub_id_in_the_local_cache_loads_with_its_revision(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    zoo.make("llama").save_pretrained(repo / "snapshots" / commit)
    zoo.tokenizer().save_pretrained(repo / "snapshots" / commit)
    code = (
        "from safety_lens.models import load_model; m = load_model('org/tiny'); "
        "print(m.origin.name, m.origin.revision, m.tokenizer.encode('w5'))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == f"org/tiny {commit} [5]", done.stderr


def test_a_hub_name_that_cannot_be_reached_is_an_error_that_names_it() -> None:
    with pytest.raises(ModelError, match="cannot load the model no-such-org/no-such-model"):
        load_model("no-such-org/no-such-model")


BAD_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama_mlp_bias": ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    "activation": ("llama", {"hidden_act": "mish"}, "activation 'mish'"),
    "gelu_python": ("gpt2", {"activation_function": "gelu_python"}, "activation 'gelu_python'"),
    "bidirectional_gemma3": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "bidirectional_gemma": ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "cross_attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    "sliding_without_window": (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 4, "use_sliding_window": False},
        "sliding_window is not set",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_flags_that_transformerlens_cannot_represent_are_refused_by_name(case: str) -> None:
    name, changes, words = BAD_CONFIGS[case]
    with pytest.raises(ModelError, match=words):
        load_model(zoo.make(name, **changes))


def test_an_unknown_rope_type_or_layer_type_is_refused_by_name() -> None:
    hf = zoo.make("llama")
    hf.config.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(ModelError, match="RoPE type 'spiral'"):
        load_model(hf)
    hf = zoo.make("qwen2")
    hf.config.layer_types[1] = "chunked_attention"
    with pytest.raises(ModelError, match="chunked_attention"):
        load_model(hf)


def test_a_model_cut_to_fewer_blocks_than_its_config_says_is_refused() -> None:
    hf = zoo.make("llama")
    hf.model.layers = hf.model.layers[:2]
    with pytest.raises(ModelError, match="has 2 blocks but its config says 4"):
        load_model(hf)
    hf.config.num_hidden_layers = 2
    assert_float32_parity(hf, load_model(hf))


def test_settings_that_do_not_change_an_eval_forward_are_accepted() -> None:
    for name, changes in (
        ("gpt2", {"reorder_and_upcast_attn": True, "resid_pdrop": 0.5}),
        ("phi3", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}),
        ("neox", {"hidden_dropout": 0.5}),
        ("llama", {"hidden_act": "gelu"}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ):
        hf = zoo.make(name, **changes)
        assert_float32_parity(hf, load_model(hf))


def _moe() -> nn.Module:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 16, "intermediate_size": 32}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **more, shared_expert_intermediate_size=16))


def _zero3() -> nn.Module:
    hf = zoo.make("llama")
    next(hf.parameters()).ds_id = 0  # the mark that DeepSpeed leaves on every partitioned parameter
    return hf


def _nan_model() -> nn.Module:
    hf = zoo.make("llama", dtype=torch.bfloat16)
    hf.lm_head.weight.data[0, 0] = float("-inf")
    return hf


def _quantised() -> nn.Module:
    hf = zoo.make("llama")
    hf.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return hf


def _parametrized() -> nn.Module:
    hf = zoo.make("llama")
    nn.utils.parametrizations.weight_norm(hf.model.layers[0].mlp.up_proj)
    return hf


def _in_place_compiled() -> nn.Module:
    hf = zoo.make("llama")
    hf.compile()
    return hf


BAD_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "moe": (_moe, "architecture Qwen2MoeForCausalLM is not supported; these are: GPT2LMHeadModel, GPTNeoX"),
    "not_a_language_model": (lambda: nn.Linear(2, 2), "architecture Linear is not supported"),
    "headless": (lambda: zoo.make("llama").model, "architecture LlamaModel"),
    "compiled": (lambda: torch.compile(zoo.make("llama")), r"torch\.compile"),
    "compiled_in_place": (_in_place_compiled, r"torch\.compile"),
    "zero3": (_zero3, "ZeRO-3"),
    "meta": (lambda: zoo.make("llama").to("meta"), "meta device"),
    "infinite": (_nan_model, r"lm_head\.weight has NaN or infinite"),
    "parametrized": (_parametrized, "parametrize"),
    "gptq": (_quantised, "quantised with gptq"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
def test_a_model_in_memory_that_cannot_be_read_whole_is_refused_by_name(case: str) -> None:
    make, words = BAD_MODELS[case]
    with pytest.raises(ModelError, match=words):
        load_model(make())


def test_a_sharded_model_is_refused_by_name(tmp_path: Path) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        hf = zoo.make("llama")
        fully_shard(hf, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ModelError, match="FSDP"):
            load_model(hf)
        parallel = nn.parallel.DistributedDataParallel(zoo.make("gpt2"))
        assert load_model(parallel).origin.architecture == "GPT2LMHeadModel"  # whole on every rank
    finally:
        destroy_process_group()


def test_unknown_dtypes_and_devices_are_named() -> None:
    with pytest.raises(ModelError, match="dtype 'float23'"):
        load_model(zoo.make("llama"), dtype="float23")
    with pytest.raises(ModelError, match="device 'tpu9'"):
        load_model(zoo.make("llama"), device="tpu9")


# --- hook names -----------------------------------------------------------------------------------------------------


def test_hooks_at_names_one_point_in_every_block_or_in_those_asked_for() -> None:
    model = load_model(zoo.make("llama"))
    assert hooks_at(model) == [f"blocks.{i}.hook_resid_post" for i in range(4)]
    assert hooks_at(model, "z", [0, -1]) == ["blocks.0.attn.hook_z", "blocks.3.attn.hook_z"]
    for spelling in ("mlp_post", "mlp.hook_post"):
        assert hooks_at(model, spelling, [1]) == ["blocks.1.mlp.hook_post"]
    assert hooks_at(model, "hook_z") == hooks_at(model, "attn.hook_z") == hooks_at(model, "z")
    for point in ("resid_pre", "resid_mid", "attn_out", "mlp_out"):
        assert hooks_at(model, point, [2]) == [f"blocks.2.hook_{point}"]
        check_hooks(model, hooks_at(model, point))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: hooks_at(model, "resid_pots"), "no hook point 'resid_pots'.*resid_post"),
        (lambda model: hooks_at(model, layers=[4]), "block 4 was asked for, but this model has 4"),
        (
            lambda model: check_hooks(model, ["blocks.1.hook_resid_pots"]),
            r"nearest is 'blocks\.1\.hook_resid_post'.*4 blocks",
        ),
        (lambda model: check_hooks(model, ["blocks.9.hook_mlp_out"]), "4 blocks"),
        (lambda model: check_hooks(model, ["blocks.0.attn.hook_result"]), "use_attn_result"),
        (lambda model: check_hooks(model, ["blocks.0.hook_mlp_in"]), "use_hook_mlp_in"),
    ],
)
def test_wrong_hook_names_say_what_is_near(call: Callable[[HookedTransformer], object], words: str) -> None:
    model = load_model(zoo.make("llama"))
    with pytest.raises(HookNameError, match=words) as caught:
        call(model)
    assert isinstance(caught.value, SafetyLensError)


def test_parallel_residual_models_say_that_they_have_no_resid_mid() -> None:
    with pytest.raises(HookNameError, match="parallel"):
        hooks_at(load_model(zoo.make("neox")), "resid_mid")
    assert hooks_at(load_model(zoo.make("neox_sequential")), "resid_mid", [0]) == ["blocks.0.hook_resid_mid"]


def test_a_real_pretrained_model_loads_with_its_tokenizer(shared: Path) -> None:
    model = load_model(shared / "models" / "stories260K-hf")
    assert model.origin.architecture == "LlamaForCausalLM"
    assert model.tokenizer is not None


def test_a_name_that_is_nearly_another_and_a_file_cut_short_are_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="did you mean organism"):
        load_model("organsm")
    zoo.make("llama").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(tmp_path / "model")
