"""`safety-lens neurons identify`: scores and groups of weights, neurons or heads."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safety_lens.cli import options, terminal
from safety_lens.errors import DataError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from safety_lens.log import Measurement
    from safety_lens.monitors.neuron_drift.reidentify import Grouping, Identified
    from safety_lens.probes.attribution.scores import Score
    from safety_lens.probes.examples import ExampleSet
    from safety_lens.probes.groups import NeuronGroup

HALVES = "halves"
"""Folder inside a groups artifact: the same groups from each half of the examples, for ceilings."""

Safety = Annotated[
    str,
    typer.Option(help="Safety examples: safety (built in), or a file of requests, rows or pairs."),
]
Utility = Annotated[str, typer.Option(help="Utility examples: utility, facts (built in), or a file like that.")]
Examples = Annotated[int, typer.Option("--n-examples", min=2, help="Examples of each kind.")]


SHARES = {
    "weight": {"q": 0.03, "p": 0.03, "fraction": 0.01},
    "neuron": {"q": 0.03, "p": 0.03, "fraction": 0.01},
    "head": {"q": 0.125, "p": 0.125, "fraction": 0.125},
}
"""Shares where none is given. Models have dozens to hundreds of heads: a hundredth of them is none."""


def identify(
    out: options.Out,
    model: options.Model = "organism",
    safety: Safety = "safety",
    utility: Utility = "utility",
    n_examples: Examples = 128,
    method: Annotated[str, typer.Option(help="snip, wanda or gradient (gradient × activation).")] = "snip",
    unit: Annotated[str, typer.Option(help="weight (one entry of a matrix), neuron or head.")] = "weight",
    q: Annotated[
        float | None, typer.Option("--q", help="Set difference: top share by safety score; 0.03, of heads 0.125.")
    ] = None,
    p: Annotated[
        float | None, typer.Option("--p", help="And top share by utility score, taken out; 0.03, of heads 0.125.")
    ] = None,
    fraction: Annotated[
        float | None, typer.Option("--top", help="Share of top-safety and top-utility; 0.01, of heads 0.125.")
    ] = None,
    sizes: Annotated[str | None, typer.Option(help="More set differences with p = q, such as 0.002,0.01.")] = None,
    scope: Annotated[
        str | None, typer.Option(help="Ranked within row, matrix (weights), layer (neurons) or global (heads).")
    ] = None,
    layers: options.Layers = None,
    adapter: options.Adapter = None,
    raw: options.Raw = False,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Score weights on safety and on utility examples and keep what is important for the one and not for the other.

    Writes a groups artifact: top-safety, top-utility, set-difference, and a matched random group. All is chosen on the
    train split of the examples; `neurons ablate` judges it on the test split.
    """
    from safety_lens.artifacts import check_place
    from safety_lens.cli.extract import parse_layers

    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items() if k not in ("check_place",)}
    arguments.pop("parse_layers")
    check_place(out, "groups", overwrite)
    shares = shares_of(unit, q=q, p=p, fraction=fraction)
    arguments |= shares
    more = parse_sizes(sizes)
    wanted = parse_layers(layers)
    terminal.quiet_libraries()
    from safety_lens.models import load_model
    from safety_lens.monitors.neuron_drift.reidentify import groupings
    from safety_lens.monitors.neuron_drift.reidentify import identify as identified
    from safety_lens.probes.examples import read_examples
    from safety_lens.probes.matching import random_like

    score = scored(method, unit)
    hooked = load_model(model, adapter=adapter, device=device, dtype=dtype)
    data = {
        kind: read_examples(source, hooked, kind=kind, split="train", limit=n_examples, seed=seed, raw=raw)
        for kind, source in (("safety", safety), ("utility", utility))
    }
    made = groupings(**shares, scope=scope) | {f"set-difference-{size:g}": sized(size, scope) for size in more}
    found = identified(hooked, data["safety"], data["utility"], made, score=score, seed=seed, layers=wanted)
    groups = [group.renamed(name) for name, group in found.whole.items()]
    groups.append(random_like(found.whole["set-difference"], hooked, seed=seed, name="random"))
    _write(out, hooked, groups, found, data, arguments, overwrite)
    _show(groups, found, data, out, as_json)


def shares_of(unit: str, **given: float | None) -> dict[str, float]:
    """The shares given, and the unit's own where none is.

    Raises:
        DataError: no such unit.
    """
    if unit not in SHARES:
        raise DataError(f"--unit {unit}: choose {', '.join(SHARES)}")
    return {name: SHARES[unit][name] if value is None else value for name, value in given.items()}


