"""Tables on narrow terminals: no word is broken in the middle, nothing is left out, and no line is too wide."""

import io
import re
from itertools import pairwise

import pytest
from rich.console import Console
from rich.text import Text

from safety_lens.log import Measurement
from safety_lens.probes.sharing import Corrected, Overlap
from safety_lens.report.neuron_tables import corrected_table, effect_table, overlap_table
from safety_lens.report.steering_tables import cell_table, site_table
from safety_lens.report.whole_words import WordTable, fitted

HOOKS = [f"blocks.{block}.hook_resid_{end}" for block in (1, 11) for end in ("pre", "post")]
NAMES = ("set-difference-0.003", "top-safety", "near-duplicate", "proximity", "refusal_log_odds_in_text")


def printed(table: object, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def interval(value: float) -> str:
    return f"{value:.2f} [{value - 1.25:.2f}, {value + 1.25:.2f}]"


def made() -> WordTable:
    table = WordTable("measure", "hook", "before", "with the edit", "beyond random groups", "p", title="Made")
    for k, name in enumerate(NAMES):
        table.add_row(f"  {name}", HOOKS[k % 4], "5.35", interval(-10 - k), interval(2.5 + k), "1e-03")
    return table


def words(text: str) -> set[str]:
    """What is left of a text without rules, numbers and separators; a word cut in two is two others."""
    return set(re.findall(r"[A-Za-z]+", text))


@pytest.mark.parametrize("width", [60, 72, 80, 100, 120])
def test_words_break_behind_separators_only_and_every_line_fits(width: int) -> None:
    said = printed(made(), width)
    assert max(map(len, said.splitlines())) <= width
    assert words(said) == words(printed(made(), 400))
    for number in ("-10.00", "[-11.25,", "-8.75]", "1e-03", "5.35", "0.003"):
        assert number in said


def test_a_wide_terminal_gets_one_line_a_row_and_a_narrow_one_keeps_intervals_whole() -> None:
    assert len(printed(made(), 140).splitlines()) == len(printed(made(), 200).splitlines()) == 5 + len(NAMES)
    narrow = printed(made(), 80)
    assert all(f"[{v - 1.25:.2f}, {v + 1.25:.2f}]" in narrow for v in (-10, 2.5))


def test_cells_lose_nothing_but_line_breaks_whatever_the_width() -> None:
    rows = [["a-name_with.parts", "0.98 [0.95, 1.00]"], ["x" * 30, "1e-03"]]
    for width in range(4, 60):
        out = fitted(rows, width)
        squeezed = [["".join(cell.split()) for cell in row] for row in out]
        assert squeezed == [["".join(cell.split()) for cell in row] for row in rows]
        assert sum(max(len(line) for row in out for line in row[k].split("\n")) for k in (0, 1)) <= width


def test_a_column_can_be_kept_whole_as_long_as_others_give_way() -> None:
    rows = [
        ["measure", "hook", "value"],
        *([name, hook, interval(1)] for name, hook in zip(NAMES, HOOKS, strict=False)),
    ]
    kept = fitted(rows, 60, {1})
    assert [row[1] for row in kept] == [row[1] for row in rows]
    assert any("\n" in row[1] for row in fitted(rows, 60))
    assert any("\n" in row[1] for row in fitted(rows, 30, {1}))  # nothing else is left to break


def test_markup_in_a_cell_is_text_and_a_style_stays() -> None:
    table = WordTable("a", "b")
    table.add_row("[bold]x[/bold]", Text("FAILED", style="bold red"))
    assert "[bold]x[/bold]" in printed(table, 40)
    styled = io.StringIO()
    Console(width=40, file=styled, force_terminal=True, color_system="standard").print(table)
    assert "\x1b[1;31mFAILED" in styled.getvalue()


def sweep() -> list[Measurement]:
    rows = []
    for hook in HOOKS:
        for coeff in (-1.0, 0.5, 2.0):
            at = {"hook": hook, "coeff": coeff, "split": "test"}
            for name in ("effect", "random", "shuffled"):
                rows.append(Measurement("refusal/dim", f"refusal/{name}", -1.234 * coeff, -2.5, 3.75, **at))
            rows.append(Measurement("refusal/dim", "refusal/p_all", 0.0123, **at))
            rows.append(Measurement("refusal/dim", "degenerate", 0.25, **at))
            rows.append(Measurement("refusal/dim", "benign_kl", 1.5, **at | {"split": "benign"}))
        slope = {"hook": hook, "split": "test"}
        rows.append(Measurement("refusal/dim", "refusal/slope", -1.0, -2.0, 3.0, **slope))
        rows.append(Measurement("refusal/dim", "refusal/anti_steerable", 0.5, 0.25, 0.75, **slope))
    return rows


def effects() -> list[Measurement]:
    rows = []
    for metric in ("refusal_log_odds_in_text", "coherence_harmful"):
        note = {"refusal_log_odds_in_text": "3,930 weights, 0.267%"}.get(metric)
        for end in ("", "_before", "_beyond_random", "_p"):
            rows.append(Measurement("group/set-difference-0.003", metric + end, -2.85, -3.94, 3.51, note=note))
    return rows


SHARED = Overlap(31_000, 44_000, 45_000, 10**6, 1_980.0, 43.0)
TABLES = {
    "cells of a sweep": cell_table(sweep(), "refusal/dim", "refusal"),
    "sites of a sweep": site_table(sweep(), "refusal/dim", "refusal"),
    "effects of groups": effect_table(effects()),
    "overlap": overlap_table({f"{a} / {b}": SHARED for a, b in pairwise(NAMES)}, "Overlap"),
    "corrected": corrected_table(dict.fromkeys(NAMES, Corrected(0.5, 0.25, 0.125, 0.75, 0.2)), "jaccard"),
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_sweeps_and_groups_break_no_word(name: str, width: int) -> None:
    said = printed(TABLES[name], width)
    assert max(map(len, said.splitlines())) <= width
    assert words(said) == words(printed(TABLES[name], 400))
