"""`safety-lens neurons drift`: how far neuron groups moved in saved fine-tunes, and what is found again of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safety_lens.cli import terminal
from safety_lens.cli.options import Device, Dtype, Json, Overwrite, Seed, checked_model

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from safety_lens.log import Measurement
    from safety_lens.monitors.neuron_drift.reidentify import Reidentified
    from safety_lens.monitors.neuron_drift.saved import SavedDrift

REPORT, RESULTS = "drift_analysis_report.txt", "statistical_results.json"


def drift(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", callback=checked_model, help="Hub id, folder or GGUF file of the base; or organism."
        ),
    ],
    sources: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="Adapters, checkpoints or runs; several: one training, other seeds."),
    ],
    groups: Annotated[
        list[str], typer.Option("--groups", help="Groups artifact, or FOLDER:GROUP for one of it; repeatable.")
    ],
    draws: Annotated[int, typer.Option(min=1, help="Random partners of every member.")] = 4,
    margin: Annotated[float, typer.Option(help="Up to this much farther or less far counts as similar.")] = 0.1,
    reidentify: Annotated[
        bool, typer.Option("--reidentify", help="Also identify the groups again on the trained weights.")
    ] = False,
    safety: Annotated[str, typer.Option(help="With --reidentify: safety examples, built-in or a file.")] = "safety",
    utility: Annotated[str, typer.Option(help="With --reidentify: utility examples, built-in or a file.")] = "utility",
    n_examples: Annotated[int, typer.Option(min=2, help="With --reidentify: examples of each kind.")] = 128,
    q: Annotated[float, typer.Option(help="With --reidentify: top share by safety in the set difference.")] = 0.03,
    p: Annotated[float, typer.Option(help="With --reidentify: top share by utility taken out of it.")] = 0.03,
    fraction: Annotated[float, typer.Option("--top", help="With --reidentify: share of the top groups.")] = 0.01,
    out: Annotated[Path | None, typer.Option(help="Folder to write: report, statistics, measurements, plots.")] = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Say how far groups moved beside matched random weights, from the adapters' factors, and answer H1 and H2.

    H1: safety weights move farther than random ones. H2: about as far. Both from intervals; undecided where they do
    not tell.
    """
    from safety_lens.artifacts import check_place

    if out is not None:
        check_place(out, "neuron-drift", overwrite)
    terminal.quiet_libraries()
    from safety_lens.models import load_hf, load_model
    from safety_lens.monitors.neuron_drift.saved import saved_drift
    from safety_lens.monitors.neuron_drift.summary import summary

    hf, tokenizer = load_hf(base, device=device, dtype=dtype)
    model = load_model(hf, tokenizer=tokenizer, check=False)
    found = saved_drift(hf, sources, chosen_groups(groups, model), draws=draws, seed=seed)
    again: dict[str, Reidentified] = {}
    if reidentify:
        again = _again(model, base, found, (safety, utility, n_examples), (q, p, fraction), seed, device, dtype)
    results = summary(found.final, margin=margin, reidentified=again, notes=found.notes)
    if out is not None:
        arguments = {
            "base": base, "sources": list(sources), "groups": list(groups), "draws": draws, "margin": margin,
            "seed": seed, "reidentify": reidentify, "safety": safety, "utility": utility, "n_examples": n_examples,
            "q": q, "p": p, "fraction": fraction,
        }  # fmt: skip
        _write(out, found, again, results, arguments, overwrite)
    _show(results, out, as_json)


def chosen_groups(names: Sequence[str], model: "HookedTransformer") -> "list[Any]":
    """All groups of every artifact named, or those named as FOLDER:GROUP; of this model only.

    Raises:
        ArtifactError: no such artifact or group. ModelMismatchError: groups of another model.
    """
    from safety_lens.errors import ArtifactError
    from safety_lens.monitors.finetune.early import split_name
    from safety_lens.probes.groups import load_groups

    found = []
    for text in names:
        place, name = split_name(text)
        there = load_groups(place, model)
        wanted = [group for group in there if name in (None, group.name)]
        if not wanted:
            raise ArtifactError(f"{place} holds no group {name!r}; there are {', '.join(g.name for g in there)}")
        found += wanted
    return found


def _again(
    model: "HookedTransformer",
    base: str,
    found: "SavedDrift",
    data: tuple[str, str, int],
    recipe: tuple[float, float, float],
    seed: int,
    device: str,
    dtype: str | None,
) -> "dict[str, Reidentified]":
    """What is found again of the groups at the end of every run; one trained model in memory at a time."""
    from safety_lens.models import load_model
    from safety_lens.monitors.neuron_drift.reidentify import compare_identified, groupings, identify
    from safety_lens.probes.examples import read_examples

    safety = read_examples(data[0], model, kind="safety", limit=data[2], seed=seed)
    utility = read_examples(data[1], model, kind="utility", limit=data[2], seed=seed)
    made = groupings(q=recipe[0], p=recipe[1], fraction=recipe[2])
    before = identify(model, safety, utility, made, seed=seed)
    out = {}
    for name, states in found.runs.items():
        last = states[-1].state
        source, adapter = (base, last.source) if last.is_adapter else (last.source, None)
        after = load_model(source, adapter=adapter, device=device, dtype=dtype)
        out[name] = compare_identified(before, identify(after, safety, utility, made, seed=seed))
        terminal.err.print(f"{name}: identified again", markup=False)
    return out


def _write(
    out: Path,
    found: "SavedDrift",
    again: "dict[str, Reidentified]",
    results: dict[str, Any],
    arguments: dict[str, Any],
    overwrite: bool,
) -> None:
    from safety_lens.artifacts import save_artifact
    from safety_lens.report.neuron_drift_plots import draw_neuron_drift
    from safety_lens.report.neuron_drift_text import drift_report

    def attach(folder: Path) -> None:
        (folder / REPORT).write_text(drift_report(results), encoding="utf-8")
        text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
        for name in found.runs:
            figures = folder / "figures" / name if len(found.runs) > 1 else folder / "figures"
            draw_neuron_drift(found.rows(name), figures, name)

    states = {name: [s.state.source for s in states] for name, states in found.runs.items()}
    save_artifact(
        out,
        "neuron-drift",
        measurements=_rows(found, again),
        arguments=arguments,
        extra={"runs": states, "notes": list(found.notes)},
        attach=attach,
        overwrite=overwrite,
    )


def _rows(found: "SavedDrift", again: "dict[str, Reidentified]") -> "list[Measurement]":
    """All rows, with the run's name before their subject."""
    from dataclasses import replace

    from safety_lens.monitors.neuron_drift.reidentify import reidentified_rows

    rows = []
    for name, states in found.runs.items():
        mine = found.rows(name)
        if name in again:
            mine += reidentified_rows(again[name], step=states[-1].step)
        rows += [replace(row, subject=f"{name}:{row.subject}") for row in mine]
    return rows


def _show(results: dict[str, Any], out: Path | None, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(results, ensure_ascii=False, allow_nan=False))
        return
    from safety_lens.report.neuron_drift_text import drift_report

    terminal.out.print(drift_report(results), markup=False, highlight=False, soft_wrap=True, end="")
    if out is not None:
        terminal.out.print(f"written: {out}", markup=False, soft_wrap=True)
