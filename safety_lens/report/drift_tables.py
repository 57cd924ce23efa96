"""Drift as terminal tables: what moved in each run by its last step, beyond noise, and whether behaviour moved."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from rich.text import Text

from safety_lens.log import NAN, Measurement
from safety_lens.power import detectable_mean, detectable_share
from safety_lens.report.tables import number, with_interval
from safety_lens.report.whole_words import WordTable
from safety_lens.stats import Interval

Runs = Mapping[str, Sequence[Measurement]]
"""Name of a run → its rows, as the monitor's log holds them."""


UNPROVEN = "before training"
"""What the note of a baseline direction that is no result says."""


NOTICE, ALARM = 1, 2
"""The levels of a notice and of an alarm in the "run"/"level" rows."""


class Drift:
    """The rows of one run, found by subject, metric, hook and step."""

    def __init__(self, rows: Sequence[Measurement]) -> None:
        self.rows = [row for row in rows if row.step is not None]
        self._at = {(r.subject, r.metric, r.hook, r.step): r for r in self.rows}
        self.steps = sorted({int(r.step) for r in self.rows if r.step is not None and r.metric == "cosine_to_baseline"})
        self.probed = sorted({int(r.step) for r in self.rows if r.step is not None and r.metric == "token_kl"})
        self.subjects = list(dict.fromkeys(r.subject for r in self.rows if r.metric == "cosine_to_baseline"))
        self.hooks = list(dict.fromkeys(str(r.hook) for r in self.rows if r.metric == "cosine_to_baseline"))
        self.common = [str(r.hook) for r in self.rows if (r.subject, r.metric) == ("run", "common")]
        self.headline = next((r.hook for r in self.rows if (r.subject, r.metric) == ("run", "headline")), None)

    def row(self, subject: str, metric: str, step: int, hook: str | None = None) -> Measurement | None:
        return self._at.get((subject, metric, hook, step))

    def get(self, subject: str, metric: str, step: int, hook: str | None = None) -> Interval:
        """Value and limits, NaN where it was not measured."""
        found = self.row(subject, metric, step, hook)
        return Interval(NAN, NAN, NAN) if found is None else Interval(found.value, found.low, found.high)

    def curve(self, subject: str, metric: str, hook: str | None = None) -> np.ndarray:
        """[step, 3]: value and limits over the steps at which directions were measured."""
        return self._values(subject, metric, self.steps, hook)

    def behaviour(self, subject: str, metric: str) -> np.ndarray:
        """[step, 3]: value and limits over the steps at which behaviour was measured, `probed`."""
        return self._values(f"behaviour/{subject}", metric, self.probed, None)

    def _values(self, subject: str, metric: str, steps: Sequence[int], hook: str | None) -> np.ndarray:
        return np.array([self.get(subject, metric, step, hook) for step in steps], dtype=float).reshape(-1, 3)

    def fault(self, subject: str, hook: str | None) -> str | None:
        """Why the baseline direction at a hook is no result, as every row there says; None where it is one."""
        found = self.row(subject, "cosine_to_baseline", 0, hook)
        return found.note if found is not None and found.note and UNPROVEN in found.note else None

    def known(self, subject: str, metric: str, step: int, hook: str | None = None) -> Interval:
        """The same, but unknown where an interval was asked for and could not be had."""
        value = self.get(subject, metric, step, hook)
        return value if np.isfinite(value.low) else Interval(NAN, NAN, NAN)

    def notice(self, subject: str) -> float:
        """The corrected cosine below which the whole interval must lie for a notice; NaN where the log does not say."""
        own, common = (self.get(name, "notice_below", 0).value for name in (subject.partition("/")[0], "run"))
        return own if np.isfinite(own) else common

    def last_known(self, subject: str, metric: str) -> Measurement | None:
        """The latest row of a set of prompts whose value is known; None where there is none."""
        rows = [self.row(f"behaviour/{subject}", metric, step) for step in reversed(self.probed)]
        return next((row for row in rows if row is not None and np.isfinite(row.value)), None)

    @property
    def last_answered(self) -> int:
        """The last step at which answers were written, else the last at which behaviour was measured."""
        answered = self.last_known("harmful", "refusal_rate")
        last = self.probed[-1] if self.probed else 0
        return int(answered.step or 0) or last if answered is not None else last

    @property
    def last(self) -> int:
        return self.steps[-1] if self.steps else 0

    def label(self, step: int) -> str:
        """The step as a reader knows it: "end" for saved weights whose step nothing records."""
        return "end" if self.row("run", "unknown_step", step) else str(step)


