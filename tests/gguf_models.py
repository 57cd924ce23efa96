"""Tiny models written as GGUF files, as llama.cpp's converter lays them out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import zoo
from torch import Tensor
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

ALPHABET = list(bytes_to_unicode().values())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TOKENS = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), *SPECIAL]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE: dict[str, Any] = {"vocab_size": 272, "eos_token_id": 262, "bos_token_id": 261, "pad_token_id": 262}
"""Sizes that blocks of 32 and the tokenizer fit: more rows in the embedding than tokens, as padded checkpoints have."""

_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256}
HEADS = {"qwen3": {"head_dim": 128}, "gemma2": _GEMMA, "gemma3": _GEMMA}


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """A random model of the zoo that can be written as GGUF."""
    return zoo.make(name, **{**SIZE, **HEADS.get(name, {}), **changes})


def write(path: Path, hf: PreTrainedModel, architecture: str, *, tokenizer: bool = True, **metadata: Any) -> Path:
    """Write a model of float32 weights; `metadata` (with "__" for ".") goes on top, None removes a key."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_metadata(hf, architecture, tokenizer) | _dotted(metadata)).items():
        _add(writer, key, value)
    for name, weight in tensors(hf, architecture).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _dotted(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in metadata.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_uint32(key, value)


def _metadata(hf: PreTrainedModel, a: str, tokenizer: bool) -> dict[str, Any]:
    c = hf.config
    theta = (c.rope_parameters.get("full_attention") or c.rope_parameters)["rope_theta"]
    sizes = {
        f"{a}.block_count": c.num_hidden_layers,
        f"{a}.context_length": c.max_position_embeddings,
        f"{a}.embedding_length": c.hidden_size,
        f"{a}.feed_forward_length": c.intermediate_size,
        f"{a}.attention.head_count": c.num_attention_heads,
        f"{a}.attention.head_count_kv": c.num_key_value_heads,
        f"{a}.attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        f"{a}.rope.freq_base": float(theta),
        f"{a}.vocab_size": c.vocab_size,
        "general.file_type": 0,
    }
    if a in HEADS:
        sizes[f"{a}.attention.key_length"] = c.head_dim
    if a.startswith("gemma"):
        sizes[f"{a}.attention.sliding_window"] = c.sliding_window
    words = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [1] * (len(TOKENS) - len(SPECIAL)) + [3] * len(SPECIAL),
        "tokenizer.ggml.bos_token_id": 261,
        "tokenizer.ggml.eos_token_id": 262,
        "tokenizer.ggml.padding_token_id": 262,
        "tokenizer.chat_template": TEMPLATE,
    }
    return sizes | (words if tokenizer else {})


def tensors(hf: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    """The weights under GGUF's names; a head that is tied is left out."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, hf.config.num_hidden_layers)
    out = {}
    for name, weight in hf.state_dict().items():
        if name == "lm_head.weight" and hf.config.tie_word_embeddings:
            continue
        stem, _, end = name.rpartition(".")
        out[f"{names.get_name(stem)}.{end}"] = _stored(name, weight, hf, architecture).contiguous().float().numpy()
    return out


def _stored(name: str, weight: Tensor, hf: PreTrainedModel, architecture: str) -> Tensor:
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weight + 1
    heads = {"q_proj": hf.config.num_attention_heads, "k_proj": hf.config.num_key_value_heads}
    for part, n in heads.items():
        if architecture == "llama" and part in name:  # llama.cpp turns adjacent pairs
            return weight.reshape(n, 2, weight.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(weight.shape)
    return weight
