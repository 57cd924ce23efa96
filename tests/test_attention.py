"""The fused way through attention, norms and gated MLPs against TransformerLens' own way, which hooks switch on."""

from itertools import pairwise

import pytest
import torch
import zoo
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from safety_lens import load_model

NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi3", "gpt2", "neox")
WATCHED = ("hook_pattern", "hook_attn_scores", "hook_rot_k", "mlp.hook_post", "hook_normalized")


def rows(width: int = 24) -> tuple[Tensor, Tensor]:
    tokens, mask, _ = zoo.ragged(width=width)
    return tokens, mask


def watching(model: HookedTransformer) -> list[tuple[str, object]]:
    return [(name, lambda act, hook: None) for name in model.hook_dict if name.endswith(WATCHED)]


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_way_gives_the_logits_of_the_way_that_hooks_see(name: str) -> None:
    model = load_model(zoo.make(name, dtype=torch.float64), check=False)
    tokens, mask = rows()
    with torch.no_grad():
        fused = model(tokens, attention_mask=mask)
        with model.hooks(fwd_hooks=watching(model)):
            seen = model(tokens, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(fused[real], seen[real], rtol=0, atol=1e-10)
    assert bool(torch.isfinite(fused).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("watched_steps", [(), (0,), (1, 3), (0, 1, 2, 3, 4, 5)])
def test_a_cache_may_be_filled_by_either_way_in_any_order(name: str, watched_steps: tuple[int, ...]) -> None:
    """Rotated keys are kept beside the cache by the fused way only: the other must not leave stale ones behind."""
    model = load_model(zoo.make(name, dtype=torch.float64), check=False)
    tokens, mask = rows()
    cuts = [0, 10, 11, 12, 18, 19, 24]
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask)[:, -1]
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
        for step, (start, end) in enumerate(pairwise(cuts)):
            hooks = watching(model) if step in watched_steps else []
            with model.hooks(fwd_hooks=hooks):
                logits = model(tokens[:, start:end], attention_mask=mask[:, start:end], past_kv_cache=cache)
    torch.testing.assert_close(logits[:, -1], whole, rtol=0, atol=1e-10)


def test_a_frozen_cache_is_not_written_to() -> None:
    model = load_model(zoo.make("llama"), check=False)
    tokens, mask = rows()
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
    with torch.no_grad():
        model(tokens[:, :10], attention_mask=mask[:, :10], past_kv_cache=cache)
        cache.freeze()
        before = [(e.past_keys.clone(), e.past_values.clone()) for e in cache.entries]
        first, second = (model(tokens[:, 10:], attention_mask=mask[:, 10:], past_kv_cache=cache) for _ in range(2))
    assert torch.equal(first, second)
    for entry, (keys, values) in zip(cache.entries, before, strict=True):
        assert torch.equal(entry.past_keys, keys)
        assert torch.equal(entry.past_values, values)


def test_gradients_flow_as_through_the_unfused_way() -> None:
    model = load_model(zoo.make("llama", dtype=torch.float64), check=False)
    tokens, mask = rows()
    found = []
    for hooks in ([], watching(model)):
        embedded = model.embed(tokens).clone().requires_grad_()
        with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
            model(embedded, attention_mask=mask, start_at_layer=0)[mask.bool()].sum().backward()  # padding is not read
        assert embedded.grad is not None
        found.append(embedded.grad[mask.bool()])
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


def test_inference_mode_gives_the_same_logits_also_after_its_mask_was_changed_in_place() -> None:
    model = load_model(zoo.make("llama"), check=False)
    tokens, mask = rows()
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask)
        fewer = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], 1)
        without_first = model(tokens, attention_mask=fewer)
    with torch.inference_mode():
        own = mask.clone()
        torch.testing.assert_close(model(tokens, attention_mask=own)[mask.bool()], plain[mask.bool()])
        own[:, 0] = 0
        torch.testing.assert_close(model(tokens, attention_mask=own)[fewer.bool()], without_first[fewer.bool()])
