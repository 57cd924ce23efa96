"""Artifact pairs: a natural prompt beside one that sets off an alignment artifact, by category, in three parts.

fit: directions, centres, components. calibrate: thresholds, radii, and whatever `auto` decides. report: every figure
that is reported. A pair, and all pairs that share a template or a prompt with it, is in one part only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random

from safety_lens.data import Concept, ContrastPair
from safety_lens.data.built_in import ModelHint
from safety_lens.data.concept import read_source
from safety_lens.data.formats import detect
from safety_lens.data.rows import raw_rows, read_rows
from safety_lens.data.splits import prompt_keys, split_pairs
from safety_lens.errors import DataError
from safety_lens.types import Prompt

BUILT_IN = "artifacts"
SHARES = {"fit": 0.4, "calibrate": 0.2, "report": 0.4}
"""Parts of the pairs of each category, where the data names no split."""
UNNAMED = "all"
"""The category of pairs that name none."""


@dataclass(frozen=True)
class ArtifactPairs:
    """Pairs (positive: the artifact side) in three parts.

    categories: those kept. source, sha256: where the pairs came from and a hash of all of them, parts included.
    notes: how the parts were made.

    Raises:
        DataError: too few pairs in a part.
    """

    fit: tuple[ContrastPair, ...]
    calibrate: tuple[ContrastPair, ...]
    report: tuple[ContrastPair, ...]
    source: str
    raw: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = {"fit": len(self.fit), "calibrate": len(self.calibrate), "report": len(self.report)}
        if min(counts.values()) < 2:
            found = ", ".join(f"{n} {name}" for name, n in counts.items())
            raise DataError(f"{self.source}: {found} pairs; at least 2 of each are needed: give more pairs")

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories of all pairs, sorted."""
        return tuple(sorted({category_of(p) for p in (*self.fit, *self.calibrate, *self.report)}))

    @property
    def sha256(self) -> str:
        """Hash of the prompts, categories and parts."""
        parts = [
            [(p.positive, p.negative, p.category) for p in part] for part in (self.fit, self.calibrate, self.report)
        ]
        return sha256(repr((parts, self.raw)).encode()).hexdigest()


def category_of(pair: ContrastPair) -> str:
    """The category of a pair, or `UNNAMED`."""
    return pair.category or UNNAMED


def artifact_pairs(
    source: "str | Path | Concept | Sequence[ContrastPair] | ArtifactPairs" = BUILT_IN,
    *,
    categories: Sequence[str] | None = None,
    model: ModelHint = None,
    seed: int = 0,
) -> ArtifactPairs:
    """Pairs of a source, divided, with only the categories wanted.

    Args:
        source: "artifacts" (shipped with the organism), a built-in concept, a file or "hf:..." as `load_concept` takes
            them, a Concept (its val pairs calibrate; without any, a third of its train pairs do), or pairs.
        categories: None for all of them.
        model: The model that a built-in concept is meant for, as in `load_concept`.
        seed: divides the pairs where the data does not say how.

    Raises:
        DataError: an unknown category (the message lists those there are), or too few pairs.
    """
    if isinstance(source, ArtifactPairs):
        whole = source
    elif isinstance(source, Concept):
        whole = _of_concept(source, seed)
    elif isinstance(source, str | Path):
        whole = _of_file(str(source), model, seed)
    else:
        whole = _divided(list(source), "pairs given in Python", seed)
    return whole if categories is None else _only(whole, categories)


def _only(whole: ArtifactPairs, wanted: Sequence[str]) -> ArtifactPairs:
    known = whole.categories
    if not wanted:
        raise DataError(f"no category was named; {whole.source} has {', '.join(known)}")
    if unknown := [name for name in wanted if name not in known]:
        raise DataError(f"no category {unknown[0]!r} in {whole.source}: it has {', '.join(known)}")
    fit, calibrate, report = (
        tuple(p for p in part if category_of(p) in wanted) for part in (whole.fit, whole.calibrate, whole.report)
    )
    return ArtifactPairs(fit, calibrate, report, whole.source, whole.raw, whole.notes)


def _of_file(name: str, model: ModelHint, seed: int) -> ArtifactPairs:
    from safety_lens.organism import DATA_DIR

    table = read_rows(DATA_DIR / "artifacts.jsonl") if name == BUILT_IN else read_source(name, model)
    form = detect(table.rows)
    drafts, notes = form.read(table.rows, seed)
    raw = raw_rows(table.rows, form.raw)
    if not {draft.split for draft in drafts} & {"val", "test"}:
        return _divided([draft.pair for draft in drafts], name, seed, raw, notes)
    found = split_pairs(drafts, seed, name)
    concept = Concept(name, found.train, found.val, found.test, name, table.sha256, raw, (*notes, *found.notes))
    return _of_concept(concept, seed)


def _of_concept(concept: Concept, seed: int) -> ArtifactPairs:
    if concept.val:
        return ArtifactPairs(concept.train, concept.val, concept.test, concept.source, concept.raw, concept.notes)
    parts = _parts(concept.train, {"fit": 2 / 3, "calibrate": 1 / 3}, seed)
    note = f"a third of the train pairs calibrate (seed {seed})"
    return ArtifactPairs(
        parts["fit"], parts["calibrate"], concept.test, concept.source, concept.raw, (*concept.notes, note)
    )


def _divided(
    pairs: Sequence[ContrastPair], source: str, seed: int, raw: bool = False, notes: Sequence[str] = ()
) -> ArtifactPairs:
    parts = _parts(pairs, SHARES, seed)
    counts = "/".join(str(len(parts[name])) for name in SHARES)
    note = f"pairs divided with seed {seed} ({counts} fit/calibrate/report), inside each category"
    return ArtifactPairs(parts["fit"], parts["calibrate"], parts["report"], source, raw, (*notes, note))


def _parts(pairs: Sequence[ContrastPair], shares: dict[str, float], seed: int) -> dict[str, tuple[ContrastPair, ...]]:
    """Pairs dealt out category by category; pairs that share a template or a prompt stay together."""
    rng = Random(seed)
    parts: dict[str, list[ContrastPair]] = {name: [] for name in shares}
    groups = _families(pairs)
    rng.shuffle(groups)
    for category in sorted({category_of(p) for p in pairs}):
        own = [g for g in groups if category_of(g[0]) == category]
        placed = dict.fromkeys(shares, 0)
        for group in own:
            total = sum(placed.values()) + len(group)
            name = max(shares, key=lambda part: shares[part] * total - placed[part])
            placed[name] += len(group)
            parts[name] += group
    return {name: tuple(members) for name, members in parts.items()}


def _families(pairs: Sequence[ContrastPair]) -> list[list[ContrastPair]]:
    """Groups of pairs that share a template or a prompt, directly or through others."""
    groups: list[tuple[set[tuple[str, str]], list[ContrastPair]]] = []
    for pair in pairs:
        keys = {("prompt", key) for key in prompt_keys(pair)}
        if pair.template is not None:
            keys.add(("template", pair.template))
        members = [pair]
        apart = []
        for known, group in groups:
            if known & keys:
                keys |= known
                members = group + members
            else:
                apart.append((known, group))
        groups = [*apart, (keys, members)]
    return [members for _, members in groups]


def naturals(pairs: Sequence[ContrastPair]) -> list[Prompt]:
    """The natural prompts of pairs."""
    return [pair.negative for pair in pairs]


def artifacts(pairs: Sequence[ContrastPair]) -> list[Prompt]:
    """The artifact prompts of pairs."""
    return [pair.positive for pair in pairs]
