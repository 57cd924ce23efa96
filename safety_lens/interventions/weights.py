"""A direction taken out of the weights: what ablation hooks do, with no hooks.

Held in memory, to test the hooks against. Safety Lens does not write such models to disk.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from safety_lens.errors import ModelError, ModelMismatchError
from safety_lens.interventions.edits import unit_of
from safety_lens.probes.directions import Direction

WRITERS = ("embed.W_E", "pos_embed.W_pos", "attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")
"""Parameters whose last axis is the residual stream: all that is ever written into it."""
ROWS = 1024
"""Rows of a weight that are worked on at a time: 7 MB in float64 at a width of 896."""


def orthogonalize(model: HookedTransformer, direction: Direction) -> HookedTransformer:
    """Return a copy that cannot write along the direction: W ← W − (W·u)uᵀ for every writing weight and bias.

    Equal to `ablate(direction)` at every writing site, the embedding included (Arditi et al. 2024, arXiv:2406.11717,
    section 4.1 and appendix E). The unembedding is left alone even where it was tied to the embedding. The products are
    taken in float64, block by block, and rounded once. All tensors of the copy are its own.

    Raises:
        ModelError: a norm stands between a block's weights and the residual stream (Gemma 2 and 3): its gain would
            turn what the weights write, so no change of weights does what the hooks do.
        ModelMismatchError: the direction has another width than the residual stream.
        DataError: a direction without length.
    """
    return _with_writers(model, _checked(model, direction))


@contextmanager
def orthogonalized(model: HookedTransformer, direction: Direction) -> Iterator[None]:
    """Let the model itself run with the weights of `orthogonalize`, made as a module runs and dropped after it.

    Takes the memory of the largest writing weight instead of a copy. The model is left as found.

    Raises:
        ModelError, ModelMismatchError, DataError: as `orthogonalize`.
    """
    unit, writers = _checked(model, direction), [n for n, _ in model.named_parameters() if n.endswith(WRITERS)]
    with ExitStack() as stack:
        for owner, names in groupby(writers, lambda name: name.rpartition(".")[0]):
            module = model.get_submodule(owner)
            own = {name.rpartition(".")[2]: model.get_parameter(name) for name in names}
            stack.callback(_swap, own, None, module)
            stack.callback(module.register_forward_pre_hook(partial(_swap, own, unit)).remove)
            stack.callback(module.register_forward_hook(partial(_swap, own, None), always_call=True).remove)
        yield


def _swap(own: dict[str, nn.Parameter], unit: Float[Tensor, " d_model"] | None, module: nn.Module, *_: Any) -> None:
    """Give a module its weights without the direction, or its own ones back."""
    for name, parameter in own.items():
        if unit is None:
            setattr(module, name, parameter)
        else:
            changed = _without(parameter.detach(), unit.to(parameter.device))
            setattr(module, name, nn.Parameter(changed, requires_grad=False))


def _checked(model: HookedTransformer, direction: Direction) -> Float[Tensor, " d_model"]:
    """The direction at length one, if weights of this model can be without it."""
    if not can_orthogonalize(model):
        raise ModelError(
            f"{model.cfg.model_name} normalises what attention and MLP write before adding it to the residual stream,"
            " so weights without the direction can still write along it; ablate(direction) does what is wanted"
        )
    if len(direction.vector) != model.cfg.d_model:
        raise ModelMismatchError(
            f"the direction has width {len(direction.vector)}, the residual stream {model.cfg.d_model}: a direction of"
            f" the residual stream is needed, this one was read at {direction.hook}"
        )
    return unit_of(direction.vector)


def can_orthogonalize(model: HookedTransformer) -> bool:
    """Whether weights alone decide what is written into the residual stream: no norm stands behind them."""
    return not model.cfg.use_normalization_before_and_after


def _without(weight: Float[Tensor, "*rows d_model"], unit: Float[Tensor, " d_model"]) -> Float[Tensor, "*rows d_model"]:
    """Rows of a weight without the direction; only a block of rows is ever held in float64."""
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows = zip(weight.reshape(-1, len(unit)).split(ROWS), out.view(-1, len(unit)).split(ROWS), strict=True)
    for given, left in rows:
        wide = given.double()
        left.copy_(wide - (wide @ unit)[:, None] * unit)
    return out


def _with_writers(model: HookedTransformer, unit: Float[Tensor, " d_model"]) -> HookedTransformer:
    """The model with new writing weights and without forward hooks; the tokenizer is shared."""
    shared = [model.tokenizer, getattr(model, "origin", None)]
    memo: dict[int, object] = {id(thing): thing for thing in shared if thing is not None}
    with torch.no_grad():
        # One by one: deepcopy would keep parameters that are views of one fused tensor as views of one new tensor.
        for name, parameter in model.named_parameters():
            tensor = parameter.detach()
            tensor = _without(tensor, unit.to(tensor.device)) if name.endswith(WRITERS) else tensor.clone()
            memo[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
        own: HookedTransformer = copy.deepcopy(model, memo)
    own.reset_hooks(including_permanent=True)
    return own
