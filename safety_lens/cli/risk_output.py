"""What `safety-lens risk` does with its options: forecast, write, print."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from safety_lens.cli import terminal
from safety_lens.cli.risk_score import show_score

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from safety_lens.log import Measurement
    from safety_lens.monitors.finetune.config import RunConfig
    from safety_lens.monitors.forecast import RiskReport
    from safety_lens.monitors.forecasting.scoring import Measured
    from safety_lens.probes.row_risk import RowRisk

COLORS = {"red": "bold red", "amber": "yellow", "grey": "dim", "green": "green"}


class Asked(NamedTuple):
    """The options of a forecast that are not the run's own."""

    safety: str
    n_safety: int
    batches: int
    rehearse: int
    closed: bool
    directions: int | None
    limit: float
    rows: bool
    ancestor: bool
    dry_run: bool
    as_json: bool


def forecast_run(config: "RunConfig", asked: Asked, run: Path | None, out: Path | None, overwrite: bool) -> None:
    """Load, forecast, compare with a run where there is one, write, print."""
    from safety_lens.models import load_hf, load_model
    from safety_lens.monitors.finetune.training import quantization_of
    from safety_lens.monitors.forecast import Budget, assess_risk
    from safety_lens.monitors.forecasting.saved import curves_of, measurements_of, read_run, save_risk
    from safety_lens.monitors.forecasting.scoring import score_forecast
    from safety_lens.probes.examples import read_examples

    budget = Budget(asked.batches, asked.rehearse, asked.closed, asked.directions, asked.limit, seed=config.seed)
    measured = None if run is None else read_run(run)
    quantization = quantization_of(config.tuning, None)
    hf, tokenizer = load_hf(
        config.model, dtype=None if quantization else "float32", device=config.device, quantization=quantization
    )
    if asked.dry_run:
        _cost(hf, tokenizer, config, asked)
        return
    model = load_model(hf, tokenizer=tokenizer)
    safe = read_examples(asked.safety, model, kind="safety", limit=asked.n_safety, seed=config.seed)
    report = assess_risk(hf, tokenizer, safe.continuations, config, budget, model=model)
    more: list[Measurement] = []
    if asked.ancestor:
        more += _ancestor(hf, tokenizer, config, safe.continuations, asked)
    if measured is not None:
        more += score_forecast(curves_of(report), measured, limit=asked.limit, level=report.warning.level)
    ranked, lines = _ranked(model, tokenizer, config, safe.continuations) if asked.rows else (None, [])
    if out is not None:
        save_risk(
            out, report, more=more, overwrite=overwrite,
            extra={"safety": {"source": safe.name, "n": len(safe), "sha256": safe.sha256}},
            attach=partial(_attach, report, measured, ranked, lines),
        )  # fmt: skip
    _show(report, [*safe.notes, *report.notes], [*measurements_of(report), *more], asked.as_json)
    if out is not None and not asked.as_json:
        terminal.out.print(f"written: {out}", markup=False, soft_wrap=True)


