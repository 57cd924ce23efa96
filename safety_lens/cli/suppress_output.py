"""What `safety-lens suppress` prints and writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from safety_lens.cli import terminal
from safety_lens.errors import DataError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from safety_lens.interventions.suppression import BeforeAfter, Suppression

STORED_TOKENS = 12
"""Of an answer to a prompt that the pairs mark as setting an artifact off, no more than this is written to a file."""


def show(answers: "Sequence[BeforeAfter]", found: "Suppression", as_json: bool) -> None:
    if as_json:
        import json

        for answer in answers:
            typer.echo(json.dumps(_row(answer)))
        for row in found.report:
            typer.echo(row.to_json())
        return
    from safety_lens.report.whole_words import WordTable

    compared = any(a.before is not None for a in answers)
    table = WordTable("prompt", *(["before"] if compared else []), "after", "tokens touched", lines=True)
    for a in answers:
        before = [a.before or ""] if compared else []
        marks = f"{sum(a.touched)} of {len(a.touched)}"
        table.add_row(str(a.prompt), *before, a.after, marks)
    terminal.out.print(table)
    terminal.out.print(found.explain, markup=False, soft_wrap=True)
    for note in found.notes:
        terminal.out.print(f"note: {note}", markup=False, soft_wrap=True)
    _show_report(answers, found)


def _show_report(answers: "Sequence[BeforeAfter]", found: "Suppression") -> None:
    from safety_lens.interventions.suppression.prompts import firing_rate
    from safety_lens.report.tables import with_interval
    from safety_lens.report.whole_words import WordTable

    rate = with_interval(firing_rate(answers), 3)
    terminal.out.print(f"firing rate per token, these prompts and their answers: {rate}", markup=False)
    if not found.report:
        return
    table = WordTable("figure", "value", "n", title="On held-out pairs (95 % intervals, n prompts)")
    from safety_lens.stats import Interval

    for row in found.report:
        name = row.metric if row.hook is None else f"{row.metric} at {row.hook}"
        cell = f"{row.value:.3f}" if row.low != row.low else with_interval(Interval(row.value, row.low, row.high), 3)
        table.add_row(name, cell, str(row.n))
    terminal.out.print(table)
    terminal.out.print("false_fire_rate: share of natural tokens touched; a gated mode aims at --false-fire (0.01)")


def _row(answer: "BeforeAfter") -> dict[str, Any]:
    return {
        "prompt": answer.prompt,
        "before": answer.before,
        "after": answer.after,
        "mode": answer.suppression.mode,
        "scale": answer.suppression.scale,
        "tokens": list(answer.tokens),
        "touched": list(answer.touched),
        "explain": answer.suppression.explain,
    }


def show_analysis(
    model: "HookedTransformer", found: "Suppression", site: str, read: str, no_cache: bool, as_json: bool
) -> None:
    from safety_lens.interventions.suppression.analysis import analyse

    result = analyse(model, found.pairs, site=site, read=read, cache=not no_cache)
    if as_json:
        for row in result.measurements:
            typer.echo(row.to_json())
        return
    from safety_lens.report.tables import with_interval
    from safety_lens.report.whole_words import WordTable
    from safety_lens.stats import Interval

    titles = {
        "effect_size": "Effect size (Hedges' g) on held-out prompts, 95 % intervals",
        "cosine": "Cosine between the categories' directions, 95 % intervals",
    }
    for metric, title in titles.items():
        rows = [row for row in result.measurements if row.metric == metric]
        hooks, subjects = (
            list(dict.fromkeys(x)) for x in ((str(r.hook) for r in rows), (str(r.subject) for r in rows))
        )
        cells = {(str(r.hook), r.subject): Interval(r.value, r.low, r.high) for r in rows}
        columns = (s.removeprefix("artifacts/").replace("~", "\n~ ") for s in subjects)
        table = WordTable("hook", *columns, title=title)
        for hook in hooks:
            short = str(hook).removeprefix("blocks.").replace("hook_", "")
            table.add_row(short, *(with_interval(cells[hook, s], 2).replace(" [", "\n[") for s in subjects))
        terminal.out.print(table)


def write_page(path: Path, answers: "Sequence[BeforeAfter]") -> int:
    from safety_lens.report.tokens import TokenView, token_page

    views = []
    for a in answers:
        names, values = _columns(a)
        labels = [*(f"projection, {name}" for name in names), "moved, in gaps"]
        lines = [] if a.before is None else [f"before: {a.before}"]
        views.append(TokenView(str(a.prompt), [*lines, f"after: {a.after}"], a.tokens, values, labels, a.touched))
    notes = [
        answers[0].suppression.explain,
        "projection: signed alignment in gaps, 0 at the natural mean, 1 at the artifact mean. moved: length of the"
        " change, all edits together",
    ]
    page = token_page("Suppression: projection and touched tokens", views, notes=notes)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    return len(page.encode())


def _columns(a: "BeforeAfter") -> tuple[list[str], list[list[float]]]:
    """Names of the edits, those that moved most first; per token its projection at each, and how far it was moved."""
    hooks = {s.hook for s in a.seen}
    edits: dict[tuple[str, str], float] = {}
    for s in a.seen:
        edits[s.hook, s.category] = edits.get((s.hook, s.category), 0.0) + s.moved
    order = sorted(edits, key=lambda edit: -edits[edit])
    values = [[float("nan")] * len(order) + [0.0] for _ in a.tokens]
    for s in a.seen:
        values[s.position][order.index((s.hook, s.category))] = s.projection
        values[s.position][-1] += s.moved
    short = [hook.removeprefix("blocks.").replace("hook_", "") for hook, _ in order]
    names = [c if len(hooks) == 1 else f"{c} at {h}" for (_, c), h in zip(order, short, strict=True)]
    return names, values


def save(
    out: Path,
    model: "HookedTransformer",
    answers: "Sequence[BeforeAfter]",
    found: "Suppression",
    arguments: dict[str, Any],
    overwrite: bool,
) -> None:
    import json

    from safety_lens.artifacts import save_artifact
    from safety_lens.data.pairs import last_user_text
    from safety_lens.data.splits import normalised
    from safety_lens.interventions.suppression.data import artifacts

    parts = (found.pairs.fit, found.pairs.calibrate, found.pairs.report)
    marked = {normalised(last_user_text(p)) for part in parts for p in artifacts(part)}

    def stored(answer: "BeforeAfter") -> dict[str, Any]:
        row = _row(answer)
        if normalised(last_user_text(answer.prompt)) not in marked:
            return row
        cut = {k: None if row[k] is None else " ".join(row[k].split()[:STORED_TOKENS]) for k in ("before", "after")}
        kept = (
            len(row["tokens"])
            if not answer.seen
            else 1 + max((s.position for s in answer.seen if not s.written), default=0)
        )
        return {**row, **cut, "tokens": row["tokens"][: kept + STORED_TOKENS], "shortened": True}

    def attach(folder: Path) -> None:
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(stored(a)) + "\n" for a in answers)
        with (folder / "firing.jsonl").open("w", encoding="utf-8") as file:
            for a in answers:
                file.writelines(json.dumps(_finite(s._asdict())) + "\n" for s in a.seen)

    tensors = {f"{at.category}/{at.hook}": at.vector for at in found.fits}
    facts = {"explain": found.explain, "mode": found.mode, "scale": found.scale, "notes": list(found.notes)}
    save_artifact(
        out,
        "suppression",
        model=model,
        tensors=tensors,
        measurements=found.report,
        arguments=arguments,
        extra=facts,
        attach=attach,
        overwrite=overwrite,
    )


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}
