"""Models in memory that cannot be read faithfully, recognised before anything is built, each by name."""

import torch
from torch import nn

from safety_lens.errors import ModelError

_BITSANDBYTES = ("Params4bit", "Int8Params")


def refuse_unreadable(model: nn.Module) -> None:
    """Refuse models whose parameters are not plain, whole, finite tensors in this process.

    Raises:
        ModelError: torch.compile, parametrizations, FSDP, ZeRO-3, tensor parallelism, meta or offloaded tensors,
            several devices, quantisation other than bitsandbytes, NaN or infinite weights (names the tensor).
    """
    _refuse_wrappers(model)
    _refuse_quantised(model)
    devices = set()
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ModelError(
                f"DeepSpeed ZeRO-3 holds only a part of {name} here; gather the model with "
                "deepspeed.zero.GatheredParameters, or use ZeRO-2, and pass the whole model"
            )
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise ModelError(f"{name} is sharded over processes (DTensor: FSDP2 or tensor parallel); pass it whole")
        if parameter.device.type == "meta":
            raise ModelError(
                f"{name} is on the meta device (offloaded or not loaded); load the model without device_map offloading"
            )
        devices.add(parameter.device)
        _refuse_not_finite(name, parameter)
    if len(devices) > 1:
        raise ModelError(f"the model is spread over {sorted(map(str, devices))}; load it on one device")


def _refuse_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(
                "the model was compiled with torch.compile; pass the original (model._orig_mod, or load it uncompiled)"
            )
        if hasattr(module, "parametrizations"):
            raise ModelError(
                f"a {kind.__name__} computes its weight on each access (torch.nn.utils.parametrize): remove the "
                "parametrization first"
            )
        if any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in kind.__mro__):
            raise ModelError("the model is wrapped in FSDP, which holds only a part of each weight; pass a whole model")


def _refuse_quantised(model: nn.Module) -> None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    method = getattr(method, "value", method)
    if method is not None and method != "bitsandbytes":
        raise ModelError(
            f"the model is quantised with {method}; call model.dequantize() or load the checkpoint it was made from "
            "(bitsandbytes models can be passed as they are)"
        )


def _refuse_not_finite(name: str, parameter: torch.Tensor) -> None:
    if not parameter.is_floating_point() or not parameter.numel():
        return
    low, high = torch.aminmax(parameter.detach())  # one pass, no temporary; NaN propagates
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ModelError(f"weight {name} has NaN or infinite entries; the checkpoint is damaged or training diverged")


def is_quantised(module: nn.Module) -> bool:
    """Whether this layer keeps its weight in a bitsandbytes format."""
    return type(getattr(module, "weight", None)).__name__ in _BITSANDBYTES
