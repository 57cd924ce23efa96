"""The terminal table of a causal selection: what each hook's direction does, beside how well it separates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from safety_lens.log import Measurement
from safety_lens.report.tables import number, with_interval
from safety_lens.report.whole_words import WordTable
from safety_lens.stats import UNKNOWN, Interval

if TYPE_CHECKING:
    from safety_lens.probes.selection import Choice


def causal_table(choice: "Choice", name: str) -> WordTable | None:
    """Every hook that was looked at, the causal choice and the one by separability marked; None for other selections.

    bypass: behaviour score of positive prompts with the direction ablated. induce: of negative prompts with it added.
    KL: nats of ablating it on negative prompts. All on the selection pairs.
    """
    rows = choice.measurements
    separable = next((r.hook for r in rows if r.metric == "chosen_by_separability"), None)
    if separable is None:
        return None
    columns = ("hook", "AUROC", "d'", "bypass", "induce", "KL", "choice, or why not")
    table = WordTable(*columns, title=Text(_title(rows, name)))
    passed = any(r.metric == "causal_passed" and r.value > 0 for r in rows)
    for row in (r for r in rows if r.metric == "causal_eligible"):
        by = {"causal": choice.hook if passed else None, "AUROC and d'": separable}
        marks = [f"→ by {rule}" for rule, hook in by.items() if hook == row.hook]
        why = [row.note.partition(":")[0]] if row.note else []
        numbers = [_of(rows, metric, row.hook) for metric in ("select_auroc", "bypass", "induce", "kl")]
        auroc, *rest = (with_interval(found).replace(" [", "\n[") for found in numbers)
        gap = number(_of(rows, "select_d_prime", row.hook).value, 1)
        hook = str(row.hook).replace(".hook_", ".\nhook_")
        table.add_row(Text(hook), auroc, gap, *rest, Text("\n".join([*marks, *why])))
    return table


def _title(rows: Sequence[Measurement], name: str) -> str:
    positive, negative = (_of(rows, f"behaviour_{side}", None).value for side in ("positive", "negative"))
    score = next((r.note for r in rows if r.metric == "behaviour_positive"), None)
    return (
        f"{name}: what each direction does on the selection pairs. Score of positive prompts without an edit"
        f" {positive:.2f}, of negative ones {negative:.2f}\n({score})"
    )


def _of(rows: Sequence[Measurement], metric: str, hook: str | None) -> Interval:
    found = (Interval(r.value, r.low, r.high) for r in rows if r.metric == metric and r.hook == hook)
    return next(found, UNKNOWN)
