"""`safety-lens neurons ablate`: what a model does without a group, beside matched random groups."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safety_lens.cli import options, terminal
from safety_lens.cli.neurons_identify import Safety, Utility
from safety_lens.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from safety_lens.interventions.neuron_effects import Edit, Effect, Measure
    from safety_lens.log import Measurement
    from safety_lens.probes.examples import ExampleSet
    from safety_lens.probes.groups import NeuronGroup

DERIVE = 60


def ablate(
    groups: Annotated[Path, typer.Argument(help="Groups artifact, as `neurons identify` writes it.")],
    group: Annotated[
        list[str] | None, typer.Option("--group", help="Group to ablate; repeatable, default all.")
    ] = None,
    model: options.Model = "organism",
    safety: Safety = "safety",
    utility: Utility = "utility",
    keep: Annotated[bool, typer.Option("--keep", help="Keep only the group, ablate all else.")] = False,
    mean: Annotated[
        bool, typer.Option("--mean", help="Neurons and heads at their mean on utility examples, not zero.")
    ] = False,
    draws: Annotated[int, typer.Option(min=0, help="Random groups of the same sizes, matched on |w|.")] = 20,
    n_prompts: Annotated[int, typer.Option("--n-examples", min=2, help="Prompts and examples of each kind.")] = 48,
    loss_only: Annotated[bool, typer.Option("--loss-only", help="Measure losses alone: write no answers.")] = False,
    adapter: options.Adapter = None,
    raw: options.Raw = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write: measurements and the figure.")] = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Take groups out of a model and measure safety and utility on the test split, beside random groups.

    Groups of several sizes (`neurons identify --sizes`) give the faithfulness curve.
    """
    from safety_lens.artifacts import check_place

    if out is not None:
        check_place(out, "ablation", overwrite)
    terminal.quiet_libraries()
    from safety_lens.interventions.neuron_effects import causal_check, effect_rows
    from safety_lens.models import load_model
    from safety_lens.probes.examples import read_examples
    from safety_lens.probes.groups import load_groups

    hooked = load_model(model, adapter=adapter, device=device, dtype=dtype)
    chosen = _chosen(load_groups(groups, hooked), group)
    data = {
        kind: read_examples(source, hooked, kind=kind, split="test", limit=n_prompts, seed=seed, raw=raw)
        for kind, source in (("safety", safety), ("utility", utility))
    }
    measures, notes = _measures(hooked, data, n_prompts, seed, loss_only, raw)
    edit = _edit(hooked, chosen, keep, mean, utility, seed, raw)
    with terminal.progress("editing groups", len(chosen)) as advance:
        found = causal_check(hooked, chosen, measures, edit=edit, draws=draws, seed=seed, on_group=lambda _: advance(1))
    rows = effect_rows(_with_text(found), split="test", seed=seed)
    if out is not None:
        arguments = {
            "groups": str(groups), "group": group, "model": model, "adapter": adapter, "safety": safety,
            "utility": utility, "keep": keep, "mean": mean, "draws": draws, "n_prompts": n_prompts,
            "loss_only": loss_only, "seed": seed,
        }  # fmt: skip
        _write(out, hooked, rows, arguments, notes, overwrite)
    notes.append(
        f"at most {n_prompts} prompts or examples of each kind; p counts {draws} random groups, so it is"
        f" {1 / (draws + 1):.2g} at least"
    )
    _show(rows, notes, out, as_json)


def _chosen(there: "Sequence[NeuronGroup]", names: Sequence[str] | None) -> "list[NeuronGroup]":
    if missing := [name for name in names or () if name not in {g.name for g in there}]:
        raise DataError(f"no group {missing[0]!r}: there are {', '.join(g.name for g in there)}")
    return [g for g in there if not names or g.name in names]


def _edit(
    model: "HookedTransformer",
    groups: "Sequence[NeuronGroup]",
    keep: bool,
    mean: bool,
    utility: str,
    seed: int,
    raw: bool,
) -> "Edit":
    from functools import partial

    from safety_lens.interventions.neurons import ablated, kept, mean_activations
    from safety_lens.probes.examples import read_examples

    edit = kept if keep else ablated
    if not mean:
        return edit
    rows = read_examples(utility, model, kind="utility", split="train", limit=64, seed=seed, raw=raw).continuations
    means: dict[str, Any] = {}
    for group in groups:
        means |= mean_activations(model, rows, group)
    return partial(edit, means=means)


def _measures(
    model: "HookedTransformer", data: "dict[str, ExampleSet]", n: int, seed: int, loss_only: bool, raw: bool
) -> "tuple[list[Measure], list[str]]":
    """What can be measured of this model, and why the rest cannot."""
    from safety_lens.data.built_in import built_in_for
    from safety_lens.interventions import neuron_measures as measures
    from safety_lens.interventions.scorers.refusal_tokens import derive_refusal_tokens

    found = [measures.loss_measure(f"{kind}_loss", rows.continuations) for kind, rows in data.items()]
    if loss_only:
        return found, []
    sets, notes = built_in_for(model), []
    harmful, harmless = (sets.requests(label, "test")[:n] for label in ("harmful", "harmless"))
    try:
        derive = (sets.requests(label, "train")[:DERIVE] for label in ("harmful", "harmless"))
        tokens = derive_refusal_tokens(model, *derive, seed=seed, raw=raw)
        found.insert(0, measures.refusal_measure(tokens, harmful, raw=raw))
    except (DataError, ModelError) as error:  # a model that does not refuse: there is nothing to lose
        notes.append(f"refusal was not measured: {error}")
    own = sets.name == "organism"
    found.append(measures.coherence_measure(harmless, organism=own))
    found.append(measures.coherence_measure(harmful, organism=own, name="coherence_harmful"))
    found.append(measures.facts_measure(sets, n))
    return found, notes


def _with_text(effects: "Sequence[Effect]") -> "list[Effect]":
    """The refusal log-odds once more, with prompts whose answers were broken counted as unchanged."""
    from safety_lens.interventions.neuron_effects import broken_not_counted

    text = {e.group.name: e for e in effects if e.measure.name == "coherence_harmful"}
    out: list[Effect] = []
    for e in effects:
        out.append(e)
        if e.measure.name == "refusal_log_odds":
            out.append(broken_not_counted(e, text[e.group.name]))
    return out


def _write(
    out: Path,
    model: "HookedTransformer",
    rows: "Sequence[Measurement]",
    arguments: dict[str, Any],
    notes: Sequence[str],
    overwrite: bool,
) -> None:
    from safety_lens.artifacts import save_artifact
    from safety_lens.report.neuron_plots import faithfulness
    from safety_lens.report.plots import save_figure

    edited = "nothing kept but the group" if arguments["keep"] else "group ablated"
    figure = faithfulness(rows, title=f"{arguments['model']}: {edited}")
    save_artifact(
        out,
        "ablation",
        model=model,
        measurements=rows,
        arguments=arguments,
        extra={"notes": list(notes)},
        attach=lambda folder: (save_figure(figure, folder / "faithfulness.png"), None)[1],
        overwrite=overwrite,
    )


def _show(rows: "Sequence[Measurement]", notes: Sequence[str], out: Path | None, as_json: bool) -> None:
    if as_json:
        for row in rows:
            typer.echo(row.to_json())
        return
    from safety_lens.report.neuron_tables import effect_table

    terminal.out.print(effect_table(rows))
    for note in notes:
        terminal.out.print(f"! {note}", markup=False, soft_wrap=True)
    if out is not None:
        terminal.out.print(f"written: {out}", markup=False, soft_wrap=True)