def _cost(hf: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", config: "RunConfig", asked: Asked) -> None:
    """Passes through the model, and how long they take at the speed of one batch here."""
    import time

    from safety_lens.monitors.forecasting.path import batch_gradients
    from safety_lens.monitors.forecasting.planned import plan, throwaway

    planned = plan(config, tokenizer, hf)
    with throwaway(hf, planned) as spare:
        began = time.perf_counter()
        batch_gradients(spare.live, spare.trained, planned.batches(1, config.seed), micro=planned.batch_rows)
        seconds = time.perf_counter() - began
        trained = sum(p.numel() for p in spare.trained)
    steps = asked.batches * 3 * asked.closed + asked.rehearse
    per_row = seconds / planned.batch_rows
    answers = asked.n_safety * (2 * (asked.rehearse + 1) + 9 * asked.closed)
    found = {
        "plan_steps": len(planned.rates),
        "trained_weights": trained,
        "training_batches": steps,
        "safety_passes": answers,
        "seconds": steps * seconds + answers * per_row,
        "bytes": 4 * trained * (8 if asked.closed else 4),
    }
    if asked.as_json:
        typer.echo(json.dumps(found))
        return
    terminal.out.print(
        f"plan: {found['plan_steps']} steps, {trained:,} weights trained\n"
        f"forecast: {steps} training batches of {planned.batch_rows} rows and {answers} safety passes, about"
        f" {found['seconds']:.0f} s at the speed of one batch here ({seconds:.2g} s); {found['bytes'] / 2**20:.0f} MiB"
        " beside the model",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _ancestor(
    hf: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    config: "RunConfig",
    safety: Sequence[Any],
    asked: Asked,
) -> "list[Measurement]":
    from safety_lens.log import NAN, Measurement
    from safety_lens.monitors.forecasting.ancestor import ancestor_of
    from safety_lens.monitors.forecasting.planned import plan, throwaway

    planned = plan(config, tokenizer, hf)
    with throwaway(hf, planned) as spare:
        found = ancestor_of(
            spare.live, spare.trained, safety, planned.batches(1, config.seed)[0],
            learning_rate=config.training.learning_rate, threshold=asked.limit,
        )  # fmt: skip
    note = "as alignment-risk 1.14.1 computes it; known to be wrong"
    return [
        Measurement("ancestor/alignment-risk", name, NAN if value is None else float(value), n=len(safety), note=note)
        for name, value in asdict(found).items()
    ]


def _ranked(
    model: "HookedTransformer", tokenizer: "PreTrainedTokenizerBase", config: "RunConfig", safety: Sequence[Any]
) -> "tuple[RowRisk, list[int]]":
    """Risk of every training row, and their lines in the file."""
    from safety_lens.monitors.finetune.run import prepare, tokens_of
    from safety_lens.probes.row_risk import responses_of, row_risk

    rows = tokens_of(prepare(config), tokenizer).rows
    parts = [(i, part) for i, row in enumerate(rows) for part in responses_of(row)]
    found = row_risk(model, [part for _, part in parts], safety, belongs=[i for i, _ in parts])
    present = sorted({i for i, _ in parts})
    return found, [rows[i].line for i in present]


def _attach(
    report: "RiskReport", measured: "Measured | None", ranked: "RowRisk | None", lines: Sequence[int], folder: Path
) -> None:
    """Figures and row risks beside the forecast."""
    from safety_lens.monitors.forecasting.saved import curves_of, measurements_of
    from safety_lens.probes.row_risk import write_row_risk
    from safety_lens.report import risk_plots as plots
    from safety_lens.report.plots import save_figure

    rows = measurements_of(report)
    name = f"{report.config.model} on {report.config.data.source}"
    figure = plots.forecast_figure(
        {n: plots.Forecast(c.steps, c.kl, c.low, c.high, c.valid) for n, c in curves_of(report).items()},
        limit=report.budget.limit,
        planned=report.steps,
        rehearsed=[row for row in rows if row.metric == "token_kl_measured"],
        measured=None if measured is None else (measured.steps, measured.kl),
        title=f"{name}: {report.warning.level}",
    )
    save_figure(figure, folder / "forecast.png")
    if report.sensitivity is not None:
        s = report.sensitivity.spectrum
        sensitive = [row for row in rows if row.subject == "risk/sensitivity"]
        save_figure(plots.sensitivity_figure(sensitive, name), folder / "sensitivity.png")
        save_figure(
            plots.spectrum_figure(s.eigenvalues, s.total, s.dimension, report.n_safety, name), folder / "spectrum.png"
        )
    if ranked is not None:
        write_row_risk(folder / "row_risk.jsonl", ranked, list(lines))
        save_figure(plots.row_risk_figure(ranked.risk, name), folder / "row_risk.png")


def _show(report: "RiskReport", notes: Sequence[str], rows: "Sequence[Measurement]", as_json: bool) -> None:
    if as_json:
        for row in rows:
            typer.echo(row.to_json())
        return
    for note in notes:
        terminal.err.print(f"! {note}", markup=False, soft_wrap=True)
    level = report.warning.level
    terminal.out.print(f"[{COLORS[level]}]{level.upper()}[/]: {report.warning.reasons[0]}", soft_wrap=True)
    for reason in report.warning.reasons[1:]:
        terminal.out.print(f"  also: {reason}", markup=False, soft_wrap=True)
    terminal.out.print(_table(report))
    terminal.out.print(
        "95 %: draw of the answers, and the law's own error as it was on fine-tunes of the organism; it may be larger"
        " elsewhere",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    show_score([row for row in rows if row.subject.startswith("score/")])
    for row in rows:
        if row.subject.startswith("ancestor/"):
            terminal.out.print(
                f"{row.subject} {row.metric}: {row.value:.4g} ({row.note})", markup=False, soft_wrap=True
            )


def _table(report: "RiskReport") -> Any:

    from safety_lens.monitors.forecasting.saved import curves_of
    from safety_lens.report.whole_words import WordTable

    table = WordTable(
        "forecast", f"step to {report.budget.limit:g}", "95 %", "KL at the end", "known",
        title=f"KL per token on {report.n_safety} safe answers, plan of {report.steps} steps",
    )  # fmt: skip
    for name, curve in curves_of(report).items():
        when = curve.reaches
        table.add_row(
            name.replace("_", " "),
            _step(when.value) + (" (beyond its range)" if curve.valid < when.value < float("inf") else ""),
            f"{_step(when.low)} … {_step(when.high)}",
            f"{curve.kl[report.steps - 1]:.2g}",
            curve.claims,
        )
    return table


def _step(value: float) -> str:
    return f"{value:.0f}" if value < float("inf") else "never"
