"""Inputs of every linear map, read in one forward pass without gradients, at chosen tokens."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError, ModelError
from safety_lens.forced import Continuation
from safety_lens.frames import running, whole
from safety_lens.kv import right_padded
from safety_lens.models import named_hooks
from safety_lens.probes.gradients import SITES, example_batches
from safety_lens.probes.matrices import Matrix
from safety_lens.types import FwdHook

Picked = Callable[
    [Int[Tensor, " pos"], Int[Tensor, "batch 1"], Int[Tensor, "batch 1"]],
    Bool[Tensor, "batch pos"],
]
"""Which tokens are read: (columns, tokens in each prompt, tokens in all) → mask."""


def _response(at: Tensor, prompt: Tensor, end: Tensor) -> Tensor:
    return (at >= prompt) & (at < end)


def _predicting(at: Tensor, prompt: Tensor, end: Tensor) -> Tensor:
    return (at >= prompt - 1) & (at < end - 1)


def _prompt(at: Tensor, prompt: Tensor, end: Tensor) -> Tensor:
    return at < prompt


def _all(at: Tensor, prompt: Tensor, end: Tensor) -> Tensor:
    return at < end


POSITIONS: dict[str, Picked] = {"response": _response, "predicting": _predicting, "prompt": _prompt, "all": _all}
"""Token rules. "response": the response's own tokens, as Wei et al.'s code has it: the last prompt token, from which
the first word of a refusal is predicted, is not among them. "predicting": the tokens that the loss reads, from the last
of the prompt to the last but one of the response. "prompt" and "all": as they say.
"""


def positions_named(name: str) -> Picked:
    """The token rule of this name.

    Raises:
        DataError: there is none.
    """
    if name not in POSITIONS:
        raise DataError(f"no token rule {name!r}: choose {', '.join(POSITIONS)}")
    return POSITIONS[name]


@dataclass(frozen=True, eq=False)
class Read:
    """What one batch gives to one matrix. x: inputs, float32 or wider, 0 wherever `read` is False."""

    matrix: Matrix
    x: Float[Tensor, "batch pos d_in"]
    read: Bool[Tensor, "batch pos"]


def read_inputs(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    matrices: Sequence[Matrix],
    see: Callable[[Read], None],
    *,
    positions: Picked,
    hooks: Sequence[FwdHook] = (),
    batch_size: int | str = "auto",
) -> None:
    """Hand out the inputs of every matrix, batch by batch, in the order of the forward pass.

    Raises:
        DataError: no example, or one that is empty or longer than the context.
        ModelError: an activation that is not finite; the message names the example.
    """
    for batch in example_batches(model, examples, batch_size):
        read_batch(model, examples, batch, matrices, see, positions=positions, hooks=hooks)


def read_batch(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    numbers: Sequence[int],
    matrices: Sequence[Matrix],
    see: Callable[[Read], None],
    *,
    positions: Picked,
    hooks: Sequence[FwdHook] = (),
) -> None:
    """`read_inputs` for the examples of these numbers, as one batch."""
    rows = [examples[i] for i in numbers]
    device = torch.device(model.cfg.device or "cpu")
    if (longest := max(len(r.prompt) + len(r.tokens) for r in rows)) > model.cfg.n_ctx:
        raise DataError(
            f"an example has {longest} tokens, all of which are read here; the model takes {model.cfg.n_ctx}"
        )
    tokens, mask = right_padded([(*row.prompt, *row.tokens) for row in rows], device)
    prompt = torch.tensor([[len(r.prompt)] for r in rows], device=device)
    end = torch.tensor([[len(r.prompt) + len(r.tokens)] for r in rows], device=device)
    read = positions(torch.arange(tokens.shape[1], device=device), prompt, end)
    frame = whole(mask, prompt[:, 0], torch.tensor(list(numbers), device=device))

    def on_site(here: Sequence[Matrix], module: Any, args: Any, kwargs: Any, *out: Tensor) -> None:
        value = out[0] if out else args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        flat = value.detach().flatten(2)
        x = torch.where(read[..., None], flat if flat.dtype == torch.float64 else flat.float(), 0.0)
        if not bool(x.isfinite().all()):
            bad = numbers[int((~x.isfinite()).flatten(1).any(1).nonzero()[0])]
            raise ModelError(f"example {bad} has an input of {here[0].name} that is not finite; nothing was scored")
        for matrix in here:
            see(Read(matrix, x, read))

    with ExitStack() as stack, torch.no_grad(), running(frame):
        stack.enter_context(model.hooks(fwd_hooks=list(named_hooks(model, hooks))))
        for layer, site in dict.fromkeys((m.layer, SITES[m.kind][0]) for m in matrices):
            here = [m for m in matrices if (m.layer, SITES[m.kind][0]) == (layer, site)]
            module = model.blocks[layer].get_submodule(site)
            argument = SITES[here[0].kind][1]
            add = module.register_forward_pre_hook if argument else module.register_forward_hook
            stack.callback(add(partial(on_site, here), with_kwargs=True).remove)
        model(tokens, attention_mask=mask, stop_at_layer=max(m.layer for m in matrices) + 1)
