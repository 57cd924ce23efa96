"""`safety-lens neurons overlap`: what groups share, beside chance and ceiling."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safety_lens.cli import options, terminal
from safety_lens.cli.neurons_identify import HALVES
from safety_lens.errors import DataError

if TYPE_CHECKING:
    from safety_lens.log import Measurement
    from safety_lens.probes.groups import NeuronGroup
    from safety_lens.probes.sharing import Corrected, Halves, Overlap

Measure = Annotated[str, typer.Option(help="jaccard, coefficient or recall: which one is corrected for chance.")]


def overlap(
    sources: Annotated[
        list[Path], typer.Argument(metavar="GROUPS [GROUPS]", help="One groups artifact, or two: before and after.")
    ],
    measure: Measure = "jaccard",
    as_json: options.Json = False,
) -> None:
    """Compare the groups of one model with one another, or groups of one name before and after training.

    Two artifacts of `neurons identify` are compared between chance (random groups of the same sizes) and ceiling (two
    halves of the examples for one model): that they differ from 1 alone says nothing.
    """
    if len(sources) > 2:
        raise DataError(f"overlap compares the groups of one artifact, or of two; got {len(sources)}")
    from safety_lens.probes.groups import load_groups
    from safety_lens.probes.sharing import MEASURES

    if measure not in MEASURES:
        raise DataError(f"--measure {measure}: choose {', '.join(MEASURES)}")
    found = [{g.name: g for g in load_groups(source)} for source in sources]
    if len(found) == 1:
        _show(_within(list(found[0].values())), {}, measure, as_json)
        return
    before, after = found
    _show(_across(before, after), _corrected(sources, before, after, measure), measure, as_json)


def _within(groups: "Sequence[NeuronGroup]") -> "dict[str, Overlap]":
    from safety_lens.probes.sharing import overlap as shared

    if len(groups) < 2:
        raise DataError("the artifact holds one group: name a second artifact to compare it with")
    return {f"{a.name} / {b.name}": shared(a, b) for a, b in combinations(groups, 2) if a.unit == b.unit}


def _across(before: "dict[str, NeuronGroup]", after: "dict[str, NeuronGroup]") -> "dict[str, Overlap]":
    from safety_lens.probes.sharing import overlap as shared

    names = [name for name in before if name in after]
    if not names:
        raise DataError(f"no group is in both: there are {', '.join(before)} and {', '.join(after)}")
    return {name: shared(before[name], after[name]) for name in names}


def _corrected(
    sources: Sequence[Path], before: "dict[str, NeuronGroup]", after: "dict[str, NeuronGroup]", measure: str
) -> "dict[str, Corrected]":
    from safety_lens.probes.sharing import corrected

    halves = [_halves(source) for source in sources]
    return {
        name: corrected(before[name], after[name], halves[0][name], halves[1][name], measure)
        for name in before
        if name in after and all(name in there for there in halves)
    }


def _halves(source: Path) -> "dict[str, Halves]":
    """Groups from each half of the examples; none where the artifact was not made by `neurons identify`."""
    if not (source / HALVES).is_dir():
        return {}
    from safety_lens.probes.groups import load_groups
    from safety_lens.probes.sharing import Halves

    there = {g.name: g for g in load_groups(source / HALVES)}
    names = {name.rpartition("-")[0] for name in there}
    return {name: Halves(there[f"{name}-1"], there[f"{name}-2"]) for name in names}


def _show(pairs: "dict[str, Overlap]", corrected: "dict[str, Corrected]", measure: str, as_json: bool) -> None:
    if as_json:
        for row in _rows(pairs, corrected, measure):
            typer.echo(row.to_json())
        return
    from safety_lens.report.neuron_tables import corrected_table, overlap_table

    terminal.out.print(overlap_table(pairs, "Overlap; in brackets what random groups of these sizes share"))
    if corrected:
        terminal.out.print(corrected_table(corrected, measure))


def _rows(pairs: "dict[str, Overlap]", corrected: "dict[str, Corrected]", measure: str) -> "list[Measurement]":
    from safety_lens.log import Measurement
    from safety_lens.probes.sharing import overlap_rows

    rows = [row for name, found in pairs.items() for row in overlap_rows(name.replace(" / ", "/"), found)]
    for name, one in corrected.items():
        rows += [Measurement(name, f"{measure}_halves_{k}", v) for k, v in one._asdict().items() if k != "whole"]
    return rows
