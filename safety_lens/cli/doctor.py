"""`safety-lens doctor`: is this model, as loaded here, fit to be measured?"""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safety_lens.cli import options, terminal

if TYPE_CHECKING:
    from safety_lens.conformance import Finding


def doctor(
    model: options.Model = "organism",
    adapter: options.Adapter = None,
    directions: Annotated[
        Path | None,
        typer.Option(
            callback=options.checked_directions,
            help="Also check that this artifact (or GGUF control vector) belongs to the model.",
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Check the environment, and identities that must hold on a model before its numbers are believed.

    Loading itself compares logits with Hugging Face. Exits 3 if a check fails.
    """
    terminal.quiet_libraries()
    from safety_lens.conformance import examine
    from safety_lens.interventions.conformance import examine_edits
    from safety_lens.models import load_model

    hooked = load_model(model, adapter=adapter, device=device, dtype=dtype)
    if directions is not None:
        from safety_lens.interventions.gguf import read_directions

        held = read_directions(directions, hooked)
        which = "fits this model" if directions.suffix == ".gguf" else "made with this model"
        terminal.err.print(f"{directions}: whole, and {which} ({sum(map(len, held))} directions)")
    findings = [*examine(hooked), *examine_edits(hooked)]
    if as_json:
        for finding in findings:
            typer.echo(finding.to_measurement().to_json())
    else:
        _show_environment(str(hooked.cfg.device), str(hooked.cfg.dtype).removeprefix("torch."))
        _show(findings, model)
        terminal.out.print(verdict(findings, model), markup=False, soft_wrap=True)
    if not all(f.ok for f in findings):
        raise typer.Exit(3)


def verdict(findings: "Sequence[Finding]", model: str) -> str:
    """One line that sums up: whether the model is fit to be measured, and if not, which checks say so."""
    failed = [f.name for f in findings if not f.ok]
    if failed:
        return f"not fit to be measured: {model} fails {len(failed)} of {len(findings)} checks ({', '.join(failed)})"
    idle = [f.name for f in findings if f.gap != f.gap and f.detail.startswith("does not apply")]
    apart = f", {len(idle)} of which cannot be made on it ({', '.join(idle)})" if idle else ""
    return f"fit to be measured: {model} passes all {len(findings)} checks{apart}"


def _show_environment(device: str, dtype: str) -> None:
    import torch

    from safety_lens.artifacts import versions

    listed = ", ".join(f"{name} {number}" for name, number in versions().items())
    terminal.out.print(f"{platform.system()} {platform.machine()}, {listed}", soft_wrap=True)
    terminal.out.print(f"device {device}, {dtype}, {torch.get_num_threads()} threads")


def _show(findings: "Sequence[Finding]", model: str) -> None:
    from rich.text import Text

    from safety_lens.report.whole_words import WordTable

    table = WordTable("check", "", "relative gap", "allowed", "what it says", title=Text(f"Conformance of {model}"))
    for f in findings:
        gap, allowed = ("–" if x != x else f"{x:.1e}" for x in (f.gap, f.tolerance))
        table.add_row(f.name, "ok" if f.ok else Text("FAILED", style="bold red"), gap, allowed, f.detail)
    terminal.out.print(table)
