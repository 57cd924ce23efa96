"""What a live model is made of: wrappers, adapters, saved modules and quantised layers, told apart; only read."""

from collections.abc import Sequence
from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from safety_lens.errors import ModelError
from safety_lens.loading.architectures import blocks_of
from safety_lens.loading.refusals import is_quantised


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or DataParallel, else the model itself."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return cast(nn.Module, model.module)
    return model


def base_model(model: Any) -> Any:
    """The HF model inside a PeftModel (adapters still in its layers), else the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def has_adapters(model: nn.Module) -> bool:
    """Whether some layer's effective weight is no parameter of its own: adapters, saved modules, quantised weights."""
    return isinstance(model, PeftModel) or any(stands_for_another(module) for module in model.modules())


def has_quantised(model: nn.Module) -> bool:
    """Whether some layer keeps its weight in a bitsandbytes format."""
    return any(is_quantised(module) for module in model.modules())


def refuse_unfoldable(model: nn.Module) -> None:
    """Refuse adapters that change the forward pass rather than weights.

    Raises:
        ModelError: prompt, prefix or p-tuning, adaption prompts, X-LoRA's routing; named by adapter.
    """
    for name, config in (model.peft_config if isinstance(model, PeftModel) else {}).items():
        kind = getattr(config.peft_type, "value", str(config.peft_type))
        if config.is_prompt_learning or config.is_adaption_prompt or kind == "XLORA":
            raise ModelError(f"adapter {name!r} is {kind}: it acts on the forward pass and has no weights to fold")


def stands_for_another(module: Any) -> bool:
    return has_adapter(module) or is_quantised(module)


def saved_module(wrapper: ModulesToSaveWrapper) -> nn.Module:
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    if wrapper.disable_adapters or not active:
        return cast(nn.Module, wrapper.original_module)
    return cast(nn.Module, wrapper.modules_to_save[active[0]])


def has_adapter(live: Any) -> bool:
    return isinstance(live, BaseTunerLayer | AuxiliaryTrainingWrapper)


def active_adapters(live: Any) -> Sequence[str]:
    return cast(Sequence[str], live.active_adapters) if has_adapter(live) else ()


def blocks_prefix(base: PreTrainedModel) -> str:
    blocks = blocks_of(base)
    names = [name for name, module in base.named_modules() if module is blocks]
    return str(names[0])
