"""One capture in progress: which forwards to run, where in them the wanted tokens stand, and the rows read.

Prompts are run as trees (their common beginnings once, see trees.py) where that saves tokens, else grouped by shared
prefix (its keys and values are computed once); batched by length, padded behind with an explicit mask, run only up to
the last wanted block (that one only for tokens that are read), never through the unembedding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from safety_lens.batching import GROUP_OVERHEAD, length_batches, prefix_groups
from safety_lens.data import Encoded
from safety_lens.errors import ModelError
from safety_lens.frames import running, whole
from safety_lens.kv import Span, can_run_span, expanded, right_padded, span_input
from safety_lens.loading.paths import along
from safety_lens.positions import Positions
from safety_lens.trees import Tree, can_run_trees, grow_trees, last_block, planted
from safety_lens.types import FwdHook, NamedHook

TOKEN_BUDGET = {"cpu": 1024, "mps": 4096, "cuda": 16384}
"""Padded tokens in one forward by device; larger CPU batches only move memory, larger GPU batches fill it."""
WORTH = 0.95
"""Trees are run where they take less than this share of the tokens: their attention looks at more pairs."""
T = TypeVar("T")
Spot = tuple[int, int, list[int]]
"""Row of a batch, prompt, and the columns of that row at which its wanted tokens stand."""


@dataclass(frozen=True)
class Want:
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


class Run:
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
        self.wants = [Want(tokens, start) for tokens, start in zip(picks, starts, strict=True)]
        self.n_rows = sum(sizes)
        self.out: dict[str, Tensor] = {}
        self.token_forwards = 0
        self.device = torch.device(model.cfg.device or "cpu")
        self.budget = TOKEN_BUDGET.get(self.device.type, 4096)

    @property
    def may_share(self) -> bool:
        """Whether tokens that prompts share can be run once: without blocks there are no keys and values to keep."""
        return self.can_cache and self.stop != 0

    def everything(self, reuse: bool) -> Iterator[list[int]]:
        """Run all prompts; yields the prompts of each forward when it is done."""
        ids = [e.ids for e in self.encoded]
        groups = prefix_groups(ids, self.limits(reuse))
        plan = [(prefix, list(self.batches(rows, prefix))) for prefix, rows in groups]
        trees = self.trees(ids) if reuse and self.may_share and can_run_trees(self.model, self.hooks) else []
        if trees and _size_of_trees(trees) < WORTH * self._size(plan):
            for forest in trees:
                self.shrinking(self._forward_trees, forest)
                yield [row for tree in forest for row in tree.rows]
            return
        for (prefix, batches), (_, rows) in zip(plan, groups, strict=True):
            cache = self.prefix_cache(ids[rows[0]][:prefix]) if prefix else None
            for batch in batches:
                self.shrinking(partial(self._forward, prefix=prefix, cache=cache), batch)
                yield batch

    def limits(self, reuse: bool) -> list[int]:
        """Leading tokens of each prompt that need not be run with its batch: those before the first one read."""
        return [
            min(want.tokens[0], len(e.ids) - 1) if reuse and self.may_share else 0
            for want, e in zip(self.wants, self.encoded, strict=True)
        ]

    def batches(self, rows: list[int], prefix: int) -> Iterator[list[int]]:
        rows_cap = self.batch_size if isinstance(self.batch_size, int) else None
        budget = 10**9 if rows_cap else self.budget
        for batch in length_batches([len(self.encoded[i].ids) - prefix for i in rows], budget, max_rows=rows_cap):
            yield [rows[i] for i in batch]

    def trees(self, ids: Sequence[Sequence[int]]) -> list[list[Tree]]:
        """Batches of trees; none where the caller fixed how many prompts a forward takes."""
        if self.batch_size != "auto":
            return []
        grown = grow_trees(ids)
        batches = length_batches([len(tree.tokens) for tree in grown], self.budget)
        return [[grown[i] for i in batch] for batch in batches]

    def _size(self, plan: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> int:
        """Padded tokens of a plan, with what its forwards cost beside."""
        total = 0
        for prefix, batches in plan:
            total += prefix + GROUP_OVERHEAD * ((prefix > 0) + len(batches))
            total += sum(len(rows) * (max(len(self.encoded[i].ids) for i in rows) - prefix) for rows in batches)
        return total

    def prefix_cache(self, ids: Sequence[int]) -> TransformerLensKeyValueCache:
        cache = TransformerLensKeyValueCache.init_cache(self.model.cfg, self.device, 1)
        tokens = torch.tensor([list(ids)], device=self.device)
        stop = self.model.cfg.n_layers if self.stop is None else self.stop  # a prefix never needs logits
        self.model(tokens, attention_mask=torch.ones_like(tokens), past_kv_cache=cache, stop_at_layer=stop)
        self.token_forwards += len(ids)
        return cache

    def shrinking(self, forward: Callable[[list[T]], None], batch: list[T]) -> None:
        """A forward over a batch; in halves where a GPU has no memory for the whole."""
        try:
            forward(batch)
        except torch.cuda.OutOfMemoryError:
            if self.batch_size != "auto" or len(batch) == 1:
                raise
            self.budget = max(1, self.budget // 2)
            torch.cuda.empty_cache()
            half = len(batch) // 2
            self.shrinking(forward, batch[:half])
            self.shrinking(forward, batch[half:])

    def _forward(self, batch: list[int], *, prefix: int, cache: TransformerLensKeyValueCache | None) -> None:
        tokens, mask = right_padded([self.encoded[i].ids[prefix:] for i in batch], self.device)
        self.token_forwards += tokens.numel()
        past = expanded(self.model, cache, len(batch)) if cache is not None else None
        run = partial(self.model, return_type=self.returns)
        begins, span = [prefix] * len(batch), self._span(batch, prefix, tokens.shape[1])
        if self.stop is None or span is None:
            readers = self._readers(self.hooks, self._after(batch, begins), tokens.shape)
            asked = [len(e.ids) if e.answer is None else e.answer[0] for e in (self.encoded[i] for i in batch)]
            frame = whole(mask, *(torch.tensor(numbers, device=self.device) for numbers in (asked, batch)))
            with running(frame), self.model.hooks(fwd_hooks=[*self.edits, *readers]):
                run(tokens, attention_mask=mask, past_kv_cache=past, stop_at_layer=self.stop)
            return
        last = self.stop - 1
        early, late = self._early_and_late(last)
        with self.model.hooks(fwd_hooks=self._readers(early, self._after(batch, begins), tokens.shape)):
            resid = run(tokens, attention_mask=mask, past_kv_cache=past, stop_at_layer=last)
        resid, mask, past = span_input(self.model, last, resid, mask, past, span)
        begins = [prefix + first for first in span.first]
        with self.model.hooks(fwd_hooks=self._readers(late, self._after(batch, begins), (len(batch), span.length))):
            run(resid, attention_mask=mask, past_kv_cache=past, start_at_layer=last, stop_at_layer=self.stop)

    def _forward_trees(self, forest: list[Tree]) -> None:
        tokens, mask, paths = planted(forest, self.device)
        self.token_forwards += tokens.numel()
        run = partial(self.model, return_type=self.returns)
        read = [
            (b, row, [path[t] for t in self.wants[row].tokens])
            for b, tree in enumerate(forest)
            for row, path in zip(tree.rows, tree.nodes, strict=True)
        ]
        few = [sorted({node for b, _, nodes in read if b == own for node in nodes}) for own in range(len(forest))]
        if self.stop is None or 2 * max(map(len, few)) > tokens.shape[1]:
            with along(paths), self.model.hooks(fwd_hooks=self._readers(self.hooks, read, tokens.shape)):
                run(tokens, attention_mask=mask, stop_at_layer=self.stop)
            return
        last = self.stop - 1
        early, late = self._early_and_late(last)
        with along(paths), self.model.hooks(fwd_hooks=self._readers(early, read, tokens.shape)):
            resid = run(tokens, attention_mask=mask, stop_at_layer=last)
        resid, mask, past, paths = last_block(self.model, last, resid, paths, few)
        read = [(b, row, [few[b].index(node) for node in nodes]) for b, row, nodes in read]
        with along(paths), self.model.hooks(fwd_hooks=self._readers(late, read, resid.shape[:2])):
            run(resid, attention_mask=mask, past_kv_cache=past, start_at_layer=last, stop_at_layer=self.stop)

    def _early_and_late(self, last: int) -> tuple[list[str], list[str]]:
        """Hooks that fire before block `last`, and those in it."""
        late = [name for name in self.hooks if name.startswith(f"blocks.{last}.")]
        return [name for name in self.hooks if name not in late], late

    def _span(self, batch: list[int], prefix: int, width: int) -> Span | None:
        """The columns that the last block must run for, where that is less than all of them."""
        if not self.stop or not self.can_cache:
            return None
        wants = [self.wants[i].tokens for i in batch]
        span = Span([tokens[0] - prefix for tokens in wants], max(tokens[-1] - tokens[0] + 1 for tokens in wants))
        return span if can_run_span(self.model, self.stop - 1, span, width, prefix) else None

    def _after(self, batch: list[int], begins: list[int]) -> list[Spot]:
        """Where the wanted tokens stand in a batch of prompts whose row b begins with token `begins[b]`."""
        return [(b, i, [token - begins[b] for token in self.wants[i].tokens]) for b, i in enumerate(batch)]

    def _readers(self, names: Sequence[str], spots: Sequence[Spot], shape: Sequence[int]) -> list[FwdHook]:
        return [(name, self._reader(name, spots, tuple(shape))) for name in names]

    def _reader(self, name: str, spots: Sequence[Spot], shape: tuple[int, ...]) -> Callable[..., None]:
        """A hook function that copies the wanted tokens of one batch into the output rows, and changes nothing."""
        across = name.endswith(("hook_attn_scores", "hook_pattern"))  # heads stand where tokens should
        source = [b for b, _, columns in spots for _ in columns]
        column = [k for _, _, columns in spots for k in columns]
        owner = [n for n, (_, _, columns) in enumerate(spots) for _ in columns]
        row = [
            self.wants[i].first_row + (0 if self.mean else k) for _, i, columns in spots for k in range(len(columns))
        ]

        def read(act: Tensor, hook: object) -> None:
            if across or act.ndim < 3 or tuple(act.shape[:2]) != shape:
                raise ModelError(f"{name} has shape {tuple(act.shape)}: only hooks with [batch, pos, ...] can be read")
            wide = torch.float64 if act.dtype == torch.float64 else torch.float32
            taken = act.detach()[source, column].flatten(1).to(wide)
            if name not in self.out:
                self.out[name] = torch.zeros(self.n_rows, taken.shape[1], dtype=wide)
            if not self.mean:
                self.out[name][row] = taken.cpu()
                return
            # float64 sums: averaging long spans in float32 would lose the difference between two similar means.
            sums = torch.zeros(len(spots), taken.shape[1], dtype=torch.float64)
            sums.index_add_(0, torch.tensor(owner), taken.double().cpu())
            counts = torch.bincount(torch.tensor(owner), minlength=len(spots))
            self.out[name][[self.wants[i].first_row for _, i, _ in spots]] = (sums / counts[:, None]).to(wide)

        return read

    def read(self) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
        """Prompt and token of every output row, once everything has run.

        Raises:
            ModelError: a hook that did not fire.
        """
        if silent := [name for name in self.hooks if name not in self.out]:
            raise ModelError(f"hook {silent[0]!r} did not fire in a forward pass of this model, so it cannot be read")
        prompt: list[int] = []
        pos: list[int] = []
        for i, want in enumerate(self.wants):
            tokens = want.tokens[-1:] if self.mean else want.tokens
            prompt += [i] * len(tokens)
            pos += tokens
        return torch.tensor(prompt), torch.tensor(pos)


def _size_of_trees(batches: Sequence[Sequence[Tree]]) -> int:
    return sum(GROUP_OVERHEAD + len(forest) * max(len(tree.tokens) for tree in forest) for forest in batches)
