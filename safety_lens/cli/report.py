"""`safety-lens report`: figures from saved results, without a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safety_lens.cli import drift_source, options, terminal
from safety_lens.errors import ArtifactError

if TYPE_CHECKING:
    from safety_lens.log import Measurement


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE…", help="A sweep of `steer`; or runs of `finetune`, drift logs, `monitor`s."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the figures; files of the same name are replaced.")],
    pdf: Annotated[bool, typer.Option("--pdf", help="Also as PDF.")] = False,
    as_json: options.Json = False,
) -> None:
    """Draw what was measured, and run no model.

    A sweep: coefficients, layers, both signs, cost, subsets. Drift of one or several runs: directions over steps,
    behaviour beside them, runs side by side.
    """
    if all(map(drift_source.holds_drift, sources)):
        written = _drift(sources, out, pdf, as_json)
    elif len(sources) == 1:
        written = _sweep(sources[0], out, pdf, as_json)
    else:
        found = next(source for source in sources if not drift_source.holds_drift(source))
        raise ArtifactError(f"{found} holds no drift: several sources are compared only where each is a monitored run")
    if not as_json:
        for file in written:
            terminal.out.print(f"written: {file}", markup=False, soft_wrap=True)


def _drift(sources: Sequence[Path], out: Path, pdf: bool, as_json: bool) -> list[Path]:
    if not as_json:
        return drift_source.report_drift(sources, out, pdf=pdf)
    runs = drift_source.read_runs(sources)
    for rows in runs.values():
        _print_rows(rows)
    return drift_source.draw(runs, out, pdf)


def _sweep(source: Path, out: Path, pdf: bool, as_json: bool) -> list[Path]:
    from safety_lens.artifacts import load_artifact
    from safety_lens.report.steering_plots import draw_all
    from safety_lens.report.steering_tables import cell_table, site_table

    rows = load_artifact(source, kind="sweep").measurements
    try:
        written = draw_all(rows, out, pdf=pdf)
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    if as_json:
        _print_rows(rows)
        return written
    found = dict.fromkeys((r.subject, r.metric.removesuffix("/p_all")) for r in rows if r.metric.endswith("/p_all"))
    for subject, scorer in found:
        terminal.out.print(site_table(rows, subject, scorer))
        terminal.out.print(cell_table(rows, subject, scorer))
    return written


def _print_rows(rows: "Sequence[Measurement]") -> None:
    for row in rows:
        typer.echo(row.to_json())
