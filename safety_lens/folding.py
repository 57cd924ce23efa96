"""Adapter weights folded into a hooked model, out of place: the model in training is never touched.

The shadow is a copy of the HF module tree whose tensors alias the live ones, with every adapted layer replaced by a
plain layer that owns its merged weight. Folding recomputes only those weights: W + scale · B · A in float32, rounded
once to the model's dtype, straight into the buffers that the hooked parameters are views of. peft's own
merge_adapter / unmerge_adapter on a live bf16 model changes a fifth of the adapted weights per cycle.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from safety_lens.errors import ModelError
from safety_lens.hooked import attach, main_device, main_dtype
from safety_lens.refusals import is_quantised, refuse_unreadable


@dataclass(frozen=True, eq=False)
class _Slot:
    """A live layer and the plain layer that owns its effective weight."""

    name: str
    live: Any
    plain: Any


class Shadow:
    """An aliasing copy of a model's module tree with adapters folded in; `refresh` recomputes the folded weights.

    adapters: which adapters to fold instead of the active ones.

    Raises:
        ModelError: an adapter that has no merged weight (prompt learning, routed or activated adapters).
    """

    model: PreTrainedModel

    def __init__(self, trained: nn.Module, adapters: Sequence[str] | None = None) -> None:
        refuse_prompt_learning(trained)
        self.adapters = adapters
        self.slots: list[_Slot] = []
        base = base_model(trained)
        self._dtype = main_dtype(base)  # of what quantised layers become
        # aliases of every parameter; buffers (rotary state) are copied, for a forward pass writes to them
        memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters()}
        seen: set[int] = set()
        for name, module in base.named_modules():
            if id(module) in seen:
                continue
            if _stands_for_another(module):
                seen |= {id(inner) for inner in module.modules()}
                memo[id(module)] = self._plain(name, module, memo)
        self.model = cast(PreTrainedModel, copy.deepcopy(base, memo)).eval()
        for module in self.model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                hooks.clear()
        self.refresh()

    def _plain(self, name: str, module: Any, memo: dict[int, object]) -> Any:
        if isinstance(module, ModulesToSaveWrapper):
            return copy.deepcopy(_saved_module(module), memo)
        base: Any = module.original_module if isinstance(module, TrainableTokensWrapper) else _base_layer(module)
        dtype = self._dtype if is_quantised(base) else base.weight.dtype
        shape = _dequantised(base).shape
        own = nn.Parameter(torch.empty(shape, dtype=dtype, device=base.weight.device), requires_grad=False)
        if is_quantised(base):
            plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            plain.weight = own
            if base.bias is not None:
                plain.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        else:
            plain = copy.deepcopy(base, {**memo, id(base.weight): own})
        self.slots.append(_Slot(name, module, plain))
        return plain

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute every owned weight from the live model, in place."""
        for slot in self.slots:
            names = self.adapters if self.adapters is not None else _active(slot.live)
            _fold_slot(slot, list(names))

    @property
    def owned_bytes(self) -> int:
        """Memory of the merged weights: what folding costs beside the live model."""
        return sum(slot.plain.weight.numel() * slot.plain.weight.element_size() for slot in self.slots)


