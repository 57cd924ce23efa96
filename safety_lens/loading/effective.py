"""The weight that a live layer acts with, whatever holds it: itself, an adapter on it, or a copy saved beside it.

Every weight is read as [d_out, d_in]; GPT-2's Conv1D keeps the other order.
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from safety_lens.loading.live import active_adapters, saved_module
from safety_lens.loading.merging import Slot, base_layer, dequantised, fold_slot


@torch.no_grad()
def effective_weight(layer: Any) -> Float[Tensor, "d_out d_in"]:
    """The weight that a layer acts with, active adapters included, in float32 or wider; the layer is only read.

    Raises:
        ModelError: an adapter that cannot be merged.
    """
    inner = saved_module(layer) if isinstance(layer, ModulesToSaveWrapper) else layer
    weight = dequantised(base_layer(inner))
    plain = nn.Linear(1, 1, bias=False, device="meta")
    plain.weight = nn.Parameter(torch.empty_like(weight, dtype=_wide(weight)), requires_grad=False)
    fold_slot(Slot("", inner, plain), list(active_adapters(inner)))
    return _upright(layer, plain.weight.detach())


def original_weight(layer: Any) -> Float[Tensor, "d_out d_in"]:
    """The weight under a layer's adapters, in float32 or wider."""
    weight = dequantised(original_layer(layer))
    return _upright(layer, weight.to(_wide(weight)))


def original_layer(layer: Any) -> Any:
    """The layer as it was before adapters were put on the model."""
    return base_layer(layer.original_module if isinstance(layer, ModulesToSaveWrapper) else layer)


def trained_weight(layer: Any) -> Tensor | None:
    """The weight of a layer if it is trained itself, not through an adapter; as the layer keeps it."""
    inner: Any = saved_module(layer) if isinstance(layer, ModulesToSaveWrapper) else layer
    weight = cast(Tensor, base_layer(inner).weight)
    return weight if weight.requires_grad else None


def stored_entries(layer: Any, index: Int64[Tensor, " k"]) -> Int64[Tensor, " k"]:
    """Flat entries of [d_out, d_in] as flat entries of the weight as the layer keeps it."""
    if not _is_transposed(layer):
        return index
    d_in, d_out = original_layer(layer).weight.shape
    return cast(Tensor, (index % d_in) * d_out + index // d_in)


def _upright(layer: Any, weight: Tensor) -> Tensor:
    return weight.T if _is_transposed(layer) else weight


def _is_transposed(layer: Any) -> bool:
    return type(original_layer(layer)).__name__ == "Conv1D"


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
