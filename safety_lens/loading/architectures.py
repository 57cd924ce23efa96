"""How ten Hugging Face architectures read as a HookedTransformer: settings of its config, and views of its weights.

`settings(hf)` turns a model's config into HookedTransformerConfig keywords and refuses by name what TransformerLens
cannot represent. `weights(hf, cfg)` names every tensor of the hooked model as a *view* of a Hugging Face tensor:
nothing is copied, scaled or folded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformer_lens import HookedTransformerConfig
from transformers import PretrainedConfig, PreTrainedModel

from safety_lens.errors import ModelError
from safety_lens.loading import layouts
from safety_lens.loading.layouts import Layer, Weights

Settings = dict[str, Any]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_fast",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class Architecture:
    """One family: its settings, where its body lives in the HF module tree, and the views of one block."""

    settings: Callable[[PretrainedConfig], Settings]
    body: str
    block: Callable[[Layer, HookedTransformerConfig], Weights]
    outer: Callable[[Layer], Weights]
    offset_norms: bool = False  # Gemma: gain 1 + w, embedding times sqrt(d_model)


def architecture_of(hf: PreTrainedModel) -> Architecture:
    """The table row for this model's class.

    Raises:
        ModelError: the class is not one of the ten; the message lists them.
    """
    return architecture_named(type(hf).__name__)


def architecture_named(name: str) -> Architecture:
    """The table row for a class name such as "LlamaForCausalLM".

    Raises:
        ModelError: the class is not one of the ten; the message lists them.
    """
    if name not in ARCHITECTURES:
        raise ModelError(f"architecture {name} is not supported; these are: {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[name]


def settings(hf: PreTrainedModel) -> Settings:
    """HookedTransformerConfig keywords for a model, without dtype and device.

    Raises:
        ModelError: a flag of the HF config that TransformerLens cannot represent, by name.
    """
    found = architecture_of(hf).settings(hf.config)
    if len(blocks_of(hf)) != found["n_layers"]:
        raise ModelError(
            f"the model has {len(blocks_of(hf))} blocks but its config says {found['n_layers']}: set "
            "model.config.num_hidden_layers to what is there"
        )
    return found


def weights(hf: PreTrainedModel, cfg: HookedTransformerConfig) -> Weights:
    """Every tensor of the hooked model that the HF model has, as a view of the HF tensor; absent biases are omitted."""
    family = architecture_of(hf)
    body = getattr(hf, family.body)
    found = family.outer(body)
    for index, layer in enumerate(blocks_of(hf)):
        found |= {f"blocks.{index}.{name}": tensor for name, tensor in family.block(layer, cfg).items()}
    head = hf.get_output_embeddings()
    found["unembed.W_U"] = head.weight.detach().T
    if getattr(head, "bias", None) is not None:
        found["unembed.b_U"] = head.bias.detach()
    return found


def blocks_of(hf: PreTrainedModel) -> nn.ModuleList:
    """The HF model's list of transformer blocks."""
    body = getattr(hf, architecture_of(hf).body)
    blocks: nn.ModuleList = body.h if hasattr(body, "h") else body.layers
    return blocks


def rope_parameters(config: PretrainedConfig, layer: int) -> tuple[str | None, dict[str, Any]]:
    """The layer type that keys the rotary module (None where there is one table for all) and its RoPE parameters."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope or not rope:
        return None, rope
    kind = config.layer_types[layer]
    return kind, rope[kind]


def usable_length(config: PretrainedConfig) -> int:
    """Positions for which HF's rotary frequencies are constant: longrope switches factors past the original length."""
    length = int(config.max_position_embeddings)
    for layer in range(config.num_hidden_layers):
        _, rope = rope_parameters(config, layer)
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            length = min(length, int(original))
    return length


def _refuse(config: PretrainedConfig, flag: str, why: str) -> None:
    if getattr(config, flag, None):
        raise ModelError(f"{config.model_type} config has {flag}={getattr(config, flag)!r}: {why}")


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ModelError(f"activation {name!r} is not one that TransformerLens has ({', '.join(sorted(_ACTIVATIONS))})")
    return _ACTIVATIONS[name]


def _common(config: PretrainedConfig) -> Settings:
    n_heads = config.num_attention_heads
    n_kv = getattr(config, "num_key_value_heads", None) or n_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": n_heads,
        "n_key_value_heads": None if n_kv == n_heads else n_kv,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "d_vocab": config.vocab_size,
        "attn_scale": float(d_head) ** 0.5,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }


