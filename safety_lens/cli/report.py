"""`safety-lens report`: figures from saved results, without a model."""

from pathlib import Path
from typing import Annotated

import typer

from safety_lens.cli import options, terminal
from safety_lens.errors import ArtifactError


def report(
    source: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that `steer --sweep` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the figures; files of the same name are replaced.")],
    pdf: Annotated[bool, typer.Option("--pdf", help="Also as PDF.")] = False,
    as_json: options.Json = False,
) -> None:
    """Draw what a sweep has measured: coefficients, layers, both signs, cost, subsets. Runs no model."""
    from safety_lens.artifacts import load_artifact
    from safety_lens.report.steering_plots import draw_all
    from safety_lens.report.steering_tables import cell_table, site_table

    rows = load_artifact(source, kind="sweep").measurements
    try:
        written = draw_all(rows, out, pdf=pdf)
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    if as_json:
        for row in rows:
            typer.echo(row.to_json())
        return
    found = dict.fromkeys((r.subject, r.metric.removesuffix("/p_all")) for r in rows if r.metric.endswith("/p_all"))
    for subject, scorer in found:
        terminal.out.print(site_table(rows, subject, scorer))
        terminal.out.print(cell_table(rows, subject, scorer))
    for file in written:
        terminal.out.print(f"written: {file}", markup=False, soft_wrap=True)
