"""Drift of neuron groups as measurement rows, for the drift log and for artifacts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from safety_lens.log import NAN, Measurement
from safety_lens.monitors.neuron_drift.moved import GroupDrift, Moved, Place
from safety_lens.monitors.neuron_drift.statistics import MARGIN, QUANTITIES, compare

SUBJECT = "neurons/"
TOTAL = "total"
QUANTILES = (5, 25, 50, 75, 95)
LENGTHS = {"rms_change": "rms", "relative_to_weight": "relative"}
ANGLES = {"unit_cosine": "mean_cosine", "unit_turn": "turned"}


def drift_rows(
    drifts: Sequence[GroupDrift], step: int, *, seed: int | None = None, margin: float = MARGIN
) -> list[Measurement]:
    """Rows with subject "neurons/<group>" and split = the matrix's name, the block's, or "total".

    Each figure of a group stands beside its partners', named `…_random`. Per matrix and in total: rms_change (of a
    weight), relative_to_weight (√(ΣΔ²/Σw²)). Neurons and heads, per block and in total: unit_cosine, unit_turn. Total
    only: mean_change and change_q05 … q95 (of ‖Δ‖ of a unit; of |Δ| of an entry), outside_share and held_share (of the
    group's weights in matrices that were not adapted, and in frozen members), change_ratio (mean over matrices, limits
    over layers) and change_p; turn_ratio and turn_p.
    """
    rows: list[Measurement] = []
    for drift in drifts:
        total = drift.total
        rows += [row for place in (*drift.matrices, total) for row in _moved(drift, place, LENGTHS, "entries")]
        if drift.blocks:
            rows += [row for place in (*drift.blocks, drift.whole) for row in _moved(drift, place, ANGLES, "units")]
        rows += [*_distribution(drift), *_compared(drift, margin)]
        note = f"{drift.size} weights; no matrix of it was adapted: it cannot move" if not drift.matrices else None
        rows.append(_row(drift, "outside_share", drift.outside, TOTAL, drift.size, note))
        rows.append(_row(drift, "held_share", drift.held, TOTAL, drift.size))
    return [replace(row, step=step, seed=seed) for row in rows]


def _moved(drift: GroupDrift, place: Place, fields: Mapping[str, str], n: str) -> list[Measurement]:
    """A row of each field of what moved at a place, and of the same at its partners; n: the field that counts."""
    return [
        _row(drift, f"{metric}{suffix}", getattr(moved, field), place.name, getattr(moved, n))
        for suffix, moved in _sides(place)
        for metric, field in fields.items()
    ]


def _distribution(drift: GroupDrift) -> list[Measurement]:
    rows = []
    for suffix, moved in _sides(drift.whole):
        found = np.percentile(moved.sample, QUANTILES) if len(moved.sample) else np.full(len(QUANTILES), NAN)
        rows.append(_row(drift, f"mean_change{suffix}", moved.mean_length, TOTAL, moved.units))
        rows += [
            _row(drift, f"change_q{q:02d}{suffix}", float(value), TOTAL, moved.units)
            for q, value in zip(QUANTILES, found, strict=True)
        ]
    return rows


def _compared(drift: GroupDrift, margin: float) -> list[Measurement]:
    rows = []
    for quantity, asked in QUANTITIES.items():
        if not asked.places(drift):
            continue
        c = compare([drift], quantity, margin=margin)
        said = f"withheld: {c.withheld}" if c.withheld else f"one run: H1 {c.answers.h1}, H2 {c.answers.h2}"
        rows.append(_row(drift, f"{quantity}_ratio", c.ratio.value, TOTAL, c.matrices, said, c.ratio.low, c.ratio.high))
        rows.append(_row(drift, f"{quantity}_p", c.p, TOTAL, c.matrices))
    return rows


def _sides(place: Place) -> tuple[tuple[str, Moved], tuple[str, Moved]]:
    return ("", place.group), ("_random", place.random)


def _row(
    drift: GroupDrift, metric: str, value: float, split: str, n: int, note: str | None = None,
    low: float = NAN, high: float = NAN,
) -> Measurement:  # fmt: skip
    return Measurement(f"{SUBJECT}{drift.group}", metric, value, low, high, n, split=split, note=note)
