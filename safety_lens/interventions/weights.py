"""A direction taken out of the weights: what ablation hooks do, with no hooks.

Held in memory, to test the hooks against. Safety Lens does not write such models to disk.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from safety_lens.errors import ModelError, ModelMismatchError
from safety_lens.interventions.edits import unit_of
from safety_lens.probes.directions import Direction

WRITERS = ("embed.W_E", "pos_embed.W_pos", "attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")
"""Parameters whose last axis is the residual stream: all that is ever written into it."""
ROWS = 4096
"""Rows of a weight that are worked on at a time: 30 MB in float64 at a width of 896."""


def orthogonalize(model: HookedTransformer, direction: Direction, *, share: bool = False) -> HookedTransformer:
    """Return a model that cannot write along the direction: W ← W − (W·u)uᵀ for every writing weight and bias.

    Equal to `ablate(direction)` at every writing site, the embedding included (Arditi et al. 2024, arXiv:2406.11717,
    section 4.1 and appendix E). The unembedding is left alone even where it was tied to the embedding. The products are
    taken in float64, block by block, and rounded once.

    Args:
        share: Share the tensors that do not write with the given model, which saves most of a copy; a change of one
            model in place is then one of the other. By default all tensors of the result are its own.

    Raises:
        ModelError: a norm stands between a block's weights and the residual stream (Gemma 2 and 3): its gain would
            turn what the weights write, so no change of weights does what the hooks do.
        ModelMismatchError: the direction has another width than the residual stream.
        DataError: a direction without length.
    """
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
    return _with_writers(model, unit_of(direction.vector), share)


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


def _with_writers(model: HookedTransformer, unit: Float[Tensor, " d_model"], share: bool) -> HookedTransformer:
    """The model with new writing weights and without forward hooks; the tokenizer is shared."""
    shared = [model.tokenizer, getattr(model, "origin", None)]
    memo: dict[int, object] = {id(thing): thing for thing in shared if thing is not None}
    with torch.no_grad():
        # One by one: deepcopy would keep parameters that are views of one fused tensor as views of one new tensor.
        for name, parameter in model.named_parameters():
            tensor = parameter.detach()
            if name.endswith(WRITERS):
                tensor = _without(tensor, unit.to(tensor.device))
            elif not share:
                tensor = tensor.clone()
            memo[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
        own: HookedTransformer = copy.deepcopy(model, memo)
    own.reset_hooks(including_permanent=True)
    return own
