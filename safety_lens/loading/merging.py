"""The effective weight of one adapted layer, written into a plain layer beside it; the live layer is only read.

Plain and rank-stabilised LoRA is W + scale · B · A in float32, rounded once. Everything else goes through peft's own
merge on a float32 copy of that one layer, because B · A alone is silently wrong for it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from safety_lens.errors import ModelError
from safety_lens.loading.refusals import is_quantised


@dataclass(frozen=True, eq=False)
class Slot:
    """A live layer and the plain layer that owns its effective weight."""

    name: str
    live: Any
    plain: Any


def base_layer(module: Any) -> nn.Module:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(getattr(base, "weight", None), Tensor):
        raise ModelError(f"an adapter on a {type(base).__name__} cannot be folded: that layer has no single weight")
    return cast(nn.Module, base)


def dequantised(layer: Any) -> Tensor:
    """A layer's weight as floating numbers, without the side effects that bitsandbytes' modules have."""
    weight = layer.weight
    if not is_quantised(layer):
        return cast(Tensor, weight.detach())
    if type(weight).__name__ == "Int8Params":
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB
        return cast(Tensor, weight.detach().float() * (scale.float()[:, None] / 127))
    from bitsandbytes.functional import dequantize_4bit

    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ModelError(
            "bitsandbytes repacked this 4-bit model when it ran in eval mode on the CPU and cannot read its weights "
            "back: call load_model before the first forward, or load the model again"
        )
    return cast(Tensor, dequantize_4bit(weight.data, weight.quant_state)).detach()


def fold_slot(slot: Slot, names: list[str]) -> None:
    live, own = slot.live, slot.plain.weight
    if isinstance(live, TrainableTokensWrapper):
        tokens = live.token_adapter
        own.copy_(live.original_module.weight if live.disable_adapters else tokens.get_merged_weights(names))
        return
    if not isinstance(live, BaseTunerLayer) or (live.disable_adapters and not live.merged):
        own.copy_(dequantised(base_layer(live)))
    elif live.merged and not live.disable_adapters:
        own.copy_(live.get_base_layer().weight)  # peft's forward reads the base weight alone while merged
    elif _is_plain_lora(live, names):
        _add_lora(live, names, own)
    else:
        _merge_clone(slot, names)


def _is_plain_lora(layer: Any, names: Sequence[str]) -> bool:
    """Whether the effective weight is W + Σ scale · B · A and nothing else."""
    return (
        isinstance(layer, LoraLayer)
        and type(layer).__name__ in ("Linear", "Linear4bit", "Linear8bitLt")
        and not layer.lora_embedding_A
        and not layer.merged
        and not getattr(layer, "lora_variant", None)
        and not any(layer.use_dora.get(name) or layer.lora_bias.get(name) for name in names)
        and all(isinstance(layer.lora_A[name], nn.Linear) for name in names if name in layer.lora_A)
    )


def _add_lora(layer: Any, names: Sequence[str], own: Tensor) -> None:
    weight = dequantised(layer.get_base_layer())
    wide = torch.promote_types(own.dtype, torch.float32)
    total = own.data if own.dtype == wide else torch.empty_like(own, dtype=wide)
    source = weight.to(wide)
    for name in names:
        if name not in layer.lora_A:
            continue
        down, up = layer.lora_A[name].weight.to(wide), layer.lora_B[name].weight.to(wide)
        if getattr(layer, "fan_in_fan_out", False):
            down, up = up.T, down.T  # Conv1D keeps [d_in, d_out]
        source = torch.addmm(source, up, down, alpha=layer.scaling[name], out=total)
    if source is not total or total.dtype != own.dtype:  # else the sum is already where it belongs
        own.copy_(source)


def _merge_clone(slot: Slot, names: list[str]) -> None:
    """peft's own merge on a float32 copy of one layer: DoRA, biases, embeddings, IA3, LoHa, VeRA and the rest."""
    live = slot.live
    if is_quantised(base_layer(live)):
        raise ModelError(f"{slot.name}: {type(live).__name__} on a quantised layer cannot be folded; plain LoRA can")
    clone = copy.deepcopy(live)
    clone.to(torch.promote_types(slot.plain.weight.dtype, torch.float32))
    base = clone.get_base_layer()
    try:
        if clone.merged:
            clone.unmerge()
        if getattr(base, "bias", None) is None and any(getattr(clone, "lora_bias", {}).get(name) for name in names):
            base.bias = nn.Parameter(base.weight.new_zeros(base.weight.shape[0]))
        if not live.disable_adapters:
            clone.merge(adapter_names=names)
        base = clone.get_base_layer()  # some tuners put another module in its place
    except (NotImplementedError, ValueError, RuntimeError, TypeError) as error:
        why = str(error) or type(error).__name__
        raise ModelError(f"{slot.name}: this {type(live).__name__} adapter cannot be merged: {why}") from error
    slot.plain.weight.copy_(base.weight)
    if getattr(base, "bias", None) is not None:
        _set_bias(slot.plain, base.bias)


def _set_bias(plain: Any, bias: Tensor) -> None:
    old = plain.bias
    if getattr(plain, "_owns_bias", False):
        old.copy_(bias)
        return
    dtype = plain.weight.dtype if old is None else old.dtype
    plain.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    plain._owns_bias = True  # the first bias aliases the live one, which must never be written to
