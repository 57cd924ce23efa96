"""The few TransformerLens modules that are replaced so that a hooked model computes what transformers computes.

Every class keeps the hook points, the parameter names and the shapes of the class it stands in for. What changes:
attention scores and softmax are taken in float32 (as fused attention kernels do), norms are rounded once, Gemma's
embedding and (1 + w) norms read the checkpoint's own tensors instead of processed copies, positions past the end of
what the model's position table covers are an error instead of a silently different rotation, and the gated MLP spends
no pass on a bias that is zero.
"""

import copy
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.components import Attention, Embed, GroupedQueryAttention, LayerNorm, PosEmbed, RMSNorm
from transformer_lens.components.mlps.gated_mlp import GatedMLP

from safety_lens.errors import ModelError

_FIRST_LENGTH = 2048


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
            raise ModelError(_too_long(length, self.n_ctx, "rotary table"))
        if len(self.cos) < length or self.cos.device != like.device or self.cos.dtype != like.dtype:
            size = min(self.n_ctx, max(length, 2 * len(self.cos), min(self.n_ctx, _FIRST_LENGTH)))
            positions = torch.arange(size, device=like.device)[None]
            kind = () if self.layer_type is None else (self.layer_type,)
            self.rotary.to(like.device)
            self.rotary(like, positions[:, :1], *kind)  # dynamic RoPE drops what an earlier, longer input left behind
            cos, sin = self.rotary(like, positions, *kind)
            self.cos, self.sin = cos[0].to(like), sin[0].to(like)
        return self.cos, self.sin


def _too_long(length: int, n_ctx: int, what: str) -> str:
    return (
        f"an input of {length} positions was given, but this model's {what} covers {n_ctx} (model.cfg.n_ctx): "
        "shorten the prompt"
    )


class _Faithful:
    """Mixin over TransformerLens' attention: HF's rotary table, and float32 between q·k and the softmax."""

    table: RotaryTable | None = None
    rotary_cos: Tensor
    rotary_sin: Tensor

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


class FusedGatedMLP(GatedMLP):
    """TransformerLens' gated MLP with its inner bias added in the product, not in a pass of its own.

    The bias is zero in every supported family, and on a CPU adding it over [batch, pos, d_mlp] costs as much as the
    activation function does.
    """

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        gate = self.act_fn(self.hook_pre(F.linear(x, self.W_gate.T)))
        post = self.hook_post(torch.addcmul(self.b_in, gate, self.hook_pre_linear(F.linear(x, self.W_in.T))))
        return F.linear(post, self.W_out.T, self.b_out)


class FaithfulLayerNorm(LayerNorm):
    """LayerNorm whose gain and bias are applied in float32: rounded once, as torch's fused kernel does."""

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        wide = self.hook_normalized(wide / scale)
        return cast(Tensor, (wide * self.w.to(wide) + self.b.to(wide)).to(x.dtype))


class OffsetRMSNorm(RMSNorm):
    """Gemma's RMSNorm: the gain is 1 + w, applied in float32; `w` is the checkpoint's own tensor, around zero."""

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        wide = self.hook_normalized(wide / scale)
        return cast(Tensor, (wide * (1.0 + self.w.to(wide))).to(x.dtype))


class ScaledEmbed(Embed):
    """Gemma's embedding: rows times √d_model rounded to the weights' dtype; `W_E` is the checkpoint's own tensor."""

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        rows = super().forward(tokens)
        return cast(Tensor, rows * torch.tensor(self.cfg.d_model**0.5).to(rows))


class BoundedPosEmbed(PosEmbed):
    """Learned positions that name the limit when an input is longer than the table."""

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        length = past_kv_pos_offset + tokens.shape[-1]
        if length > len(self.W_pos):
            raise ModelError(_too_long(length, len(self.W_pos), "position embedding"))
        return cast(Tensor, super().forward(tokens, past_kv_pos_offset, attention_mask))
