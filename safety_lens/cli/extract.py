"""`safety-lens extract`: concept directions with their evidence."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safety_lens.artifacts import check_place
from safety_lens.cli import options, terminal
from safety_lens.errors import DataError
from safety_lens.positions import parse_positions

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer

    from safety_lens.data import Concept
    from safety_lens.interventions.causality.selector import CausalSelector
    from safety_lens.probes.extract import DirectionSet
    from safety_lens.probes.reading import ConceptActivations
    from safety_lens.probes.selection import Selector


def extract(
    out: options.Out,
    model: options.Model = "organism",
    concept: options.Concepts = None,
    pairs: options.Pairs = None,
    method: options.Methods = None,
    point: options.Point = "resid_post",
    layers: options.Layers = None,
    positions: options.ReadAt = "last",
    select: options.Select = "separability",
    behaviour: options.BehaviourName = None,
    max_kl: options.MaxKl = 0.1,
    draws: options.Draws = 99,
    adapter: options.Adapter = None,
    raw: options.Raw = False,
    truncate: options.Truncate = False,
    enable_thinking: options.Thinking = None,
    min_auroc: Annotated[
        float | None, typer.Option(help="Exit 3 if a lower AUROC limit is below.", rich_help_panel=options.FIT)
    ] = None,
    save_activations: Annotated[
        list[str] | None,
        typer.Option(help="Keep rows of hooks matching a pattern; repeatable.", rich_help_panel=options.OUTPUT),
    ] = None,
    activations_dtype: Annotated[
        str, typer.Option(help="float16 or float32, for --save-activations.", rich_help_panel=options.OUTPUT)
    ] = "float16",
    null_repeats: Annotated[
        int, typer.Option(min=20, help="Refits on shuffled labels, for the null.", rich_help_panel=options.FIT)
    ] = 100,
    batch_size: options.BatchSize = None,
    all_hooks: Annotated[
        bool, typer.Option("--all-hooks", help="Also print a table of every hook.", rich_help_panel=options.OUTPUT)
    ] = False,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Find directions at every hook, choose one on held-out pairs, and report it with its uncertainty and controls.

    Writes an artifact: directions.safetensors, measurements.jsonl, manifest.json, and plots.
    """
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    check_place(out, "directions", overwrite)
    wanted_layers, rule = parse_layers(layers), parse_positions(positions)
    concepts = _concepts(concept, pairs, model, seed, raw)
    _check_behaviour(behaviour, select)
    terminal.quiet_libraries()

    from safetensors.torch import save_file

    from safety_lens.models import hooks_at, load_model
    from safety_lens.probes.estimators import estimator
    from safety_lens.probes.extract import directions_from
    from safety_lens.probes.reading import kept_rows, stored_dtype
    from safety_lens.probes.selection import check_selector, selector
    from safety_lens.probes.store import save_directions

    methods = list(dict.fromkeys(method or ["dim"]))
    arguments["method"] = methods
    for name in methods:
        estimator(name)
    stored_dtype(activations_dtype)
    if select != "causal":
        check_selector(select)
    hooked = load_model(model, adapter=adapter, device=device, dtype=dtype)
    hooks = hooks_at(hooked, point, wanted_layers)
    template_kwargs = None if enable_thinking is None else {"enable_thinking": enable_thinking}
    reading = {"truncate": truncate, "template_kwargs": template_kwargs, "batch_size": batch_size or "auto"}
    choose: Selector
    causal = None
    if select == "causal":
        choose = causal = _causal(behaviour, max_kl, draws, seed, reading)
    else:
        choose = selector(select, hooks)
    kept = _matching(hooked, save_activations or [])
    everything = list(dict.fromkeys([*hooks, *kept]))
    acts = _read(hooked, concepts, everything, rule, reading)
    rows: dict[str, Tensor] = {}
    if kept:  # before the fits: a value too large for float16 must not cost them
        _announce_size(acts, kept, activations_dtype)
        rows = {key: t for a in acts for key, t in kept_rows(a, kept, activations_dtype).items()}
    terminal.print_pairs(concepts)  # once nothing of the command can be wrong: an error is one line
    sets = _fit(
        lambda a, m: directions_from(
            hooked, a.at(hooks), method=m, select=choose, seed=seed, null_repeats=null_repeats
        ),
        acts,
        methods,
    )
    if causal is not None:
        of = {c.name: c for c in concepts}
        sets = [causal.report(hooked, of[s.concept], s) for s in sets]

    def attach(folder: Path) -> None:
        _plots(folder, sets)
        if rows:
            save_file(rows, folder / "activations.safetensors")

    save_directions(out, sets, hooked, concepts=concepts, arguments=arguments, attach=attach, overwrite=overwrite)
    _report(sets, out, all_hooks, as_json)
    if causal is not None and not as_json:
        _report_behaviours(causal)
    _judge(sets, min_auroc)


