"""`safety-lens risk --score`: saved forecasts set beside what monitored runs measured."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from safety_lens.cli import terminal

if TYPE_CHECKING:
    from safety_lens.log import Measurement
    from safety_lens.monitors.forecasting.scoring import Measured


def score_saved(
    forecasts: Sequence[Path], runs: Sequence[Path], out: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Saved forecasts beside the runs they were made for, pair by pair; over three pairs and more also ranks."""
    from safety_lens.artifacts import save_artifact
    from safety_lens.errors import DataError
    from safety_lens.monitors.forecasting.saved import load_risk, read_run
    from safety_lens.monitors.forecasting.scoring import score_forecast

    if len(forecasts) != len(runs):
        raise DataError(f"{len(forecasts)} forecasts and {len(runs)} runs: give one --forecast for each --score")
    saved, measured = [load_risk(path) for path in forecasts], [read_run(path) for path in runs]
    rows: list[Measurement] = []
    for one, other, path in zip(saved, measured, runs, strict=True):
        for name in _other_plan(one.manifest["arguments"]["config"], path):
            terminal.err.print(f"! the forecast was made for another plan than {path}: {name} differs", markup=False)
        found = score_forecast(one.curves, other, limit=one.limit, level=one.level)
        rows += [replace(row, split=path.name) for row in found] if len(runs) > 1 else found
    if len(runs) > 2:
        rows += _ranks(saved, measured)
    if out is not None:
        names = {"forecasts": [str(p) for p in forecasts], "runs": [str(p) for p in runs]}
        save_artifact(out, "risk-score", measurements=rows, arguments=names, overwrite=overwrite)
    if as_json:
        for row in rows:
            typer.echo(row.to_json())
        return
    show_score(rows)


def _other_plan(planned: dict[str, Any], run: Path) -> list[str]:
    """Keys of data, tuning and training in which a forecast's plan and a run differ; none where the run keeps none."""
    from safety_lens.monitors.finetune.config import RunConfig, differences, read_config

    if not (run / "config.yaml").is_file():
        return []
    found = differences(RunConfig.model_validate(planned), read_config(run / "config.yaml"))
    return [key for key in found if key.partition(".")[0] in ("model", "data", "tuning", "training")]


def _ranks(saved: Sequence[Any], measured: "Sequence[Measured]") -> "list[Measurement]":
    """Agreement over runs, at the last step that every run measured."""
    from safety_lens.errors import DataError
    from safety_lens.monitors.forecasting.scoring import rank_runs

    common = set.intersection(*({float(s) for s in run.steps} for run in measured))
    if not common:
        raise DataError("the runs share no measured step: monitor them at the same interval to rank them")
    at = max(common)
    truth = [float(run.kl[list(run.steps).index(at)]) for run in measured]
    numbers = {
        name: [one.curves[name].at(at) for one in saved]
        for name in saved[0].curves
        if all(name in s.curves for s in saved)
    }
    for name in ("mean_loss", "gradient_norm"):
        numbers[name] = [one.value("risk", name) for one in saved]
    return rank_runs(numbers, truth)


SCORED = ("step_to_limit", "step_ratio", "inside", "right", "log_slope", "claims_to_step")
HEADINGS = (
    "step to\nlimit",
    "× what was\nmeasured",
    "in the\ninterval",
    "within a\nfactor of 3",
    "grows as\nstep^",
    "known",
)


def show_score(rows: "Sequence[Measurement]") -> None:
    """A line for each forecast and what came, then missed warnings and ranks over runs.

    The ratio at every checkpoint is in the rows.
    """
    from safety_lens.report.whole_words import WordTable

    found: dict[str, dict[str, dict[str, Measurement]]] = {}
    for row in rows:
        if row.metric in SCORED:
            run = found.setdefault(row.split or "", {})
            run.setdefault(row.subject.removeprefix("score/"), {})[row.metric] = row
    for name, lines in found.items():
        title = "Forecasts beside what was measured" + (f": {name}" if name else "")
        table = WordTable("forecast", *HEADINGS, title=title)
        for forecast, numbers in lines.items():
            cells = [CELLS[metric](numbers[metric]) if metric in numbers else "" for metric in SCORED]
            table.add_row(forecast.replace("_", " "), *cells)
        terminal.out.print(table)
    for row in rows:
        if row.metric == "missed":
            _say_warning(row)
        if row.metric == "rank_runs":
            band = f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"
            what = row.subject.removeprefix("score/").replace("_", " ")
            terminal.out.print(f"rank agreement over {row.n} runs, {what}: {band}", markup=False)


def _say_warning(row: "Measurement") -> None:
    run = f"{row.split}: " if row.split else ""
    terminal.out.print("[bold red]MISSED WARNING[/] " if row.value else "warning: ", end="")
    terminal.out.print(f"{run}{row.note}", markup=False, soft_wrap=True)


def _number(row: "Measurement") -> str:
    return f"{row.value:.3g}" if row.value == row.value else row.note or "–"


def _step(row: "Measurement") -> str:
    if row.low != row.low:
        return _number(row)
    return f"{_number(row)} [{row.low:.3g}, {f'{row.high:.3g}' if row.high == row.high else 'never'}]"


def _answer(row: "Measurement") -> str:
    said = {1.0: "yes", 0.0: "no"}.get(row.value, "open")
    return said + (f": {row.note}" if row.note else "")


CELLS: "dict[str, Callable[[Measurement], str]]" = {
    "step_to_limit": _step,
    "step_ratio": _number,
    "inside": _answer,
    "right": _answer,
    "log_slope": _number,
    "claims_to_step": lambda row: row.note or "",
}
