"""Terminal tables of what was measured."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from safety_lens.report.whole_words import WordTable
from safety_lens.stats import Interval

if TYPE_CHECKING:
    from safety_lens.probes.extract import DirectionSet


def number(value: float, digits: int = 2) -> str:
    """A number, or a dash where it is unknown."""
    return "–" if value != value else f"{value:.{digits}f}"


def with_interval(interval: Interval, digits: int = 2) -> str:
    """`0.98 [0.95, 1.00]`, or a dash where it is unknown."""
    if interval.value != interval.value:
        return "–"
    if interval.low != interval.low:
        return f"{interval.value:.{digits}f} [no interval]"
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def p_value(p: float) -> str:
    """A p value that is never written as 0."""
    return "–" if p != p else f"{p:.4f}" if p >= 0.001 else f"{p:.0e}"


def direction_table(sets: Sequence["DirectionSet"]) -> WordTable:
    """One row per concept and method: the chosen hook with its evidence and controls."""
    title = "Directions at the chosen hook, on held-out pairs (95 % intervals)"
    columns = ("direction", "hook", "AUROC", "p, all\nhooks", "d'", "AUROC,\nbag of words")
    table = WordTable(*columns, title=title)
    for s in sets:
        name = Text(f"{s.concept}\n{s.method}")
        if s.choice is None:
            table.add_row(name, "no direction", *["–"] * (len(columns) - 2))
            continue
        e = s.evidence[s.choice.hook]
        table.add_row(
            name,
            Text(s.choice.hook.replace(".hook_", ".\nhook_")),
            with_interval(e.auroc).replace(" [", "\n["),
            p_value(e.p_max),
            with_interval(e.d_prime, 1).replace(" [", "\n["),
            with_interval(e.lexical).replace(" [", "\n["),
        )
    return table


def hook_table(s: "DirectionSet") -> WordTable:
    """Every hook of one concept and method; the chosen one is marked."""
    title = Text(f"{s.concept}/{s.method} at every hook (q95: what 95 % of shuffled fits or random directions reach)")
    columns = ("hook", "AUROC", "p, all", "d'", "halves", "shuffled\nq95", "random\nq95", "norm")
    table = WordTable(*columns, title=title, unbroken=["hook"])
    for hook, e in s.evidence.items():
        mark = "→ " if s.choice is not None and s.choice.hook == hook else ""
        norm = s.directions[hook].norm if hook in s.directions else float("nan")
        table.add_row(
            Text(mark + hook),
            with_interval(e.auroc),
            p_value(e.p_max),
            with_interval(e.d_prime, 1),
            number(e.stability),
            number(e.null_shuffled),
            number(e.null_random),
            f"{norm:.3g}" if norm == norm else "–",
        )
    return table
