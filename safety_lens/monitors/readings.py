"""What a measurement reads: a fixed choice of every concept's pairs, all of them in one forward sweep."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.activations import capture, encode_for
from safety_lens.data import Concept, ContrastPair, Encoded
from safety_lens.data.built_in import pairs_in_use
from safety_lens.errors import DataError
from safety_lens.positions import Positions, last_token

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Pairs:
    """How many pairs of each concept are read at every measurement; None reads all.

    train: pairs that the directions are fitted on. test: pairs that separability is reported on.
    """

    train: int | None = 24
    test: int | None = 16

    def __post_init__(self) -> None:
        for name, least in (("train", 4), ("test", 2)):
            asked = getattr(self, name)
            if asked is not None and asked < least:
                raise DataError(f"{name}={asked} pairs are too few: a direction with its noise needs {least} or more")


def describe_pairs(concept: Concept, pairs: Pairs) -> str:
    """One line: "pairs: built-in refusal, plain English: 64 train, 64 val, 64 test; 24 train and 16 test are read"."""
    sizes = ((len(concept.train), pairs.train), (len(concept.test), pairs.test))
    train, test = (n if most is None else min(n, most) for n, most in sizes)
    return f"pairs: {pairs_in_use(concept)}; {train} train and {test} test are read"


def chosen(concept: Concept, pairs: Pairs, seed: int) -> Concept:
    """The concept with as many pairs as are read, spread evenly over templates; the choice depends on `seed` alone."""
    return replace(
        concept,
        train=_spread(concept.train, pairs.train, seed),
        val=(),
        test=_spread(concept.test, pairs.test, seed + 1),
    )


def _spread(pairs: Sequence[ContrastPair], most: int | None, seed: int) -> tuple[ContrastPair, ...]:
    if most is None or len(pairs) <= most:
        return tuple(pairs)
    order = np.random.default_rng(seed).permutation(len(pairs))
    turn: dict[object, int] = {}
    rank = {}
    for i in order.tolist():  # the k-th pair of every template before any template's (k+1)-th
        label = pairs[i].template if pairs[i].template is not None else i
        turn[label] = turn.get(label, 0) + 1
        rank[i] = turn[label]
    kept = sorted(order.tolist(), key=lambda i: rank[i])[:most]  # stable: random among equals
    return tuple(pairs[i] for i in sorted(kept))


@dataclass(frozen=True, eq=False)
class Read:
    """One concept as the model sees it now, [hook pair d] float64. groups: template of each training pair."""

    train_pos: Float[np.ndarray, "hook n d"]
    train_neg: Float[np.ndarray, "hook n d"]
    test_pos: Float[np.ndarray, "hook m d"]
    test_neg: Float[np.ndarray, "hook m d"]

    @property
    def differences(self) -> Float[np.ndarray, "hook n d"]:
        out: np.ndarray = self.train_pos - self.train_neg
        return out

    @property
    def finite(self) -> bool:
        sides = (self.train_pos, self.train_neg, self.test_pos, self.test_neg)
        return all(bool(np.isfinite(side).all()) for side in sides)


class Reader:
    """Prompts of all concepts, tokenised once; every prompt that several pairs share is run once."""

    def __init__(
        self,
        model: HookedTransformer,
        concepts: Sequence[Concept],
        hooks: Sequence[str],
        *,
        positions: Positions = last_token,
        batch_size: int | str = "auto",
    ) -> None:
        self.concepts, self.hooks, self.positions, self.batch_size = concepts, list(hooks), positions, batch_size
        index: dict[Encoded, int] = {}
        self.rows: list[dict[tuple[str, str], list[int]]] = []
        for concept in concepts:
            rows: dict[tuple[str, str], list[int]] = {}
            for split in SPLITS:
                for side in ("positive", "negative"):
                    prompts = [getattr(pair, side) for pair in getattr(concept, split)]
                    encoded = encode_for(model, prompts, raw=concept.raw)
                    rows[split, side] = [index.setdefault(e, len(index)) for e in encoded]
            self.rows.append(rows)
        self.unique = list(index)
        ids = [[self.unique[i].ids for side in sorted(rows) for i in rows[side]] for rows in self.rows]
        self.ids: list[list[tuple[int, ...]]] = ids
        if not positions.mean and any(len(positions.pick(e)) != 1 for e in self.unique):
            raise DataError(f"positions {positions.name!r} gives several rows per prompt; a direction needs one")

    def read(self, model: HookedTransformer) -> list[Read]:
        """All concepts at all hooks in one pass, on the model's current weights."""
        captured = capture(model, self.unique, self.hooks, positions=self.positions, batch_size=self.batch_size)
        acts = np.stack([captured.acts[hook].double().numpy() for hook in self.hooks])
        out = []
        for rows in self.rows:
            sides = [acts[:, rows[split, side]] for split in SPLITS for side in ("positive", "negative")]
            out.append(Read(*sides))
        return out


def as_tensor(rows: Float[np.ndarray, "..."]) -> torch.Tensor:
    """Rows as a float64 tensor, for estimators."""
    return torch.from_numpy(np.ascontiguousarray(rows))
