"""How serious a forecast is, and why: every level comes with the sentence that set it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from safety_lens.monitors.forecasting.growth import Curve, Polynomial
from safety_lens.probes.fisher import Overlap

Level = Literal["red", "amber", "grey", "green"]
RARE = 1e-3
"""The p-value of an overlap below which it counts, if the lift is above `LIFT` too."""
LIFT = 10.0
"""Share over chance. Any two gradients of one language model overlap a little: p alone would always speak."""


class Warned(NamedTuple):
    """level: red: the limit is forecast to be reached before the planned end. amber: the update leans on directions
    that safe answers are sensitive to, or speeds up within the range that is known. grey: the plan goes on beyond what
    the closed form knows and nothing was rehearsed. green: none of these. reasons: of every level that applies.
    """

    level: Level
    reasons: tuple[str, ...]


def warned(
    closed: Curve | None,
    rehearsed: Curve | None,
    polynomial: Polynomial | None,
    overlap: Overlap | None,
    *,
    limit: float,
    steps: int,
    t_valid: float = float("inf"),
) -> Warned:
    """The gravest level that applies, and the reasons of all that do. steps: of the plan. t_valid: as in the path."""
    red, amber, grey = list[str](), list[str](), list[str]()
    for name, curve in (("the rehearsal", rehearsed), ("the closed form", closed)):
        if curve is not None and curve.reaches.value <= min(steps, curve.valid):
            first, last = curve.reaches.low, curve.reaches.high
            red.append(
                f"{name} reaches a KL of {limit:g} at step {curve.reaches.value:.0f} ({first:.0f} to {last:.0f}), the"
                f" plan has {steps}"
            )
    if overlap is not None and overlap.p < RARE and overlap.lift >= LIFT:
        amber.append(
            f"the first update overlaps with safety-sensitive directions {overlap.lift:.0f} times as much as chance"
            f" (p {overlap.p:.1g})"
        )
    if polynomial is not None and closed is not None and _speeds_up(polynomial, t_valid):
        amber.append(
            "within the known range the second-order part of the path already outweighs the first (c4t⁴ > c2t²)"
        )
    if rehearsed is None and closed is not None and closed.valid < steps:
        grey.append(
            f"the closed form knows the path up to step {closed.valid:.0f} of {steps}: no forecast beyond; rehearse"
        )
    for level, reasons in (("red", red), ("amber", amber), ("grey", grey)):
        if reasons:
            return Warned(level, _all(red, amber, grey))  # type: ignore[arg-type]
    return Warned("green", ("no limit is reached within the plan, and the update does not lean on safe answers",))


def _speeds_up(polynomial: Polynomial, t: float) -> bool:
    return t < float("inf") and polynomial.c4 * t**4 > polynomial.c2 * t**2


def _all(*groups: Sequence[str]) -> tuple[str, ...]:
    return tuple(reason for group in groups for reason in group)