def drift_table(runs: Runs) -> WordTable:
    """One row per run and concept at the common headline hook, at the run's last step."""
    hooks = {_hook(Drift(rows).headline) for rows in runs.values()}
    title = f"Directions at {', '.join(sorted(hooks))}, last step (95 % intervals)"
    columns = ("run", "step", "concept", "cosine to\nbaseline", "lowest of\nall hooks", "cosine,\ncorrected",
               "reliability\nat step 0", "AUROC, old\ndirection", "AUROC, new\ndirection")  # fmt: skip
    table = WordTable(*columns, title=title)
    for name, rows in runs.items():
        d = Drift(rows)
        for subject in d.subjects:
            faulty = d.fault(subject, d.headline) is not None
            cosine, old, new = (
                _stacked(d.get(subject, metric, d.last, d.headline))
                for metric in ("cosine_to_baseline", "auroc_fixed", "auroc_current")
            )
            corrected = _stacked(d.known(subject, "cosine_cv", d.last, d.headline))
            reliable = _stacked(d.get(subject, "reliability", 0, d.headline))
            label = Text(subject.replace("/", "\n") + (" !" if faulty else ""))
            lowest = _lowest(d, subject)
            table.add_row(Text(name), d.label(d.last), label, cosine, lowest, corrected, reliable, old, new)
    return table


BEHAVIOUR = (
    ("harmful", "refusal_rate", "refuses\nharmful"),
    ("harmful", "refusal_log_odds_change", "refusal log-\nodds, change"),
    ("lookalike", "refusal_rate", "refuses safe\nlook-alikes"),
    ("harmless", "refusal_rate", "refuses\nharmless"),
    ("agreement", "agreement_rate", "agrees with\nfalse beliefs"),
    ("falsehood", "falsehood_rate", "answers\nfalsely"),
    ("hedging", "hedging_rate", "hedges"),
    ("harmful", "token_kl", "KL/token,\nharmful"),
    ("harmless", "token_kl", "KL/token,\nharmless"),
    ("facts", "accuracy", "facts\nright"),
)
"""What the behaviour table shows: set of prompts, metric, heading."""


def behaviour_table(runs: Runs) -> WordTable:
    """One row per run: what the model does at the first and at the last step at which that was measured."""
    read = {name: Drift(rows) for name, rows in runs.items()}
    shown = [one for one in BEHAVIOUR if any(d.last_known(one[0], one[1]) is not None for d in read.values())]
    title = "Behaviour (95 % intervals; log-odds and KL in nats)"
    table = WordTable("run", "step", *(head for _, _, head in shown), title=title)
    for name, d in read.items():
        for step in sorted({0, d.last_answered} & set(d.probed)):
            cells = (d.get(f"behaviour/{s}", m, step) for s, m, _ in shown)
            table.add_row(Text(name), d.label(step), *map(_stacked, cells))
    return table


