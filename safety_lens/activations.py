"""The one forward engine: activations at named hooks and chosen tokens, in as few token-forwards as possible.

Prompts are grouped by shared prefix (its keys and values are computed once), batched by length, padded behind with an
explicit mask, run only up to the last wanted block (that one only for tokens that are read), never through the
unembedding. Hooks gather the wanted tokens on the device, so memory grows with rows read, not with tokens run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from safety_lens.batching import check_batch_size, length_batches, prefix_groups
from safety_lens.data import Encoded, encode
from safety_lens.errors import DataError, ModelError
from safety_lens.frames import running, whole
from safety_lens.kv import Span, can_run_span, expanded, right_padded, span_input
from safety_lens.models import check_hooks, named_hooks
from safety_lens.positions import Positions, last_token
from safety_lens.types import FwdHook, NamedHook, Prompt

TOKEN_BUDGET = {"cpu": 1024, "mps": 4096, "cuda": 16384}
"""Padded tokens in one forward by device; larger CPU batches only move memory, larger GPU batches fill it."""


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


@dataclass(frozen=True)
class _Want:
    """What to read from one prompt: token indices and the output rows they go to."""

    tokens: tuple[int, ...]
    first_row: int


def stop_layer(hooks: Sequence[str]) -> int | None:
    """Blocks that must run so that all these hooks fire; None where one lies after the blocks (norm, unembedding)."""
    last = 0
    for name in hooks:
        parts = name.split(".")
        if parts[0] == "blocks":
            last = max(last, int(parts[1]) + 1)
        elif parts[0] not in ("hook_embed", "hook_pos_embed", "embed", "hook_tokens"):
            return None
    return last


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
        reuse_prefix: run a prefix that prompts share once.
        on_batch: called with the number of prompts finished, for a progress bar.

    Returns:
        `Captured`, float32 rows on the CPU (float64 where the model is float64), in prompt order.

    Raises:
        DataError: no prompts, a prompt too long, or a position that a prompt does not have.
        HookNameError: a hook the model does not have.
        ModelError: a hook without a token axis (attention patterns and scores).
    """
    check_hooks(model, hooks)
    named = named_hooks(model, edits)
    if not prompts:
        raise DataError("there are no prompts to read")
    if not hooks:
        raise DataError("there are no hooks to read")
    check_batch_size(batch_size)
    encoded = encode_for(model, prompts, raw=raw, truncate=truncate, template_kwargs=template_kwargs)
    run = _Run(model, encoded, tuple(dict.fromkeys(hooks)), positions, batch_size, named)
    with torch.no_grad():
        for prefix, rows in prefix_groups([e.ids for e in encoded], run.limits(reuse_prefix)):
            cache = run.prefix_cache(encoded[rows[0]].ids[:prefix]) if prefix else None
            for batch in run.batches(rows, prefix):
                run.forward(batch, prefix, cache)
                if on_batch:
                    on_batch(len(batch))
    return run.result()


