"""Groups, their overlaps and their effects as terminal tables."""

from collections.abc import Mapping, Sequence

from safety_lens.log import Measurement
from safety_lens.probes.groups import NeuronGroup
from safety_lens.probes.sharing import Corrected, Overlap
from safety_lens.report.tables import number, p_value, with_interval
from safety_lens.report.whole_words import WordTable
from safety_lens.stats import Interval

Rows = Mapping[tuple[str, str], Measurement]


def by_metric(rows: Sequence[Measurement]) -> Rows:
    """(subject, metric) → row."""
    return {(row.subject, row.metric): row for row in rows}


def group_table(groups: Sequence[NeuronGroup], rows: Sequence[Measurement]) -> WordTable:
    """Every group with its size, and how far its two halves agree: no comparison of groups can do better."""
    title = "Groups. Halves: Jaccard index of the groups from each half of the examples"
    table = WordTable("group", "unit", "members", "share", "halves", "by chance", title=title)
    at = by_metric(rows)
    for group in groups:
        found = [at.get((f"halves/{group.name}", metric)) for metric in ("jaccard", "jaccard_chance")]
        shown = [number(row.value, 3) if row else "–" for row in found]
        table.add_row(group.name, group.unit, f"{group.size:,}", f"{group.share:.3%}", *shown)
    return table


def overlap_table(found: Mapping[str, Overlap], title: str) -> WordTable:
    """Pairs of groups: the measures, chance in brackets, and standard deviations above chance."""
    table = WordTable("groups", "members", "shared", "jaccard", "coefficient", "recall", "z", title=title)
    for name, one in found.items():
        pairs = zip(one.found, one.chance, strict=True)
        shown = [f"{number(value, 3)} ({number(chance, 3)})" for value, chance in pairs]
        table.add_row(name, f"{one.a:,} / {one.b:,}", f"{one.both:,}", *shown, number(one.z, 1))
    return table


def corrected_table(found: Mapping[str, Corrected], measure: str) -> WordTable:
    """Overlap before and after, between chance and the ceiling that two draws of examples give for one model."""
    title = (
        f"Overlap ({measure}). Halves: groups from different halves of the examples; normalised: 0 chance, 1 ceiling"
    )
    table = WordTable("group", "all examples", "halves", "chance", "ceiling", "normalised", title=title)
    for name, one in found.items():
        table.add_row(name, *(number(v, 3) for v in (one.whole, one.found, one.chance, one.ceiling, one.normalised)))
    return table


def effect_table(rows: Sequence[Measurement]) -> WordTable:
    """What is measured with each group edited, and how much more it changed than by matched random groups."""
    title = "Each group edited, on prompts that chose nothing (95 % intervals)"
    table = WordTable("measure", "before", "with the edit", "beyond random groups", "p", title=title)
    at = by_metric(rows)
    last = None
    for row in rows:
        if (row.subject, f"{row.metric}_beyond_random") not in at:
            continue
        if row.subject != last:
            name = row.subject.removeprefix("group/")
            table.add_row(f"{name}: {row.note}", style="bold")
            last = row.subject
        before = number(at[row.subject, f"{row.metric}_before"].value)
        shown = [_interval(at[row.subject, f"{row.metric}{end}"]) for end in ("", "_beyond_random")]
        table.add_row(f"  {row.metric}", before, *shown, p_value(at[row.subject, f"{row.metric}_p"].value))
    return table


def _interval(row: Measurement) -> str:
    return with_interval(Interval(row.value, row.low, row.high))
