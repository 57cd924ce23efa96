"""Random-init models that benchmarks measure on: real sizes, no downloads."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama_100m(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """A 100.1 M-parameter Llama: width 768, 12 blocks, 12 heads over 4 key-value heads, tied embeddings of 32 000."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype).eval()
