"""Where each matrix of a hooked model lives in the Hugging Face tree: which module, and which of its output features.

Adapters, masks and optimisers act on the modules in training; scores and groups are kept by hooked names. Read from
the views that the layouts make of a tree without data, so fused and interleaved projections need no code of their own.
"""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from safety_lens.loading.architectures import settings, weights
from safety_lens.loading.live import base_model, unwrapped


@dataclass(frozen=True, eq=False)
class Home:
    """The module behind a matrix, by its name inside the base model, and the matrix' rows among its output features.

    transposed: the module keeps [d_in, d_out] (GPT-2's Conv1D).
    """

    module: str
    rows: Int[Tensor, " d_out"]
    transposed: bool

    def take(self, weight: Float[Tensor, "a b"]) -> Float[Tensor, "d_out d_in"]:
        """The matrix [d_out, d_in] out of a tensor of the module's weight shape; a view where its rows are a range."""
        weight = weight.T if self.transposed else weight
        first, last = int(self.rows[0]), int(self.rows[-1])
        if last - first + 1 == len(self.rows):
            return weight[first : last + 1]
        return weight[self.rows.to(weight.device)]

    def put(self, into: Float[Tensor, "a b"], values: Tensor) -> None:
        """Write a matrix [d_out, d_in] into a tensor of the module's weight shape."""
        target = into.T if self.transposed else into
        target[self.rows.to(into.device)] = values.to(into)


def homes(hf: nn.Module) -> dict[str, Home]:
    """Matrix name ("blocks.3.attn.W_Q") → where it is in `hf`; adapters and quantised layers make no difference.

    Raises:
        ModelError: an architecture that TransformerLens cannot represent.
    """
    base = cast(PreTrainedModel, base_model(unwrapped(hf)))
    empty = _without_data(base)
    cfg = HookedTransformerConfig.from_dict(
        {**settings(base), "model_name": "homes", "init_weights": False, "tokenizer_name": None, "device": "cpu"}
    )
    owners = {
        module.weight.untyped_storage()._cdata: (name, module)
        for name, module in empty.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    found = {}
    for name, view in weights(empty, cfg).items():
        block, _, leaf = name.rpartition(".")
        if leaf.removeprefix("_").startswith("W_") and block.startswith("blocks."):
            module_name, module = owners[view.untyped_storage()._cdata]
            kind = leaf.removeprefix("_")
            found[f"{block}.{kind}"] = Home(module_name, _rows(view, kind, module), isinstance(module, Conv1D))
    return found


def _without_data(base: PreTrainedModel) -> PreTrainedModel:
    """The module tree of a model's class and config, with no memory behind its weights."""
    config = copy.deepcopy(base.config)
    with torch.device("meta"):
        return cast(PreTrainedModel, type(base)(config))


def _rows(view: Tensor, kind: str, module: Any) -> Int[Tensor, " d_out"]:
    """Output feature of the module for every output of the map, from where its first input's entries are stored."""
    if kind in ("W_Q", "W_K", "W_V"):  # head, d_model, d_head
        per_head = view.stride(0) * torch.arange(view.shape[0])[:, None]
        places = (per_head + view.stride(2) * torch.arange(view.shape[2])).flatten()
    else:  # outputs are the last axis: W_O head, d_head, d_model; W_in, W_gate, W_out d_in, d_out
        places = view.stride(-1) * torch.arange(view.shape[-1])
    flat = places + int(view.storage_offset())
    width = int(module.weight.shape[1])
    return flat % width if isinstance(module, Conv1D) else flat // width
