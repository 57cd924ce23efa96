"""TransformerLens' attention, computing what transformers computes, fused where nobody watches its inside.

The classes keep the hook points, the parameter names and the shapes of those they stand in for. RoPE tables come from
HF's own module. Where hooks watch scores or patterns, scores and softmax are taken in float32, as fused kernels do.
"""

import copy
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.components import Attention, GroupedQueryAttention

from safety_lens.errors import ModelError
from safety_lens.loading.paths import running_paths
from safety_lens.loading.watching import hooked

_FIRST_LENGTH = 2048
ROTATED = "rotated_keys"
"""Attribute of a cache entry: its keys after rotation, [batch, pos, kv_head, d_head]."""


class RotaryTable:
    """cos and sin of positions 0 … n − 1, from the HF model's own rotary module, so every RoPE type is exact.

    One table serves every layer of the same type. It grows by doubling up to `n_ctx`: beyond that length transformers
    either was never asked to go (max_position_embeddings) or changes the frequencies per input (dynamic, longrope).
    """

    def __init__(self, rotary: nn.Module, layer_type: str | None, n_ctx: int) -> None:
        self.rotary = copy.deepcopy(rotary)  # its buffers change with the longest input seen: not on the user's module
        self.layer_type = layer_type
        self.n_ctx = n_ctx
        self.cos = self.sin = torch.empty(0, 0)

    @torch.no_grad()
    def upto(
        self, length: int, like: Tensor
    ) -> tuple[Float[Tensor, "pos rotary_dim"], Float[Tensor, "pos rotary_dim"]]:
        """cos and sin for at least `length` positions, in the dtype and on the device of `like`.

        Raises:
            ModelError: `length` is more than this model's table covers.
        """
        if length > self.n_ctx:
            raise ModelError(too_long(length, self.n_ctx, "rotary table"))
        if len(self.cos) < length or self.cos.device != like.device or self.cos.dtype != like.dtype:
            size = min(self.n_ctx, max(length, 2 * len(self.cos), min(self.n_ctx, _FIRST_LENGTH)))
            positions = torch.arange(size, device=like.device)[None]
            kind = () if self.layer_type is None else (self.layer_type,)
            self.rotary.to(like.device)
            self.rotary(like, positions[:, :1], *kind)  # dynamic RoPE drops what an earlier, longer input left behind
            cos, sin = self.rotary(like, positions, *kind)
            self.cos, self.sin = cos[0].to(like), sin[0].to(like)
        return self.cos, self.sin


def too_long(length: int, n_ctx: int, what: str) -> str:
    return (
        f"an input of {length} positions was given, but this model's {what} covers {n_ctx} (model.cfg.n_ctx): "
        "shorten the prompt"
    )


