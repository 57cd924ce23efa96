"""Terminal tables of a causal selection: effects at each hook, controls, and effects on unseen prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from safety_lens.log import Measurement
from safety_lens.report.plots import short_hook
from safety_lens.report.tables import number, with_interval
from safety_lens.report.whole_words import WordTable
from safety_lens.stats import UNKNOWN, Interval

if TYPE_CHECKING:
    from safety_lens.probes.selection import Choice


def causal_table(choice: "Choice", name: str) -> WordTable | None:
    """Effects at every hook, the causal choice and the one by separability marked; None for other selections.

    bypass: log-odds of positive prompts with the direction ablated. induce: of negative prompts with it added. %: parts
    of the way to the other level. KL: nats of ablating it on negative prompts. All on selection prompts.
    """
    rows = choice.measurements
    separable = next((r.hook for r in rows if r.metric == "chosen_by_separability"), None)
    if separable is None:
        return None
    columns = ("hook", "AUROC", "d'", "bypass", "%", "induce", "%", "KL", "choice, or why not")
    table = WordTable(*columns, title=Text(_title(rows, name)))
    for row in (r for r in rows if r.metric == "causal_eligible"):
        by = {"causal": choice.hook if choice.causal else None, "AUROC and d'": separable}
        marks = [f"→ by {rule}" for rule, hook in by.items() if hook == row.hook]
        why = [row.note.partition(":")[0]] if row.note else []
        auroc, bypass, induce, kl = (
            with_interval(_of(rows, metric, row.hook)).replace(" [", "\n[")
            for metric in ("select_auroc", "bypass", "induce", "kl")
        )
        shares = [_percent(_of(rows, f"{metric}_share", row.hook)) for metric in ("bypass", "induce")]
        coeff = next((r.coeff for r in rows if r.metric == "induce" and r.hook == row.hook), None)
        induce += "" if coeff in (None, 1.0) else f"\nat {coeff:g} times"
        gap = number(_of(rows, "select_d_prime", row.hook).value, 1)
        hook = short_hook(str(row.hook))
        table.add_row(hook, auroc, gap, bypass, shares[0], induce, shares[1], kl, Text("\n".join([*marks, *why])))
    return table


def control_table(choice: "Choice", name: str) -> WordTable | None:
    """Effects of the controls at the hooks where they were drawn; None without controls."""
    rows = choice.measurements
    drawn = [r for r in rows if r.metric.startswith(("bypass_", "induce_")) and r.note and r.hook]
    drawn = [r for r in drawn if r.metric.endswith(("_unedited", "_same", "_random", "_shuffled", "_concept"))]
    if not drawn:
        return None
    table = WordTable("hook", "control", "effect", "log-odds", "p", title=Text(f"{name}: controls of equal length"))
    for row in drawn:
        effect, _, kind = row.metric.partition("_")
        what = f"concept {row.note}" if kind == "concept" else str(row.note)
        table.add_row(
            short_hook(str(row.hook)),
            what,
            effect,
            with_interval(_interval(row)),
            _p(_of(rows, f"{row.metric}_p", row.hook)),
        )
    return table


def after_table(choice: "Choice", name: str) -> WordTable | None:
    """Labels and log-odds of unseen prompts before and after both edits; None where they were not measured."""
    rows = choice.measurements
    stages = {
        "positive, unedited": "before_positive",
        "positive, ablated": "ablated_positive",
        "negative, unedited": "before_negative",
        "negative, added": "added_negative",
    }
    if _of(rows, "log_odds_before_positive", choice.hook) == UNKNOWN:
        return None
    title = Text(f"{name}: reporting prompts at {choice.hook}, none filtered out")
    table = WordTable("prompts", "n", "answers that show it", "log-odds", "log-odds and labels agree", title=title)
    for what, stage in stages.items():
        n = next((r.n for r in rows if r.metric == f"log_odds_{stage}"), None)
        found = [_of(rows, f"{metric}_{stage}", choice.hook) for metric in ("rate", "log_odds", "agreement")]
        table.add_row(what, str(n), *map(with_interval, found))
    for what, edit in (("positive that showed it, ablated", "ablated"), ("negative that did not, added", "added")):
        filtered = next((r for r in rows if r.metric == f"rate_{edit}_filtered"), None)
        if filtered is not None:
            table.add_row(what, str(filtered.n), with_interval(_interval(filtered)), "", "")
    return table


def _title(rows: Sequence[Measurement], name: str) -> str:
    positive, negative = (_of(rows, f"behaviour_{side}", None).value for side in ("positive", "negative"))
    score = next((r.note for r in rows if r.metric == "behaviour_positive"), None)
    left = [r for r in rows if r.metric.startswith("selection_prompts")]
    counts = ", ".join(f"{r.value:.0f} of {r.n} {r.metric.rpartition('_')[2]}" for r in left)
    return (
        f"{name}: effects of each direction on the selection prompts ({counts}). Log-odds of positive prompts without"
        f" an edit {positive:.2f}, of negative ones {negative:.2f}\n({score})"
    )


def _interval(row: Measurement) -> Interval:
    return Interval(row.value, row.low, row.high)


def _of(rows: Sequence[Measurement], metric: str, hook: str | None) -> Interval:
    return next((_interval(r) for r in rows if r.metric == metric and r.hook == hook), UNKNOWN)


def _percent(share: Interval) -> str:
    return "" if share.value != share.value else f"{share.value:.0%}"


def _p(p: Interval) -> str:
    return "" if p.value != p.value else f"{p.value:.2g}"