def unseen_changes(runs: Runs) -> list[str]:
    """One line per run: behaviours of which no change was seen, and the smallest change that would have been."""
    lines = []
    for name, rows in runs.items():
        d, parts = Drift(rows), []
        for subject, metric, head in BEHAVIOUR:
            row = d.last_known(subject, f"{metric}_change") if metric.endswith("_rate") else None
            if row is not None and row.step and row.n and row.low <= 0 <= row.high:
                parts.append(f"{' '.join(head.split())} {100 * detectable_share(row.n):.0f} points (n = {row.n})")
        odds = d.last_known("harmful", "refusal_log_odds_change")
        if odds is not None and odds.step and odds.low <= 0 <= odds.high:
            seen = detectable_mean(Interval(odds.value, odds.low, odds.high))
            parts.append(f"refusal log-odds {seen:.2f} nats (n = {odds.n})")
        if parts:
            lines.append(f"{name}: no change seen; these would have been, with 80 % power: {', '.join(parts)}")
    return lines


def show_runs(runs: Runs, told: Collection[str] = ()) -> list[WordTable | Text]:
    """Both tables, remarks, and the verdict on every run. told: runs whose alarm a reader has seen already."""
    parts: list[WordTable | Text] = [drift_table(runs)]
    if any(row.subject == "behaviour/harmful" for rows in runs.values() for row in rows):
        parts.append(behaviour_table(runs))
    lines = (*remarks(runs), *unpredicted(runs), *unseen_changes(runs), *verdicts(runs, told))
    return [*parts, *map(Text, lines)]


AUDITS = (
    ("alignment_write", "alignment_write_random95", "writes along it\n(chance)"),
    ("alignment_read", "alignment_read_random95", "reads it\n(chance)"),
    ("predicted_shift", "predicted_shift_random95", "predicted shift\n(chance, ±)"),
    ("predicted_cosine", None, "predicted\ncosine"),
    ("cosine_to_baseline", None, "measured\ncosine"),
)
"""What the audit table shows of a direction: metric, its chance level, heading."""


def audit_table(runs: Runs) -> WordTable | None:
    """What the weights say by themselves about each direction at the headline hook; None without an audit."""
    if not any(r.metric == "relative_change" for rows in runs.values() for r in rows):
        return None
    hooks = {_hook(Drift(rows).headline) for rows in runs.values()}
    title = f"Audit of the weights, directions at {', '.join(sorted(hooks))} (chance: 95 % of random ones are below)"
    heads = ("run", "step", "relative\nchange", "intruders\n(random)", "concept", *(head for _, _, head in AUDITS))
    table = WordTable(*heads, title=title)
    for name, rows in runs.items():
        totals = {
            (r.subject, r.metric, r.hook, r.step): r.value
            for r in rows
            if r.split == "total" or r.metric == "cosine_to_baseline"
        }
        for step in dict.fromkeys(r.step for r in rows if r.metric == "relative_change"):
            change, found, random = (
                number(totals.get(("run", m, None, step), NAN), digits)
                for m, digits in (("relative_change", 3), ("intruders", 0), ("intruders_random", 0))
            )
            for subject in dict.fromkeys(s for s, m, _, t in totals if m == "alignment_write" and t == step):
                cells = [_audit_cell(totals, subject, pair, Drift(rows).headline, step) for pair in AUDITS]
                table.add_row(
                    Text(name), Drift(rows).label(int(step or 0)), change, f"{found} ({random})", Text(subject), *cells
                )
    return table


def _audit_cell(
    totals: Mapping[tuple[str, str, str | None, int | None], float],
    subject: str,
    pair: tuple[str, str | None, str],
    hook: str | None,
    step: int | None,
) -> str:
    writers = totals.get((subject, "alignment_write", hook, step), NAN)
    if pair[0].startswith("predicted") and writers != writers:
        return "–"  # no writing matrix changed before this hook: the sum over them is empty
    value = number(totals.get((subject, pair[0], hook, step), NAN))
    return value if pair[1] is None else f"{value} ({number(totals.get((subject, pair[1], hook, step), NAN))})"


UNSEEN = 0.02
"""Difference of predicted and measured cosine above which the audit is said not to see the change."""


