"""A group of weights, neurons or heads taken out of a model, or left alone in it, while a context lasts.

Weights are set to zero in copies of their matrices; the model's own tensors are never written. Neurons and heads are
set to zero, or to their mean, where they are read: at mlp.hook_post and attn.hook_z.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.forced import Continuation, continuation_logprobs
from safety_lens.frames import frame_of
from safety_lens.interventions.steering import applied
from safety_lens.probes.groups import NeuronGroup
from safety_lens.probes.matrices import as_parameter, named_matrix, parameter_of, weight_of
from safety_lens.types import FwdHook

POINTS = {"neuron": "hook_post", "head": "hook_z"}
"""Where a unit's activation is: [batch, pos, d_mlp], or [batch, pos, n_heads, d_head]."""

Means = Mapping[str, Tensor]
"""Block part ("blocks.3.mlp" or "blocks.3.attn") → mean activation, without batch and position."""


@contextmanager
def ablated(model: HookedTransformer, group: NeuronGroup, *, means: Means | None = None) -> Iterator[HookedTransformer]:
    """The model without a group: its weights are 0, its neurons and heads 0 or at their `means`.

    Raises:
        ModelMismatchError: a group of another model.
        DataError: an empty group, or means for a group of weights or without those of a block.
        ModelError: a streamed model.
    """
    with _edited(model, group, {key: _members(group, key) for key in group.index}, means):
        yield model


@contextmanager
def kept(model: HookedTransformer, group: NeuronGroup, *, means: Means | None = None) -> Iterator[HookedTransformer]:
    """The model with nothing but a group in every matrix or block part that the group was chosen from.

    Raises:
        ModelMismatchError, DataError: as `ablated`.
    """
    with _edited(model, group, {key: ~_members(group, key) for key in group.index}, means):
        yield model


def _members(group: NeuronGroup, key: str) -> Bool[Tensor, " n"]:
    mask = torch.zeros(group.count(key), dtype=torch.bool)
    mask[group.index[key]] = True
    return mask


@contextmanager
def _edited(
    model: HookedTransformer, group: NeuronGroup, out: Mapping[str, Bool[Tensor, " n"]], means: Means | None
) -> Iterator[None]:
    if not group.size:
        raise DataError(f"the group {group.name!r} is empty: there is nothing to ablate or to keep")
    group.check_fits(model)
    out = {key: mask for key, mask in out.items() if bool(mask.any())}
    if group.unit != "weight":
        with applied(model, _hooks(group, out, means)):
            yield
        return
    if means is not None:
        raise DataError("a single weight has no mean activation: set weights to zero, or ablate neurons or heads")
    with ExitStack() as stack:
        for name, mask in out.items():
            stack.enter_context(_without_entries(model, name, mask))
        yield


@contextmanager
def _without_entries(model: HookedTransformer, name: str, mask: Bool[Tensor, " n"]) -> Iterator[None]:
    """Another parameter stands in the module while the context lasts."""
    matrix = named_matrix(model, name)
    weight = weight_of(model, matrix)
    edited = torch.where(mask.view(matrix.shape).to(weight.device), torch.zeros((), dtype=weight.dtype), weight)
    module = model.get_submodule(name.rpartition(".")[0])
    behind = parameter_of(model, matrix)
    slot, own = next((s, p) for s, p in module._parameters.items() if p is behind)
    stand_in = nn.Parameter(as_parameter(edited, matrix, model.cfg.d_head), requires_grad=False)
    module._parameters[slot] = stand_in
    try:
        yield
    finally:
        module._parameters[slot] = own


def _hooks(group: NeuronGroup, out: Mapping[str, Tensor], means: Means | None) -> list[FwdHook]:
    if means is not None and (missing := [key for key in out if key not in means]):
        raise DataError(f"there is no mean activation of {missing[0]}: read it with mean_activations")
    return [
        (f"{key}.{POINTS[group.unit]}", partial(_replace, mask, None if means is None else means[key]))
        for key, mask in out.items()
    ]


def _replace(
    mask: Bool[Tensor, " unit"], mean: Tensor | None, act: Float[Tensor, "batch pos unit *rest"], hook: object
) -> Float[Tensor, "batch pos unit *rest"]:
    there = mask.to(act.device).view(-1, *[1] * (act.ndim - 3))
    return torch.where(there, torch.zeros((), dtype=act.dtype) if mean is None else mean.to(act), act)


def mean_activations(model: HookedTransformer, rows: Sequence[Continuation], group: NeuronGroup) -> dict[str, Tensor]:
    """Mean activation over all tokens of the rows, of every neuron or head in the blocks of a group (float32).

    The last token of a continuation is not read. Use rows of ordinary text: a mean over the text that a group reacts to
    would leave in place what it does there.

    Raises:
        DataError: no rows, or a group of weights.
    """
    if group.unit == "weight":
        raise DataError("a single weight has no activation: ablate weights to zero")
    if not rows:
        raise DataError("mean activations need rows to be read on: got none")
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(group.index, 0)

    def add(key: str, act: Tensor, hook: object) -> Tensor:
        there = frame_of(act).position >= 0
        sums[key] = sums.get(key, 0.0) + act[there].double().sum(0)
        counts[key] += int(there.sum())
        return act

    hooks: list[FwdHook] = [(f"{key}.{POINTS[group.unit]}", partial(add, key)) for key in group.index]
    for start in range(0, len(rows), 16):
        continuation_logprobs(model, rows[start : start + 16], hooks=hooks)
    return {key: (total / counts[key]).float().cpu() for key, total in sums.items()}
