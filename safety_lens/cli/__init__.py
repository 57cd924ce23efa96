"""The command line: the library with files. Nothing here imports torch: --help is quick."""

import os
import sys
from typing import Annotated

import typer

from safety_lens.cli import (
    convert,
    demo,
    doctor,
    extract,
    finetune,
    monitor,
    neurons,
    pairs,
    report,
    risk,
    steer,
    suppress,
)
from safety_lens.cli.terminal import PROCESS
from safety_lens.errors import OtherProcessError, SafetyLensError

app = typer.Typer(
    name="safety-lens",
    help="Find, test, change and watch concept directions in language models. Every number with its uncertainty,"
    " its control and its cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool | None) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"safety-lens {version('safety-lens-tl')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options that stand before the verb."""


app.command("extract")(extract.extract)
app.command("steer")(steer.steer)
app.command("report")(report.report)
app.command("suppress")(suppress.suppress)
app.command("finetune")(finetune.finetune)
app.command("monitor")(monitor.monitor)
app.command("risk")(risk.risk)
app.command("doctor")(doctor.doctor)
app.command("convert")(convert.convert)
app.command("demo")(demo.demo)
app.add_typer(pairs.app, name="pairs")
app.add_typer(neurons.app, name="neurons")


def main() -> None:
    """Entry point: errors that a user can mend are one message and exit code 2; --debug shows where they arose."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers would warn on every run
    try:
        app()
    except OtherProcessError:
        sys.exit(2)  # that process says why
    except SafetyLensError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"error{f' in process {PROCESS}' if PROCESS else ''}: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing unfinished was left behind", err=True)
        sys.exit(130)