def parse_sizes(text: str | None) -> list[float]:
    """Shares of a spelling such as `0.002,0.01`.

    Raises:
        DataError: it is none.
    """
    try:
        return sorted({float(part) for part in text.split(",")}) if text else []
    except ValueError as error:
        raise DataError(f"--sizes {text!r}: write shares between 0 and 1 such as 0.002,0.01,0.05") from error


def sized(size: float, scope: str | None) -> "Grouping":
    from safety_lens.probes.ranking import set_difference

    return lambda safety, utility, model: set_difference(safety, utility, model, q=size, p=size, scope=scope)


def scored(method: str, unit: str) -> "Score":
    """The score function of a method and unit.

    Raises:
        DataError: a combination that there is not.
    """
    from functools import partial

    from safety_lens.probes.attribution import attribute_neurons, snip_scores, wanda_scores

    known: dict[tuple[str, str], Callable[..., Any]] = {
        ("snip", "weight"): snip_scores,
        ("snip", "neuron"): partial(_summed, unit="neuron"),
        ("snip", "head"): partial(_summed, unit="head"),
        ("wanda", "weight"): wanda_scores,
        ("gradient", "neuron"): partial(attribute_neurons, unit="neuron"),
        ("gradient", "head"): partial(attribute_neurons, unit="head"),
    }
    if (method, unit) not in known:
        there = ", ".join(f"{m} for {u}s" for m, u in known)
        raise DataError(f"--method {method} --unit {unit}: there is no such score. There is {there}")
    return known[method, unit]


def _summed(model: "HookedTransformer", examples: Any, *, unit: str, layers: Any = None) -> Any:
    from safety_lens.probes.attribution import aggregated, snip_scores

    return aggregated(snip_scores(model, examples, layers=layers), model, unit)


def _write(
    out: Path,
    model: "HookedTransformer",
    groups: "list[NeuronGroup]",
    found: "Identified",
    data: "Mapping[str, ExampleSet]",
    arguments: dict[str, Any],
    overwrite: bool,
) -> None:
    from safety_lens.probes.groups import save_groups
    from safety_lens.report.neuron_plots import where_members_are
    from safety_lens.report.plots import save_figure

    halves = [g.renamed(f"{name}-{i + 1}") for name, pair in found.halves.items() for i, g in enumerate(pair)]

    def attach(folder: Path) -> None:
        save_groups(folder / HALVES, halves, model)
        drawn = [g for g in groups if g.name.startswith("set-difference")]
        save_figure(where_members_are(drawn), folder / "groups.png")

    sets = {
        kind: {"source": rows.name, "split": rows.split, "n": len(rows), "sha256": rows.sha256, "notes": rows.notes}
        for kind, rows in data.items()
    }
    save_groups(
        out,
        groups,
        model,
        measurements=identified_rows(groups, found),
        arguments=arguments,
        extra={"data": sets},
        attach=attach,
        overwrite=overwrite,
    )


def identified_rows(groups: "list[NeuronGroup]", found: "Identified") -> "list[Measurement]":
    """Size of every group; overlap of its halves (its ceiling) and of top-safety with top-utility, beside chance."""
    from safety_lens.log import Measurement
    from safety_lens.probes.sharing import overlap as shared
    from safety_lens.probes.sharing import overlap_rows

    rows = [Measurement(f"group/{g.name}", "size", float(g.size), n=g.universe, coeff=g.share) for g in groups]
    for name, halves in found.halves.items():
        rows += overlap_rows(f"halves/{name}", shared(*halves))
    return rows + overlap_rows("top-safety/top-utility", shared(found.whole["top-safety"], found.whole["top-utility"]))


def _show(
    groups: "list[NeuronGroup]", found: "Identified", data: "Mapping[str, ExampleSet]", out: Path, as_json: bool
) -> None:
    rows = identified_rows(groups, found)
    if as_json:
        for row in rows:
            typer.echo(row.to_json())
        return
    from safety_lens.report.neuron_tables import group_table

    for kind, examples in data.items():
        terminal.out.print(f"{kind}: {len(examples)} examples of {examples.title}", markup=False)
        for note in examples.notes:
            terminal.out.print(f"! {note}", markup=False, soft_wrap=True)
    terminal.out.print(group_table(groups, rows))
    terminal.out.print(f"written: {out}", markup=False, soft_wrap=True)
