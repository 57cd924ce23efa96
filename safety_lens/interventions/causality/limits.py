"""What a causal candidate must satisfy, and which candidates are not worth a forward pass."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite

from safety_lens.probes.directions import Direction
from safety_lens.probes.selection import PREFERRED_DEPTH, depth

STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True)
class Limits:
    """What a candidate must satisfy, stated before looking.

    max_kl: nats. latest: depth in [0, 1] from which on candidates are left out: so near the output they steer words.
    near: cosine above which a candidate is not scored beside a more
    separating one that passes. min_induce: the mean behaviour score
    that adding must reach. coeff: how often the vector is added. controls: random directions of the same length that a
    candidate must beat, each of them, in both bypass and induce (20: p < 0.05 each); 0 asks for no control.
    """

    max_kl: float = 0.1
    latest: float = 0.8
    near: float = 0.99
    min_induce: float = 0.0
    coeff: float = 1.0
    controls: int = 20


def ablatable(direction: Direction, d_model: int) -> bool:
    """Whether the direction lies in the residual stream, so that it can be removed wherever the stream is written."""
    return direction.hook.endswith(STREAM) and len(direction.vector) == d_model


def left_out(directions: Mapping[str, Direction], limits: Limits, *, n_layers: int, d_model: int) -> dict[str, str]:
    """Hook → why its candidate is not scored at all."""
    out: dict[str, str] = {}
    for hook, direction in directions.items():
        if not ablatable(direction, d_model):
            out[hook] = "outside the residual stream"
        elif depth(hook, n_layers) >= limits.latest:
            out[hook] = f"too late: not before depth {limits.latest:g}"
    return out


def in_order(hooks: Iterable[str], gaps: Mapping[str, float], n_layers: int) -> list[str]:
    """Candidates by falling gap (d'), unknown ones last, equal ones by nearness to the depth fixed beforehand."""

    def rank(hook: str) -> tuple[float, float, float, str]:
        gap, at = gaps.get(hook, float("nan")), depth(hook, n_layers)
        return (-gap if isfinite(gap) else float("inf"), abs(at - PREFERRED_DEPTH), at, hook)

    return sorted(hooks, key=rank)


def twin(direction: Direction, others: Iterable[Direction], near: float) -> str | None:
    """The hook of a direction whose cosine with this one is above `near`."""
    unit = direction.vector.double() / direction.norm
    return next((o.hook for o in others if float(unit @ o.vector.double()) / o.norm > near), None)
