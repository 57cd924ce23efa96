"""Plain models out of trained ones: with the adapters merged, or with a group put back to where training found it.

Rewinding afterwards is what the code of Wei et al. 2024 (arXiv:2402.05162) does, and another experiment than freezing:
the other weights learned in the company of ones that moved. Both leave max|(W′ − W₀)⊙M| = 0.
"""

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from safety_lens.errors import ModelError
from safety_lens.folding import Shadow
from safety_lens.interventions.freezing import group_entries
from safety_lens.loading.effective import stored_entries
from safety_lens.loading.live import base_model, has_adapters, unwrapped
from safety_lens.loading.merging import base_layer, dequantised
from safety_lens.probes.groups import NeuronGroup


def merged(trained: nn.Module) -> PreTrainedModel:
    """The model with its adapters' effect in plain weights, for `save_pretrained`; masks of frozen entries included.

    Each weight is merged in float32 and rounded once to the model's dtype. What no adapter touches is shared with
    `trained`, which is left as it was.

    Raises:
        ModelError: no adapters, or one that has no merged weight.
    """
    live = unwrapped(trained)
    if not has_adapters(live):
        raise ModelError("the model has no adapters to merge: its weights are plain already")
    return Shadow(live).model


@torch.no_grad()
def rewound(
    trained: nn.Module, groups: NeuronGroup | Sequence[NeuronGroup], base: nn.Module | None = None
) -> PreTrainedModel:
    """A plain copy of a trained model in which the entries of groups have the values they had before training.

    base: the model before training, needed after full fine-tuning; for adapters it is the one that they lie on.

    Raises:
        ModelError: base is missing, or of another shape. ModelMismatchError: a group of another model.
    """
    live = unwrapped(trained)
    chosen = [groups] if isinstance(groups, NeuronGroup) else list(groups)
    adapters = has_adapters(live)
    if base is None and not adapters:
        raise ModelError("the model was trained without adapters: give the model before training as base=")
    entries = group_entries(live, chosen)
    source = base_model(live if base is None else unwrapped(base))
    plain = _own(Shadow(live).model if adapters else cast(PreTrainedModel, live), set(entries))
    for module, index in entries.items():
        weight = plain.get_submodule(module).weight
        before = dequantised(base_layer(source.get_submodule(module)))
        if before.shape != weight.shape:
            raise ModelError(
                f"{module} has shape {tuple(before.shape)} in base and {tuple(weight.shape)} after training"
            )
        stored = stored_entries(plain.get_submodule(module), index)
        cast(torch.Tensor, weight).view(-1)[stored] = before.reshape(-1)[stored].to(cast(torch.Tensor, weight))
    return plain


def _own(model: PreTrainedModel, modules: set[str]) -> PreTrainedModel:
    """A copy of the module tree that owns the weights of some modules and shares all others."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False)
        for name, p in model.named_parameters()
        if name.removesuffix(".weight") not in modules
    }
    return copy.deepcopy(model, memo).eval().requires_grad_(False)
