"""The effective weight of one adapted layer, written into a plain layer beside it; the live layer is only read.

Plain and rank-stabilised LoRA is W + scale · B · A in float32, rounded once. Everything else goes through peft's own
merge on a float32 copy of that one layer, because B · A alone is silently wrong for it.
"""

import copy
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from safety_lens.errors import ModelError
from safety_lens.loading.masked import is_masked, mask_of, stored_index
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


def shape_of(layer: Any) -> torch.Size:
    """The shape of a layer's weight as floating numbers; packed formats store another one."""
    return torch.Size((layer.out_features, layer.in_features)) if is_quantised(layer) else layer.weight.shape


def dequantised(layer: Any) -> Tensor:
    """A layer's weight as floating numbers, without the side effects that bitsandbytes' modules have."""
    weight = layer.weight
    if not is_quantised(layer) or weight.is_floating_point():  # bitsandbytes quantises on the first move to a device
        return cast(Tensor, weight.detach())
    if type(weight).__name__ == "Int8Params":
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB
        return cast(Tensor, weight.detach().float() * (scale.float()[:, None] / 127))
    from bitsandbytes.functional import dequantize_4bit

    packed = getattr(weight.quant_state, "packing_format_for_cpu", False)
    data, state = _unpacked(weight) if packed else (weight.data, weight.quant_state)
    return cast(Tensor, dequantize_4bit(data, state)).detach()


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight that bitsandbytes repacked for the CPU when it ran in eval mode, in the usual order.

    The live forward keeps its block scales in bfloat16 from then on; these are the ones returned.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(weight.quant_state)  # the inverse writes to the state that it is given
    state.original_nested = False  # it would quantise the scales a second time
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = weight.quant_state.absmax.T.reshape(-1).float()
    return data, state


def fold_slot(slot: Slot, names: list[str]) -> None:
    live, own = slot.live, slot.plain.weight
    if isinstance(live, TrainableTokensWrapper):
        tokens = live.token_adapter
        own.copy_(live.original_module.weight if live.disable_adapters else tokens.get_merged_weights(names))
        return
    if not isinstance(live, BaseTunerLayer) or (live.disable_adapters and not live.merged):
        own.copy_(dequantised(base_layer(live)))
    elif live.merged and not live.disable_adapters:
        own.copy_(dequantised(live.get_base_layer()))  # peft's forward reads the base weight alone while merged
    elif is_plain_lora(live, names) or is_masked_lora(live, names):
        _add_lora(live, names, own)
    else:
        _merge_clone(slot, names)


def is_plain_lora(layer: Any, names: Sequence[str]) -> bool:
    """Whether the effective weight is W + Σ scale · B · A and nothing else."""
    return not getattr(layer, "lora_variant", None) and _is_product(layer, names)


def is_masked_lora(layer: Any, names: Sequence[str]) -> bool:
    """Whether it is that, but for entries at which some of the updates are held at zero."""
    return all(is_masked(layer, name) for name in getattr(layer, "lora_variant", ())) and _is_product(layer, names)


def _is_product(layer: Any, names: Sequence[str]) -> bool:
    return (
        isinstance(layer, LoraLayer)
        and type(layer).__name__ in ("Linear", "Linear4bit", "Linear8bitLt")
        and not layer.lora_embedding_A
        and not layer.merged
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
        kept = _held(layer, name, source)
        source = torch.addmm(source, up, down, alpha=layer.scaling[name], out=total)
        if kept is not None:
            source.view(-1)[kept[0]] = kept[1]
    if source is not total or total.dtype != own.dtype:  # else the sum is already where it belongs
        own.copy_(source)


def _held(layer: Any, name: str, source: Tensor) -> tuple[Tensor, Tensor] | None:
    """Entries at which an adapter's update is held at zero, and what is there without it, bit for bit."""
    if not is_masked(layer, name):
        return None
    index = stored_index(layer, mask_of(layer, name))
    return index, source.reshape(-1)[index]


def _merge_clone(slot: Slot, names: list[str]) -> None:
    """peft's own merge on a float32 copy of one layer: DoRA, biases, embeddings, IA3, LoHa, VeRA and the rest."""
    live = slot.live
    clone = _clone(live, torch.promote_types(slot.plain.weight.dtype, torch.float32))
    base = clone.get_base_layer()
    try:
        if clone.merged:
            clone.unmerge()
        if getattr(base, "bias", None) is None and any(getattr(clone, "lora_bias", {}).get(name) for name in names):
            base.bias = nn.Parameter(base.weight.new_zeros(base.weight.shape[0]))
        if not live.disable_adapters:
            clone.merge(adapter_names=names)
        base = clone.get_base_layer()  # some tuners put another module in its place
    except (NotImplementedError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        why = str(error) or "peft has no merge for it"
        raise ModelError(
            f"{slot.name}: a {kind_of(live)} adapter ({', '.join(names)}) cannot be folded: {why}"
        ) from error
    slot.plain.weight.copy_(base.weight)
    if getattr(base, "bias", None) is not None:
        _set_bias(slot.plain, base.bias)


def kind_of(live: Any) -> str:
    """The peft method of an adapted layer, such as "LORA" or "LILY": the name of the package its class is in."""
    return type(live).__module__.removeprefix("peft.tuners.").partition(".")[0].upper()


def _clone(live: Any, dtype: torch.dtype) -> Any:
    """A wide copy of an adapted layer. On a quantised base it becomes peft's class for plain ones: merging there would
    round to a few bits again.
    """
    base: Any = base_layer(live)
    if not is_quantised(base):
        return copy.deepcopy(live).to(dtype)
    plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(dequantised(base), requires_grad=False)
    if base.bias is not None:
        plain.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
    kind = type(live)
    name = kind.__name__.removesuffix("4bit").removesuffix("8bitLt")
    of_floats = getattr(importlib.import_module(kind.__module__.replace(".bnb", ".layer")), name, None)
    if of_floats is None:
        raise ModelError(
            f"peft has no {kind_of(live)} layer for plain weights, so one on quantised weights cannot be folded"
        )
    clone = copy.deepcopy(live, {id(base): plain})
    clone.__class__ = of_floats
    clone.fan_in_fan_out, clone.quantization_backend = False, None  # what those classes lack, and what newer ones ask
    return clone.to(dtype)


def _set_bias(plain: Any, bias: Tensor) -> None:
    old = plain.bias
    if getattr(plain, "_owns_bias", False):
        old.copy_(bias)
        return
    dtype = plain.weight.dtype if old is None else old.dtype
    plain.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    plain._owns_bias = True  # the first bias aliases the live one, which must never be written to
