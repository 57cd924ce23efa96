"""Prompts that begin alike, run as trees: every common beginning once, in a forward whose tokens follow their paths.

Contrast pairs share more than a template: a pair differs in a word or an answer, and prompts of one scenario in their
ends. Exact for the reason that prefixes are: a token's output depends on the tokens before it on its path alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from safety_lens.loading.attention import ROTATED, follows_paths
from safety_lens.loading.paths import Paths, along
from safety_lens.streaming import block_weights

NODES = 128
"""Tokens of one tree at most, but for a single longer prompt: attention looks at every pair of tokens of a tree."""


class Tree(NamedTuple):
    """Some prompts with their common beginnings merged. tokens, parent (−1 for a root), depth: of every node, parents
    before children. rows: which prompts. nodes: for each of them, the node of each of its tokens.
    """

    tokens: list[int]
    parent: list[int]
    depth: list[int]
    rows: list[int]
    nodes: list[list[int]]


def grow_trees(ids: Sequence[Sequence[int]], most: int = NODES) -> list[Tree]:
    """All prompts as trees of up to `most` tokens; neighbours in lexicographic order share one."""
    trees: list[Tree] = []
    last: Sequence[int] = ()
    for row in sorted(range(len(ids)), key=lambda i: tuple(ids[i])):
        tree = trees[-1] if trees else None
        shared = 0 if tree is None else common_length(last, ids[row])
        if tree is None or len(tree.tokens) + len(ids[row]) - shared > most:
            tree, shared = Tree([], [], [], [], []), 0
            trees.append(tree)
        path = tree.nodes[-1][:shared] if shared else []
        for depth, token in enumerate(ids[row][shared:], shared):
            tree.parent.append(path[-1] if path else -1)
            path.append(len(tree.tokens))
            tree.tokens.append(token)
            tree.depth.append(depth)
        tree.rows.append(row)
        tree.nodes.append(path)
        last = ids[row]
    return trees


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two rows begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def can_run_trees(model: HookedTransformer, hooks: Sequence[str]) -> bool:
    """Whether every block's attention can follow paths while these hooks are read."""
    cfg = model.cfg
    return (
        hasattr(model, "origin")
        and not (cfg.use_split_qkv_input or cfg.use_attn_in)
        and not any(name.endswith(("attn_scores", "pattern", "rot_q", "rot_k")) for name in hooks)
        and all(follows_paths(block.attn) for block in model.blocks)
    )


def planted(
    trees: Sequence[Tree], device: torch.device | str
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Paths]:
    """Node tokens padded behind, their mask, and the paths."""
    width = max(len(tree.tokens) for tree in trees)
    tokens, mask, position = np.zeros((3, len(trees), width), dtype=np.int64)
    on_path = np.tile(np.eye(width, dtype=bool), (len(trees), 1, 1))  # padding sees itself
    for b, tree in enumerate(trees):
        n = len(tree.tokens)
        tokens[b, :n], mask[b, :n], position[b, :n] = tree.tokens, 1, tree.depth
        for node, parent in enumerate(tree.parent):
            if parent >= 0:
                on_path[b, node] |= on_path[b, parent]
    behind = np.where(on_path, position[:, :, None] - position[:, None], -1)
    on_device = [torch.from_numpy(array).to(device) for array in (tokens, mask, behind, position)]
    return on_device[0], on_device[1], Paths(on_device[2], on_device[3])


def last_block(
    model: HookedTransformer,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    paths: Paths,
    nodes: Sequence[Sequence[int]],
) -> tuple[Float[Tensor, "batch few d_model"], Int[Tensor, "batch all_pos"], TransformerLensKeyValueCache, Paths]:
    """What block `layer` needs to run for some nodes of each tree alone: residuals, a mask of ones, the cache, paths.

    The cache holds keys and values of all nodes; the chosen ones come again as the input and see themselves there.
    """
    block, device, (batch, width) = model.blocks[layer], resid.device, paths.position.shape
    few = max(map(len, nodes))
    chosen = torch.tensor([[*own, *[own[-1]] * (few - len(own))] for own in nodes], device=device)
    normed = block.ln1(resid)
    with block_weights(model, layer):
        _, keys, values = block.attn.calculate_qkv_matrices(normed[:, :1], normed, normed)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, device, batch)
    entry = cache.entries[layer]
    entry.past_keys, entry.past_values = keys, values
    with along(paths):
        setattr(entry, ROTATED, block.attn.turned(keys))
    cache.previous_attention_mask = torch.ones(batch, width, dtype=torch.long, device=device)
    cache.freeze()
    behind = paths.behind.gather(1, chosen[..., None].expand(-1, -1, width))
    behind = behind.where(behind != 0, torch.tensor(-1, device=device))  # itself, which comes again
    again = torch.full((few, few), -1, device=device).fill_diagonal_(0).expand(batch, -1, -1)
    mask = torch.ones(batch, width + few, dtype=torch.long, device=device)
    return (
        resid.gather(1, chosen[..., None].expand(-1, -1, resid.shape[2])),
        mask,
        cache,
        Paths(torch.cat([behind, again], 2), paths.position.gather(1, chosen)),
    )
