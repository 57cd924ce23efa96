"""Text from a hooked model: batched, left-padded and masked, KV-cached, greedy or sampled with a stream per prompt.

`HookedTransformer.generate` ignores the attention mask of token tensors (rows of a ragged batch then differ from the
same rows alone), so the loop here passes masks explicitly and lets positions follow from them. Prompts that several
rows share are run once wherever no edit touches them, and rows that have ended leave the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from safety_lens.activations import encode_for
from safety_lens.batching import GROUP_OVERHEAD, check_batch_size, length_batches
from safety_lens.data import Encoded
from safety_lens.errors import DataError
from safety_lens.forced import hooked_after_blocks, unembedded
from safety_lens.frames import Frame, running, whole
from safety_lens.kv import left_padded, picked
from safety_lens.models import named_hooks
from safety_lens.progress import progressed
from safety_lens.sampling import Sampling
from safety_lens.trees import common_length
from safety_lens.types import FwdHook, NamedHook, Prompt

ROW_BUDGET = {"cpu": 8192, "mps": 16384, "cuda": 131072}
"""Tokens, prompt and answer together, that the caches of one batch may hold."""
NAN = float("nan")


@dataclass(frozen=True)
class Generation:
    """One continuation.

    tokens: new token ids without the stop token. stopped: whether a stop token ended it. first: what `read_first` made
    of the logits that chose its first token, NaN without one.
    """

    prompt: Prompt | Encoded
    text: str
    tokens: tuple[int, ...]
    stopped: bool
    first: float = NAN


@dataclass(frozen=True)
class _Plan:
    """What all batches of one call share."""

    hooks: list[NamedHook]
    max_new_tokens: int
    sampling: Sampling
    stops: frozenset[int]
    read_first: Callable[[Tensor], Tensor] | None
    on_token: Callable[[int, int], None] | None
    may_share: bool


def generate(
    model: HookedTransformer,
    prompts: Sequence[Prompt | Encoded],
    *,
    hooks: Sequence[FwdHook] = (),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    streams: Sequence[tuple[int, int]] | None = None,
    ignore_eos: bool = False,
    batch_size: int | str = "auto",
    raw: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    read_first: Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Continue each prompt, with forward hooks active on every forward (prompt and new tokens).

    Args:
        hooks: TransformerLens `fwd_hooks`; with the cache, later forwards see one token at a time. Edits of
            `safety_lens.interventions` know which tokens those are; `by_row` gives every prompt its own.
        temperature, top_p, top_k, repetition_penalty: see `Sampling`; temperature 0 is greedy.
        streams: (seed, number) of each prompt's random stream, by default (seed, index of the prompt). Prompts with
            equal streams draw the same numbers; no draw depends on the batch a prompt lands in.
        ignore_eos: go on to `max_new_tokens` past stop tokens.
        batch_size: rows per forward, or "auto".
        read_first: function of the logits that choose each row's first new token, kept as `Generation.first`.
        on_token: called with (index of the prompt, token id) as tokens come.

    Raises:
        DataError: a prompt and `max_new_tokens` exceed the context, or a bad number.
        HookNameError: a hook the model does not have.
    """
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    check_batch_size(batch_size)
    named = named_hooks(model, hooks)
    encoded = encode_for(model, prompts, raw=raw, template_kwargs=template_kwargs)
    _check_lengths(model, encoded, max_new_tokens)
    streams = [(seed, i) for i in range(len(prompts))] if streams is None else streams
    if len(streams) != len(prompts):
        raise DataError(f"{len(prompts)} prompts need as many random streams, got {len(streams)}")
    plan = _Plan(
        named,
        max_new_tokens,
        Sampling(temperature, top_p, top_k, repetition_penalty),
        frozenset() if ignore_eos else stop_tokens(model),
        read_first,
        on_token,
        _may_share(model, named),
    )
    done: dict[int, Generation] = {}
    cap = batch_size if isinstance(batch_size, int) else None
    budget = 10**9 if cap else ROW_BUDGET.get(torch.device(model.cfg.device or "cpu").type, 8192)
    # Every further batch costs as many forwards as there are new tokens: padding is cheaper than that.
    overhead = GROUP_OVERHEAD * max_new_tokens
    lengths = [len(e.ids) + max_new_tokens for e in encoded]
    for batch in length_batches(lengths, budget, max_rows=cap, overhead=overhead):
        generators = [torch.Generator().manual_seed(_stream_seed(*streams[i])) for i in batch]
        for i, row in zip(batch, _Batch(model, encoded, batch, generators, plan).run(), strict=True):
            done[i] = Generation(prompts[i], _decode(model, row.tokens), row.tokens, row.stopped, row.first)
        progressed("answers", len(done), len(prompts))
        if on_batch:
            on_batch(len(batch))
    return [done[i] for i in range(len(prompts))]


