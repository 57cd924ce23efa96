"""Steering sweeps: directions × hooks × coefficients × seeds in few `generate` calls, with controls, resumable.

Rows of one call belong to different cells (`by_row`), so a batch is as full for a grid of 300 cells as for one. All
cells of a (prompt, seed) draw the same random numbers: what differs between them is the edit. The unsteered rows ride
along and serve as coefficient 0, after the steered path at coefficient 0 was shown to give the same tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

from safety_lens.artifacts import fingerprint, load_artifact, tokenizer_fingerprint
from safety_lens.errors import DataError
from safety_lens.interventions.scopes import Scope, scope_named
from safety_lens.interventions.scorers import Scorer
from safety_lens.interventions.steering import ablate, steer
from safety_lens.interventions.strength import residual_norm
from safety_lens.interventions.sweeping import inputs
from safety_lens.interventions.sweeping.choice import WANTED
from safety_lens.interventions.sweeping.plan import Controls, Decoding, Directions, Plan, Site, SweepPrompt
from safety_lens.interventions.sweeping.run import Edit, Estimate, Running, SweepResult
from safety_lens.interventions.sweeping.search import describe, most_sites, remarks, resolved
from safety_lens.interventions.sweeping.store import KIND, open_sweep
from safety_lens.log import Measurement
from safety_lens.probes.directions import Direction
from safety_lens.types import FwdHook, Prompt


def adding(direction: Direction, coeff: float, scope: Scope, unit: float | None) -> list[FwdHook]:
    """Steering: adds coefficient × direction at its hook."""
    return steer(direction, coeff, scope=scope, units="raw" if unit is None else unit)


def ablating(direction: Direction, coeff: float, scope: Scope, unit: float | None) -> list[FwdHook]:
    """Graded ablation at every writing site: 1 removes the component, negative coefficients amplify it."""
    return ablate(direction, coeff, scope=scope)


def sweep(
    model: HookedTransformer,
    directions: Directions,
    prompts: Sequence[Prompt | SweepPrompt],
    *,
    scorers: Sequence[Scorer],
    coeffs: Sequence[float] | None = None,
    hooks: Sequence[str] | None = None,
    together: bool = False,
    seeds: Sequence[int] = (0,),
    scope: str | Scope = "all",
    units: str = "raw",
    decoding: Decoding | None = None,
    controls: Controls | None = None,
    shuffled: Sequence[Mapping[str, Direction]] = (),
    trained_on: Sequence[Prompt] = (),
    chosen_on: Sequence[Prompt] = (),
    system: str | None = None,
    benign: Sequence[Prompt] = (),
    goal: str = "either",
    max_kl: float | None = None,
    edit: Edit = adding,
    out: str | Path | None = None,
    overwrite: bool = False,
    arguments: Mapping[str, Any] | None = None,
    search: str = "auto",
    portion_rows: int | None = None,
    on_estimate: Callable[[Estimate], None] | None = None,
    on_rows: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> SweepResult:
    """Steer every prompt with every direction, hook and coefficient, score the answers, and say what that is worth.

    Args:
        directions: a Direction, a DirectionSet (its hooks are a layer sweep), or several.
        prompts: texts or `SweepPrompt`s with their roles; plain ones are test prompts.
        scorers: the first one chooses; each is reported.
        coeffs: default 9 symmetric ones (`COEFFS`); 0 is always there, served by the unsteered rows.
        hooks: restricts sets to these hooks, or puts a single direction at each of them.
        together: all hooks of a set are steered at once, with the same coefficient.
        units: "raw", or "rms": 1 is the RMS length of the activations at the hook on these prompts.
        shuffled: refits on shuffled labels (`shuffled_directions`) to stand beside the random directions.
        trained_on: texts the directions were fitted on; prompts among them are refused. chosen_on: texts that chose
            the directions' hook; test prompts among them are refused.
        system: a system prompt that asks for the same in words, as a baseline of its own.
        benign: prompts the edit is not meant for: the KL it costs there is measured for each cell.
        goal: "lower", "higher" or "either": which way the first scorer should move.
        max_kl: cells above this benign KL (nats per token) are not chosen.
        edit: what a coefficient does: `adding` or `ablating`, or a function of your own.
        out: folder for the running sweep and its result; the same call goes on where an earlier one was cut off.
        search: "grid" runs every cell on every prompt. "coarse" lets the selection prompts search from coarse to fine;
            test prompts and controls run at the chosen site alone. "auto" is "coarse" over more than `COARSE_SITES`
            sites of a direction, where there are selection prompts and `controls` names no coefficients.
        portion_rows: answers that are generated and stored at once; by default what takes half a minute at most.
        on_estimate: called with the predicted duration before anything is generated, and asked for by being given: some
            answers are timed for it. It stops the sweep by raising.
        on_rows: called with (rows done, rows in all at most), first before anything is generated.
        on_note: called with remarks for the reader: the size of the sweep, few controls, a score at its floor.

    Raises:
        DataError: prompts that overlap, a bad number, a scorer without a name of its own.
        ModelError: the edit at coefficient 0 changes the text: nothing that it does would be a measurement.
        ArtifactError: `out` holds another sweep; the message says what differs.
    """
    decoding, controls = decoding or Decoding(), controls or Controls()
    checked = inputs.checked_prompts(prompts, trained_on, chosen_on)
    grid = inputs.checked_coeffs(coeffs, units)
    sites = inputs.with_shuffled(inputs.sites_of(directions, hooks, together), shuffled)
    if goal not in WANTED:
        raise DataError(f"goal {goal!r}: choose {', '.join(WANTED)}")
    if max_kl is not None and not benign:
        raise DataError("a limit on the benign KL needs benign prompts to measure it on")
    plan = Plan(
        _with_units(model, sites, [p.prompt for p in checked], units),
        grid,
        checked,
        inputs.checked_seeds(seeds, decoding.temperature),
        decoding,
        inputs.checked_controls(controls, grid),
        scope_named(scope),
        units,
        edit.__name__,
        system,
        _names(scorers),
        tuple(benign),
        goal,
        max_kl,
        int(model.cfg.n_layers),
        resolved(search, most_sites(sites), checked, controls),
    )
    place = Path(out) if out is not None else None
    who = {"model": fingerprint(model), "tokenizer": tokenizer_fingerprint(model.tokenizer)}
    opened = open_sweep(place, plan, who, overwrite=overwrite)
    running = Running(model, replace(plan, sites=opened.sites), scorers, edit, opened)
    if not opened.sealed:
        for note in (describe(plan), *remarks(plan)):
            on_note(note)
        running.check_widths()
        rows = portion_rows or running.portion_rows
        if on_estimate is not None:
            on_estimate(running.estimate(rows))
        running.write(rows, on_rows or (lambda done, total: None), on_note)
    return running.finish(arguments)


def _names(scorers: Sequence[Scorer]) -> tuple[str, ...]:
    names = tuple(scorer.name for scorer in scorers)
    if not names or len(set(names)) < len(names) or "degenerate" in names:
        raise DataError(f"a sweep needs one or more scorers with different names, got {', '.join(names) or 'none'}")
    return names


def _with_units(
    model: HookedTransformer, sites: Sequence[Site], prompts: Sequence[Prompt], units: str
) -> tuple[Site, ...]:
    if units == "raw":
        return tuple(sites)
    lengths = {h: residual_norm(model, prompts, h) for h in dict.fromkeys(d.hook for s in sites for d in s.parts)}
    return tuple(replace(s, units=tuple(lengths[d.hook] for d in s.parts)) for s in sites)


def load_sweep(folder: str | Path) -> list[Measurement]:
    """The measurements of a finished sweep.

    Raises:
        ArtifactError: not a sweep, unfinished, or changed since it was written.
    """
    return load_artifact(folder, kind=KIND).measurements
