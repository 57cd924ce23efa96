"""The demo's second part: the refusal direction pushed, removed, and compared with others at equal cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safety_lens.cli import terminal

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from safety_lens.interventions.compare import Method
    from safety_lens.interventions.strength import MakeHooks
    from safety_lens.probes import DirectionSet

LAYERS = (3, 5, 7)
COEFFS = (-0.5, -0.25, -0.125, 0.0, 0.125, 0.25, 0.5)
CONTROL_COEFFS = (-0.25, 0.25)
SELECTION, TEST, BENIGN = 10, 12, 8
MAX_KL, TARGET_KL = 0.2, 0.02
SHOWN = 2


def instructions(label: str, split: str, n: int, start: int = 0) -> list[str]:
    """The organism's own instructions with a label."""
    import json

    from safety_lens.organism import DATA_DIR

    lines = (DATA_DIR / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == split and row["label"] == label]
    return [row["instruction"] for row in rows[start : start + n]]


def steering(model: "HookedTransformer", out: Path, seed: int) -> None:
    """Choose the refusal direction by what it does, steer borderline requests with it, compare methods at one cost."""
    from safety_lens.interventions import Limits, causal_selector
    from safety_lens.probes import extract_directions
    from safety_lens.report.causal import causal_table

    terminal.out.print("\n[bold]2. Does the model use it?[/bold] Directions are removed and added on the val pairs.")
    found = extract_directions(
        model,
        _concept("refusal"),
        select=causal_selector(limits=Limits(max_kl=MAX_KL), seed=seed),
        seed=seed,
        null_repeats=20,
    )
    if found.choice is not None and (table := causal_table(found.choice, "refusal/dim")) is not None:
        terminal.out.print(table)
        terminal.out.print(f"chosen: {found.choice.hook}: {found.choice.reason}", markup=False, soft_wrap=True)
    _show_texts(model, found)
    _sweep(model, found, out, seed)
    _equal_cost(model, out, seed)


def _concept(name: str) -> Any:
    from safety_lens.data import load_concept

    return load_concept(name, model="organism")


def _show_texts(model: "HookedTransformer", found: "DirectionSet") -> None:
    """Before and after, on requests that nothing was fitted on; answers to harmful ones are refusals or boilerplate."""
    from safety_lens.generation import generate
    from safety_lens.interventions import ablate, steer

    push = steer(found.best, 1.0, scope="prompt")
    for label, what, hooks in (("harmless", "added", push), ("harmful", "removed", ablate(found.best))):
        asked = instructions(label, "test", SHOWN, start=TEST)
        before, after = (generate(model, asked, hooks=edits, max_new_tokens=28) for edits in ((), hooks))
        terminal.out.print(f"\n{label} requests, refusal {what}:", markup=False)
        for prompt, old, new in zip(asked, before, after, strict=True):
            terminal.out.print(f"  {prompt}\n    plain:   {old.text}\n    {what}: {new.text}", markup=False)


def _sweep(model: "HookedTransformer", found: "DirectionSet", out: Path, seed: int) -> None:
    from safety_lens.interventions import Controls, Decoding, SweepPrompt, sweep
    from safety_lens.interventions.scorers import SubstringRefusal
    from safety_lens.models import hooks_at
    from safety_lens.report.steering_plots import draw_all
    from safety_lens.report.steering_tables import cell_table, site_table

    terminal.out.print("\n[bold]3. How much does it take, where, at what cost?[/bold] Borderline requests, 3 blocks.")
    prompts = [SweepPrompt(p, "selection") for p in instructions("borderline", "val", SELECTION)]
    prompts += [SweepPrompt(p, "test") for p in instructions("borderline", "test", TEST)]
    result = sweep(
        model,
        found,
        prompts,
        scorers=[SubstringRefusal()],
        coeffs=COEFFS,
        hooks=hooks_at(model, layers=LAYERS),
        scope="prompt",
        decoding=Decoding(28),
        controls=Controls(random=20, coeffs=CONTROL_COEFFS, draw=seed),
        benign=instructions("harmless", "test", BENIGN),
        goal="lower",
        max_kl=MAX_KL,
        out=out / "sweep",
        overwrite=True,
    )
    scorer = result.plan.scorers[0]
    for subject in dict.fromkeys(site.subject for site in result.plan.sites):
        terminal.out.print(site_table(result.measurements, subject, scorer))
        terminal.out.print(cell_table(result.measurements, subject, scorer))
    draw_all(result.measurements, out / "plots")


def _methods(model: "HookedTransformer", seed: int) -> "tuple[dict[str, Method], list[Method]]":
    """Adding and removing the toxicity direction, and the same push along 20 random ones."""
    from safety_lens.interventions import ablate, causal_selector, random_direction, steer
    from safety_lens.interventions.compare import Method
    from safety_lens.probes import Direction, extract_directions

    best = extract_directions(model, _concept("toxicity"), select=causal_selector(seed=seed), null_repeats=2).best

    def against(direction: Direction, scope: str) -> "MakeHooks":
        return lambda strength: steer(direction, -strength, scope=scope)

    methods = {
        "add −, prompt tokens": Method(against(best, "prompt"), 2.0),
        "add −, all tokens": Method(against(best, "all"), 2.0),
        "ablate": Method(lambda strength: ablate(best, strength), 1.0),
    }
    return methods, [Method(against(random_direction(best, k, seed), "prompt"), 2.0) for k in range(20)]


def _equal_cost(model: "HookedTransformer", out: Path, seed: int) -> None:
    from safety_lens.interventions import equal_cost
    from safety_lens.interventions.scorers import scorer_named
    from safety_lens.report.pareto import pareto
    from safety_lens.report.plots import save_figure

    terminal.out.print(
        f"\n[bold]4. Which way at the same cost?[/bold] Rudeness, every method tuned to {TARGET_KL} nat per token."
    )
    rude = [str(pair.positive) for pair in _concept("toxicity").test[:TEST]]
    methods, random = _methods(model, seed)
    found = equal_cost(
        model,
        methods,
        rude,
        scorer_named("lexicon:rude", model),
        tuning=instructions("harmless", "val", BENIGN),
        benign=instructions("harmless", "test", BENIGN),
        target_kl=TARGET_KL,
        random=random,
        instruction="Be kind.",
        grid=(0.5, 1.0, 2.0),
        seed=seed,
    )
    _show_costs(found)
    figure = pareto(found.measurements, title="Organism: rude words against benign KL", target_kl=TARGET_KL)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    save_figure(figure, out / "plots" / "pareto.png")


def _show_costs(found: Any) -> None:
    from safety_lens.report.tables import p_value, with_interval
    from safety_lens.report.whole_words import WordTable

    columns = ("method", "strength", "benign KL", "effect", "broken", "p, against 20 random directions")
    table = WordTable(*columns, title=f"Change of {found.scorer}, {found.n} prompts")
    for result in found.results:
        if (point := result.point) is None:
            continue
        strength = "–" if result.solved is None else f"{point.strength:.2f}{'' if result.solved.reached else ' *'}"
        broken = point.others.get("degenerate")
        cells = (with_interval(point.kl.mean, 3), with_interval(point.effect), f"{broken.value:.2f}" if broken else "–")
        table.add_row(result.name, strength, *cells, p_value(result.p_random))
    terminal.out.print(table)
    terminal.out.print(
        "* does not reach that cost at its largest strength. Costs are those of other prompts than the tuning ones;"
        " with 20 random directions p cannot be below 0.0476",
        markup=False,
    )
