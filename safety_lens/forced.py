"""Teacher forcing: how probable a given continuation is, in one forward per batch, with and without edits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.batching import check_batch_size, length_batches
from safety_lens.errors import DataError
from safety_lens.frames import running, whole
from safety_lens.kv import right_padded
from safety_lens.models import named_hooks
from safety_lens.progress import progressed
from safety_lens.types import FwdHook, NamedHook

BEFORE_HEAD = ("blocks.", "hook_embed", "hook_pos_embed")
TOKEN_BUDGET = {"cpu": 2048, "mps": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Continuation:
    """A prompt and the tokens that follow it, as ids. Edits see the prompt as prompt and the rest as generated."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def continuation_logprobs(
    model: HookedTransformer,
    rows: Sequence[Continuation],
    *,
    hooks: Sequence[FwdHook] = (),
    batch_size: int | str = "auto",
) -> list[Float[Tensor, "new d_vocab"]]:
    """Log-probabilities (nats, float32, CPU) of every next token at each position of each continuation.

    Row j of an answer predicts token j of the continuation: row 0 is read behind the last prompt token.

    Raises:
        DataError: an empty prompt or continuation, or one that exceeds the context.
        HookNameError: a hook the model does not have.
    """
    out: dict[int, Tensor] = {}
    named = named_hooks(model, hooks)
    for batch in checked_batches(model, rows, batch_size):
        found = _logprobs(model, [rows[i] for i in batch], batch, named)
        out |= {i: found[k].cpu() for k, i in enumerate(batch)}
    return [out[i] for i in range(len(rows))]


def continuation_kl(
    model: HookedTransformer,
    rows: Sequence[Continuation],
    edits: Sequence[Sequence[FwdHook]],
    *,
    batch_size: int | str = "auto",
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Float[np.ndarray, " new"]]]:
    """KL(unedited ‖ edited) in nats at every position of each continuation, for several interventions.

    The unedited model runs once for all interventions, and no logits outlive their batch. Entry `[e][i]` belongs to
    intervention e and row i. Exactly 0 for an intervention that changes nothing.

    Raises:
        DataError, HookNameError: as `continuation_logprobs`.
    """
    named = [named_hooks(model, hooks) for hooks in edits]
    out: list[dict[int, Float[np.ndarray, " new"]]] = [{} for _ in edits]
    for batch in checked_batches(model, rows, batch_size):
        part = [rows[i] for i in batch]
        base = _logprobs(model, part, batch, [])
        for number, (found, hooks) in enumerate(zip(out, named, strict=True)):
            progressed("edits compared with the unedited model", number, len(named))
            edited = _logprobs(model, part, batch, hooks)
            found |= {i: _kl(p, q) for i, p, q in zip(batch, base, edited, strict=True)}
        if on_batch:
            on_batch(len(batch))
    return [[found[i] for i in range(len(rows))] for found in out]


def _kl(base: Float[Tensor, "new d_vocab"], edited: Float[Tensor, "new d_vocab"]) -> Float[np.ndarray, " new"]:
    p, q = base.double(), edited.double()
    # a token of probability 0 in float32 (log −inf) contributes nothing
    terms = torch.where(p.isfinite(), p.exp() * (p - q), 0.0)
    return terms.sum(-1).clamp(min=0.0).cpu().numpy()


def checked_batches(
    model: HookedTransformer,
    rows: Sequence[Continuation],
    batch_size: int | str,
    budgets: Mapping[str, int] = TOKEN_BUDGET,
    what: str = "row",
) -> list[list[int]]:
    """Numbers of the rows of every batch, like lengths together. budgets: tokens of an "auto" batch by device.

    Raises:
        DataError: a row without prompt or continuation, or longer than the context; `what` names it.
    """
    check_batch_size(batch_size)
    for i, row in enumerate(rows):
        if not row.prompt or not row.tokens:
            raise DataError(
                f"{what} {i} has {len(row.prompt)} prompt and {len(row.tokens)} continuation tokens: needs both"
            )
        if len(row.prompt) + len(row.tokens) > model.cfg.n_ctx + 1:
            raise DataError(
                f"{what} {i} has {len(row.prompt) + len(row.tokens)} tokens; the model takes {model.cfg.n_ctx}"
            )
    cap = batch_size if isinstance(batch_size, int) else None
    budget = 10**9 if cap else budgets.get(torch.device(model.cfg.device or "cpu").type, budgets["cpu"])
    return length_batches([len(r.prompt) + len(r.tokens) for r in rows], budget, max_rows=cap)


def _logprobs(
    model: HookedTransformer, part: Sequence[Continuation], numbers: Sequence[int], hooks: Sequence[NamedHook]
) -> list[Float[Tensor, "new d_vocab"]]:
    """One batch: the blocks run for all tokens, the unembedding only for those that predict the continuation."""
    device = torch.device(model.cfg.device or "cpu")
    tokens, mask = right_padded([(*row.prompt, *row.tokens[:-1]) for row in part], device)
    frame = whole(mask, *(torch.tensor(n, device=device) for n in ([len(r.prompt) for r in part], list(numbers))))
    with torch.no_grad(), running(frame), model.hooks(fwd_hooks=list(hooks)):
        if hooked_after_blocks(model):
            logits = model(tokens, attention_mask=mask)
            return [logits[b, len(r.prompt) - 1 :][: len(r.tokens)].float().log_softmax(-1) for b, r in enumerate(part)]
        resid = model(tokens, attention_mask=mask, stop_at_layer=model.cfg.n_layers)
    read = [resid[b, len(r.prompt) - 1 :][: len(r.tokens)] for b, r in enumerate(part)]
    with torch.no_grad():
        scores = unembedded(model, torch.cat(read)[None])[0].float().log_softmax(-1)
    return list(scores.split([len(r.tokens) for r in part]))


def hooked_after_blocks(model: HookedTransformer) -> bool:
    """Look for active hooks after the blocks, which must see whole rows."""
    return any(point.fwd_hooks for name, point in model.hook_dict.items() if not name.startswith(BEFORE_HEAD))


def unembedded(
    model: HookedTransformer, resid: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of residuals that the last block gave out: final norm, unembedding, soft cap where the model has one."""
    logits: Tensor = model.unembed(model.ln_final(resid))
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits
