"""Terminal tables of a steering sweep."""

from collections.abc import Sequence

from rich.text import Text

from safety_lens.log import Measurement
from safety_lens.report.plots import short_hook as short
from safety_lens.report.tables import number, p_value, with_interval
from safety_lens.report.whole_words import WordTable
from safety_lens.stats import UNKNOWN, Interval


class Cells:
    """The rows of one direction and scorer, looked up by site, coefficient and metric.

    split: "test", or "selection": where a search looked, which may be at more sites than the test prompts report.
    """

    def __init__(self, rows: Sequence[Measurement], subject: str, scorer: str, split: str = "test") -> None:
        self.subject, self.scorer, self.split = subject, scorer, split
        mine = [r for r in rows if r.subject == subject and r.split in (split, "benign") and r.hook is not None]
        self._rows = {(r.hook, r.coeff, r.metric): r for r in mine}
        self.sites = list(dict.fromkeys(str(r.hook) for r in mine if r.metric == f"{scorer}/effect"))
        self.coeffs = sorted({r.coeff for r in mine if r.metric == f"{scorer}/effect" and r.coeff is not None})
        self.chosen = next((r for r in rows if r.subject == subject and r.metric == "chosen"), None)
        self.baseline = next((r for r in rows if r.subject == "baseline" and r.metric == f"{scorer}/mean"), None)
        self.system = next((r for r in rows if r.subject == "system" and r.metric == f"{scorer}/effect"), None)

    def row(self, site: str, coeff: float | None, what: str) -> Measurement | None:
        """A row of the scorer (`effect`, `p_all`, …), or of the cell itself (`degenerate`, `benign_kl`)."""
        return self._rows.get((site, coeff, f"{self.scorer}/{what}")) or self._rows.get((site, coeff, what))

    def get(self, site: str, coeff: float | None, what: str) -> Interval:
        """The numbers of a row, NaN where there is none."""
        row = self.row(site, coeff, what)
        return UNKNOWN if row is None else Interval(row.value, row.low, row.high)

    @property
    def remark(self) -> str:
        """Remark on a score at its floor or ceiling, as a line of a title; empty for none."""
        return "" if self.baseline is None or self.baseline.note is None else f"\n{self.baseline.note}"

    def is_chosen(self, site: str, coeff: float) -> bool:
        """True for the cell that the selection prompts chose."""
        return self.chosen is not None and (self.chosen.hook, self.chosen.coeff) == (site, coeff)

    def unmoved(self, site: str) -> bool:
        """True where a score began at its floor or ceiling and stayed there in every cell: its slope says nothing."""
        return bool(self.remark) and not any(self.get(site, c, "effect").value for c in self.coeffs)

    @property
    def shown_site(self) -> str:
        """The site of the chosen cell; without one, the site with the largest effect of all."""
        if self.chosen is not None and self.chosen.hook in self.sites:
            return str(self.chosen.hook)
        return max(self.sites, key=lambda site: max(abs(self.get(site, c, "effect").value) for c in self.coeffs))


def searched(rows: Sequence[Measurement], subject: str, scorer: str) -> Cells | None:
    """The cells of the selection prompts, where a search looked at sites that no test prompt ran at; else None."""
    looked, tested = (Cells(rows, subject, scorer, split) for split in ("selection", "test"))
    return looked if set(looked.sites) > set(tested.sites) else None


def sweep_tables(rows: Sequence[Measurement], subject: str, scorer: str) -> list[WordTable]:
    """Every table of one direction and scorer: what was searched, all tested sites, the chosen site."""
    looked = searched(rows, subject, scorer)
    out = [] if looked is None else [search_table(looked)]
    if Cells(rows, subject, scorer).sites:
        out += [site_table(rows, subject, scorer), cell_table(rows, subject, scorer)]
    return out


def search_table(cells: Cells) -> WordTable:
    """Effects on the selection prompts at every site and coefficient where the search looked, with the benign KL."""
    n = max(row.n or 0 for site in cells.sites for c in cells.coeffs if (row := cells.row(site, c, "effect")))
    costs = any(cells.row(site, c, "benign_kl") for site in cells.sites for c in cells.coeffs)
    what = "effect (benign KL)" if costs else "effect"
    title = f"{cells.subject} → {cells.scorer}: {what} on {n} selection prompts, by site and coefficient"
    table = WordTable("site", *(f"{c:g}" for c in cells.coeffs), title=Text(title + cells.remark))
    for site in cells.sites:
        shown = []
        for c in cells.coeffs:
            effect, kl = cells.get(site, c, "effect").value, cells.get(site, c, "benign_kl").value
            mark = "→ " if cells.is_chosen(site, c) else ""
            shown.append("" if effect != effect else f"{mark}{effect:.2f}" + ("" if kl != kl else f" ({kl:.2f})"))
        table.add_row(Text(short(site)), *shown)
    return table


