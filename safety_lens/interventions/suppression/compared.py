"""All five modes at one benign KL, as a table: what the acceptance figures, the demo and the guide show."""

from collections.abc import Callable, Sequence

from transformer_lens import HookedTransformer

from safety_lens.interventions.scopes import scope_named
from safety_lens.interventions.scorers.completion import Scorer
from safety_lens.interventions.suppression.apply import TUNING_PAIRS, Source, scorers_for, spread
from safety_lens.interventions.suppression.data import BUILT_IN, artifact_pairs
from safety_lens.interventions.suppression.fitted import fitted
from safety_lens.interventions.suppression.measure import KL_BUDGET, ModeResult, bench, modes_at_equal_cost
from safety_lens.interventions.suppression.modes import MODES, Settings
from safety_lens.log import Measurement
from safety_lens.stats import Interval


def compare_modes(
    model: HookedTransformer,
    concept_or_pairs: Source = BUILT_IN,
    *,
    categories: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    site: str = "resid",
    scope: str = "all",
    read: str = "last",
    scorers: Sequence[Scorer] | None = None,
    kl_budget: float = KL_BUDGET,
    settings: Settings | None = None,
    modes: Sequence[str] = tuple(MODES),
    cache: bool = True,
    seed: int = 0,
    on_mode: Callable[[int], None] | None = None,
) -> list[ModeResult]:
    """Every mode, its scale solved for `kl_budget` on calibration pairs, measured on the report pairs.

    Arguments as `suppress`. A result's `reached` is False where a gated mode cannot cost that much.
    """
    pairs = artifact_pairs(concept_or_pairs, categories=categories, model=model, seed=seed)
    chosen = settings or Settings()
    fits, readout = fitted(model, pairs, site=site, layers=layers, read=read, components=chosen.components, cache=cache)
    judges = tuple(scorers) if scorers is not None else scorers_for(model, pairs)
    tuned, reported = (
        bench(model, part, readout, judges, split=split, raw=pairs.raw)
        for part, split in ((spread(pairs.calibrate, TUNING_PAIRS), "calibrate"), (pairs.report, "report"))
    )
    return modes_at_equal_cost(
        tuned, reported, fits, chosen, kl_budget=kl_budget, modes=modes, scope=scope_named(scope), on_mode=on_mode
    )


def mode_rows(results: Sequence[ModeResult]) -> list[Measurement]:
    """The measurements of all results."""
    return [row for result in results for row in result.measurements]


def mode_cells(result: ModeResult) -> dict[str, str]:
    """One row of the table: column → text."""
    cells = {
        "mode": result.mode,
        "scale, gaps": f"{result.scale:.2f}" + ("" if result.reached in (None, True) else " *"),
        "projection drop, gaps": _text(result.drop),
        "benign KL, nat/token (p95)": f"{_text(result.kl, 3)} ({result.kl_p95:.3f})",
        "natural tokens touched": _text(result.false_fire, percent=True),
        "artifact tokens touched": _text(result.firing, percent=True),
    }
    cells |= {f"in {name}": _text(rate, percent=True) for name, rate in result.by_category.items()}
    cells |= {name: f"{s.before:.2f} → {_text(s.after)}" for name, s in result.scores.items()}
    return cells


def _text(i: Interval, digits: int = 2, *, percent: bool = False) -> str:
    if i.value != i.value:
        return "–"
    form = (lambda x: f"{x:.1%}") if percent else (lambda x: f"{x:.{digits}f}")
    return f"{form(i.value)} [{form(i.low)}, {form(i.high)}]"