class LoraFolder:
    """Keeps a hooked model equal to a model in training: `fold()` sets its weights to the effective ones.

    Works for any adapter that peft can merge, for several active adapters, and for full fine-tuning (nothing to do
    there unless storage moved). `trained` stays bit-identical: weights, gradients, modes, hooks and RNG. `model`
    takes the dtype and device of `trained`, and its weights become views wherever they can be.

    Raises:
        ModelError: `model` was not made by load_model, or `trained` is of another architecture or cannot be read.
    """

    _built_from: tuple[object, ...]

    def __init__(self, model: HookedTransformer, trained: PeftModel | PreTrainedModel) -> None:
        self.model = model
        self.trained = unwrapped(trained)
        origin = getattr(model, "origin", None)
        base = base_model(self.trained)
        if origin is None or origin.architecture != type(base).__name__:
            made = "not by load_model" if origin is None else f"from {origin.architecture}"
            raise ModelError(
                f"the hooked model was made {made} and the trained one is {type(base).__name__}: "
                "make the hooked model with load_model(trained)"
            )
        refuse_unreadable(self.trained)
        self._rebuild()

    def fold(self) -> None:
        """Hooked weights := the trained model's effective weights now. Never touches the trained model.

        Raises:
            ModelError: an adapter that cannot be merged, or storage that was given up (FSDP, offloading).
        """
        if self._fingerprint() != self._built_from:  # .to(), resize_token_embeddings, another adapter, another module
            refuse_unreadable(self.trained)
            self._rebuild()
            return
        if self._shadow is not None:
            self._shadow.refresh()
        if not self._views:  # some weight has another dtype than the model, so the hooked one has a copy
            attach(self.model, self._source)
            self._built_from = self._fingerprint()

    def _rebuild(self) -> None:
        self._shadow = Shadow(self.trained) if has_adapters(self.trained) else None
        self._source = base_model(self.trained) if self._shadow is None else self._shadow.model
        cfg = self.model.cfg
        if torch.device(cfg.device) != main_device(self._source):
            cfg.device = str(main_device(self._source))
        if cfg.dtype != main_dtype(self._source):
            cfg.dtype = main_dtype(self._source)
        self._views = attach(self.model, self._source)
        self._built_from = self._fingerprint()

    def _fingerprint(self) -> tuple[object, ...]:
        """Identity of every storage involved, and which adapters and saved modules are in force."""
        storage = [
            (name, p.data_ptr(), p.dtype, p.device, p.shape)
            for model in (self.trained, self.model)
            for name, p in model.named_parameters(remove_duplicate=False)
        ]
        wrappers = [
            (name, tuple(module.active_adapters), module.disable_adapters)
            for name, module in self.trained.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        return (*storage, *wrappers)


# --- what a live model is made of -----------------------------------------------------------------------------------


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
    return isinstance(model, PeftModel) or any(_stands_for_another(module) for module in model.modules())


def has_quantised(model: nn.Module) -> bool:
    """Whether some layer keeps its weight in a bitsandbytes format."""
    return any(is_quantised(module) for module in model.modules())


def refuse_prompt_learning(model: nn.Module) -> None:
    """Refuse adapters that act through virtual tokens.

    Raises:
        ModelError: prompt, prefix or p-tuning.
    """
    for name, config in (model.peft_config if isinstance(model, PeftModel) else {}).items():
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ModelError(f"adapter {name!r} is {kind}: it adds virtual tokens and has no weights to fold")


def _stands_for_another(module: Any) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or is_quantised(module)


def _saved_module(wrapper: ModulesToSaveWrapper) -> nn.Module:
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    if wrapper.disable_adapters or not active:
        return cast(nn.Module, wrapper.original_module)
    return cast(nn.Module, wrapper.modules_to_save[active[0]])


def _base_layer(module: Any) -> nn.Module:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(getattr(base, "weight", None), Tensor):
        raise ModelError(f"an adapter on a {type(base).__name__} cannot be folded: that layer has no single weight")
    return cast(nn.Module, base)


def _active(live: Any) -> Sequence[str]:
    adapted = isinstance(live, BaseTunerLayer | AuxiliaryTrainingWrapper)
    return cast(Sequence[str], live.active_adapters) if adapted else ()


def _dequantised(layer: Any) -> Tensor:
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
            "bitsandbytes repacked this 4-bit model's weights when it ran in eval mode on the CPU, and cannot read them "
            "back: call load_model before the first forward, or load the model again"
        )
    return cast(Tensor, dequantize_4bit(weight.data, weight.quant_state)).detach()


# --- folding one layer ----------------------------------------------------------------------------------------------


def _fold_slot(slot: _Slot, names: list[str]) -> None:
    live, own = slot.live, slot.plain.weight
    if isinstance(live, TrainableTokensWrapper):
        tokens = live.token_adapter
        own.copy_(live.original_module.weight if live.disable_adapters else tokens.get_merged_weights(names))
        return
    if not isinstance(live, BaseTunerLayer) or (live.disable_adapters and not live.merged):
        own.copy_(_dequantised(_base_layer(live)))
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
        and not layer.lora_embedding_A
        and not layer.merged
        and not getattr(layer, "lora_variant", None)
        and not any(layer.use_dora.get(name) or layer.lora_bias.get(name) for name in names)
        and all(isinstance(layer.lora_A[name], nn.Linear) for name in names if name in layer.lora_A)
    )


def _add_lora(layer: Any, names: Sequence[str], own: Tensor) -> None:
    weight = _dequantised(layer.get_base_layer())
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
    own.copy_(source)


def _merge_clone(slot: _Slot, names: list[str]) -> None:
    """peft's own merge on a float32 copy of one layer: DoRA, biases, embeddings, IA3, LoHa, VeRA and the rest."""
    live = slot.live
    if is_quantised(_base_layer(live)):
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
    except (NotImplementedError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"{slot.name}: this {type(live).__name__} adapter cannot be merged: {error}") from error
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