def _check_behaviour(behaviour: str | None, select: str) -> None:
    """Refuse a behaviour that cannot be used, before a model is loaded."""
    from safety_lens.interventions.named_behaviours import check_behaviour

    if behaviour is None:
        return
    if select != "causal":
        raise DataError(f"--behaviour {behaviour!r} is read by a causal choice alone: add --select causal")
    check_behaviour(behaviour)


def _causal(behaviour: str | None, max_kl: float, draws: int, seed: int, reading: dict[str, Any]) -> "CausalSelector":
    from safety_lens.interventions.causality.limits import Limits
    from safety_lens.interventions.causality.selector import causal_selector

    terminal.show_log("safety_lens.causality")
    return causal_selector(behaviour, limits=Limits(max_kl=max_kl, draws=draws), seed=seed, **reading)


def _concepts(
    names: Sequence[str] | None, files: Sequence[str] | None, model: str, seed: int, raw: bool
) -> "list[Concept]":
    from safety_lens.data import load_concept

    wanted = [*(names or []), *(files or [])]
    if not wanted:
        raise DataError("nothing to extract: name a built-in concept with --concept, or a file with --pairs")
    found = [load_concept(source, model=model, seed=seed, raw=True if raw else None) for source in wanted]
    labels = [c.name for c in found]
    if twice := {n for n in labels if labels.count(n) > 1}:
        raise DataError(
            f"two sources give the concept {sorted(twice)[0]!r}; rename one (the field 'concept' or the file)"
        )
    return found


