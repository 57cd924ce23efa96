"""`safety-lens suppress`: answers with and without suppression of alignment artifacts, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from safety_lens.cli import options, steer_options, suppress_output, terminal
from safety_lens.cli.extract import parse_layers
from safety_lens.errors import DataError


def suppress(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT…", help="One or more prompts.")],
    model: options.Model = "organism",
    mode: Annotated[
        str, typer.Option(help="auto (measured), auto-size, always, proximity, adaptive, sphere or subspace.")
    ] = "auto",
    scale: Annotated[float, typer.Option(help="Strength in gaps; under auto a factor on the measured one.")] = 1.0,
    pairs: Annotated[str, typer.Option(help="Artifact pairs: 'artifacts' (built-in), a JSONL file, hf:NAME.")] = (
        "artifacts"
    ),
    categories: Annotated[
        list[str] | None, typer.Option(help="Only these categories; repeat, or separate by commas.")
    ] = None,
    layers: options.Layers = None,
    site: Annotated[str | None, typer.Option(help="resid, mlp or attn; default resid (mlp with --ancestor).")] = None,
    scope: Annotated[str, typer.Option(help="Tokens that may be touched: all, prompt, generated, answer, from:K.")] = (
        "all"
    ),
    read: Annotated[str, typer.Option(help="Tokens that fit: last, instruction, prompt or answer:K.")] = "last",
    false_fire: Annotated[float | None, typer.Option(help="Share of natural tokens a gate may touch (0.01).")] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", "--proximity-threshold", help="Gate in gaps, instead of --false-fire."),
    ] = None,
    radius: Annotated[
        float | None,
        typer.Option("--radius", "--distance-threshold", help="Sphere in gaps, instead of the fitted one."),
    ] = None,
    decay: Annotated[
        float | None, typer.Option("--decay", "--decay-rate", help="How fast the sphere's push falls (2).")
    ] = None,
    components: Annotated[
        int | None, typer.Option("--components", "--pca-components", help="Of the subspace (5).")
    ] = None,
    kl_budget: Annotated[float, typer.Option(help="Nats per benign token at which auto compares the modes.")] = 0.1,
    ancestor: Annotated[bool, typer.Option("--ancestor", help="The seed's formulas, with their defects.")] = False,
    max_tokens: steer_options.MaxNewTokens = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repetition.")] = 1.0,
    ignore_end_tokens: Annotated[
        bool, typer.Option("--ignore-end-tokens", "--ignore-eos", help="Write on past the end of the answer.")
    ] = False,
    no_compare: Annotated[bool, typer.Option("--no-compare", help="Only the suppressed answer.")] = False,
    analysis: Annotated[
        bool, typer.Option("--analysis", help="Also print effect sizes by category and layer.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page of projections and touched tokens.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write an artifact to.")] = None,
    overwrite: options.Overwrite = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure again; keep nothing.")] = False,
    adapter: options.Adapter = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Answer prompts with and without suppression; show what it does, what it costs, and which tokens it touched."""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    if out is not None:
        from safety_lens.artifacts import check_place

        check_place(out, "suppression", overwrite)
    if html is not None and not html.absolute().parent.is_dir():
        raise DataError(f"cannot write {html}: there is no folder {html.absolute().parent}")
    wanted = parse_layers(layers)
    terminal.quiet_libraries()

    from safety_lens.interventions.suppression.apply import suppress as fit
    from safety_lens.interventions.suppression.modes import check_scale
    from safety_lens.interventions.suppression.prompts import before_after, check_prompts
    from safety_lens.models import load_model
    from safety_lens.sampling import Sampling

    check_prompts(prompts)
    check_scale(scale)
    sampling: dict[str, Any] = {"temperature": temperature, "repetition_penalty": repetition_penalty}
    Sampling(**sampling)
    hooked = load_model(model, adapter=adapter, device=device, dtype=dtype)
    params: dict[str, Any] = {
        "false_fire": false_fire,
        "threshold": threshold,
        "radius": radius,
        "decay": decay,
        "components": components,
    }
    with terminal.progress("measuring modes", 5) as advance:
        found = fit(
            hooked,
            pairs,
            mode,
            scale,
            categories=_listed(categories),
            layers=wanted,
            site=site,
            scope=scope,
            read=read,
            kl_budget=kl_budget,
            ancestor=ancestor,
            cache=not no_cache,
            seed=seed,
            on_step=advance,
            **{name: value for name, value in params.items() if value is not None},
        )
    answers = before_after(
        hooked,
        prompts,
        found,
        compare=not no_compare,
        max_new_tokens=max_tokens,
        ignore_eos=ignore_end_tokens,
        seed=seed,
        **sampling,
    )
    suppress_output.show(answers, found, as_json)
    if analysis:
        suppress_output.show_analysis(hooked, found, site or ("mlp" if ancestor else "resid"), read, no_cache, as_json)
    if html is not None:
        size = suppress_output.write_page(html, answers)
        terminal.err.print(f"written: {html} ({size / 1e6:.2f} MB, needs no network)", markup=False)
    if out is not None:
        suppress_output.save(out, hooked, answers, found, arguments, overwrite)
        terminal.err.print(f"written: {out}", markup=False)


def _listed(categories: Sequence[str] | None) -> list[str] | None:
    if categories is None:
        return None
    return [name.strip() for entry in categories for name in entry.split(",") if name.strip()]
