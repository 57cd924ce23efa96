"""Contrast pairs turned into activations: one sweep over the prompts serves all concepts, hooks and methods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.activations import Captured, capture, encode_for
from safety_lens.data import Concept, ContrastPair, Encoded
from safety_lens.errors import DataError
from safety_lens.positions import Positions, last_token, mean_over
from safety_lens.types import Prompt

EMBEDDING = "hook_embed"


@dataclass(frozen=True, eq=False)
class Sides:
    """Rows of one split at one hook: row i of both sides is pair i. groups: template of each pair, None = unknown."""

    pos: Float[Tensor, "pair d"]
    neg: Float[Tensor, "pair d"]
    groups: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.pos)

    def only(self, keep: Sequence[int]) -> "Sides":
        index = torch.as_tensor(list(keep), dtype=torch.long)
        return Sides(self.pos[index], self.neg[index], tuple(self.groups[i] for i in keep))

    def swapped(self, swap: Sequence[bool]) -> "Sides":
        """The same pairs with the sides exchanged where `swap` says so: the shuffled-label null."""
        where = torch.as_tensor(list(swap))[:, None]
        return Sides(torch.where(where, self.neg, self.pos), torch.where(where, self.pos, self.neg), self.groups)


@dataclass(frozen=True, eq=False)
class ConceptActivations:
    """A concept as a model sees it. sides: split → hook → rows; embedding: split → mean token embeddings.

    truncated: distinct prompts whose user text was cut to fit the context.
    """

    concept: Concept
    positions: Positions
    hooks: tuple[str, ...]
    sides: dict[str, dict[str, Sides]]
    embedding: dict[str, Sides]
    length: dict[str, Sides]
    truncated: int = 0

    def at(self, hooks: Sequence[str]) -> "ConceptActivations":
        """The same reading, restricted to some of its hooks."""
        return replace(self, hooks=tuple(dict.fromkeys(hooks)))

    def pairs(self, split: str) -> tuple[ContrastPair, ...]:
        return tuple(getattr(self.concept, split))


def read_concepts(
    model: HookedTransformer,
    concepts: Sequence[Concept],
    hooks: Sequence[str],
    *,
    positions: Positions = last_token,
    truncate: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    batch_size: int | str = "auto",
    on_batch: Callable[[int], None] | None = None,
) -> list[ConceptActivations]:
    """Read every prompt of every concept once, at all hooks.

    Prompts that occur in several pairs or concepts are run once. `positions` must give one row per prompt.

    Raises:
        DataError: a position rule with several rows per prompt, a prompt too long, or an empty split.
    """
    for concept in concepts:
        _check_splits(concept)
    index: dict[Encoded, int] = {}  # equal ids with other spans are read at other tokens
    unique: list[Encoded] = []
    where: dict[tuple[str, int, str, str], list[int]] = {}
    for c, concept in enumerate(concepts):
        for split in ("train", "val", "test"):
            pairs: Sequence[ContrastPair] = getattr(concept, split)
            for side in ("positive", "negative"):
                prompts: list[Prompt] = [getattr(pair, side) for pair in pairs]
                encoded = _encode(model, concept, split, side, prompts, truncate, template_kwargs)
                rows = []
                for e in encoded:
                    if e not in index:
                        index[e] = len(unique)
                        unique.append(e)
                    rows.append(index[e])
                where[concept.name, c, split, side] = rows
    if not positions.mean and any(len(positions.pick(e)) != 1 for e in unique):
        raise DataError(
            f"positions {positions.name!r} gives several rows per prompt; a direction needs one: use last, mean:K,"
            " mean:instruction or answer_letter"
        )
    captured = capture(model, unique, hooks, positions=positions, batch_size=batch_size, on_batch=on_batch)
    embedded = capture(model, unique, [EMBEDDING], positions=mean_over("all"))
    return [_gather(c, concept, hooks, positions, captured, embedded, where) for c, concept in enumerate(concepts)]


def _encode(
    model: HookedTransformer,
    concept: Concept,
    split: str,
    side: str,
    prompts: list[Prompt],
    truncate: bool,
    template_kwargs: dict[str, Any] | None,
) -> list[Encoded]:
    if not prompts:
        return []
    try:
        return encode_for(model, prompts, raw=concept.raw, truncate=truncate, template_kwargs=template_kwargs)
    except DataError as error:
        raise DataError(f"{concept.name}, {split} split, {side} side: {error}") from error


def _check_splits(concept: Concept) -> None:
    if len(concept.train) < 4:
        raise DataError(
            f"concept {concept.name!r} has {len(concept.train)} training pairs; a direction with evidence needs 4"
        )
    if len(concept.test) < 2:
        raise DataError(
            f"concept {concept.name!r} has {len(concept.test)} pairs to report on; it needs 2 in a test split"
        )


def _gather(
    c: int,
    concept: Concept,
    hooks: Sequence[str],
    positions: Positions,
    captured: Captured,
    embedded: Captured,
    where: dict[tuple[str, int, str, str], list[int]],
) -> ConceptActivations:
    lengths = torch.tensor([[float(len(e.ids))] for e in captured.encoded])
    sides: dict[str, dict[str, Sides]] = {}
    embedding: dict[str, Sides] = {}
    length: dict[str, Sides] = {}
    for split in ("train", "val", "test"):
        pos = torch.as_tensor(where[concept.name, c, split, "positive"], dtype=torch.long)
        neg = torch.as_tensor(where[concept.name, c, split, "negative"], dtype=torch.long)
        groups = tuple(pair.template for pair in getattr(concept, split))
        sides[split] = {h: Sides(captured.acts[h][pos], captured.acts[h][neg], groups) for h in hooks}
        embedding[split] = Sides(embedded.acts[EMBEDDING][pos], embedded.acts[EMBEDDING][neg], groups)
        length[split] = Sides(lengths[pos], lengths[neg], groups)
    mine = {row for (_, index, _, _), rows in where.items() if index == c for row in rows}
    truncated = sum(captured.encoded[row].truncated > 0 for row in mine)
    return ConceptActivations(concept, positions, tuple(dict.fromkeys(hooks)), sides, embedding, length, truncated)


STORED = {"float16": torch.float16, "float32": torch.float32}


def stored_dtype(name: str) -> torch.dtype:
    """The dtype in which activations are kept.

    Raises:
        DataError: another name than float16 and float32.
    """
    if name not in STORED:
        raise DataError(f"activations are kept as {' or '.join(STORED)}, not {name!r}")
    return STORED[name]


def kept_bytes(acts: ConceptActivations, hooks: Sequence[str], dtype: str) -> int:
    """Bytes that `kept_rows` of these hooks will take."""
    values = sum(acts.sides[split][hook].pos.numel() * 2 for split in acts.sides for hook in hooks)
    return values * stored_dtype(dtype).itemsize


def kept_rows(acts: ConceptActivations, hooks: Sequence[str], dtype: str) -> dict[str, Float[Tensor, "pair d"]]:
    """Rows to store, as `<concept>/<split>/<side>/<hook>`; row i is pair i of the split.

    Raises:
        DataError: a value too large for float16.
    """
    out = {}
    for split, by_hook in acts.sides.items():
        for hook in hooks:
            for side in ("pos", "neg"):
                rows = getattr(by_hook[hook], side).to(stored_dtype(dtype))
                if not bool(torch.isfinite(rows).all()):
                    raise DataError(f"{hook} holds values beyond {dtype}; keep activations as float32")
                out[f"{acts.concept.name}/{split}/{'positive' if side == 'pos' else 'negative'}/{hook}"] = (
                    rows.contiguous()
                )
    return out
