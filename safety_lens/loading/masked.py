"""LoRA whose effective update is zero at chosen entries: W' = W₀ + s·(B·A)⊙M̄, in the forward pass and in every fold.

No mask on the factors can do this for single entries: (B·A)[i, j] = ⟨b_i, a_j⟩, so holding r entries of a row at zero
forces b_i = 0 for generic A, and the whole row stands still (MATH §1.7). Here the product itself is masked; autograd
gives ∂B = s(G⊙M̄)Aᵀ and ∂A = sBᵀ(G⊙M̄). The mask lies on the adapter's layer as a list of entries; peft reaches it as
a variant of LoRA, so its own merging, saving and Trainer integration see the masked update and nothing else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from jaxtyping import Float, Int64
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from safety_lens.artifacts import FROZEN
from safety_lens.errors import ModelError
from safety_lens.loading.held_back import Pattern, held_back, pattern_of

FEW, LARGE = 0.03, 1 << 18
"""Share of a matrix' entries up to which they are worth an own product, and from which size (as timed on the CPU)."""
CLOSE = 1e-4  # of the largest entry: products of the same factors, summed in another order


class MaskedLora(LoraVariant):
    """The masked update as peft calls it. Parameters are plain LoRA's; the mask is a buffer of the layer.

    pattern: for few entries of a large matrix on the CPU: plain LoRA less the product at the entries. None: the masked
    product. A training step of a Llama of width 1024 with 1 % frozen takes 1.55 and 2.35 times one of plain LoRA.
    """

    def __init__(self, pattern: Pattern | None) -> None:
        self.pattern = pattern

    def supports_lora_conversion(self) -> bool:
        """The masked product has a higher rank than its factors."""
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: masks are put on adapters that exist."""

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Adds x · (s·B·A⊙M̄)ᵀ. The product is made again in the backward pass: kept, it would be as large as W."""
        down, up = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        index, scale = mask_of(module, active_adapter), module.scaling[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        if self.pattern is not None and x.device.type == "cpu" and down.dtype in (torch.float32, torch.float64):
            plain = linear(linear(x, down), up) * scale
            return cast(Tensor, result + plain - held_back(x, down, up, scale, self.pattern))
        added = checkpoint(_masked, x, down, up, index, scale, use_reentrant=False, preserve_rng_state=False)
        return cast(Tensor, result + added)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W + masked update, as a new tensor."""
        return orig_weight + _stored_update(module, active_adapter).to(orig_weight)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """W += masked update."""
        orig_weight.data += _stored_update(module, active_adapter).to(orig_weight)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W − masked update."""
        return orig_weight - _stored_update(module, active_adapter).to(orig_weight)


def _masked(x: Tensor, down: Tensor, up: Tensor, index: Tensor, scale: float) -> Tensor:
    update = (up @ down) * scale
    update.view(-1).index_fill_(0, index, 0)
    return linear(x, update.to(x.dtype))


def _stored_update(layer: Any, name: str) -> Tensor:
    """The masked update as the layer keeps its weight: Conv1D has [d_in, d_out]."""
    update: Tensor = layer.get_delta_weight(name).contiguous()
    update.view(-1)[stored_index(layer, mask_of(layer, name))] = 0
    return update


def stored_index(layer: Any, index: Int64[Tensor, " k"]) -> Int64[Tensor, " k"]:
    """Flat entries of [d_out, d_in] as flat entries of the weight as the layer keeps it."""
    if not getattr(layer, "fan_in_fan_out", False):
        return index
    row, column = index // layer.in_features, index % layer.in_features
    return cast(Tensor, column * layer.out_features + row)


def mask_update(layer: Any, name: str, index: Int64[Tensor, " k"]) -> None:
    """Keep an adapter's update at zero at these entries (flat in [d_out, d_in]), beside any that it has already."""
    if (old := layer._buffers.get(_buffer(name))) is not None:
        index = torch.cat([old.cpu(), index.cpu()])
    where = layer.lora_A[name].weight.device
    index = torch.unique(index)
    d_out, d_in = layer.out_features, layer.in_features
    few = d_out * d_in >= LARGE and index.numel() <= FEW * d_out * d_in
    pattern = pattern_of(index.cpu(), d_out, d_in) if few and where.type == "cpu" else None
    layer.register_buffer(_buffer(name), index.to(where), persistent=False)
    layer.lora_variant[name] = MaskedLora(pattern)


def mask_of(layer: Any, name: str) -> Int64[Tensor, " k"]:
    """Entries (flat in [d_out, d_in]) at which the update of a masked adapter is zero."""
    return cast(Tensor, layer._buffers[_buffer(name)])


def is_masked(layer: Any, name: str) -> bool:
    """Whether an adapter of this layer has a masked update."""
    return isinstance(getattr(layer, "lora_variant", {}).get(name), MaskedLora)


def _buffer(name: str) -> str:
    return f"frozen_entries_{name}"


# --- beside the adapter on disk -------------------------------------------------------------------------------------


@dataclass
class MaskedLoraConfig(LoraConfig):
    """The configuration of an adapter with masks: wherever peft saves the adapter, the masks are saved beside it.

    frozen_entries: the file. Software that does not know this key warns of it and would apply the update unmasked.
    """

    frozen_entries: str | None = None

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As peft's, and the masks' file."""
        super().save_pretrained(str(save_directory), **kwargs)
        save_masks(self._model, self._adapter, save_directory)


def travel_with_adapter(model: PeftModel, name: str) -> None:
    """Have the masks of an adapter saved wherever peft or the Trainer saves the adapter."""
    config = model.peft_config[name]
    config.__class__ = MaskedLoraConfig
    config.frozen_entries = FROZEN
    config._model, config._adapter = model, name  # no fields: they are neither compared nor written


def save_masks(model: PeftModel, name: str, folder: str | Path) -> None:
    """Write for every masked layer the entries and the sparse delta there, −s·(B·A), in float32.

    LoRA + this sparse matrix is the effective update: `<module>.index` (flat in [d_out, d_in]) and `<module>.delta`.
    """
    tensors: dict[str, Tensor] = {}
    for module, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and is_masked(layer, name):
            index = mask_of(layer, name)
            tensors[f"{module}.index"] = index.cpu()
            tensors[f"{module}.delta"] = -_unmasked_at(layer, name, index).cpu()
    save_file(tensors, Path(folder) / FROZEN, metadata={"index": "flat in [d_out, d_in]", "delta": "-scale * (B @ A)"})


def _unmasked_at(layer: Any, name: str, index: Tensor) -> Float[Tensor, " k"]:
    with torch.no_grad():
        up, down = layer.lora_B[name].weight.float(), layer.lora_A[name].weight.float()
        return cast(Tensor, ((up @ down) * layer.scaling[name]).view(-1)[index])


def restore_masks(model: PeftModel, place: str | Path) -> None:
    """Put the masks saved beside an adapter back on it; nothing happens where the adapter has none.

    place: folder or hub id that the adapter was loaded from.

    Raises:
        ModelError: the file is missing, or belongs to another adapter.
    """
    if (file := _masks_file(str(place))) is None:
        return
    tensors = load_file(file)
    layers = dict(model.get_base_model().named_modules())
    (name,) = model.active_adapters
    for key in sorted(tensors):
        module, _, what = key.rpartition(".")
        if what == "index":
            _restore(layers.get(module), name, module, tensors, str(place))
    travel_with_adapter(model, name)


def _restore(layer: Any, name: str, module: str, tensors: Mapping[str, Tensor], place: str) -> None:
    index, delta = tensors[f"{module}.index"], tensors.get(f"{module}.delta")
    if not isinstance(layer, LoraLayer) or name not in layer.lora_A or delta is None:
        raise ModelError(f"{place}: {FROZEN} names {module}, which the adapter does not adapt; save the adapter again")
    if int(index.max()) >= layer.in_features * layer.out_features:
        raise ModelError(f"{place}: {FROZEN} has entries outside {module}; it belongs to another model")
    found = -_unmasked_at(layer, name, index.to(layer.lora_A[name].weight.device)).cpu()
    if not torch.allclose(found, delta, rtol=0, atol=CLOSE * float(delta.abs().max())):
        raise ModelError(f"{place}: {FROZEN} was written for other factors than those there; save the adapter again")
    mask_update(layer, name, index)


def _masks_file(place: str) -> str | None:
    try:
        named = json.loads(Path(_fetch(place, "adapter_config.json")).read_text(encoding="utf-8"))
        if named.get("frozen_entries") is None:
            return None
        return _fetch(place, FROZEN)
    except (OSError, EntryNotFoundError, LocalEntryNotFoundError) as error:
        raise ModelError(f"{place} was trained with frozen entries and {FROZEN} is not there") from error


def _fetch(place: str, name: str) -> str:
    if Path(place).is_dir():
        if not (Path(place) / name).is_file():
            raise FileNotFoundError(name)
        return str(Path(place) / name)
    return hf_hub_download(place, name)


def masked_layers(model: nn.Module, name: str) -> list[str]:
    """Names, inside the base model, of the layers whose update is masked."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return [module for module, layer in base.named_modules() if is_masked(layer, name)]
