"""The one forward engine: activations at named hooks and chosen tokens, in as few token-forwards as possible.

Hooks gather the wanted tokens on the device, so memory grows with rows read, not with tokens run. How prompts are
batched, and what they share, is in capturing.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.batching import check_batch_size
from safety_lens.capturing import Run
from safety_lens.data import Encoded, encode
from safety_lens.errors import DataError, ModelError
from safety_lens.models import check_hooks, named_hooks
from safety_lens.positions import Positions, last_token
from safety_lens.progress import progressed
from safety_lens.types import FwdHook, Prompt


@dataclass(frozen=True, eq=False)
class Captured:
    """Activations of the tokens that were asked for; row i of every array belongs together.

    acts: hook name → float rows on the CPU; heads are flattened into the last axis (`hook_z`: n_heads · d_head).
    prompt: which prompt a row came from. pos: its token index (unpadded; the last one of a mean).
    encoded: the prompts as they were tokenised. token_forwards: tokens that were run, padding included.
    """

    acts: dict[str, Float[Tensor, "row d"]]
    prompt: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]
    encoded: tuple[Encoded, ...]
    token_forwards: int

    def of(self, prompts: Sequence[int], hook: str) -> Float[Tensor, "n d"]:
        """The rows of these prompts, in their order, at one hook.

        Raises:
            DataError: a prompt gave more than one row.
        """
        if len(self.prompt) != len(self.encoded):
            raise DataError("rows and prompts are one to one only where each prompt is read at one token or a mean")
        return self.acts[hook][torch.as_tensor(list(prompts), dtype=torch.long)]


def encode_for(
    model: HookedTransformer,
    prompts: Sequence[Prompt | Encoded],
    *,
    raw: bool = False,
    truncate: bool = False,
    template_kwargs: dict[str, Any] | None = None,
) -> list[Encoded]:
    """Tokenise prompts for a model; prompts that are already encoded pass through.

    Raises:
        DataError: a prompt is longer than the model's context (and not `truncate`).
        ModelError: the model has no tokenizer.
    """
    if all(isinstance(p, Encoded) for p in prompts):
        ready = [p for p in prompts if isinstance(p, Encoded)]
        for i, p in enumerate(ready):
            if not 0 < len(p.ids) <= model.cfg.n_ctx:
                raise DataError(f"prompt {i} has {len(p.ids)} tokens; the model takes 1 to {model.cfg.n_ctx}")
        return ready
    if model.tokenizer is None:
        raise ModelError("this model has no tokenizer: pass tokenizer= to load_model, or prompts that are encoded")
    texts = [p for p in prompts if not isinstance(p, Encoded)]
    if len(texts) != len(prompts):
        raise DataError("prompts are partly encoded and partly text; pass one kind")
    return encode(
        texts, model.tokenizer, raw=raw, max_length=model.cfg.n_ctx, truncate=truncate, template_kwargs=template_kwargs
    )


def capture(
    model: HookedTransformer,
    prompts: Sequence[Prompt | Encoded],
    hooks: Sequence[str],
    *,
    positions: Positions = last_token,
    batch_size: int | str = "auto",
    edits: Sequence[FwdHook] = (),
    reuse_prefix: bool = True,
    raw: bool = False,
    truncate: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Captured:
    """Read activations of many prompts at many hooks in one sweep over the prompts.

    Args:
        prompts: user turns, conversations, or prompts that are already `Encoded`.
        hooks: TransformerLens hook names (see `hooks_at`), each with a token axis: [batch, pos, ...].
        positions: which tokens to read; `last_token`, `mean_last(k)`, `all_tokens`, ...
        batch_size: rows per forward, or "auto" (by padded tokens; halved when a GPU runs out of memory).
        edits: other forward hooks that are active while reading, run before the reading ones. They, and hooks that the
            model already has, switch prefix reuse off: an edit may treat a prefix differently in every row.
        reuse_prefix: run tokens that several prompts begin with once.
        on_batch: called with the number of prompts finished, for a progress bar.

    Returns:
        `Captured`, float32 rows on the CPU (float64 where the model is float64), in prompt order.

    Raises:
        DataError: no prompts, a prompt too long, or a position that a prompt does not have.
        HookNameError: a hook the model does not have.
        ModelError: a hook without a token axis (attention patterns and scores).
    """
    if isinstance(hooks, str) or not isinstance(positions, Positions):
        raise DataError(
            f"hooks is a list of names and positions a rule such as last_token, got {hooks!r} and {positions!r};"
            " parse_positions('last') makes a rule of a name"
        )
    check_hooks(model, hooks)
    named = named_hooks(model, edits)
    if not prompts:
        raise DataError("there are no prompts to read")
    if not hooks:
        raise DataError("there are no hooks to read")
    check_batch_size(batch_size)
    encoded = encode_for(model, prompts, raw=raw, truncate=truncate, template_kwargs=template_kwargs)
    run = Run(model, encoded, tuple(dict.fromkeys(hooks)), positions, batch_size, named)
    with torch.no_grad():
        done = 0
        for batch in run.everything(reuse_prefix):
            done += len(batch)
            progressed("prompts read", done, len(prompts))
            if on_batch:
                on_batch(len(batch))
    return Captured(run.out, *run.read(), tuple(encoded), run.token_forwards)
