"""Building contrast pairs from a named source: read, pair, draw, split, and say where every row is from."""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from safety_lens.data.concept import read_source
from safety_lens.data.formats import detect
from safety_lens.data.rows import Row, check_ids
from safety_lens.data.sources import SOURCES, Fields, Source
from safety_lens.data.splits import SHARES, split_pairs
from safety_lens.errors import DataError


class Built(NamedTuple):
    """Rows ready to be written, and what should be known about them."""

    rows: list[Fields]
    notes: tuple[str, ...]


def build_pairs(
    concept: str, *, source: str | None = None, files: Sequence[str] = (), n: int | None = None, seed: int = 0
) -> Built:
    """Build contrast pairs of a concept from a named source.

    Args:
        source: a name out of `SOURCES`; None: the concept's first.
        files: local copies of the source's inputs, in their order; none: the Hub's.
        n: how many pairs to keep, drawn at random; None: all.
        seed: for pairing, drawing and splitting.

    Raises:
        DataError: unknown concept or source, a missing input, rows the source cannot read, fewer than `n` pairs.
    """
    chosen = find_source(concept, source)
    tables = [read_source(name).rows for name in _inputs(chosen, files)]
    rng = Random(seed)
    pairs = chosen.build(tables, rng)
    if n is not None and n > len(pairs):
        raise DataError(f"asked for {n} pairs, source '{chosen.name}' gives {len(pairs)}: lower --n or add data")
    read = " + ".join(str(len(table)) for table in tables)
    note = f"{len(pairs)} pairs from {read} rows of {chosen.name}" + (
        "" if n is None else f", {n} drawn with seed {seed}"
    )
    kept = pairs if n is None else rng.sample(pairs, n)
    rows, notes = _with_splits([_complete(row, chosen, number) for number, row in enumerate(kept)], chosen, seed)
    return Built(rows, (note, *notes))


def find_source(concept: str, name: str | None = None) -> Source:
    """The source of that name for the concept, or the concept's first."""
    of_concept = [source for source in SOURCES if source.concept == concept]
    if not of_concept:
        known = ", ".join(dict.fromkeys(source.concept for source in SOURCES))
        raise DataError(f"no source for the concept '{concept}': pairs can be built for {known}")
    if name is None:
        return of_concept[0]
    for source in of_concept:
        if source.name == name:
            return source
    raise DataError(f"no source '{name}' for {concept}: choose one of {', '.join(s.name for s in of_concept)}")


def _inputs(source: Source, files: Sequence[str]) -> Sequence[str]:
    wanted = "; ".join(f"{place}. {name}" for place, name in enumerate(source.inputs, start=1))
    if files and len(files) != len(source.inputs):
        raise DataError(
            f"source '{source.name}' reads {len(source.inputs)} input(s), got {len(files)}: "
            f"give --from once for each ({wanted})"
        )
    if not files and not all(name.startswith("hf:") for name in source.inputs):
        raise DataError(f"source '{source.name}' is not on the Hub: give a local copy with --from ({wanted})")
    return files or source.inputs


def _complete(row: Fields, source: Source, number: int) -> Fields:
    fields = {"id": f"{source.concept}-{source.name}-{number:04d}", "concept": source.concept, **row}
    return {**fields, "source": row.get("source", source.name), "licence": row.get("licence", source.licence)}


def _with_splits(rows: list[Fields], source: Source, seed: int) -> Built:
    """Write a split into every row: as the data says, or made."""
    table = [Row(row, f"source {source.name}", number) for number, row in enumerate(rows, start=1)]
    if not table:
        raise DataError(f"source '{source.name}' gave no pairs from this data")
    check_ids(table)
    drafts = detect(table).read(table, seed).drafts
    splits = split_pairs(drafts, seed, f"source {source.name}")
    if len({draft.split for draft in drafts}) > 1:
        return Built(rows, splits.notes)
    where = {pair.id: name for name in SHARES for pair in getattr(splits, name)}
    return Built([{**row, "split": where[row["id"]]} for row in rows], splits.notes)
