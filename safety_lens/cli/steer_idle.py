"""Options of `steer` that do nothing in the mode in use: refused, all of them in one message."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from safety_lens.errors import DataError

SWEEP_ONLY = (
    *("coeffs", "controls", "control_coeffs", "shuffled", "seeds", "selection_share", "system_baseline", "goal"),
    *("max_kl", "search", "dry_run", "yes"),
)


class Idle(NamedTuple):
    """Options that do nothing under a condition, and what would make them act."""

    holds: bool
    options: tuple[str, ...]
    remedy: str


def refuse_idle(given: Mapping[str, Any], changed: Mapping[str, str]) -> None:
    """Refuse options that were given and would do nothing.

    Args:
        given: every option by name. changed: flags of those that are not at their default.

    Raises:
        DataError: naming each of them and what would make it act.
    """
    idle = []
    for rule in _rules(given):
        flags = [changed[name] for name in rule.options if name in changed]
        if rule.holds and flags:
            idle.append(f"{', '.join(flags)} ({rule.remedy})")
    if idle:
        raise DataError(f"options that would do nothing here: {'; '.join(idle)}")


def _rules(given: Mapping[str, Any]) -> list[Idle]:
    sweep, alone = bool(given["sweep"]), not given["sweep"]
    return [
        Idle(alone, SWEEP_ONLY, "acts with --sweep alone"),
        Idle(sweep, ("coeff", "target_kl"), "a sweep tries the coefficients of --coeffs"),
        Idle(given["search"] == "coarse", ("control_coeffs",), "a search runs its controls where it chooses"),
        Idle(alone and given["target_kl"] is None, ("benign",), "read with --target-kl, or by a sweep"),
        Idle(given["out"] is None, ("overwrite",), "replaces what is in --out"),
        Idle(sweep, ("stream",), "shows one answer, not a sweep"),
        Idle(bool(given["stream"]), ("as_json", "scorer", "out"), "leave out --stream"),
        Idle(given["temperature"] == 0, ("top_p", "top_k"), "acts at --temperature above 0"),
        Idle(given["raw"], ("system", "system_baseline"), "needs the chat template, which --raw leaves out"),
        Idle(given["directions"] is not None, ("positions",), "the artifact says where it was read"),
        Idle(given["directions"] is not None and given["layers"] is None, ("point",), "acts with --layers"),
    ]
