"""`safety-lens steer`: answers with a direction added or removed, next to the answers without; or a whole sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safety_lens.artifacts import check_place
from safety_lens.cli import options, terminal
from safety_lens.cli import steer_options as own
from safety_lens.cli.extract import parse_layers
from safety_lens.cli.steer_answers import KIND, Place, check_stream, show_answers, stream_answers
from safety_lens.cli.steer_idle import refuse_idle
from safety_lens.cli.steer_prompts import Asked, limited, read_prompts
from safety_lens.cli.steer_source import hooks_of, read_source
from safety_lens.cli.steer_sweep import check_sweep, run_sweep
from safety_lens.errors import DataError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from safety_lens.interventions.sweeping.run import Edit
    from safety_lens.probes.directions import Direction
    from safety_lens.probes.extract import DirectionSet
    from safety_lens.types import FwdHook, Prompt


def steer(
    prompt: own.Prompts = None,
    prompts: own.PromptFile = None,
    model: options.Model = "organism",
    directions: own.DirectionsFrom = None,
    concept: options.Concepts = None,
    pairs: options.Pairs = None,
    method: own.Method = "dim",
    point: options.Point = "resid_post",
    positions: options.ReadAt = "last",
    layers: options.Layers = None,
    hook: own.Hook = None,
    all_layers: own.AllLayers = False,
    coeff: own.Coeff = 1.0,
    units: own.Units = "raw",
    scope: own.Scope = "all",
    ablate: own.Ablate = False,
    target_kl: own.TargetKl = None,
    benign: own.Benign = None,
    max_new_tokens: own.MaxNewTokens = 64,
    temperature: own.Temperature = 0.0,
    top_p: own.TopP = 1.0,
    top_k: own.TopK = 0,
    repetition_penalty: own.RepetitionPenalty = 1.0,
    ignore_eos: own.IgnoreEos = False,
    system: own.System = None,
    raw: options.Raw = False,
    stream: own.Stream = False,
    sweep: own.Sweep = False,
    coeffs: own.Coeffs = None,
    scorer: own.Scorers = None,
    controls: own.ControlCount = 20,
    control_coeffs: own.ControlCoeffs = None,
    shuffled: own.Shuffled = 5,
    seeds: own.Seeds = None,
    selection_share: own.SelectionShare = 0.3,
    system_baseline: own.SystemBaseline = None,
    goal: own.Goal = "either",
    max_kl: own.CeilingKl = None,
    search: own.Search = "auto",
    dry_run: own.DryRun = False,
    yes: own.Yes = False,
    harmful: own.Harmful = False,
    subset: own.Subset = None,
    limit: own.Limit = None,
    out: own.SteerOut = None,
    overwrite: options.Overwrite = False,
    adapter: options.Adapter = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Steer generation along a direction, side by side with the unsteered answers.

    With --scorer also the scores of both, with intervals and the paired change. With --sweep: coefficients × hooks with
    scorers, random and shuffled controls, intervals and side effects.
    """
    given = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    refuse_idle(given, options.changed(steer, given))
    asked = limited(read_prompts(prompt, prompts, subset, system), limit, seed)
    wanted = parse_layers(layers)
    _check(directions, concept, pairs, hook, wanted)
    if stream:
        check_stream(asked, harmful)
    if sweep:
        check_sweep(given)
    elif out is not None:
        check_place(out, KIND, overwrite)
    benign_prompts = None if benign is None else [a.prompt for a in read_prompts(None, benign, system=system)]
    terminal.quiet_libraries()
    from safety_lens.interventions.scorers.named import prepared_scorers
    from safety_lens.interventions.sweeping.plan import COEFFS, Decoding
    from safety_lens.models import load_model

    if units not in COEFFS:
        raise DataError(f"--units {units!r}: choose {' or '.join(COEFFS)}")
    decoding = Decoding(max_new_tokens, temperature, top_p, top_k, repetition_penalty, ignore_eos, raw)
    make_scorers = prepared_scorers(scorer or [])
    hooked = load_model(model, adapter=adapter, device=device, dtype=dtype)
    source = read_source(hooked, directions, concept, pairs, method, point, positions, seed, raw)
    hooks = hooks_of(hooked, source.found, point, wanted, hook)
    if sweep:
        run_sweep(hooked, source, hooks, asked, decoding, benign_prompts, make_scorers(hooked), given)
        return
    at = hooks if all_layers or wanted or hook else [source.found.best.hook]
    _say_what(source.found, at, "" if target_kl is not None else f" {coeff:g} times (--coeff)", ablate)
    plan = _Steering([source.found[h] for h in at], _edit(ablate), scope, _unit(hooked, at, units, asked))
    if target_kl is not None:
        coeff = _solved(hooked, plan, coeff, target_kl, benign_prompts, raw)
    if stream:
        stream_answers(hooked, asked[0], plan.hooks(coeff), decoding, seed)
        return
    show_answers(hooked, asked, plan.hooks(coeff), decoding, make_scorers(hooked), plan.place(coeff), given)


