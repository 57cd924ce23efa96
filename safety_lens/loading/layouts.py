"""Where each architecture keeps its weights, read in TransformerLens' shapes: views of Hugging Face tensors, no copies.

A block function returns the tensors of one block, an outer function those around the blocks. Biases that a model lacks
are absent here and zero in the hooked model.
"""

from typing import Any

from torch import Tensor
from transformer_lens import HookedTransformerConfig

from safety_lens.errors import ModelError

Weights = dict[str, Tensor]
Layer = Any
"""An HF module: its attributes are known by architecture, not by type."""


def _named(prefix: str, module: Layer, weight: str = "w", bias: str = "b") -> Weights:
    """A norm's gain and, where it has one, its bias."""
    found = {f"{prefix}.{weight}": module.weight.detach()}
    if getattr(module, "bias", None) is not None:
        found[f"{prefix}.{bias}"] = module.bias.detach()
    return found


def _input_heads(letter: str, weight: Tensor, bias: Tensor | None, n: int, cfg: HookedTransformerConfig) -> Weights:
    """A q, k or v projection [(n d_head), d_model] as [n, d_model, d_head]."""
    mark = "_" if letter in "KV" and cfg.n_key_value_heads is not None else ""
    found = {f"attn.{mark}W_{letter}": weight.detach().unflatten(0, (n, -1)).transpose(1, 2)}
    if bias is not None:
        found[f"attn.{mark}b_{letter}"] = bias.detach().unflatten(0, (n, -1))
    return found


def _output_heads(weight: Tensor, bias: Tensor | None, cfg: HookedTransformerConfig) -> Weights:
    """The output projection [d_model, (n d_head)] as [n, d_head, d_model]."""
    found = {"attn.W_O": weight.detach().unflatten(1, (cfg.n_heads, -1)).permute(1, 2, 0)}
    return found if bias is None else {**found, "attn.b_O": bias.detach()}


def _qkv(weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], cfg: HookedTransformerConfig) -> Weights:
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    heads = (cfg.n_heads, n_kv, n_kv)
    found: Weights = {}
    for letter, weight, bias, n in zip("QKV", weights, biases, heads, strict=True):
        found |= _input_heads(letter, weight, bias, n, cfg)
    return found


def _refuse_bias(module: Layer, name: str) -> None:
    if getattr(module, "bias", None) is not None:
        raise ModelError(f"{name} has a bias, and TransformerLens' gated MLP has no bias before its activation")


def _gated_mlp(gate: Tensor, up: Tensor, down: Layer) -> Weights:
    found = {"mlp.W_gate": gate.detach().T, "mlp.W_in": up.detach().T, "mlp.W_out": down.weight.detach().T}
    return found if down.bias is None else {**found, "mlp.b_out": down.bias.detach()}


def llama_block(layer: Layer, cfg: HookedTransformerConfig) -> Weights:
    attn, mlp = layer.self_attn, layer.mlp
    inputs = (attn.q_proj, attn.k_proj, attn.v_proj)
    _refuse_bias(mlp.gate_proj, "gate_proj")
    _refuse_bias(mlp.up_proj, "up_proj")
    found = {
        **_qkv(tuple(p.weight for p in inputs), tuple(p.bias for p in inputs), cfg),
        **_output_heads(attn.o_proj.weight, attn.o_proj.bias, cfg),
        **_gated_mlp(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj),
        **_named("ln1", layer.input_layernorm),
    }
    if cfg.use_qk_norm:
        found |= {**_named("attn.q_norm", attn.q_norm), **_named("attn.k_norm", attn.k_norm)}
    if not cfg.use_normalization_before_and_after:
        return {**found, **_named("ln2", layer.post_attention_layernorm)}
    return {
        **found,
        **_named("ln1_post", layer.post_attention_layernorm),
        **_named("ln2", layer.pre_feedforward_layernorm),
        **_named("ln2_post", layer.post_feedforward_layernorm),
    }


def phi3_block(layer: Layer, cfg: HookedTransformerConfig) -> Weights:
    attn, mlp = layer.self_attn, layer.mlp
    sizes = [cfg.n_heads * cfg.d_head, *[(cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head] * 2]
    biases = (None, None, None) if attn.qkv_proj.bias is None else attn.qkv_proj.bias.split(sizes)
    _refuse_bias(mlp.gate_up_proj, "gate_up_proj")
    gate, up = mlp.gate_up_proj.weight.chunk(2, dim=0)
    return {
        **_qkv(attn.qkv_proj.weight.split(sizes), biases, cfg),
        **_output_heads(attn.o_proj.weight, attn.o_proj.bias, cfg),
        **_gated_mlp(gate, up, mlp.down_proj),
        **_named("ln1", layer.input_layernorm),
        **_named("ln2", layer.post_attention_layernorm),
    }


def gpt2_block(layer: Layer, cfg: HookedTransformerConfig) -> Weights:
    attn, mlp = layer.attn, layer.mlp  # Conv1D keeps [d_in, d_out]: transpose to read it like a Linear
    weights = attn.c_attn.weight.T.chunk(3, dim=0)
    return {
        **_qkv(weights, attn.c_attn.bias.chunk(3), cfg),
        **_output_heads(attn.c_proj.weight.T, attn.c_proj.bias, cfg),
        "mlp.W_in": mlp.c_fc.weight.detach(),
        "mlp.b_in": mlp.c_fc.bias.detach(),
        "mlp.W_out": mlp.c_proj.weight.detach(),
        "mlp.b_out": mlp.c_proj.bias.detach(),
        **_named("ln1", layer.ln_1),
        **_named("ln2", layer.ln_2),
    }


def neox_block(layer: Layer, cfg: HookedTransformerConfig) -> Weights:
    attn, mlp = layer.attention, layer.mlp
    fused = attn.query_key_value  # rows are ordered (head, q/k/v, d_head)
    weight = fused.weight.detach().unflatten(0, (cfg.n_heads, 3, cfg.d_head)).permute(1, 0, 3, 2)
    found = {f"attn.W_{letter}": weight[i] for i, letter in enumerate("QKV")}
    if fused.bias is not None:
        bias = fused.bias.detach().unflatten(0, (cfg.n_heads, 3, cfg.d_head)).transpose(0, 1)
        found |= {f"attn.b_{letter}": bias[i] for i, letter in enumerate("QKV")}
    return {
        **found,
        **_output_heads(attn.dense.weight, attn.dense.bias, cfg),
        "mlp.W_in": mlp.dense_h_to_4h.weight.detach().T,
        "mlp.b_in": mlp.dense_h_to_4h.bias.detach(),
        "mlp.W_out": mlp.dense_4h_to_h.weight.detach().T,
        "mlp.b_out": mlp.dense_4h_to_h.bias.detach(),
        **_named("ln1", layer.input_layernorm),
        **_named("ln2", layer.post_attention_layernorm),
    }


def llama_outer(body: Layer) -> Weights:
    return {"embed.W_E": body.embed_tokens.weight.detach(), **_named("ln_final", body.norm)}


def gpt2_outer(body: Layer) -> Weights:
    positions = {"pos_embed.W_pos": body.wpe.weight.detach()}
    return {"embed.W_E": body.wte.weight.detach(), **positions, **_named("ln_final", body.ln_f)}


def neox_outer(body: Layer) -> Weights:
    return {"embed.W_E": body.embed_in.weight.detach(), **_named("ln_final", body.final_layer_norm)}