class _Run:
    """One capture in progress: the plan, the output rows, the forward calls."""

    def __init__(
        self,
        model: HookedTransformer,
        encoded: list[Encoded],
        hooks: tuple[str, ...],
        positions: Positions,
        batch_size: int | str,
        edits: Sequence[NamedHook],
    ) -> None:
        self.model, self.encoded, self.hooks, self.mean, self.edits = model, encoded, hooks, positions.mean, edits
        self.batch_size = batch_size
        active = [*hooks, *(name for name, _ in edits)]
        # an edit may treat each row's prefix differently; hook_rot_k sees cached keys beside those of the batch
        edited = bool(edits) or any(point.fwd_hooks for point in model.hook_dict.values())
        self.can_cache = not edited and not any(name.endswith("hook_rot_k") for name in hooks)
        self.stop = stop_layer(active)
        self.returns = "logits" if any(name.startswith("unembed.") for name in active) else None
        picks = [tuple(positions.pick(e)) for e in encoded]
        sizes = [1 if self.mean else len(p) for p in picks]
        starts = accumulate([0, *sizes[:-1]])
        self.wants = [_Want(tokens, start) for tokens, start in zip(picks, starts, strict=True)]
        self.n_rows = sum(sizes)
        self.out: dict[str, Tensor] = {}
        self.token_forwards = 0
        self.device = torch.device(model.cfg.device or "cpu")
        self.budget = TOKEN_BUDGET.get(self.device.type, 4096)

    def limits(self, reuse: bool) -> list[int]:
        """Leading tokens of each prompt that need not be run with its batch: those before the first one read."""
        reuse = reuse and self.can_cache and self.stop != 0  # without blocks there are no keys and values to keep
        return [
            min(want.tokens[0], len(e.ids) - 1) if reuse else 0
            for want, e in zip(self.wants, self.encoded, strict=True)
        ]

    def batches(self, rows: list[int], prefix: int) -> Iterator[list[int]]:
        rows_cap = self.batch_size if isinstance(self.batch_size, int) else None
        budget = 10**9 if rows_cap else self.budget
        for batch in length_batches([len(self.encoded[i].ids) - prefix for i in rows], budget, max_rows=rows_cap):
            yield [rows[i] for i in batch]

    def prefix_cache(self, ids: Sequence[int]) -> TransformerLensKeyValueCache:
        cache = TransformerLensKeyValueCache.init_cache(self.model.cfg, self.device, 1)
        tokens = torch.tensor([list(ids)], device=self.device)
        stop = self.model.cfg.n_layers if self.stop is None else self.stop  # a prefix never needs logits
        self.model(tokens, attention_mask=torch.ones_like(tokens), past_kv_cache=cache, stop_at_layer=stop)
        self.token_forwards += len(ids)
        return cache

    def forward(self, batch: list[int], prefix: int, cache: TransformerLensKeyValueCache | None) -> None:
        try:
            self._forward(batch, prefix, cache)
        except torch.cuda.OutOfMemoryError:
            if self.batch_size != "auto" or len(batch) == 1:
                raise
            self.budget = max(1, self.budget // 2)
            torch.cuda.empty_cache()
            half = len(batch) // 2
            self.forward(batch[:half], prefix, cache)
            self.forward(batch[half:], prefix, cache)

    def _forward(self, batch: list[int], prefix: int, cache: TransformerLensKeyValueCache | None) -> None:
        tokens, mask = right_padded([self.encoded[i].ids[prefix:] for i in batch], self.device)
        self.token_forwards += tokens.numel()
        past = expanded(self.model, cache, len(batch)) if cache is not None else None
        run = partial(self.model, return_type=self.returns)
        begins, span = [prefix] * len(batch), self._span(batch, prefix, tokens.shape[1])
        if self.stop is None or span is None:
            readers = self._readers(self.hooks, batch, begins, tokens.shape[1])
            asked = [len(e.ids) if e.answer is None else e.answer[0] for e in (self.encoded[i] for i in batch)]
            frame = whole(mask, *(torch.tensor(numbers, device=self.device) for numbers in (asked, batch)))
            with running(frame), self.model.hooks(fwd_hooks=[*self.edits, *readers]):
                run(tokens, attention_mask=mask, past_kv_cache=past, stop_at_layer=self.stop)
            return
        last = self.stop - 1
        late = [name for name in self.hooks if name.startswith(f"blocks.{last}.")]
        early = [name for name in self.hooks if name not in late]
        with self.model.hooks(fwd_hooks=self._readers(early, batch, begins, tokens.shape[1])):
            resid = run(tokens, attention_mask=mask, past_kv_cache=past, stop_at_layer=last)
        resid, mask, past = span_input(self.model, last, resid, mask, past, span)
        begins = [prefix + first for first in span.first]
        with self.model.hooks(fwd_hooks=self._readers(late, batch, begins, span.length)):
            run(resid, attention_mask=mask, past_kv_cache=past, start_at_layer=last, stop_at_layer=self.stop)

    def _span(self, batch: list[int], prefix: int, width: int) -> Span | None:
        """The columns that the last block must run for, where that is less than all of them."""
        if not self.stop or not self.can_cache:
            return None
        wants = [self.wants[i].tokens for i in batch]
        span = Span([tokens[0] - prefix for tokens in wants], max(tokens[-1] - tokens[0] + 1 for tokens in wants))
        return span if can_run_span(self.model, self.stop - 1, span, width, prefix) else None

    def _readers(self, names: Sequence[str], batch: list[int], begins: list[int], width: int) -> list[FwdHook]:
        return [(name, self._reader(name, batch, begins, width)) for name in names]

    def _reader(self, name: str, batch: list[int], begins: list[int], width: int) -> Callable[..., None]:
        """A hook function that copies the wanted tokens of one batch into the output rows, and changes nothing.

        begins: the token of each prompt that the first of the `width` columns holds.
        """
        across = name.endswith(("hook_attn_scores", "hook_pattern"))  # heads stand where tokens should
        source, column, row = [], [], []
        for b, i in enumerate(batch):
            want = self.wants[i]
            for k, token in enumerate(want.tokens):
                source.append(b)
                column.append(token - begins[b])
                row.append(want.first_row + (0 if self.mean else k))

        def read(act: Tensor, hook: object) -> None:
            if across or act.ndim < 3 or act.shape[:2] != (len(batch), width):
                raise ModelError(f"{name} has shape {tuple(act.shape)}: only hooks with [batch, pos, ...] can be read")
            wide = torch.float64 if act.dtype == torch.float64 else torch.float32
            taken = act.detach()[source, column].flatten(1).to(wide)
            if name not in self.out:
                self.out[name] = torch.zeros(self.n_rows, taken.shape[1], dtype=wide)
            if not self.mean:
                self.out[name][row] = taken.cpu()
                return
            # float64 sums: averaging long spans in float32 would lose the difference between two similar means.
            sums = torch.zeros(len(batch), taken.shape[1], dtype=torch.float64)
            sums.index_add_(0, torch.tensor(source), taken.double().cpu())
            counts = torch.bincount(torch.tensor(source), minlength=len(batch))
            self.out[name][[self.wants[i].first_row for i in batch]] = (sums / counts[:, None]).to(wide)

        return read

    def result(self) -> Captured:
        if silent := [name for name in self.hooks if name not in self.out]:
            raise ModelError(f"hook {silent[0]!r} did not fire in a forward pass of this model, so it cannot be read")
        prompt: list[int] = []
        pos: list[int] = []
        for i, want in enumerate(self.wants):
            tokens = want.tokens[-1:] if self.mean else want.tokens
            prompt += [i] * len(tokens)
            pos += tokens
        return Captured(self.out, torch.tensor(prompt), torch.tensor(pos), tuple(self.encoded), self.token_forwards)