def _check_lengths(model: HookedTransformer, encoded: Sequence[Encoded], max_new_tokens: int) -> None:
    for i, e in enumerate(encoded):
        if len(e.ids) + max_new_tokens > model.cfg.n_ctx:
            raise DataError(
                f"prompt {i} has {len(e.ids)} tokens; with {max_new_tokens} new ones it exceeds the model's context of"
                f" {model.cfg.n_ctx}"
            )


def stop_tokens(model: HookedTransformer) -> frozenset[int]:
    """Ids that end a generation: the model's own (its generation settings may name several) and the tokenizer's."""
    ids = set(getattr(getattr(model, "origin", None), "stop_tokens", ()))
    own = getattr(model.tokenizer, "eos_token_id", None)
    return frozenset(ids if own is None else ids | {own})


def _may_share(model: HookedTransformer, hooks: Sequence[NamedHook]) -> bool:
    """Whether equal prompts have equal keys and values up to their last token: no active hook touches them there."""
    active = [fn for _, fn in hooks]
    active += [held.user_hook for point in model.hook_dict.values() for held in point.fwd_hooks]
    return all(getattr(fn, "spares_prompt", False) for fn in active)


def _stream_seed(seed: int, row: int) -> int:
    """Distinct 63-bit seeds for neighbouring (seed, row); torch mixes them further."""
    return (seed * 1_000_003 + row * 7_919 + 17) & (2**63 - 1)


def _decode(model: HookedTransformer, tokens: Sequence[int]) -> str:
    return "" if model.tokenizer is None else str(model.tokenizer.decode(list(tokens), skip_special_tokens=True))


@dataclass
class _Row:
    """A row in the making: its number in the caller's list, its random stream, what it has written."""

    number: int
    length: int
    stream: torch.Generator
    tokens: tuple[int, ...] = ()
    stopped: bool = False
    first: float = NAN


