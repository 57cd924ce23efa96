"""How strong an edit is: units of strength, and the strength at which an edit costs a given KL.

Coefficients of different methods, hooks and models do not compare. What they cost does: the divergence from the
unedited model on prompts that the edit is not meant for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, isnan, log

import numpy as np
import torch
from transformer_lens import HookedTransformer

from safety_lens.activations import capture
from safety_lens.data import Encoded
from safety_lens.errors import DataError
from safety_lens.forced import Continuation, continuation_kl
from safety_lens.positions import all_tokens
from safety_lens.types import FwdHook, Prompt

MakeHooks = Callable[[float], Sequence[FwdHook]]
"""A method: the intervention at a strength. Strength 0 must be no edit."""

HALVINGS = 7
ROUNDS = 12


def residual_norm(model: HookedTransformer, prompts: Sequence[Prompt | Encoded], hook: str) -> float:
    """Root mean square length of the activations at a hook over all tokens of the prompts: a unit of strength.

    A coefficient of 0.1 in this unit adds a vector a tenth as long as the activations are. First tokens are left out:
    in many models theirs are a hundred times as long (attention sinks).
    """
    found = capture(model, prompts, [hook], positions=all_tokens)
    rows = found.acts[hook][found.pos > 0] if bool((found.pos > 0).any()) else found.acts[hook]
    return float(torch.linalg.vector_norm(rows.double(), dim=1).pow(2).mean().sqrt())


@dataclass(frozen=True)
class Solved:
    """A strength and what it costs.

    strength, kl: where the target was reached, the strength and the mean KL measured at it; else the measured point
    whose KL is the largest below the target (of equal ones the strongest). evaluations: every (strength, KL) that was
    measured, by strength. note: what a reader must know, None where the target was reached at the only crossing seen.
    """

    strength: float
    kl: float
    evaluations: tuple[tuple[float, float], ...]
    reached: bool
    note: str | None = None


def mean_kl(model: HookedTransformer, rows: Sequence[Continuation], edits: Sequence[Sequence[FwdHook]]) -> list[float]:
    """KL(unedited ‖ edited) in nats, averaged over all tokens of the continuations, for each intervention.

    The unedited model runs once. Below 1e-6 nats it is float32 rounding.
    `side_effects.benign_kl` gives the same number with its interval.
    """
    return [float(np.concatenate(by_row).mean()) for by_row in continuation_kl(model, rows, edits)]


def solve_strength(
    model: HookedTransformer,
    rows: Sequence[Continuation],
    make_hooks: MakeHooks,
    target_kl: float,
    *,
    largest: float = 1.0,
    tolerance: float = 0.02,
) -> Solved:
    """The smallest strength in (0, largest] at which the mean benign KL is the target, to a relative tolerance.

    KL grows with the square of a small strength, so on logarithmic axes it is close to a line: a ladder of halvings
    brackets the first crossing, then each round measures the line's guess and the middles on both sides of it, which
    at least halves the bracket whatever the curve does. A strength is only ever returned with the KL measured at it.
    Between two steps of the ladder a curve that rises above the target and falls again is not seen.

    Args:
        rows: continuations of the unedited model on benign prompts (`side_effects.benign_rows`).
        make_hooks: the intervention at a strength > 0, continuous in it; gated edits may jump, and the note says so.
        target_kl: nats per token. largest: the strongest edit that is tried.

    Raises:
        DataError: numbers out of range, no rows, or a KL that is NaN (the edit broke the model).
    """
    _check(rows, target_kl, largest, tolerance)
    seen: dict[float, float] = {0.0: 0.0}

    def measure(strengths: Sequence[float]) -> None:
        new = [s for s in dict.fromkeys(strengths) if s not in seen]
        for s, kl in zip(new, mean_kl(model, rows, [make_hooks(s) for s in new]), strict=True):
            if isnan(kl):
                raise DataError(f"at strength {s:.4g} the edited model gives NaN; lower `largest` (now {largest:g})")
            seen[s] = kl

    measure([largest * 2.0**-k for k in range(HALVINGS)])
    for _ in range(ROUNDS):
        bracket = _first_crossing(seen, target_kl)
        if bracket is None or _found(seen, target_kl, tolerance) is not None:
            break
        new = _between(bracket, seen, target_kl)
        if not new:
            break
        measure(new)
    return _answer(seen, target_kl, tolerance, largest)


def _check(rows: Sequence[Continuation], target_kl: float, largest: float, tolerance: float) -> None:
    for what, value in (("the target KL", target_kl), ("the largest strength", largest), ("tolerance", tolerance)):
        if not (isfinite(value) and value > 0):
            raise DataError(f"{what} must be a number above 0, got {value}")
    if not rows:
        raise DataError("a benign KL needs at least one prompt and its continuation, got none")


def _first_crossing(seen: dict[float, float], target: float) -> tuple[float, float] | None:
    """Neighbouring measured strengths with the KL below the target at the first and not at the second."""
    strengths = sorted(seen)
    return next(((a, b) for a, b in pairwise(strengths) if seen[b] >= target), None)


def _found(seen: dict[float, float], target: float, tolerance: float) -> float | None:
    """The measured strength at the first crossing whose KL is within the tolerance of the target."""
    bracket = _first_crossing(seen, target)
    near = [s for s in (bracket or ()) if s > 0 and abs(seen[s] / target - 1) <= tolerance]
    return min(near, key=lambda s: abs(seen[s] / target - 1), default=None)


def _between(bracket: tuple[float, float], seen: dict[float, float], target: float) -> list[float]:
    """Where to measure next inside the bracket; nothing where floating point has no room left."""
    low, high = bracket
    if seen[low] > 0 and isfinite(seen[high]):
        guess = low * (high / low) ** (log(target / seen[low]) / log(seen[high] / seen[low]))
    else:  # no line through log 0 or infinity: KL ∝ strength² from the upper end, else the middle
        guess = high * (target / seen[high]) ** 0.5
        low = max(low, min(guess, high / 2) / 16)
        guess = guess if low < guess < high else (low * high) ** 0.5
    inner = [(low * guess) ** 0.5, guess, (guess * high) ** 0.5]
    return [s for s in inner if bracket[0] * (1 + 1e-9) < s < high * (1 - 1e-9)]


def _answer(seen: dict[float, float], target: float, tolerance: float, largest: float) -> Solved:
    evaluations = tuple((s, seen[s]) for s in sorted(seen) if s > 0)
    crossing, found = _first_crossing(seen, target), _found(seen, target, tolerance)
    if found is not None:
        falls = any(kl < target * (1 - tolerance) for s, kl in evaluations if s > found)
        note = "the KL is not monotone: it falls below the target again; the first crossing was taken"
        return Solved(found, seen[found], evaluations, True, note if falls else None)
    if crossing is None:
        best = max((s for s, _ in evaluations), key=lambda s: (seen[s], s))  # one that costs nothing: at its strongest
        note = f"the largest KL up to strength {largest:.4g} is {seen[best]:.4g}, below the target of {target:.4g}"
        return Solved(best, seen[best], evaluations, False, note)
    low, high = crossing
    note = (
        f"the KL jumps from {seen[low]:.4g} to {seen[high]:.4g} at strength {high:.4g}, across the target {target:.4g}"
    )
    return Solved(low, seen[low], evaluations, False, note)
