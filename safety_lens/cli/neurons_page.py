"""`safety-lens neurons page`: groups of neurons and heads on prompts, as one HTML file that needs no network."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safety_lens.cli import steer_options, terminal
from safety_lens.cli.options import Adapter, Concepts, Device, Dtype, Model, Pairs, Point, Raw, Seed
from safety_lens.cli.steer_prompts import Asked, limited, read_prompts
from safety_lens.errors import DataError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from safety_lens.probes.attribution.scores import Scores
    from safety_lens.probes.directions import Direction
    from safety_lens.probes.groups import NeuronGroup
    from safety_lens.report.pages import NeuronPage

MAX_PROMPTS = 50
BUILT_IN_PROMPTS = 16
"""Of each label, where no prompts are given."""

Groups = Annotated[
    list[Path] | None, typer.Argument(metavar="GROUPS…", help="Artifacts written by `neurons identify`.")
]
Only = Annotated[list[str] | None, typer.Option("--group", help="Name of a group to show; repeatable, default all.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; repeatable.")]
Harmful = Annotated[bool, typer.Option("--harmful", help="All prompts are harmful: fold them away.")]
Page = Annotated[Path, typer.Option("--out", help="HTML file to write; one that is there is replaced.")]
Score = Annotated[list[str] | None, typer.Option("--score", help="snip, wanda or gradient; repeatable, first ranks.")]
Examples = Annotated[str, typer.Option(help="What --score scores: safety, utility, facts or a file of examples.")]
NumExamples = Annotated[int, typer.Option(min=1, help="Examples for --score.")]
Limit = Annotated[int, typer.Option(min=1, help="Neurons and heads on the page.")]
MaxPrompts = Annotated[int, typer.Option(min=1, help="Prompts on the page, drawn evenly from every label.")]
Title = Annotated[str, typer.Option(help="Heading of the page.")]


def page(
    out: Page,
    groups: Groups = None,
    group: Only = None,
    prompt: Prompts = None,
    prompts: steer_options.PromptFile = None,
    harmful: Harmful = False,
    max_prompts: MaxPrompts = MAX_PROMPTS,
    score: Score = None,
    examples: Examples = "safety",
    n_examples: NumExamples = 64,
    directions: steer_options.DirectionsFrom = None,
    concept: Concepts = None,
    pairs: Pairs = None,
    method: steer_options.Method = "dim",
    point: Point = "resid_post",
    hook: steer_options.Hook = None,
    limit: Limit = 200,
    title: Title = "Neurons",
    model: Model = "organism",
    adapter: Adapter = None,
    raw: Raw = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Activations of neurons and heads at every token of chosen prompts, with pick-lists, scores and top tokens.

    With --concept or --directions also every token's projection on a direction. Prompts labelled "harmful" are folded.
    """
    wanted_direction = bool(directions or concept or pairs)
    if not groups and not wanted_direction:
        raise DataError("nothing to show: name a groups artifact, or a direction with --concept or --directions")
    if out.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"--out {out}: a page is a file that ends in .html")
    asked = _asked(prompt, prompts, model, seed, max_prompts)
    terminal.quiet_libraries()
    from safety_lens.models import load_model
    from safety_lens.report.pages import LARGE, PagePrompt, neuron_page

    hooked = load_model(model, adapter=adapter, device=device, dtype=dtype)
    found = _groups(hooked, groups or [], group or [])
    along = []
    if wanted_direction:
        along = _directions(hooked, directions, concept, pairs, method, point, hook, seed, raw)
    scores = _scores(hooked, score or [], examples, n_examples, seed)
    shown = [PagePrompt(a.text, "harmful" if harmful else a.label) for a in asked]
    source = str(prompts) if prompts else "built-in test requests" if not prompt else "given on the command line"
    with terminal.progress("reading prompts", len(shown) * (bool(found) + bool(along))) as advance:
        made = neuron_page(
            hooked, found, shown, scores=scores, directions=along, limit=limit, title=title, source=source, raw=raw,
            on_batch=advance,
        )  # fmt: skip
    _written(made, made.save(out), out, LARGE)


