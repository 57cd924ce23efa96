"""Text from a hooked model: batched, left-padded and masked, KV-cached, greedy or sampled with a seed per prompt.

`HookedTransformer.generate` ignores the attention mask of token tensors (rows of a ragged batch then differ from the
same rows alone), so the loop here passes masks explicitly and lets positions follow from them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from safety_lens.activations import TOKEN_BUDGET, encode_for
from safety_lens.batching import check_batch_size, length_batches
from safety_lens.data import Encoded
from safety_lens.errors import DataError
from safety_lens.kv import left_padded
from safety_lens.models import check_hooks
from safety_lens.types import FwdHook, Prompt


@dataclass(frozen=True)
class Generation:
    """One continuation. tokens: new token ids without the stop token; stopped: whether a stop token ended it."""

    prompt: Prompt | Encoded
    text: str
    tokens: tuple[int, ...]
    stopped: bool


def generate(
    model: HookedTransformer,
    prompts: Sequence[Prompt | Encoded],
    *,
    hooks: Sequence[FwdHook] = (),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    ignore_eos: bool = False,
    batch_size: int | str = "auto",
    raw: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Continue each prompt, with forward hooks active on every forward (prompt and new tokens).

    Args:
        hooks: TransformerLens `fwd_hooks`; with the cache, later forwards see one token at a time.
        temperature: 0 is greedy; else softmax(logits / temperature) is sampled. Each prompt has its own random stream
            from (seed, index of the prompt), so its draws do not depend on the batch it lands in.
        ignore_eos: go on to `max_new_tokens` past stop tokens.
        batch_size: rows per forward, or "auto".

    Raises:
        DataError: a prompt and `max_new_tokens` exceed the context, or a bad number.
        HookNameError: a hook the model does not have.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise DataError(f"need max_new_tokens >= 1 and temperature >= 0, got {max_new_tokens} and {temperature}")
    check_batch_size(batch_size)
    check_hooks(model, [name for name, _ in hooks])
    encoded = encode_for(model, prompts, raw=raw, template_kwargs=template_kwargs)
    for i, e in enumerate(encoded):
        if len(e.ids) + max_new_tokens > model.cfg.n_ctx:
            raise DataError(
                f"prompt {i} has {len(e.ids)} tokens; with {max_new_tokens} new ones it exceeds the model's context of"
                f" {model.cfg.n_ctx}"
            )
    stops = frozenset() if ignore_eos else stop_tokens(model)
    done: dict[int, Generation] = {}
    cap = batch_size if isinstance(batch_size, int) else None
    budget = 10**9 if cap else TOKEN_BUDGET.get(torch.device(model.cfg.device or "cpu").type, 4096)
    for batch in length_batches([len(e.ids) for e in encoded], budget, max_rows=cap):
        streams = [torch.Generator().manual_seed(_stream_seed(seed, i)) for i in batch]
        rows = _continue(model, [encoded[i] for i in batch], list(hooks), max_new_tokens, temperature, streams, stops)
        for i, (tokens, stopped) in zip(batch, rows, strict=True):
            done[i] = Generation(prompts[i], _decode(model, tokens), tokens, stopped)
        if on_batch:
            on_batch(len(batch))
    return [done[i] for i in range(len(prompts))]


def stop_tokens(model: HookedTransformer) -> frozenset[int]:
    """Ids that end a generation: the model's own (its generation settings may name several) and the tokenizer's."""
    ids = set(getattr(getattr(model, "origin", None), "stop_tokens", ()))
    own = getattr(model.tokenizer, "eos_token_id", None)
    return frozenset(ids if own is None else ids | {own})


def _stream_seed(seed: int, row: int) -> int:
    """Distinct 63-bit seeds for neighbouring (seed, row); torch mixes them further."""
    return (seed * 1_000_003 + row * 7_919 + 17) & (2**63 - 1)


def _decode(model: HookedTransformer, tokens: tuple[int, ...]) -> str:
    return "" if model.tokenizer is None else str(model.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _continue(
    model: HookedTransformer,
    encoded: list[Encoded],
    hooks: list[FwdHook],
    max_new_tokens: int,
    temperature: float,
    streams: list[torch.Generator],
    stops: frozenset[int],
) -> list[tuple[tuple[int, ...], bool]]:
    """(new tokens, stopped) of each row of one batch."""
    device = torch.device(model.cfg.device or "cpu")
    tokens, mask = left_padded([e.ids for e in encoded], device)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, device, len(encoded))
    new: list[list[int]] = [[] for _ in encoded]
    stopped = [False] * len(encoded)
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        for _ in range(max_new_tokens):
            logits = model(tokens, attention_mask=mask, past_kv_cache=cache)[:, -1]
            chosen = _choose(logits, temperature, streams)
            for row, token in enumerate(chosen.tolist()):
                stopped[row] = stopped[row] or token in stops
                if not stopped[row]:
                    new[row].append(token)
            if all(stopped):
                break
            tokens = chosen[:, None].to(device)
            mask = torch.ones_like(tokens)
    return [(tuple(row), end) for row, end in zip(new, stopped, strict=True)]


def _choose(
    logits: Float[Tensor, "batch d_vocab"], temperature: float, streams: list[torch.Generator]
) -> Int[Tensor, " batch"]:
    if temperature == 0:
        return logits.argmax(-1).cpu()
    # Inverse CDF with one uniform per row from the row's own stream: the same draw whatever the batch.
    cumulative = (logits.double().cpu() / temperature).softmax(-1).cumsum(-1)
    draws = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in streams])
    return torch.searchsorted(cumulative, draws * cumulative[:, -1:]).squeeze(1).clamp(max=logits.shape[1] - 1)
