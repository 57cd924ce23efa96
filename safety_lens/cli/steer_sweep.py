"""`safety-lens steer --sweep`: from flags to a sweep, and from its numbers to what is printed."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from safety_lens.cli import terminal
from safety_lens.cli.steer_prompts import Asked, with_roles
from safety_lens.errors import DataError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from safety_lens.cli.steer_source import Source
    from safety_lens.interventions.scorers import Scorer
    from safety_lens.interventions.sweeping.plan import Decoding
    from safety_lens.interventions.sweeping.run import Estimate, SweepResult
    from safety_lens.types import Prompt

ABLATION_COEFFS = (0.25, 0.5, 0.75, 1.0)
ALL = "all"
"""Spelling of --control-coeffs that means the whole grid."""
LONG = 3600.0
"""Predicted seconds above which a sweep starts with --yes alone."""


def run_sweep(
    model: "HookedTransformer",
    source: "Source",
    hooks: Sequence[str],
    asked: Sequence[Asked],
    decoding: "Decoding",
    benign: "Sequence[Prompt] | None",
    scorers: "Sequence[Scorer]",
    given: dict[str, Any],
) -> None:
    """Run or go on with a sweep and print its results. given: the command's options by name."""
    from safety_lens.interventions.sweeping import inputs
    from safety_lens.interventions.sweeping.engine import ablating, adding, sweep
    from safety_lens.interventions.sweeping.plan import Controls
    from safety_lens.interventions.sweeping.search import middle, resolved

    roles = with_roles(asked, given["selection_share"], given["seed"], given["harmful"])
    remarks = [roles.remark]
    if source.trained_on is None:
        remarks.append("the pairs behind these directions are not at hand: overlap with the prompts was not checked")
    if source.acts is None and given["shuffled"]:
        remarks.append("no shuffled-label control: it refits the direction, which needs --concept or --pairs")
    for remark in remarks:
        terminal.err.print(remark, markup=False, soft_wrap=True)
    coeffs = parse_numbers("--coeffs", given["coeffs"])
    grid = inputs.checked_coeffs(ABLATION_COEFFS if coeffs is None and given["ablate"] else coeffs, given["units"])
    at = control_coeffs(given["control_coeffs"], grid)
    controls = Controls(given["controls"], at, draw=given["seed"])
    n_sites = 1 if given["all_layers"] else len(hooks)
    search = resolved(given["search"], n_sites, roles.prompts, controls)
    if search == "grid" and at is None:
        controls = replace(controls, coeffs=tuple(middle(grid)))
        if controls.random or source.acts is not None:
            terminal.err.print(
                f"controls run at {', '.join(f'{c:g}' for c in middle(grid))} alone (--control-coeffs all: at every"
                " coefficient)",
                markup=False,
                soft_wrap=True,
            )
    n_seeds = given["seeds"] or (5 if decoding.temperature > 0 else 1)
    out = None if given["out"] is None or given["dry_run"] else Path(given["out"])
    try:
        with ExitStack() as stack:
            progress = _Progress(out, stack)
            result = sweep(
                model,
                source.found,
                roles.prompts,
                scorers=scorers,
                coeffs=grid,
                hooks=list(hooks),
                together=given["all_layers"],
                seeds=range(given["seed"], given["seed"] + n_seeds),
                scope=given["scope"],
                units=given["units"],
                decoding=decoding,
                controls=controls,
                shuffled=_refits(source, given),
                trained_on=source.trained_on or (),
                chosen_on=source.chosen_on or (),
                system=given["system_baseline"],
                benign=list(benign or ()),
                goal=given["goal"],
                max_kl=given["max_kl"],
                edit=ablating if given["ablate"] else adding,
                out=out,
                overwrite=given["overwrite"],
                arguments=given,
                search=search,
                on_estimate=_announcer(given),
                on_rows=progress,
                on_note=lambda note: terminal.err.print(note, markup=False, soft_wrap=True),
            )
    except KeyboardInterrupt:
        typer.echo(progress.interrupted(), err=True)
        raise typer.Exit(130) from None
    _report(result, given["as_json"])


def _announcer(given: dict[str, Any]) -> "Callable[[Estimate], None]":
    """Print how long the sweep takes; end a dry run, and refuse a long one that nobody agreed to."""

    def announce(estimate: "Estimate") -> None:
        took = terminal.duration(estimate.seconds)
        if given["dry_run"] and given["as_json"]:
            typer.echo(json.dumps(asdict(estimate)))
        else:
            (terminal.out if given["dry_run"] else terminal.err).print(
                f"time: about {took} for {estimate.answers:,} answers of up to {estimate.tokens} tokens"
                f" ({estimate.timed} answers were timed)",
                soft_wrap=True,
            )
        if given["dry_run"]:
            raise typer.Exit(0)
        if estimate.seconds > LONG and not given["yes"]:
            raise DataError(
                f"this sweep takes about {took}: give --yes to start it, or make it smaller (fewer --layers, --coeffs,"
                " --controls or prompts, shorter answers by --max-new-tokens)"
            )

    return announce


