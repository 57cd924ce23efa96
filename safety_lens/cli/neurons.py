"""`safety-lens neurons`: what safety depends on in a model, whether it matters, and where it went."""

import typer

from safety_lens.cli.neurons_ablate import ablate
from safety_lens.cli.neurons_drift import drift
from safety_lens.cli.neurons_identify import identify
from safety_lens.cli.neurons_overlap import overlap
from safety_lens.cli.neurons_page import page

app = typer.Typer(
    help="Weights, neurons and heads that safety depends on and utility does not: find, compare, ablate, watch, look.",
    no_args_is_help=True,
)

app.command("identify")(identify)
app.command("overlap")(overlap)
app.command("ablate")(ablate)
app.command("drift")(drift)
app.command("page")(page)