def _say_what(found: "DirectionSet", at: Sequence[str], times: str, ablated: bool) -> None:
    """Which direction acts, and whether anybody has looked at what it does."""
    what = "removed at every site that writes into the residual stream" if ablated else f"added there{times}"
    terminal.err.print(f"{found.concept}/{found.method} of {', '.join(at)}, {what}", markup=False, soft_wrap=True)
    measured = {row.metric: row.value for row in found.choice.measurements} if found.choice else {}
    if found.choice is not None and at == [found.choice.hook] and measured.get("causal_passed", 0.0) == 0.0:
        terminal.err.print(
            "this hook separates best; what its direction does there was not tested. The hook that the model uses may"
            " be another: extract --select causal, or name one with --hook",
            soft_wrap=True,
        )


def _check(
    directions: Path | None,
    concept: Sequence[str] | None,
    pairs: Sequence[str] | None,
    hook: str | None,
    layers: Sequence[int] | None,
) -> None:
    """Refuse a direction that is missing or named twice, before a model is loaded."""
    if directions is None and not concept and not pairs:
        raise DataError("nothing to steer with: give --directions ARTIFACT, --concept NAME or --pairs FILE")
    if len([*(concept or []), *(pairs or [])]) > 1:
        raise DataError("one direction at a time: give one --concept or one --pairs")
    if hook is not None and layers is not None:
        raise DataError("--hook and --layers both say where: give one of them")


def _edit(ablate: bool) -> "Edit":
    from safety_lens.interventions.sweeping.engine import ablating, adding

    return ablating if ablate else adding


def _unit(
    model: "HookedTransformer", hooks: Sequence[str], units: str, asked: Sequence[Asked]
) -> "Sequence[float | None]":
    from safety_lens.interventions.strength import residual_norm

    return [None if units == "raw" else residual_norm(model, [a.prompt for a in asked], hook) for hook in hooks]


class _Steering(NamedTuple):
    """What a coefficient multiplies."""

    parts: "Sequence[Direction]"
    edit: "Edit"
    scope: str
    units: "Sequence[float | None]"

    def hooks(self, coeff: float) -> "list[FwdHook]":
        from safety_lens.interventions.scopes import scope_named

        scope, pairs = scope_named(self.scope), zip(self.parts, self.units, strict=True)
        return [hook for part, unit in pairs for hook in self.edit(part, coeff, scope, unit)]

    def place(self, coeff: float) -> "Place":
        """Direction, site and coefficient, as measurement rows name them."""
        first = self.parts[0]
        site = first.hook if len(self.parts) == 1 else f"{len(self.parts)} hooks together"
        return Place(f"{first.concept}/{first.method}", site, coeff)


def _solved(
    model: "HookedTransformer",
    plan: _Steering,
    coeff: float,
    target: float,
    benign: "Sequence[Prompt] | None",
    raw: bool,
) -> float:
    """The coefficient of the sign given that costs the target KL; the largest tried is 4 times the one given."""
    from safety_lens.interventions.side_effects import benign_rows
    from safety_lens.interventions.strength import solve_strength

    if benign is None:
        raise DataError("--target-kl is measured on prompts the edit is not meant for: give --benign FILE")
    if not coeff:
        raise DataError("--target-kl needs the sign of --coeff, which is 0")
    rows = benign_rows(model, list(benign), raw=raw)
    sign = 1.0 if coeff > 0 else -1.0
    found = solve_strength(model, rows, lambda s: plan.hooks(sign * s), target, largest=4 * abs(coeff))
    note = "" if found.note is None else f" ({found.note})"
    terminal.err.print(
        f"coefficient {sign * found.strength:.4g} costs {found.kl:.4g} nats per token on {len(rows)} prompts{note}",
        markup=False,
        soft_wrap=True,
    )
    return sign * found.strength