def check_sweep(given: dict[str, Any]) -> None:
    """Refuse options of a sweep that are wrong, before a model is loaded.

    Raises:
        DataError: no scorer, coefficients that are no numbers, a ceiling without prompts to measure.
    """
    if not given["scorer"]:
        raise DataError("a sweep needs something to measure: give --scorer (lexicon:rude, refusal, hf:MODEL, …)")
    from safety_lens.interventions.sweeping.search import SEARCHES

    if given["search"] not in SEARCHES:
        raise DataError(f"--search {given['search']!r}: choose {', '.join(SEARCHES)}")
    parse_numbers("--coeffs", given["coeffs"])
    if given["control_coeffs"] != ALL:
        parse_numbers("--control-coeffs", given["control_coeffs"])
    if given["max_kl"] is not None and given["benign"] is None:
        raise DataError("--max-kl is measured on prompts the edit is not meant for: give --benign FILE")


class _Progress:
    """Progress of a sweep, and what is kept when it is interrupted."""

    def __init__(self, out: Path | None, stack: ExitStack) -> None:
        self.out, self.stack, self.done, self.total = out, stack, 0, 0
        self.advance: Callable[[int], None] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.advance is None:
            self.advance = self.stack.enter_context(terminal.progress("answers", total, done))
        else:
            self.advance(done - self.done)
        self.done, self.total = done, total

    def interrupted(self) -> str:
        if self.out is None:
            return "interrupted; nothing was kept, since there is no --out"
        kept = f"{self.done} of {self.total} answers" if self.total else "the answers that were written"
        return f"interrupted; {kept} are kept in {self.out}: the same command goes on from there"


def control_coeffs(text: str | None, grid: Sequence[float]) -> tuple[float, ...] | None:
    """Coefficients that the controls run at, None where they are not named."""
    return tuple(c for c in grid if c) if text == ALL else parse_numbers("--control-coeffs", text)


def parse_numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers of a spelling such as `-2,-1,0.5`; None for none.

    Raises:
        DataError: it is none.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"{flag} {text!r}: write numbers with commas between them, such as -2,-1,1,2") from None


def _refits(source: "Source", given: dict[str, Any]) -> Any:
    from safety_lens.interventions.sweeping.controls import shuffled_directions

    if source.acts is None:
        return ()
    return shuffled_directions(source.acts, method=given["method"], n=given["shuffled"], seed=given["seed"])


def _report(result: "SweepResult", as_json: bool) -> None:
    if as_json:
        for row in result.measurements:
            typer.echo(row.to_json())
        return
    from safety_lens.report.steering_tables import sweep_tables

    for scorer in result.plan.scorers:
        for subject in dict.fromkeys(site.subject for site in result.plan.sites):
            for table in sweep_tables(result.measurements, subject, scorer):
                terminal.out.print(table)
    _conclude(result)


def _conclude(result: "SweepResult") -> None:
    rows = result.measurements
    checked = [row for row in rows if row.metric == "identity"]
    terminal.out.print(
        f"coefficient 0 through the steered path gave the unsteered text at {len(checked)} of {len(checked)} sites"
        f" ({sum(row.n or 0 for row in checked)} tokens)",
        soft_wrap=True,
    )
    for row in rows:
        if row.metric == "chosen":
            where = "none" if row.hook is None else f"{row.hook} at {row.coeff:g}"
            terminal.out.print(f"chosen for {row.subject}: {where}: {row.note}", markup=False, soft_wrap=True)
            controls = [
                r.note for r in rows if (r.hook, r.coeff) == (row.hook, row.coeff) and r.metric.endswith("/random")
            ]
            for note in filter(None, dict.fromkeys(controls)):
                terminal.out.print(f"  {note}", markup=False, soft_wrap=True)
        if row.metric.endswith("/selection_penalty"):
            terminal.out.print(f"  selection penalty {row.value:+.3f}: {row.note}", markup=False, soft_wrap=True)
    if result.folder is not None:
        terminal.out.print(f"written: {result.folder}", markup=False, soft_wrap=True)
        terminal.out.print(f"plots: safety-lens report {result.folder} --out DIR", markup=False, soft_wrap=True)
