"""The demo's third part: an alignment artifact, hedging, turned down while the model speaks."""

from pathlib import Path
from typing import TYPE_CHECKING

from safety_lens.cli import terminal

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

CATEGORY = "medical"
COLUMNS = (
    "mode",
    "scale, gaps",
    "benign KL, nat/token (p95)",
    "natural tokens touched",
    "artifact tokens touched",
    "hedge",
    "well_formed",
)


def suppression(model: "HookedTransformer", out: Path, seed: int) -> None:
    """All modes at one cost on one category, then one question before and after, with a page of the tokens touched."""
    from safety_lens.cli.suppress_output import show, write_page
    from safety_lens.data.pairs import last_user_text
    from safety_lens.interventions.suppression import before_after, compare_modes, suppress
    from safety_lens.interventions.suppression.compared import mode_cells
    from safety_lens.report.whole_words import WordTable

    terminal.out.print(
        f"\n[bold]5. Suppressing an artifact:[/bold] hedging on {CATEGORY} questions, five modes at 0.1 nat."
    )
    results = compare_modes(model, categories=[CATEGORY], seed=seed, cache=False)
    rows = [mode_cells(result) for result in results]
    table = WordTable(*COLUMNS)
    for row in rows:
        table.add_row(*(row[column] for column in COLUMNS))
    terminal.out.print(table)
    terminal.out.print("* touches too few natural tokens to cost as much: at its strongest within the budget")
    best = suppress(model, mode="proximity", scale=2.0, categories=[CATEGORY], report=False, cache=False, seed=seed)
    asked = [last_user_text(pair.positive) for pair in best.pairs.report[:2]]
    answers = before_after(model, asked, best, max_new_tokens=32)
    show(answers, best, as_json=False)
    page = out / "suppression.html"
    write_page(page, answers)
    terminal.out.print(f"page of tokens: {page}", markup=False)