def _rotary(config: PretrainedConfig) -> Settings:
    for layer in range(config.num_hidden_layers):
        _, rope = rope_parameters(config, layer)
        kind = rope.get("rope_type", "default")
        if kind not in _ROPE_TYPES:
            raise ModelError(f"RoPE type {kind!r} is not supported; these are: {', '.join(_ROPE_TYPES)}")
    _, rope = rope_parameters(config, 0)
    d_head = _common(config)["d_head"]
    return {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": int(d_head * rope.get("partial_rotary_factor", 1.0)),
        "n_ctx": usable_length(config),
    }


def _gated(config: PretrainedConfig) -> Settings:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    return {
        **_common(config),
        **_rotary(config),
        "act_fn": _activation(activation),
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
    }


def _window(config: PretrainedConfig, kinds: list[str]) -> Settings:
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(f"{config.model_type} config has layer_types {sorted(unknown)}, which TransformerLens lacks")
    if "sliding_attention" not in kinds:
        return {}
    if not config.sliding_window:
        raise ModelError(f"{config.model_type} config has sliding_attention layers but sliding_window is not set")
    local = ["local" if kind == "sliding_attention" else "global" for kind in kinds]
    return {"use_local_attn": True, "window_size": int(config.sliding_window), "attn_types": local}


def _llama(config: PretrainedConfig) -> Settings:
    _refuse(config, "mlp_bias", "TransformerLens' gated MLP has no bias before its activation")
    return _gated(config)


def _uniform_window(config: PretrainedConfig) -> Settings:
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return {**_gated(config), **_window(config, [kind] * config.num_hidden_layers)}


def _qwen2(config: PretrainedConfig) -> Settings:
    return {**_gated(config), **_window(config, list(config.layer_types)), "default_prepend_bos": False}


def _qwen3(config: PretrainedConfig) -> Settings:
    return {**_qwen2(config), "use_qk_norm": True}


def _gemma(config: PretrainedConfig) -> Settings:
    _refuse(config, "use_bidirectional_attention", "the hooked model attends causally")
    return _gated(config)


def _gemma2(config: PretrainedConfig) -> Settings:
    return {
        **_gemma(config),
        **_window(config, list(config.layer_types)),
        "use_normalization_before_and_after": True,
        "attn_scale": float(config.query_pre_attn_scalar) ** 0.5,
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
    }


def _gemma3(config: PretrainedConfig) -> Settings:
    # transformers reads attn_logit_softcapping into Gemma3Attention and then never uses it
    return {**_gemma2(config), "use_qk_norm": True, "attn_scores_soft_cap": -1.0}


def _gpt2(config: PretrainedConfig) -> Settings:
    _refuse(config, "add_cross_attention", "a decoder with cross-attention needs encoder states")
    return {
        "d_model": config.n_embd,
        "d_head": config.n_embd // config.n_head,
        "n_heads": config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "n_layers": config.n_layer,
        "n_ctx": config.n_positions,
        "d_vocab": config.vocab_size,
        "eps": config.layer_norm_epsilon,
        "act_fn": _activation(config.activation_function),
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "normalization_type": "LN",
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }


def _neox(config: PretrainedConfig) -> Settings:
    return {
        **_common(config),
        **_rotary(config),
        "act_fn": _activation(config.hidden_act),
        "eps": config.layer_norm_eps,
        "normalization_type": "LN",
        "parallel_attn_mlp": config.use_parallel_residual,
        "default_prepend_bos": False,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(_llama, "model", layouts.llama_block, layouts.llama_outer),
    "MistralForCausalLM": Architecture(_uniform_window, "model", layouts.llama_block, layouts.llama_outer),
    "Qwen2ForCausalLM": Architecture(_qwen2, "model", layouts.llama_block, layouts.llama_outer),
    "Qwen3ForCausalLM": Architecture(_qwen3, "model", layouts.llama_block, layouts.llama_outer),
    "GemmaForCausalLM": Architecture(_gemma, "model", layouts.llama_block, layouts.llama_outer, offset_norms=True),
    "Gemma2ForCausalLM": Architecture(_gemma2, "model", layouts.llama_block, layouts.llama_outer, offset_norms=True),
    "Gemma3ForCausalLM": Architecture(_gemma3, "model", layouts.llama_block, layouts.llama_outer, offset_norms=True),
    "Phi3ForCausalLM": Architecture(_uniform_window, "model", layouts.phi3_block, layouts.llama_outer),
    "GPT2LMHeadModel": Architecture(_gpt2, "transformer", layouts.gpt2_block, layouts.gpt2_outer),
    "GPTNeoXForCausalLM": Architecture(_neox, "gpt_neox", layouts.neox_block, layouts.neox_outer),
}