class PerForward:
    """What all blocks of one kind share in one forward: which keys a token may see, and how its position turns it."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.key: tuple[object, ...] = ()
        self.allowed: Tensor
        self.turn: tuple[Tensor, Tensor] | None = None

    def prepare(self, attn: "_Faithful", q: Tensor, past: int, mask: Tensor | None) -> None:
        """Make them for queries [batch, new, head, d_head] behind `past` columns, unless this forward has them.

        allowed: [batch or 1, 1, new, all]. turn: cos and sin, [batch or 1, new, 1, rotary_dim].
        """
        untracked = mask is not None and mask.is_inference()  # nobody counts changes to it: made anew every time
        version = None if mask is None or untracked else mask._version
        paths = running_paths()
        key = (q.shape[1], past, q.device, q.dtype, attn.table, version, paths)
        if mask is self.mask and key == self.key and not untracked:
            return
        self.mask, self.key = mask, key
        if paths is not None:
            self.allowed, position = paths.allowed(attn.window), paths.position
        else:
            columns = torch.arange(past + q.shape[1], device=q.device)
            ones = columns.new_ones(1, len(columns)) if mask is None else mask.to(q.device)
            self.allowed = _allowed(columns, past, ones, attn.window)
            position = (ones.cumsum(1) - 1).clamp(min=0)[:, past:]
        if attn.table is not None:
            cos, sin = attn.table.upto(int(position.max()) + 1 if paths is not None else past + q.shape[1], q)
            self.turn = cos[position][:, :, None], sin[position][:, :, None]


def _allowed(
    columns: Int[Tensor, " all_pos"], past: int, mask: Int[Tensor, "batch all_pos"], window: int | None
) -> Bool[Tensor, "batch 1 pos all_pos"]:
    """A token sees itself and what is before it, within the window, but no padding. One that may see nothing (padding
    itself) sees all: its output is not read, but NaN there would spread through the values.
    """
    behind = columns[past:, None] - columns
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    allowed = seen & mask[:, None, None].bool()
    return allowed | ~allowed.any(-1, keepdim=True)


def appended(entry: TransformerLensKeyValueCacheEntry, name: str, new: Tensor) -> Tensor:
    """Past and new columns of one of an entry's tensors [batch, pos, head, d_head], kept unless the entry is frozen.

    They are written into memory with room for more: copying the whole past for every new token would cost as much as
    attending to it.
    """
    past = getattr(entry, name)
    before, after = past.shape[1], past.shape[1] + new.shape[1]
    if entry.frozen:
        return torch.cat([past, new], 1)
    room: Tensor | None = entry.__dict__.get(f"room_{name}")
    if room is None or room.shape[1] < after or room.data_ptr() != past.data_ptr() or len(room) != len(past):
        room = new.new_empty(len(new), after + max(32, after // 2), *new.shape[2:])
        room[:, :before] = past
        setattr(entry, f"room_{name}", room)
    room[:, before:after] = new
    setattr(entry, name, room[:, :after])
    return room[:, :after]


class _Faithful:
    """Mixin over TransformerLens' attention: HF's rotary table, and float32 between q·k and the softmax."""

    table: RotaryTable | None = None
    shared: PerForward
    rotary_cos: Tensor
    rotary_sin: Tensor

    @property
    def window(self) -> int | None:
        """Columns a token sees, itself included; None is all."""
        attn = cast(Any, self)
        return int(attn.cfg.window_size) if attn.attn_type == "local" else None

    def apply_rotary(
        self,
        x: Float[Tensor, "batch pos head d_head"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
    ) -> Float[Tensor, "batch pos head d_head"]:
        if self.table is not None:
            cos, sin = self.table.upto(past_kv_pos_offset + x.size(1), x)
            if cos is not self.rotary_cos:
                self.rotary_cos, self.rotary_sin = cos, sin
        rotated = super().apply_rotary(x, past_kv_pos_offset, attention_mask)
        return cast(Tensor, rotated)

    def forward(
        self,
        query_input: Tensor,
        key_input: Tensor,
        value_input: Tensor,
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        additive_attention_mask: Tensor | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """As TransformerLens' forward; through torch's fused kernel where only its inputs and `z` can be seen."""
        attn = cast(Any, self)
        if additive_attention_mask is not None or position_bias is not None or not self._can_fuse(query_input):
            if running_paths() is not None:
                raise ModelError("a forward along paths came to attention that is not fused: this is a fault of ours")
            return cast(
                Tensor,
                super().forward(
                    query_input,
                    key_input,
                    value_input,
                    past_kv_cache_entry=past_kv_cache_entry,
                    additive_attention_mask=additive_attention_mask,
                    attention_mask=attention_mask,
                    position_bias=position_bias,
                ),
            )
        q, k, v = attn.calculate_qkv_matrices(query_input, key_input, value_input)
        entry = past_kv_cache_entry
        self.shared.prepare(self, q, 0 if entry is None else entry.past_keys.shape[1], attention_mask)
        if self.table is not None:
            q, turned = self._turned(q), self._turned(k)
            k = turned if entry is None else self._with_past(entry, k, turned, attention_mask)
        elif entry is not None:
            k = appended(entry, "past_keys", k)
        v = v if entry is None else appended(entry, "past_values", v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.shared.allowed, scale=1 / attn.attn_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        z = attn.hook_z(z.transpose(1, 2))
        return F.linear(z.flatten(2), attn.W_O.permute(2, 0, 1).flatten(1), attn.b_O)

    def _can_fuse(self, x: Tensor) -> bool:
        attn = cast(Any, self)
        rotary = attn.cfg.positional_embedding_type == "rotary"
        points = [attn.hook_attn_scores, attn.hook_pattern, *([attn.hook_rot_q, attn.hook_rot_k] if rotary else [])]
        # torch's linear with bias is wrong on mps in some releases
        return self.is_plain() and x.ndim == 3 and x.device.type != "mps" and not hooked(*points)

    def is_plain(self) -> bool:
        """Whether a fused kernel computes this attention: causal, no soft cap, positions that this package knows."""
        attn, cfg = cast(Any, self), cast(Any, self).cfg
        return (
            (
                self.table is not None
                if cfg.positional_embedding_type == "rotary"
                else cfg.positional_embedding_type == "standard"
            )
            and (attn._attention_dir_override or cfg.attention_dir) == "causal"
            and cfg.attn_scores_soft_cap <= 0
            and not cfg.use_attn_result
        )

    def turned(self, keys: Float[Tensor, "batch pos kv_head d_head"]) -> Float[Tensor, "batch pos kv_head d_head"]:
        """Keys by the positions of the running forward; as they are where positions are no rotations."""
        if self.table is None:
            return keys
        self.shared.prepare(self, keys, 0, None)
        return self._turned(keys)

    def _turned(self, x: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        """New queries or keys, rotated by their positions."""
        assert self.shared.turn is not None
        cos, sin = self.shared.turn
        part = x[..., : cos.shape[-1]]
        rotated = part * cos + cast(Any, self).rotate_every_two(part) * sin
        return rotated if part.shape == x.shape else torch.cat([rotated, x[..., cos.shape[-1] :]], -1)

    def _with_past(
        self,
        entry: TransformerLensKeyValueCacheEntry,
        k: Float[Tensor, "batch pos kv_head d_head"],
        turned: Float[Tensor, "batch pos kv_head d_head"],
        mask: Int[Tensor, "batch all_pos"] | None,
    ) -> Float[Tensor, "batch all_pos kv_head d_head"]:
        """All keys, rotated. TransformerLens caches keys before rotation and rotates all of them for every new token;
        the rotated ones are kept beside them, and made again where they were left behind.
        """
        past = entry.past_keys
        if getattr(entry, ROTATED, past[:, :0]).shape != past.shape or not hasattr(entry, ROTATED):
            before = self.apply_rotary(past, 0, None if mask is None else mask[:, : past.shape[1]])
            setattr(entry, ROTATED, before)
        appended(entry, "past_keys", k)
        return appended(entry, ROTATED, turned)

    def calculate_attention_scores(
        self, q: Float[Tensor, "batch query_pos head d_head"], k: Float[Tensor, "batch key_pos kv_head d_head"]
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        if q.dtype in (torch.bfloat16, torch.float16):  # rounding scores to 8 bits is where bf16 error comes from
            q, k = q.float(), k.float()
        return cast(Tensor, super().calculate_attention_scores(q, k))


class FaithfulAttention(_Faithful, Attention):
    """Multi-head attention."""


class FaithfulGroupedQueryAttention(_Faithful, GroupedQueryAttention):
    """Grouped-query attention."""


def follows_paths(attn: nn.Module) -> bool:
    """Whether a block's attention takes part in forwards whose tokens follow paths (see paths.Paths)."""
    return isinstance(attn, _Faithful) and attn.is_plain() and cast(Any, attn).W_Q.device.type != "mps"