def _written(made: "NeuronPage", size: int, out: Path, large: int) -> None:
    for note in made.notes:
        terminal.out.print(f"note: {note}", markup=False, soft_wrap=True)
    if size > large:
        terminal.out.print(
            f"note: {size / 1e6:.1f} MB is slow to open: fewer prompts or a lower --limit help", markup=False
        )
    what = f"{len(made.columns)} columns, {len(made.prompts)} prompts, {size / 1e6:.1f} MB"
    terminal.out.print(f"written: {out} ({what})", markup=False, soft_wrap=True)


def _asked(texts: Sequence[str] | None, file: Path | None, model: str, seed: int, most: int) -> list[Asked]:
    """Prompts of the page: at most `most`, drawn evenly from every label; built-in test requests by default."""
    if texts or file:
        asked = read_prompts(texts, file)
    else:
        from safety_lens.data.built_in import built_in_for

        sets = built_in_for(model)
        kinds = ("harmful", "harmless", "borderline" if "borderline" in sets.sources else "lookalike")
        requests = [Asked(text, label) for label in kinds for text in sets.requests(label, "test")]
        asked = limited(requests, BUILT_IN_PROMPTS, seed)
    labels = len({(a.split, a.label) for a in asked})
    if len(asked) <= most:
        return asked
    fewer = limited(asked, max(1, most // labels), seed)[:most]
    terminal.err.print(f"{len(fewer)} of {len(asked)} prompts are shown (--max-prompts {most})", markup=False)
    return fewer


def _groups(model: "HookedTransformer", sources: Sequence[Path], names: Sequence[str]) -> "list[NeuronGroup]":
    """Groups of all artifacts, or those named.

    Raises:
        DataError: a name that none of them has.
    """
    from safety_lens.probes.groups import load_groups

    found = [g for source in sources for g in load_groups(source, model)]
    if missing := [name for name in names if name not in {g.name for g in found}]:
        known = ", ".join(g.name for g in found) or "none"
        raise DataError(f"no group named {missing[0]!r}: there are {known}")
    return [g for g in found if not names or g.name in names]


def _directions(
    model: "HookedTransformer",
    artifact: Path | None,
    concept: Sequence[str] | None,
    pairs: Sequence[str] | None,
    method: str,
    point: str,
    hook: str | None,
    seed: int,
    raw: bool,
) -> "list[Direction]":
    """One direction for each concept or file of pairs, at its chosen hook or the one named."""
    from safety_lens.cli.steer_source import read_source

    names: list[tuple[list[str], list[str]]] = [([name], []) for name in concept or []]
    names += [([], [file]) for file in pairs or []]
    sets = [read_source(model, artifact, c, p, method, point, "last", seed, raw).found for c, p in names or [([], [])]]
    return [found.best if hook is None else found[hook] for found in sets]


def _scores(
    model: "HookedTransformer", methods: Sequence[str], examples: str, n: int, seed: int
) -> "dict[str, Scores]":
    """Scores by method on some examples, for the table and the ranking.

    Raises:
        DataError: no such method, or examples that cannot be read.
    """
    if not methods:
        return {}
    from safety_lens.probes.attribution import attribute_neurons, snip_scores, wanda_scores
    from safety_lens.probes.examples import read_examples

    known: dict[str, Callable[..., Any]] = {
        "snip": snip_scores,
        "wanda": wanda_scores,
        "gradient": attribute_neurons,
    }
    if unknown := [name for name in methods if name not in known]:
        raise DataError(f"--score {unknown[0]!r}: choose {', '.join(known)}")
    rows = read_examples(examples, model, limit=n, seed=seed)
    for note in rows.notes:
        terminal.err.print(f"note: {note}", markup=False, soft_wrap=True)
    return {f"{name}, {rows.name}": known[name](model, rows.continuations) for name in methods}
