"""The few TransformerLens modules that are replaced so that a hooked model computes what transformers computes.

Every class keeps the hook points, the parameter names and the shapes of the class it stands in for. What changes: norms
are rounded once, Gemma's embedding and (1 + w) norms read the checkpoint's own tensors instead of processed copies,
positions past the end of a table of learned ones are an error, and where nobody watches what is inside a norm or a
gated MLP it runs in place.
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.components import Embed, LayerNorm, PosEmbed, RMSNorm
from transformer_lens.components.mlps.gated_mlp import GatedMLP

from safety_lens.errors import ModelError
from safety_lens.loading.attention import too_long
from safety_lens.loading.paths import running_paths
from safety_lens.loading.watching import hooked, unwatched


class FusedGatedMLP(GatedMLP):
    """TransformerLens' gated MLP with its inner bias added in the product, not in a pass of its own.

    The bias is zero in every supported family, and on a CPU adding it over [batch, pos, d_mlp] costs as much as the
    activation function does.
    """

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.act_fn is F.silu and unwatched(self.hook_pre, self.hook_pre_linear, self.hook_post):
            gate = F.silu(F.linear(x, self.W_gate.T), inplace=True)
            torch.addcmul(self.b_in, gate, F.linear(x, self.W_in.T), out=gate)
            return F.linear(gate, self.W_out.T, self.b_out)
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


class FusedRMSNorm(RMSNorm):
    """TransformerLens' RMSNorm with one large result instead of three where nobody watches its inside.

    Half precision goes TransformerLens' way, which keeps HF's roundings.
    """

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        exact = x.dtype == self.w.dtype and x.dtype in (torch.float32, torch.float64)
        if not exact or hooked(self.hook_scale, self.hook_normalized):
            return cast(Tensor, super().forward(x))
        if torch.is_grad_enabled():
            own = self.w.requires_grad
            return cast(Tensor, super().forward(x) if own else _Normed.apply(x, self.w, self.eps))
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(self.length)
        return x.div(mean_square.add_(self.eps).sqrt_()).mul_(self.w)


class _Normed(torch.autograd.Function):
    """x / rms(x) · w with the gradient of x in three passes instead of ten; none for w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).sqrt_()
        ctx.save_for_backward(x, w, scale)
        ctx.eps = eps
        return x.div(scale).mul_(w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, w, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates this once more: what is saved of x must follow it
            scale = (x.square().mean(-1, keepdim=True) + ctx.eps).sqrt()
        inner = grads[0] * w
        along = (inner * x).sum(-1, keepdim=True) / (x.shape[-1] * scale.square())
        return torch.addcmul(inner, x, along, value=-1) / scale, None, None


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
        if (paths := running_paths()) is not None:
            return cast(Tensor, self.W_pos[paths.position])
        length = past_kv_pos_offset + tokens.shape[-1]
        if length > len(self.W_pos):
            raise ModelError(too_long(length, len(self.W_pos), "position embedding"))
        return cast(Tensor, super().forward(tokens, past_kv_pos_offset, attention_mask))
