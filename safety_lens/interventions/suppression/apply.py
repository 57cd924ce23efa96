"""`suppress`: from pairs to hooks, with what they do and what they cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

from safety_lens.data import Concept, ContrastPair
from safety_lens.errors import DataError
from safety_lens.interventions.edits import Edit
from safety_lens.interventions.scopes import Scope, scope_named
from safety_lens.interventions.scorers.completion import Scorer
from safety_lens.interventions.suppression.ancestor import (
    ANCESTOR_MODES,
    AncestorFit,
    AncestorSettings,
    ancestor_edits,
    estimated_parameters,
    size_mode,
)
from safety_lens.interventions.suppression.auto import Chosen, choose_mode
from safety_lens.interventions.suppression.cache import Kept, remembered
from safety_lens.interventions.suppression.data import BUILT_IN, ArtifactPairs, artifact_pairs
from safety_lens.interventions.suppression.firing import FiringLog
from safety_lens.interventions.suppression.fitted import fitted, fitted_ancestors
from safety_lens.interventions.suppression.measure import KL_BUDGET, Bench, bench, measured, modes_at_equal_cost
from safety_lens.interventions.suppression.modes import (
    MODES,
    Settings,
    centres,
    check_scale,
    edits_of,
    unresolved,
)
from safety_lens.interventions.suppression.reading import HookFit
from safety_lens.interventions.suppression.verdicts import ORGANISM_SCORERS
from safety_lens.log import Measurement
from safety_lens.types import NamedHook

AUTO, AUTO_SIZE = "auto", "auto-size"
TUNING_PAIRS = 30
"""Calibration pairs on which `auto` compares the modes; of each category equally many."""

Source = str | Path | Concept | Sequence[ContrastPair] | ArtifactPairs


@dataclass(frozen=True, eq=False)
class Suppression:
    """An intervention, and what it does.

    mode, scale: what was settled on; scale in gaps between the natural and the artifact mean (in the seed's units for
    `ancestor`). hooks: TransformerLens hooks. report: measured on pairs that took no part in anything before.
    explain: one line that says how mode and scale came about. notes: what a reader should know.
    """

    mode: str
    scale: float
    hooks: list[tuple[str, Edit]]
    explain: str
    pairs: ArtifactPairs
    report: list[Measurement]
    fits: tuple[HookFit | AncestorFit, ...] = field(repr=False)
    notes: tuple[str, ...] = ()

    def watched(self) -> tuple[list[NamedHook], FiringLog]:
        """The same hooks with a log of every token they see; a fresh log for one call of `generate` or `capture`."""
        log = FiringLog()
        return log.watching(self.hooks, [at.category for at in self.fits]), log


def suppress(
    model: HookedTransformer,
    concept_or_pairs: Source = BUILT_IN,
    mode: str = AUTO,
    scale: float = 1.0,
    *,
    categories: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    site: str | None = None,
    scope: str | Scope = "all",
    read: str = "last",
    scorers: Sequence[Scorer] | None = None,
    kl_budget: float = KL_BUDGET,
    ancestor: bool = False,
    report: bool = True,
    cache: bool = True,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
    **params: int | float | None,
) -> Suppression:
    """Suppress an alignment artifact: fit on some pairs, calibrate on others, report on the rest.

    Args:
        concept_or_pairs: see `artifact_pairs`. categories: only these.
        mode: "always", "proximity", "adaptive", "sphere", "subspace" (`modes`); "auto": the one with the largest
            measured effect at `kl_budget`; "auto-size": the seed's rule by model size.
        scale: gaps to take off; 0 changes nothing. Under "auto" it multiplies the scale that was measured.
        layers: blocks; None is one, chosen on calibration pairs (the seed's six with `ancestor`).
        site: "resid", "mlp" or "attn"; None is resid (mlp with `ancestor`).
        scope: which tokens may be touched at all, as in `steer`.
        read: which tokens fit the directions: "last", "instruction", "prompt", "answer:K" (see `read_rule`). Rows are
            means over a prompt's tokens; n counts prompts.
        scorers: verdicts on answers; "auto" lowers the first. None: the built-in ones for the organism's own pairs.
        ancestor: the seed's formulas and reading (`ancestor`), with their defects.
        report: measure on the report pairs (cached).
        cache: keep and recall fits, choices and reports (`cache`).
        params: `Settings` (false_fire, threshold, radius, reach, decay, components) or `AncestorSettings`.

    Raises:
        DataError: an unknown mode, category, site or parameter, or a number out of range.
        HookNameError: a layer that the model does not have.
    """
    check_scale(scale)
    if mode not in (AUTO, AUTO_SIZE, *MODES):
        raise DataError(f"no mode {mode!r}: choose {AUTO}, {AUTO_SIZE}, {', '.join(MODES)}")
    pairs = artifact_pairs(concept_or_pairs, categories=categories, model=model, seed=seed)
    where = scope_named(scope)
    common = {"site": site or ("mlp" if ancestor else "resid"), "layers": layers, "cache": cache}
    if ancestor:
        return _ancestor(model, pairs, mode, scale, where, params, common)
    settings = _settings(Settings, params)
    fits, readout = fitted(model, pairs, read=read, components=settings.components, **common)  # type: ignore[arg-type]
    judges = tuple(scorers) if scorers is not None else scorers_for(model, pairs)
    plan = _Plan(model, pairs, fits, readout, settings, where, judges, kl_budget, cache, read, on_step)
    chosen = plan.chosen(mode, scale)
    used = centres(chosen.mode, fits)
    hooks = edits_of(chosen.mode, fits, chosen.scale, settings, where)
    rows = plan.report(chosen.mode, chosen.scale, hooks) if report else []
    explain = f"{chosen.reason} (at {', '.join(dict.fromkeys(at.hook for at in used))})"
    return Suppression(
        chosen.mode, chosen.scale, hooks, explain, pairs, rows, tuple(used), (*pairs.notes, *_notes(used, settings))
    )


def scorers_for(model: HookedTransformer, pairs: ArtifactPairs) -> tuple[Scorer, ...]:
    """The verdicts that ship with the organism, for the organism on its own pairs; else none."""
    own = getattr(getattr(model, "origin", None), "name", None) == "organism"
    return ORGANISM_SCORERS if own and pairs.source == BUILT_IN else ()


def _settings(kind: Callable[..., Any], params: Mapping[str, int | float | None]) -> Any:
    known = tuple(kind.__annotations__)
    if unknown := sorted(set(params) - set(known)):
        raise DataError(f"no parameter {unknown[0]!r}: choose {', '.join(known)}")
    return kind(**{name: value for name, value in params.items() if value is not None})


def _notes(used: Sequence[HookFit], settings: Settings) -> list[str]:
    share = settings.false_fire / len({at.category for at in used})
    few = sorted({at.hook for at in used if unresolved(at, share)})
    if not few:
        return []
    n = len(used[0].aligned)
    return [
        f"{n} held-out natural tokens cannot resolve a false-fire rate of {share:.2g}: the extreme one is the limit"
    ]


@dataclass(frozen=True, eq=False)
class _Plan:
    """What choosing and reporting share."""

    model: HookedTransformer
    pairs: ArtifactPairs
    fits: list[HookFit]
    readout: HookFit
    settings: Settings
    scope: Scope
    scorers: tuple[Scorer, ...]
    kl_budget: float
    cache: bool
    read: str
    on_step: Callable[[int], None] | None

    def chosen(self, mode: str, scale: float) -> Chosen:
        if mode == AUTO:
            found = self._auto()
            factor = "" if scale == 1 else f" times {scale:g}"
            return Chosen(found.mode, found.scale * scale, f"auto: {found.reason}{factor}")
        if mode == AUTO_SIZE:
            return by_size(self.model, scale)
        return Chosen(mode, scale, f"{mode} at {scale:g} gaps, as asked")

    def identity(self) -> dict[str, Any]:
        return {
            "hooks": [[at.category, at.hook] for at in self.fits],
            "read": self.read,
            "settings": asdict(self.settings),
            "scope": self.scope.name,
            "scorers": [s.name for s in self.scorers],
        }

    def bench(self, pairs: Sequence[ContrastPair], split: str) -> Bench:
        return bench(self.model, pairs, self.readout, self.scorers, split=split, raw=self.pairs.raw)

    def _auto(self) -> Chosen:
        def work() -> Kept:
            held = self.bench(spread(self.pairs.calibrate, TUNING_PAIRS), "calibrate")
            results = modes_at_equal_cost(
                held, held, self.fits, self.settings, kl_budget=self.kl_budget, scope=self.scope, on_mode=self.on_step
            )
            rows = [row for result in results for row in result.measurements]
            return Kept(measurements=rows, facts=choose_mode(results, self.kl_budget)._asdict())

        identity = {**self.identity(), "kl_budget": self.kl_budget}
        kept = remembered("suppression-auto", self.model, self.pairs, identity, work, cache=self.cache)
        return Chosen(**kept.facts)

    def report(self, mode: str, scale: float, hooks: Sequence[tuple[str, Edit]]) -> list[Measurement]:
        def work() -> Kept:
            labels = [at.category for at in centres(mode, self.fits)]
            return Kept(
                measurements=measured(self.bench(self.pairs.report, "report"), mode, hooks, labels, scale).measurements
            )

        identity = {**self.identity(), "mode": mode, "scale": scale}
        return remembered("suppression-report", self.model, self.pairs, identity, work, cache=self.cache).measurements


def spread(pairs: Sequence[ContrastPair], at_most: int) -> list[ContrastPair]:
    """The first pairs of each category in turn, up to a number."""
    ranks: dict[str | None, int] = {}
    order: list[tuple[int, int]] = []
    for pair in pairs:
        ranks[pair.category] = ranks.get(pair.category, -1) + 1
        order.append((ranks[pair.category], len(order)))
    kept = sorted(sorted(order)[:at_most], key=lambda entry: entry[1])
    return [pairs[i] for _, i in kept]


def by_size(model: HookedTransformer, scale: float) -> Chosen:
    """The seed's rule; nothing is measured."""
    size = estimated_parameters(model)
    mode = size_mode(size)
    return Chosen(mode, scale, f"auto-size: {mode}, by the seed's rule for about {size:.3g} parameters; not measured")


def _ancestor(
    model: HookedTransformer,
    pairs: ArtifactPairs,
    mode: str,
    scale: float,
    scope: Scope,
    params: Mapping[str, int | float | None],
    common: dict[str, Any],
) -> Suppression:
    settings = _settings(AncestorSettings, params)
    fits = fitted_ancestors(model, pairs, components=settings.components, **common)
    chosen = by_size(model, scale) if mode in (AUTO, AUTO_SIZE) else Chosen(mode, scale, f"{mode}, as asked")
    assert chosen.mode in ANCESTOR_MODES
    hooks = ancestor_edits(chosen.mode, fits, chosen.scale, settings, scope)
    where = ", ".join(at.hook for at in fits)
    explain = f"{chosen.reason}; the seed's formulas, with their defects (at {where})"
    return Suppression(chosen.mode, chosen.scale, hooks, explain, pairs, [], tuple(fits), pairs.notes)
