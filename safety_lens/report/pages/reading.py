"""Values of neurons, heads and directions at every token of some prompts."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.activations import capture
from safety_lens.data import Encoded
from safety_lens.errors import ModelError
from safety_lens.positions import all_tokens
from safety_lens.probes.directions import Direction
from safety_lens.probes.matrices import weight_of
from safety_lens.report.pages.columns import PARTS, Unit

BUDGET = 2**26  # floats of all hooks held at once (256 MB): whole layers are read, chosen columns kept


def read_units(
    model: HookedTransformer,
    encoded: Sequence[Encoded],
    units: Sequence[Unit],
    on_batch: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "column token"]:
    """Of neurons what `mlp.hook_post` holds; of heads the length of what they add to the residual stream.

    Raises:
        ModelError: a value that is not finite; the message names hook and prompt.
    """
    hooks: dict[str, list[int]] = {}
    for row, (kind, layer, _) in enumerate(units):
        hooks.setdefault(f"blocks.{layer}.{PARTS[kind]}.hook_{'post' if kind == 'neuron' else 'z'}", []).append(row)

    def take(acts: Tensor, hook: str) -> Float[Tensor, "token column"]:
        numbers = [units[row][2] for row in hooks[hook]]
        return acts[:, numbers] if hook.endswith("hook_post") else _written_length(model, acts, hook, numbers)

    out = np.zeros((len(units), sum(len(e.ids) for e in encoded)), dtype=np.float32)
    for span, hook, values in _read(model, encoded, list(hooks), take, on_batch):
        out[hooks[hook], span] = values
    return out


def read_directions(
    model: HookedTransformer,
    encoded: Sequence[Encoded],
    directions: Sequence[Direction],
    on_batch: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "column token"]:
    """Projection of every token on each direction, at its hook.

    Raises:
        ModelError: a value that is not finite; the message names hook and prompt.
    """
    hooks: dict[str, list[int]] = {}
    for row, direction in enumerate(directions):
        hooks.setdefault(direction.hook, []).append(row)

    def take(acts: Tensor, hook: str) -> Float[Tensor, "token column"]:
        return torch.stack([directions[row].project(acts) for row in hooks[hook]], 1)

    out = np.zeros((len(directions), sum(len(e.ids) for e in encoded)), dtype=np.float32)
    for span, hook, values in _read(model, encoded, list(hooks), take, on_batch):
        out[hooks[hook], span] = values
    return out


def _written_length(
    model: HookedTransformer, z: Float[Tensor, "token d"], hook: str, heads: Sequence[int]
) -> Float[Tensor, "token head"]:
    d_head = model.cfg.d_head
    weight = weight_of(model, hook.replace("hook_z", "W_O")).to("cpu", z.dtype)
    parts = [slice(h * d_head, (h + 1) * d_head) for h in heads]
    return torch.stack([(z[:, part] @ weight[:, part].T).norm(dim=1) for part in parts], 1)


Take = Callable[[Tensor, str], Tensor]


def _read(
    model: HookedTransformer,
    encoded: Sequence[Encoded],
    hooks: list[str],
    take: Take,
    on_batch: Callable[[int], None] | None,
) -> Iterator[tuple[slice, str, np.ndarray]]:
    """(tokens, hook, values [column token]) for a few prompts at a time."""
    if not hooks:
        return
    widest = max(model.cfg.d_mlp or 4 * model.cfg.d_model, model.cfg.n_heads * model.cfg.d_head)
    first = 0
    for part in _parts(encoded, max(1, BUDGET // (widest * len(hooks)))):
        found = capture(model, part, hooks, positions=all_tokens, on_batch=on_batch)
        span = slice(first, first + len(found.pos))
        first = span.stop
        for hook in hooks:
            acts = found.acts[hook]
            if not bool(acts.isfinite().all()):
                bad = int(found.prompt[int((~acts.isfinite()).any(1).nonzero()[0])])
                raise ModelError(f"{hook} is not finite on the prompt {part[bad].text[:80]!r}: nothing can be shown")
            yield span, hook, take(acts, hook).T.float().numpy()


def _parts(encoded: Sequence[Encoded], tokens: int) -> Iterator[list[Encoded]]:
    """Runs of prompts of at most so many tokens together, at least one prompt each."""
    part: list[Encoded] = []
    for prompt in encoded:
        if part and sum(len(e.ids) for e in part) + len(prompt.ids) > tokens:
            yield part
            part = []
        part.append(prompt)
    if part:
        yield part