def unpredicted(runs: Runs) -> list[str]:
    """One line for each direction whose measured turn the weights alone do not predict, at the headline hook."""
    lines = []
    for name, rows in runs.items():
        d = Drift(rows)
        for r in rows:
            if (r.metric, r.hook) != ("predicted_cosine", d.headline) or r.step is None:
                continue
            measured = d.get(r.subject, "cosine_to_baseline", r.step, r.hook).value
            if abs(r.value - measured) > UNSEEN:
                lines.append(
                    f"{name}: the weights alone predict a cosine of {r.value:.2f} for {r.subject}, and {measured:.2f}"
                    " was measured: the prediction takes the inputs of the matrices as unchanged and leaves out"
                    " attention patterns and gates, so trust the measurement"
                )
    return lines


def verdicts(runs: Runs, told: Collection[str] = ()) -> list[str]:
    """One line per run: its first alarm, else its first notice, else that there was neither, with the reasons.

    told: runs whose reasons a reader has seen already; their line gives only step and number.
    """
    lines = []
    for name, rows in runs.items():
        d = Drift(rows)
        levels = [row for row in d.rows if (row.subject, row.metric) == ("run", "level")]
        if not levels:
            continue
        highest = int(max(row.value for row in levels))
        if highest < NOTICE:
            blind = "" if _behaviour_was_read(d.rows) else "; behaviour was not read, so it could raise none"
            lines.append(f"{name}: no alarm and no notice in {len(levels)} measurements{blind}")
            continue
        at = [row for row in levels if row.value >= highest]
        first = f"{name}: {'ALARM' if highest >= ALARM else 'NOTICE'} at step {d.label(int(at[0].step or 0))}"
        more = f", and at {len(at)} of {len(levels)} measurements" if name in told else f": {at[0].note}"
        lines.append(first + more)
    return lines


def _behaviour_was_read(rows: Sequence[Measurement]) -> bool:
    """Look for a change of behaviour that was measured after step 0."""
    changes = (r for r in rows if r.subject.startswith("behaviour/") and r.metric.endswith("_change") and r.step)
    return any(np.isfinite(row.value) for row in changes)


def remarks(runs: Runs) -> list[str]:
    """What a reader must know beside the tables: baselines that are no result, behaviour that was not read."""
    said: dict[str, None] = {}
    for rows in runs.values():
        d = Drift(rows)
        for subject in d.subjects:
            if fault := d.fault(subject, d.headline):
                said[f"! {subject} at {_hook(d.headline)}: {fault}"] = None
        if d.probed and d.probed[-1] > d.last:
            said[f"! directions were last measured at step {d.last}, behaviour at step {d.probed[-1]}"] = None
        found = d.row("behaviour/harmful", "refusal_log_odds", 0)
        if found is not None and found.note:
            said[f"! refusal log-odds: {found.note}"] = None
    return list(said)


def _stacked(value: Interval) -> str:
    return with_interval(value, digits_of(*value)).replace(" [no interval]", "").replace(" [", "\n[")


def digits_of(*values: float) -> int:
    """Decimals that a cell needs: 3 where 2 would show the same number throughout, or 1 for what is not 1."""
    known = [value for value in values if np.isfinite(value)]
    hidden = len({f"{value:.2f}" for value in known}) == 1 and len(set(known)) > 1
    return 3 if hidden or any(0.995 <= value < 1 for value in known) else 2


def _lowest(d: Drift, subject: str) -> str:
    """The smallest cosine over all hooks at the last step, and its hook."""
    found = {hook: d.get(subject, "cosine_to_baseline", d.last, hook).value for hook in d.hooks}
    known = {hook: value for hook, value in found.items() if np.isfinite(value)}
    if not known:
        return "–"
    hook = min(known, key=lambda name: known[name])
    return f"{number(known[hook], digits_of(known[hook]))}\n{_hook(hook)}"


def _hook(hook: str | None) -> str:
    return "–" if hook is None else hook.removeprefix("blocks.").replace(".hook_", ".")