def parse_layers(text: str | None) -> list[int] | None:
    """Blocks of a spelling such as `0,3,8-12` or `-1`; None for all.

    Raises:
        DataError: it is none.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().rpartition("-") if part.strip()[1:].count("-") else (part.strip(), "", "")
        try:
            layers += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError:
            raise DataError(
                f"--layers {text!r}: {part!r} is not a block or a range; write e.g. 0,3,8-12 or -1"
            ) from None
    if not layers:
        raise DataError(f"--layers {text!r} names no block; write e.g. 0,3,8-12 or -1")
    return layers


def _matching(model: "HookedTransformer", patterns: Sequence[str]) -> list[str]:
    from fnmatch import fnmatchcase

    found: list[str] = []
    for pattern in patterns:
        hits = [name for name in model.hook_dict if fnmatchcase(name, pattern)]
        if not hits:
            raise DataError(f"--save-activations {pattern!r} matches no hook; try 'blocks.*.hook_resid_post'")
        found += hits
    return list(dict.fromkeys(found))


def _read(
    model: "HookedTransformer",
    concepts: "list[Concept]",
    hooks: list[str],
    rule: Any,
    reading: dict[str, Any],
) -> "list[ConceptActivations]":
    from safety_lens.probes.reading import read_concepts

    total = sum(2 * len(c.pairs) for c in concepts)
    with terminal.progress("reading prompts", total) as advance:
        return read_concepts(
            model,
            concepts,
            hooks,
            positions=rule,
            on_batch=advance,
            **reading,
        )


def _fit(
    fit: "Callable[[ConceptActivations, str], DirectionSet]", acts: "list[ConceptActivations]", methods: list[str]
) -> "list[DirectionSet]":
    sets = []
    with terminal.progress("fitting and testing", len(acts) * len(methods)) as advance:
        for a in acts:
            for name in methods:
                sets.append(fit(a, name))
                advance(1)
    return sets


def _announce_size(acts: "list[ConceptActivations]", hooks: list[str], dtype: str) -> None:
    from safety_lens.probes.reading import kept_bytes

    size = sum(kept_bytes(a, hooks, dtype) for a in acts)
    terminal.err.print(f"keeping {len(hooks)} hooks as {dtype}: {size / 2**20:.1f} MiB")


def _plots(folder: Path, sets: "list[DirectionSet]") -> None:
    from safety_lens.report.causal_plots import causal_sweep
    from safety_lens.report.plots import layer_sweep, projection_histogram, save_figure

    for s in sets:
        stem = f"{s.concept}-{s.method}".replace("/", "_")
        save_figure(layer_sweep(s.measurements, title=f"{s.concept} · {s.method}"), folder / f"{stem}-sweep.png")
        if s.choice is not None and (figure := causal_sweep(s.choice, title=f"{s.concept} · {s.method}")):
            save_figure(figure, folder / f"{stem}-causal.png")
        if s.choice is None or not s.scores[s.choice.hook].measurable:
            continue
        scores, area = s.scores[s.choice.hook], s.evidence[s.choice.hook].auroc
        figure = projection_histogram(
            scores.pos, scores.neg, title=f"{s.concept} · {s.method} · {s.choice.hook}", area=area
        )
        save_figure(figure, folder / f"{stem}-histogram.png")


def _report(sets: "list[DirectionSet]", out: Path, all_hooks: bool, as_json: bool) -> None:
    if as_json:
        for s in sets:
            for row in s.measurements:
                typer.echo(row.to_json())
        return
    from safety_lens.report.causal import after_table, causal_table, control_table
    from safety_lens.report.tables import direction_table, hook_table, number, with_interval

    terminal.out.print(direction_table(sets))
    for s in sets:
        if all_hooks:
            terminal.out.print(hook_table(s))
        if s.choice is not None:
            for table in (causal_table, control_table, after_table):
                if (shown := table(s.choice, f"{s.concept}/{s.method}")) is not None:
                    terminal.out.print(shown)
            terminal.out.print(f"\n{s.concept}/{s.method}: {s.choice.reason}", markup=False, soft_wrap=True)
            for note in s.evidence[s.choice.hook].notes:
                terminal.out.print(f"  ! {note}", markup=False, soft_wrap=True)
            e = s.evidence[s.choice.hook]
            terminal.out.print(
                f"  · AUROC of the controls on the same pairs: bag of words {with_interval(e.lexical)}, with bigrams"
                f" {with_interval(e.bigram)}, length {with_interval(e.length)}, mean token embedding"
                f" {with_interval(e.embedding)}",
                markup=False,
                soft_wrap=True,
            )
            terminal.out.print(
                f"  · {e.n} pairs reported on ({e.scheme}); cosine of two half-data fits {number(e.stability)};"
                f" shuffled labels reach {number(e.null_shuffled)}, random directions {number(e.null_random)}",
                markup=False,
                soft_wrap=True,
            )
        for note in s.notes:
            terminal.out.print(f"  · {note}", markup=False, soft_wrap=True)
    terminal.out.print(f"written: {out}", markup=False, soft_wrap=True)


def _report_behaviours(causal: "CausalSelector") -> None:
    """Print how each behaviour was read, its openings by weight, and the CPU time of the parts."""
    for concept, behaviour in causal.behaviours.items():
        openings = "" if behaviour.openings is None else f"; openings {behaviour.openings.listed(12)}"
        line = (
            f"{concept}: behaviour {behaviour.name}, {behaviour.shown} answers show it and {behaviour.other} do not;"
            f" held-out AUROC {behaviour.auroc.value:.2f} [{behaviour.auroc.low:.2f}, {behaviour.auroc.high:.2f}]"
            f"{openings}"
        )
        terminal.out.print(line, markup=False, soft_wrap=True)
    seconds = ", ".join(f"{part} {value:.0f} s" for part, value in causal.seconds.items())
    terminal.err.print(f"CPU time: {seconds}", markup=False, soft_wrap=True)


def _judge(sets: "list[DirectionSet]", min_auroc: float | None) -> None:
    for s in sets:
        if s.choice is None:
            s.best  # noqa: B018  raises the error that says why there is none
    if min_auroc is None:
        return
    low = {f"{s.concept}/{s.method}": s.best.evidence.auroc.low for s in sets if s.best.evidence is not None}
    failed = [f"{name} {value:.3f}" for name, value in low.items() if not value >= min_auroc]
    if failed:
        typer.echo(f"below --min-auroc {min_auroc}: lower limit of {', '.join(failed)}", err=True)
        raise typer.Exit(3)
