"""Padding, and keys and values that are kept: a prefix that many rows see, a last block run for the tokens read only.

Keeping them is exact, because a token's output depends on other tokens through their keys and values alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from safety_lens.loading.attention import ROTATED
from safety_lens.streaming import block_weights


class Span(NamedTuple):
    """Columns of a padded batch that are read: in row b, `length` of them from `first[b]` on."""

    first: Sequence[int]
    length: int


def left_padded(
    ids: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids padded on the left with 0, and their mask (1 = real); the pad id itself is never read."""
    width = max(map(len, ids))
    tokens = torch.tensor([[0] * (width - len(s)) + list(s) for s in ids], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in ids], device=device)
    return tokens, mask


def right_padded(
    ids: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids padded behind with 0, and their mask.

    Behind a cached prefix padding must not come first: sliding windows are counted in columns, so a gap between prefix
    and suffix would push tokens of the prefix out of the window.
    """
    width = max(map(len, ids))
    tokens = torch.tensor([[*s, *[0] * (width - len(s))] for s in ids], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in ids], device=device)
    return tokens, mask


def expanded(model: HookedTransformer, cache: TransformerLensKeyValueCache, n: int) -> TransformerLensKeyValueCache:
    """A one-row cache seen by n rows, without copying it, frozen so that rows do not append to it."""
    out = TransformerLensKeyValueCache.init_cache(model.cfg, cache.previous_attention_mask.device, n)
    for mine, theirs in zip(out.entries, cache.entries, strict=True):
        mine.past_keys = theirs.past_keys.expand(n, -1, -1, -1)
        mine.past_values = theirs.past_values.expand(n, -1, -1, -1)
        if hasattr(theirs, ROTATED):
            setattr(mine, ROTATED, getattr(theirs, ROTATED).expand(n, -1, -1, -1))
    out.previous_attention_mask = cache.previous_attention_mask.expand(n, -1)
    out.freeze()
    return out


def picked(
    model: HookedTransformer, cache: TransformerLensKeyValueCache, rows: Int[Tensor, " row"]
) -> TransformerLensKeyValueCache:
    """A cache that holds these rows of another, in this order; a row may come several times."""
    rows = rows.to(cache.previous_attention_mask.device)
    out = TransformerLensKeyValueCache.init_cache(model.cfg, rows.device, len(rows))
    for mine, theirs in zip(out.entries, cache.entries, strict=True):
        mine.past_keys, mine.past_values = theirs.past_keys[rows], theirs.past_values[rows]
        if hasattr(theirs, ROTATED):
            setattr(mine, ROTATED, getattr(theirs, ROTATED)[rows])
    out.previous_attention_mask = cache.previous_attention_mask[rows]
    return out


def can_run_span(model: HookedTransformer, layer: int, span: Span, columns: int, prefix: int) -> bool:
    """Whether running block `layer` for a span of the columns is exact and saves work.

    Only for models that `load_model` made, whose attention is known. Tokens of a span follow all columns, so a sliding
    window (TransformerLens counts it in columns) must not end before the first of them.
    """
    cfg = model.cfg
    attn = model.blocks[layer].attn
    windowed = attn.attn_type == "local" and prefix + columns + span.length > cfg.window_size
    known = hasattr(model, "origin") and not (cfg.use_split_qkv_input or cfg.use_attn_in)
    return known and not windowed and 2 * span.length <= columns


def span_input(
    model: HookedTransformer,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    mask: Int[Tensor, "batch pos"],
    past: TransformerLensKeyValueCache | None,
    span: Span,
) -> tuple[Float[Tensor, "batch span d_model"], Int[Tensor, "batch all_pos"], TransformerLensKeyValueCache]:
    """What block `layer` needs to run for the tokens of a span alone: their residuals, the mask, the cache.

    The cache holds keys and values of every column; the mask hides those from the span on, whose tokens come again as
    the input. Positions are counted from the mask, so they stay what they were.
    """
    block, device = model.blocks[layer], resid.device
    first = torch.tensor(span.first, device=device)[:, None]
    normed = block.ln1(resid)
    with block_weights(model, layer):
        _, keys, values = block.attn.calculate_qkv_matrices(normed[:, :1], normed, normed)
    before = mask * (torch.arange(mask.shape[1], device=device) < first)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, device, len(resid))
    entry, parts = cache.entries[layer], [before, torch.ones(len(resid), span.length, dtype=mask.dtype, device=device)]
    entry.past_keys, entry.past_values = keys, values
    if past is not None:
        entry.past_keys = torch.cat([past[layer].past_keys, keys], 1)
        entry.past_values = torch.cat([past[layer].past_values, values], 1)
        parts.insert(0, past.previous_attention_mask.to(mask))
    cache.freeze()
    columns = (first + torch.arange(span.length, device=device)).clamp(max=resid.shape[1] - 1)
    return resid.gather(1, columns[..., None].expand(-1, -1, resid.shape[2])), torch.cat(parts, 1), cache