def cell_table(rows: Sequence[Measurement], subject: str, scorer: str) -> WordTable:
    """Every coefficient at the chosen site: effect, corrected p, controls and cost."""
    cells = Cells(rows, subject, scorer)
    site = cells.shown_site
    base = UNKNOWN if cells.baseline is None else Interval(*_numbers(cells.baseline))
    title = f"{subject} → {scorer} at {site}, test prompts\nunsteered {with_interval(base)}{cells.remark}"
    columns = ("coeff", "effect", "p, whole\ngrid", "random directions\n(95 % of them)", "shuffled\nlabels", "broken",
               "KL, benign\n(p95)")  # fmt: skip
    table = WordTable(*columns, title=Text(title))
    for coeff in (c for c in cells.coeffs if cells.row(site, c, "effect") is not None):
        mark = "→ " if cells.is_chosen(site, coeff) else ""
        kl, tail = cells.get(site, coeff, "benign_kl").value, cells.get(site, coeff, "benign_kl_p95").value
        table.add_row(
            f"{mark}{coeff:g}",
            with_interval(cells.get(site, coeff, "effect")),
            p_value(cells.get(site, coeff, "p_all").value),
            with_interval(cells.get(site, coeff, "random")),
            with_interval(cells.get(site, coeff, "shuffled")),
            number(cells.get(site, coeff, "degenerate").value),
            "–" if kl != kl else f"{kl:.2f} ({tail:.2f})",
        )
    if cells.system is not None:
        table.add_section()
        table.add_row("system", with_interval(Interval(*_numbers(cells.system))), *["–"] * (len(columns) - 2))
    return table


def _numbers(row: Measurement) -> tuple[float, float, float]:
    return row.value, row.low, row.high


def site_table(rows: Sequence[Measurement], subject: str, scorer: str) -> WordTable:
    """Every site: the slope over all coefficients, and the share of prompts that it does not hold for."""
    cells = Cells(rows, subject, scorer)
    title = f"{subject} → {scorer}: change of the score per unit of coefficient, test prompts{cells.remark}"
    columns = ("site", "slope", "rank\ncorr.", "steerable", "anti-\nsteerable", "largest effect", "at")
    table = WordTable(*columns, title=Text(title))
    for site in cells.sites:
        sizes = {c: abs(row.value) for c in cells.coeffs if (row := cells.row(site, c, "effect")) is not None}
        best = max(sizes, key=lambda c: sizes[c])
        table.add_row(
            Text(("→ " if cells.chosen is not None and cells.chosen.hook == site else "") + short(site)),
            "–" if cells.unmoved(site) else with_interval(cells.get(site, None, "slope")),
            number(cells.get(site, None, "monotone").value),
            number(cells.get(site, None, "steerable").value),
            with_interval(cells.get(site, None, "anti_steerable")),
            with_interval(cells.get(site, best, "effect")),
            f"{best:g}",
        )
    return table


def change_table(rows: Sequence[Measurement]) -> WordTable:
    """Scores of the same prompts without and with an edit, and the paired change; every label by itself."""
    found = {(r.metric, r.split): r for r in rows}
    scorers = list(dict.fromkeys(r.metric.rpartition("/")[0] for r in rows))
    groups = list(dict.fromkeys(r.split for r in rows))
    table = WordTable("score", "prompts", "without", "with", "change", "p")
    for scorer in scorers:
        for group in groups:
            of = {what: found[f"{scorer}/{what}", group] for what in ("without", "with", "change", "p")}
            levels = [with_interval(Interval(*_numbers(of[what]))) for what in ("without", "with", "change")]
            shown = "broken" if scorer == "degenerate" else scorer
            table.add_row(Text(shown), Text(f"{group} {of['change'].n}"), *levels, p_value(of["p"].value))
        table.add_section()
    return table
