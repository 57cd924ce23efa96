"""Tiny random models of every supported architecture, with weights large enough that a wrong conversion shows.

Fresh models from transformers have norms of exactly one, biases of exactly zero and logits near zero: a converter that
drops or swaps any of them would still agree. Here every norm gain, bias and matrix is random and of order one.
"""

import copy
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 97
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ORIGINAL = {"original_max_position_embeddings": 32}
_LONGROPE = {"short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [2.0 + i for i in range(6)]}


def rope(kind: str = "default", theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


_LLAMA3 = rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **_ORIGINAL)
_GEMMA3_ROPE = {
    "full_attention": rope("linear", 1000000.0, factor=8.0),
    "sliding_attention": rope("default", 10000.0),
}
_GEMMA3 = {**_BASE, "num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 8}
_PHI = {"num_key_value_heads": 2, "tie_word_embeddings": True}

Entry = tuple[type[PreTrainedModel], type, dict[str, Any]]


def _llama(**more: Any) -> Entry:
    return LlamaForCausalLM, LlamaConfig, {**_BASE, "num_key_value_heads": 2, "rope_parameters": rope(), **more}


def _qwen2(**more: Any) -> Entry:
    return Qwen2ForCausalLM, Qwen2Config, {**_BASE, "num_key_value_heads": 2, "rope_parameters": rope(), **more}


def _mistral(**more: Any) -> Entry:
    return MistralForCausalLM, MistralConfig, {**_BASE, "num_key_value_heads": 2, "rope_parameters": rope(), **more}


def _phi3(**more: Any) -> Entry:
    return Phi3ForCausalLM, Phi3Config, {**_BASE, "rope_parameters": rope(), **more}


def _neox(**more: Any) -> Entry:
    turn = rope(partial_rotary_factor=0.25)
    return GPTNeoXForCausalLM, GPTNeoXConfig, {**_BASE, "rope_parameters": turn, **more}


ARCHITECTURES: dict[str, Entry] = {
    "llama": _llama(),
    "mistral": _mistral(sliding_window=8),
    "qwen2": _qwen2(),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_BASE, "num_key_value_heads": 2, "head_dim": 32}),
    "gemma": (GemmaForCausalLM, GemmaConfig, {**_BASE, "num_key_value_heads": 2, "head_dim": 32}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {**_BASE, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24},
    ),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**_GEMMA3, "query_pre_attn_scalar": 24}),
    "phi3": _phi3(**_PHI, rope_parameters=rope(partial_rotary_factor=0.75)),  # the shape of Phi-4-mini
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2),
    "neox": _neox(),
}
"""One model of each of the ten architectures."""

VARIANTS: dict[str, Entry] = {
    "llama_mha": _llama(num_key_value_heads=4),
    "llama_tied": _llama(tie_word_embeddings=True),
    "llama_head_dim": _llama(head_dim=32),
    "llama_attention_bias": _llama(attention_bias=True),
    "llama_llama3": _llama(rope_parameters=_LLAMA3),
    "llama_linear": _llama(rope_parameters=rope("linear", factor=4.0)),
    "llama_yarn": _llama(rope_parameters=rope("yarn", factor=4.0, **_ORIGINAL)),
    "llama_dynamic": _llama(rope_parameters=rope("dynamic", factor=4.0)),
    "mistral_full": _mistral(sliding_window=None),
    "qwen2_tied": _qwen2(tie_word_embeddings=True),
    "qwen2_window": _qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen2_yarn": _qwen2(rope_parameters=rope("yarn", factor=4.0, **_ORIGINAL)),
    "qwen3_bias_window": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            **_BASE,
            "head_dim": 32,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
    "gemma2_bias": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {**_BASE, "num_key_value_heads": 4, "attention_bias": True, "head_dim": 16, "sliding_window": 8},
    ),
    "gemma3_linear": (Gemma3ForCausalLM, Gemma3TextConfig, {**_GEMMA3, "rope_parameters": _GEMMA3_ROPE}),
    "gemma3_softcap": (Gemma3ForCausalLM, Gemma3TextConfig, {**_GEMMA3, "final_logit_softcapping": 3.0}),
    "phi3_full": _phi3(),
    "phi3_window": _phi3(sliding_window=8),
    "phi3_longrope": _phi3(
        **_PHI, rope_parameters=rope("longrope", partial_rotary_factor=0.75, **_ORIGINAL, **_LONGROPE), **_ORIGINAL
    ),
    "gpt2_scaled": (GPT2LMHeadModel, GPT2Config, {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2_unscaled": (GPT2LMHeadModel, GPT2Config, {**_GPT2, "scale_attn_weights": False, "n_inner": 96}),
    "gpt2_untied": (GPT2LMHeadModel, GPT2Config, {**_GPT2, "tie_word_embeddings": False}),
    "neox_sequential": _neox(use_parallel_residual=False),
    "neox_no_bias": _neox(attention_bias=False),
    "neox_tied_linear": _neox(tie_word_embeddings=True, rope_parameters=rope("linear", factor=2.0)),
}
"""Settings that change the forward pass: RoPE types, windows, biases, tying, head size, residual order."""

ALL = {**ARCHITECTURES, **VARIANTS}


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **override: Any) -> PreTrainedModel:
    """A random model of the zoo in eval mode; the caller's RNG is untouched."""
    cls, config_class, fields = ALL[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config_class(**copy.deepcopy({**fields, **override}))).eval()  # configs keep the dicts given
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # a norm gain (one, or zero for Gemma) or a bias (zero)
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.16 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the zoo's vocabulary, built in memory."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def ragged(seed: int = 0, width: int = 24, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """A left-padded batch of five rows of different lengths: tokens, mask, positions."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, vocab, (5, width), generator=generator)
    mask = torch.ones_like(tokens)
    for row, pad in enumerate((0, 3, width // 3, 1, width // 2)):
        tokens[row, :pad], mask[row, :pad] = 0, 0
    return tokens, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def hf_logits(model: torch.nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The HF model's logits at real tokens, with explicit positions."""
    tokens, mask, positions = batch
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits[mask.bool()]


def hooked_logits(model: torch.nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The hooked model's logits at real tokens."""
    tokens, mask, _ = batch
    with torch.no_grad():
        logits: Tensor = model(tokens, attention_mask=mask)
    return logits[mask.bool()]
