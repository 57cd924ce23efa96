"""All that is known of the drift of neuron groups as one JSON object: `statistical_results.json`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from safety_lens.monitors.neuron_drift.moved import GroupDrift, Moved, Place
from safety_lens.monitors.neuron_drift.reidentify import Reidentified
from safety_lens.monitors.neuron_drift.rows import QUANTILES
from safety_lens.monitors.neuron_drift.statistics import MARGIN, QUANTITIES, Comparison, compare
from safety_lens.stats import Interval

Runs = Mapping[str, Sequence[GroupDrift]]
"""Name of a run → the drift of every group at its end."""


def summary(
    runs: Runs,
    *,
    margin: float = MARGIN,
    reidentified: Mapping[str, Reidentified] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything about these groups, runs of one training with different seeds taken together; unknown is null.

    Raises:
        DataError: runs that cannot be averaged (see `compare`), or a margin that is not positive.
    """
    first = next(iter(runs.values()))
    found = {
        "runs": list(runs),
        "margin": margin,
        "groups": {
            drift.group: _group(drift.group, {name: drifts[i] for name, drifts in runs.items()}, margin)
            for i, drift in enumerate(first)
        },
        "reidentified": {name: _reidentified(one) for name, one in (reidentified or {}).items()},
        "notes": list(notes),
    }
    plain: dict[str, Any] = _plain(found)
    return plain


def _group(name: str, runs: Mapping[str, GroupDrift], margin: float) -> dict[str, Any]:
    first = next(iter(runs.values()))
    kinds = [quantity for quantity, asked in QUANTITIES.items() if asked.places(first)]
    together = {kind: compare(list(runs.values()), kind, margin=margin) for kind in kinds}
    return {
        "unit": first.unit,
        "weights": first.size,
        "outside_share": first.outside,
        "held_share": {run: drift.held for run, drift in runs.items()},
        "final": {run: _final(drift) for run, drift in runs.items()},
        "tests": {kind: _test(c, kind, runs, margin) for kind, c in together.items()},
        "hypotheses": _hypotheses(together),
        "matrices": [_matrix([drift.matrices[i] for drift in runs.values()]) for i in range(len(first.matrices))],
    }


def _final(drift: GroupDrift) -> dict[str, Any]:
    sides = {"group": (drift.total.group, drift.whole.group), "random": (drift.total.random, drift.whole.random)}
    return {name: _moved(total, whole) for name, (total, whole) in sides.items()}


def _moved(total: Moved, whole: Moved) -> dict[str, Any]:
    spread = np.percentile(whole.sample, QUANTILES).tolist() if len(whole.sample) else [math.nan] * len(QUANTILES)
    return {
        "units": whole.units,
        "rms_change": total.rms,
        "relative_to_weight": total.relative,
        "mean_change": whole.mean_length,
        "change_quantiles": dict(zip((f"q{q:02d}" for q in QUANTILES), spread, strict=True)),
        "cosine": whole.mean_cosine,
        "turn": whole.turned,
    }


def _test(c: Comparison, kind: str, runs: Mapping[str, GroupDrift], margin: float) -> dict[str, Any]:
    each = {run: compare([drift], kind, margin=margin) for run, drift in runs.items()}
    return {
        **{k: v for k, v in asdict(c).items() if k not in ("group", "quantity", "ratio", "over_runs", "difference")},
        "ratio_over_layers": c.ratio._asdict(),
        "ratio_over_runs": c.over_runs._asdict(),
        "ratio_decisive": c.decisive._asdict(),
        "difference": c.difference._asdict(),
        "pooled_d_is": "descriptive: single units of one matrix are not independent",
        "each_run": {run: {"ratio": one.ratio._asdict(), "p": one.p} for run, one in each.items()},
    }


QUESTIONS = {
    "H1": "fragile safety: the group moves farther than random partners",
    "H2": "pathways elsewhere: the group moves about as far as random partners",
}


def _hypotheses(together: Mapping[str, Comparison]) -> dict[str, Any]:
    """The answer by how far weights moved; for neurons and heads also by how far they turned."""
    out: dict[str, Any] = {}
    for number, (name, question) in enumerate(QUESTIONS.items()):
        answers = {kind: c.answers[number] for kind, c in together.items()}
        out[name] = {"question": question, "answer": answers.get("change", "undecided"), "by_quantity": answers}
    return out


def _matrix(places: Sequence[Place]) -> dict[str, Any]:
    means = {
        "rms_change": [p.group.rms for p in places],
        "rms_change_random": [p.random.rms for p in places],
        "contrast": [p.contrast for p in places],
    }
    return {"matrix": places[0].name, "n": places[0].group.units, **{k: float(np.mean(v)) for k, v in means.items()}}


def _reidentified(found: Reidentified) -> dict[str, Any]:
    return {
        "groups": {
            one.group: {"members": list(one.members), **{m: v._asdict() for m, v in one.measures.items()}}
            for one in found.groups
        },
        "scores": {one.kind: {"spearman": one.found, "ceiling": one.ceiling} for one in found.ranks},
    }


def _plain(value: Any) -> Any:
    """JSON without NaN or infinity: both are null."""
    if isinstance(value, Interval):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
