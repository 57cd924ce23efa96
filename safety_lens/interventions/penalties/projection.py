"""SafeLoRA: after training, project an adapter's updates onto the directions in which a model was aligned.

Hsu et al. 2024, arXiv:2405.16833. For each adapted matrix V = W_aligned − W_unaligned and C = V·Vᵀ/‖V‖_F; where the
cosine of C·B·A with B·A is at most a threshold, B becomes C·B. C is the paper's, and is no projector: its eigenvalues
are V's squared singular values over ‖V‖_F, so it changes lengths too. A baseline: it looks at no data.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from safety_lens.errors import DataError, ModelError
from safety_lens.loading.effective import original_weight
from safety_lens.loading.live import unwrapped
from safety_lens.loading.merging import is_plain_lora


@dataclass(frozen=True)
class Projection:
    """What happened to one module. cosine: of C·B·A with B·A, NaN for an update of zero. projected: B was changed."""

    module: str
    cosine: float
    projected: bool


@torch.no_grad()
def safe_lora(model: PeftModel, unaligned: PreTrainedModel, *, threshold: float) -> list[Projection]:
    """Project the factors B of the active adapters in place, module by module.

    Args:
        model: the fine-tuned model; the weights under its adapter are the aligned ones.
        unaligned: the same architecture before alignment, such as the base model of a chat model.
        threshold: cosine in [−1, 1]; 1 projects every module.

    Raises:
        DataError: a threshold outside [−1, 1], or two models whose adapted weights are equal: there is no direction.
        ModelError: no LoRA, an adapter that is not plain LoRA, or a module that `unaligned` lacks or has in other form.
    """
    if not -1 <= threshold <= 1:
        raise DataError(f"threshold is a cosine between -1 and 1, got {threshold}")
    live: Any = unwrapped(model)
    base = live.get_base_model() if isinstance(live, PeftModel) else live
    layers = [(name, layer) for name, layer in base.named_modules() if isinstance(layer, LoraLayer)]
    if not layers:
        raise ModelError("the model has no LoRA layer: there is nothing to project")
    return [
        _project(name, layer, adapter, _alignment(name, layer, unaligned), threshold)
        for name, layer in layers
        for adapter in layer.active_adapters
        if adapter in layer.lora_A
    ]


def _alignment(name: str, layer: Any, unaligned: PreTrainedModel) -> Float[Tensor, "d_out d_out"]:
    if not is_plain_lora(layer, layer.active_adapters):
        raise ModelError(f"{name}: only plain LoRA can be projected")
    aligned = original_weight(layer)
    try:
        other = original_weight(unaligned.get_submodule(name))
    except AttributeError as error:
        raise ModelError(f"the unaligned model has no module {name}: it is of another architecture") from error
    if other.shape != aligned.shape:
        raise ModelError(f"{name}: {tuple(aligned.shape)} aligned and {tuple(other.shape)} unaligned")
    change = aligned - other.to(aligned)
    if not change.any():
        raise DataError(f"{name}: aligned and unaligned weights are equal, so there is no direction of alignment")
    found: Tensor = change @ change.T / change.norm()
    return found


def _project(name: str, layer: Any, adapter: str, onto: Tensor, threshold: float) -> Projection:
    up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight.to(onto)
    before = up.to(onto)
    after = onto @ before
    cosine = float(torch.cosine_similarity((after @ down).flatten(), (before @ down).flatten(), dim=0))
    if not before.any():
        return Projection(name, float("nan"), False)
    projected = cosine <= threshold + 1e-6  # a cosine of 1 in float32
    if projected:
        up.copy_(after)
    return Projection(name, cosine, projected)
