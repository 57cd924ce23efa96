"""`safety-lens risk --score`: saved forecasts set beside what monitored runs measured."""

from collections.abc import Sequence
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
        found = score_forecast(one.curves, other, limit=one.limit)
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


SCORED = ("step_to_limit", "step_ratio", "right", "log_slope")
HEADINGS = ("step to\nlimit", "forecast /\nmeasured", "within a\nfactor of 3", "grows as\nstep to the")


def show_score(rows: "Sequence[Measurement]") -> None:
    """A line for each forecast and what came, then ranks over runs; the ratio at every checkpoint is in the rows."""
    from rich import box
    from rich.table import Table

    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for row in rows:
        if row.metric in SCORED:
            found.setdefault((row.split or "", row.subject.removeprefix("score/")), {})[row.metric] = row
    if found:
        table = Table(title="Forecasts beside what was measured", box=box.SIMPLE_HEAD)
        several = len({run for run, _ in found}) > 1
        for column in (*(["run"] if several else []), "forecast", *HEADINGS):
            table.add_column(column, overflow="fold")
        for (run, name), numbers in found.items():
            cells = [_scored(numbers.get(metric)) for metric in SCORED]
            table.add_row(*([run] if several else []), name.replace("_", " "), *cells)
        terminal.out.print(table)
    for row in rows:
        if row.metric == "rank_runs":
            band = f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"
            what = row.subject.removeprefix("score/").replace("_", " ")
            terminal.out.print(f"rank agreement over {row.n} runs, {what}: {band}", markup=False)


def _scored(row: "Measurement | None") -> str:
    if row is None:
        return ""
    if row.metric == "right":
        return ("yes" if row.value else "no") + (f" ({row.note})" if row.note else "")
    return f"{row.value:.3g}" if row.value == row.value else row.note or "–"
