"""Which pairs fit, which choose, which report.

Splits that the rows name are taken as they are. Where they name none, splits are made: seeded, 60/20/20, and no
template and no prompt ever stands in two of them, because a direction that has seen the wording of a test prompt has
been told the answer. Categories are spread evenly, so that every split holds the same mix.
"""

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from safety_lens.data.formats import Draft
from safety_lens.data.pairs import ContrastPair, last_user_text
from safety_lens.errors import DataError

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
MIN_PAIRS = 10
"""Fewer pairs than this cannot be split into something to fit on and something to report on."""
MIN_TRAIN = 2
MIN_TEST = 2


class Splits(NamedTuple):
    """Pairs by split, and how they came there."""

    train: tuple[ContrastPair, ...]
    val: tuple[ContrastPair, ...]
    test: tuple[ContrastPair, ...]
    notes: tuple[str, ...]


def normalised(text: str) -> str:
    """The text without what does not tell prompts apart: case, white space, punctuation at the ends."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


def prompt_keys(pair: ContrastPair) -> set[str]:
    """The normalised user texts of both sides: pairs that share one are about the same prompt."""
    return {normalised(last_user_text(side)) for side in (pair.positive, pair.negative)}


def split_pairs(drafts: Sequence[Draft], seed: int, source: str) -> Splits:
    """Sort drafts into train, val and test.

    Raises:
        DataError: only some rows name a split; no train rows; too few pairs; or too few templates to hold one out.
    """
    named = Counter(draft.split for draft in drafts)
    if None in named and len(named) > 1:
        raise DataError(
            f"{source}: {named[None]} of {len(drafts)} pairs name no split and the others do: give all one, or none"
        )
    if set(named) <= {None, "train"}:
        made = _made([draft.pair for draft in drafts], seed, source)
        if "train" in named:
            return made._replace(notes=("every row says 'train': val and test were taken out of it", *made.notes))
        return made
    return _given(drafts, source)


def _given(drafts: Sequence[Draft], source: str) -> Splits:
    parts = {name: tuple(d.pair for d in drafts if d.split == name) for name in SHARES}
    notes: list[str] = []
    if parts["val"] and not parts["test"]:
        parts["val"], parts["test"] = (), parts["val"]
        notes.append("train and val only: the val rows report (test), and selection happens inside train")
    elif not parts["val"]:
        notes.append("train and test only: selection happens inside train")
    if len(parts["train"]) < MIN_TRAIN or len(parts["test"]) < MIN_TEST:
        counts = ", ".join(f"{len(pairs)} {name}" for name, pairs in parts.items())
        raise DataError(
            f"{source}: {counts} pairs; at least {MIN_TRAIN} to fit on (train) and {MIN_TEST} to report on (test, "
            "or else val) are needed"
        )
    return Splits(parts["train"], parts["val"], parts["test"], (*notes, *_leaks(parts)))


def _leaks(parts: dict[str, tuple[ContrastPair, ...]]) -> list[str]:
    """What train shares with the pairs that report: said, not repaired, because the split is the author's."""
    notes = []
    templates = {p.template for p in parts["train"]} & {p.template for p in parts["test"]} - {None}
    if templates:
        names = ", ".join(sorted(map(str, templates)))
        notes.append(f"templates in both train and test: {names}; leave-template-out evaluation is the honest one")
    seen = {key for pair in parts["train"] for key in prompt_keys(pair)}
    repeated = sum(bool(prompt_keys(pair) & seen) for pair in parts["test"])
    if repeated:
        notes.append(f"{repeated} of {len(parts['test'])} test pairs have a prompt that is also in train")
    systems = {_systems(pair) for pair in parts["train"]}
    shared = sum(_systems(pair) in systems for pair in parts["test"] if len(set(_systems(pair))) > 1)
    if shared:
        total = len(parts["test"])
        notes.append(f"{shared} of {total} test pairs contrast the same two system prompts as a pair in train")
    return notes


def _systems(pair: ContrastPair) -> tuple[str, str]:
    """The system texts of both sides, "" where there is none."""
    positive, negative = (
        "" if isinstance(side, str) else next((turn["content"] for turn in side if turn["role"] == "system"), "")
        for side in (pair.positive, pair.negative)
    )
    return positive, negative


def _made(pairs: Sequence[ContrastPair], seed: int, source: str) -> Splits:
    if len(pairs) < MIN_PAIRS:
        raise DataError(
            f"{source}: {len(pairs)} pairs without splits; at least {MIN_PAIRS} are needed to make train, val and test"
        )
    groups = _groups(pairs)
    if len(groups) < len(SHARES):
        raise DataError(
            f"{source}: its {len(pairs)} pairs fall into {len(groups)} group(s) that share a template or a prompt, and "
            f"no group may be in two splits. {len(SHARES)} groups are needed: add templates, or name splits in the rows"
        )
    parts: dict[str, list[int]] = {name: [] for name in SHARES}
    placed = 0
    for group in _spread(groups, pairs, Random(seed)):
        placed += len(group)
        name = max(SHARES, key=lambda part: SHARES[part] * placed - len(parts[part]))
        parts[name] += group
    for name, members in parts.items():
        if not members:
            raise DataError(f"{source}: its templates are too unequal to fill '{name}': name splits in the rows")
    train, val, test = (tuple(pairs[index] for index in sorted(parts[name])) for name in SHARES)
    by = "template" if any(pair.template is not None for pair in pairs) else "prompt"
    note = f"splits made with seed {seed} ({len(train)}/{len(val)}/{len(test)} train/val/test), by {by}"
    return Splits(train, val, test, (note, *_leaks({"train": train, "test": test})))


def _groups(pairs: Sequence[ContrastPair]) -> list[list[int]]:
    """Indices of pairs that must stay together: same template, or same prompt on either side."""
    parent = list(range(len(pairs)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, pair in enumerate(pairs):
        keys = {("prompt", key) for key in prompt_keys(pair)}
        if pair.template is not None:
            keys.add(("template", pair.template))
        for key in keys:
            parent[root(index)] = root(first.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(pairs)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def _spread(groups: list[list[int]], pairs: Sequence[ContrastPair], rng: Random) -> list[list[int]]:
    """Groups in random order, category after category: filling splits in this order gives each its share of each."""
    rng.shuffle(groups)
    categories = sorted({str(pair.category) for pair in pairs})
    rng.shuffle(categories)
    rank = {category: place for place, category in enumerate(categories)}
    return sorted(groups, key=lambda group: rank[str(pairs[group[0]].category)])