class _Batch:
    """One batch in the making: caches, masks, rows that still write."""

    cache: TransformerLensKeyValueCache

    def __init__(
        self,
        model: HookedTransformer,
        encoded: Sequence[Encoded],
        batch: Sequence[int],
        streams: Sequence[torch.Generator],
        plan: _Plan,
    ) -> None:
        self.model, self.plan, self.mark = model, plan, object()
        self.device = torch.device(model.cfg.device or "cpu")
        self.ids = [encoded[i].ids for i in batch]
        self.rows = [_Row(i, len(encoded[i].ids), s) for i, s in zip(batch, streams, strict=True)]
        self.active = list(range(len(batch)))
        self.seen: Bool[Tensor, "batch d_vocab"] | None = None
        if plan.sampling.penalises:
            self.seen = torch.zeros(len(batch), model.cfg.d_vocab_out, dtype=torch.bool, device=self.device)
            for i, ids in enumerate(self.ids):
                self.seen[i, list(ids)] = True

    def run(self) -> list[_Row]:
        """Write until every row has stopped or is full."""
        plan = self.plan
        with torch.no_grad(), self.model.hooks(fwd_hooks=plan.hooks):
            logits = self._prompts()
            if plan.read_first is not None:
                for row, value in zip(self.rows, plan.read_first(logits).tolist(), strict=True):
                    row.first = value
            for step in range(plan.max_new_tokens):
                progressed(f"tokens of {len(self.rows)} answers", step, plan.max_new_tokens)
                chosen = plan.sampling.choose(logits, self.seen, [self.rows[i].stream for i in self.active])
                chosen = self._note(chosen)
                if not self.active or step + 1 == plan.max_new_tokens:
                    break
                logits = self._forward(chosen[:, None].to(self.device), torch.ones(len(chosen), 1, dtype=torch.long))
        return self.rows

    def _note(self, chosen: Int[Tensor, " batch"]) -> Int[Tensor, " left"]:
        """Record one token per active row; rows that have ended leave the batch. Returns the tokens of those left."""
        going = []
        for k, (i, token) in enumerate(zip(self.active, chosen.tolist(), strict=True)):
            row = self.rows[i]
            row.stopped = token in self.plan.stops
            if row.stopped:
                continue
            going.append(k)
            row.tokens += (token,)
            if self.plan.on_token:
                self.plan.on_token(row.number, token)
        if self.seen is not None:
            self.seen[torch.arange(len(chosen)), chosen.to(self.device)] = True
        if len(going) < len(self.active):
            self.active = [self.active[k] for k in going]
            kept = torch.tensor(going, dtype=torch.long)
            chosen, self.cache = chosen[kept], picked(self.model, self.cache, kept)
            self.seen = None if self.seen is None else self.seen[kept.to(self.device)]
        return chosen

    def _prompts(self) -> Float[Tensor, "batch d_vocab"]:
        """Run the prompts; their common beginning, and equal ones, once, where edits spare them.

        Returns:
            The logits behind their last tokens.
        """
        kinds, done = list(dict.fromkeys(self.ids)), self._common()
        equal = self.plan.may_share and len(kinds) < len(self.ids) and min(map(len, kinds)) > done + 1
        first = kinds if equal else self.ids
        self.cache = TransformerLensKeyValueCache.init_cache(self.model.cfg, self.device, 1 if done else len(first))
        if done:
            self._read([self.ids[0][:done]], [0])
            self._pick([0] * len(first))
        if not equal:
            return self._forward(*left_padded([ids[done:] for ids in self.ids], self.device))
        self._read([ids[done:-1] for ids in kinds], [self.ids.index(ids) for ids in kinds])
        number = {ids: k for k, ids in enumerate(kinds)}
        self._pick([number[ids] for ids in self.ids])
        last = torch.tensor([[ids[-1]] for ids in self.ids], device=self.device)
        return self._forward(last, torch.ones_like(last))

    def _common(self) -> int:
        """Tokens of the common beginning that is run once; 0 where that is not exact or saves nothing."""
        windowed = any(block.attn.attn_type == "local" for block in self.model.blocks)  # counted in columns: no gaps
        if not self.plan.may_share or windowed or len(self.ids) == 1:
            return 0
        common = min(common_length(self.ids[0], ids) for ids in self.ids)
        return min(common, min(map(len, self.ids)) - 1)

    def _pick(self, rows: Sequence[int]) -> None:
        """Let the cache hold these of its rows."""
        self.cache = picked(self.model, self.cache, torch.tensor(rows))

    def _read(self, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        """Run tokens of some rows for their keys and values alone."""
        tokens, mask = left_padded(ids, self.device)
        with running(self._frame(mask, self.cache.previous_attention_mask.sum(1), rows)):
            self.model(tokens, attention_mask=mask, past_kv_cache=self.cache, stop_at_layer=self.model.cfg.n_layers)

    def _forward(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch d_vocab"]:
        mask = mask.to(self.device)
        frame = self._frame(mask, self.cache.previous_attention_mask.sum(1), self.active)
        reads = {"attention_mask": mask, "past_kv_cache": self.cache}
        with running(frame):
            if tokens.shape[1] == 1 or hooked_after_blocks(self.model):
                logits: Tensor = self.model(tokens, **reads)
                return logits[:, -1]
            resid = self.model(tokens, **reads, stop_at_layer=self.model.cfg.n_layers)
        return unembedded(self.model, resid[:, -1:])[:, -1]

    def _frame(self, mask: Int[Tensor, "batch pos"], before: Int[Tensor, " batch"], rows: Sequence[int]) -> Frame:
        """The frame of a forward behind `before` cached tokens of each row."""
        prompt = torch.tensor([self.rows[i].length for i in rows], device=self.device)
        frame = whole(mask, prompt, torch.tensor([self.rows[i].number for i in rows], device=self.device))
        behind = before.to(self.device)[:, None]
        return Frame(torch.where(mask > 0, frame.position + behind, -1), frame.prompt, frame.row, self.mark)
