"""Limits of a causal choice, stated before looking, and candidates that are not worth a forward pass."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite

from safety_lens.probes.directions import Direction
from safety_lens.probes.selection import PREFERRED_DEPTH, depth

STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True)
class Limits:
    """Limits that a candidate must satisfy, and the size of the search.

    Shares are parts of the way between the model's own levels: the mean log-odds of the selection prompts whose answers
    show the behaviour (1 for induce, 0 for bypass) and of those whose answers do not (0 and 1).

    Attributes:
        max_kl: Nats per token that ablation may change the first tokens of the answers to negative prompts by.
        min_bypass: Share of the way down that ablation must bring positive prompts.
        min_induce: Share of the way up that addition must bring negative prompts.
        latest: Depth in [0, 1] from which on candidates are left out: so near the output they steer words.
        near: Cosine above which a candidate counts as a near-duplicate of a more separating one.
        coeffs: Coefficients of the addition, rising: a finalist takes the first with which it induces enough.
        scope: Tokens to which it is added: "prompt" asks whether the prompt makes the model begin so, "all" edits the
            tokens of the answer, too.
        coarse: Prompts of each side in the first pass over the hooks.
        finalists: Hooks that are then measured on all selection prompts.
        positives: Positive selection prompts whose answers are labelled at most.
        negatives: Negative ones.
        draws: Random and shuffled directions, each, that the chosen one is compared with; 0 asks for none.
        control_prompts: Prompts of each side on which they are compared.
        max_p: Largest p, (1 + draws that do as much) / (1 + draws), with which a candidate passes.
    """

    max_kl: float = 0.1
    min_bypass: float = 1 / 3
    min_induce: float = 1 / 3
    latest: float = 0.8
    near: float = 0.99
    coeffs: tuple[float, ...] = (1.0, 2.0, 4.0)
    scope: str = "prompt"
    coarse: int = 8
    finalists: int = 3
    positives: int = 64
    negatives: int = 32
    draws: int = 99
    control_prompts: int = 6
    max_p: float = 0.05


FEWEST = 24
"""Selection prompts of a side below which the choice carries a remark."""


def ablatable(direction: Direction, d_model: int) -> bool:
    """Whether a direction lies in the residual stream, so that it can be removed wherever the stream is written."""
    return direction.hook.endswith(STREAM) and len(direction.vector) == d_model


def left_out(directions: Mapping[str, Direction], limits: Limits, *, n_layers: int, d_model: int) -> dict[str, str]:
    """Reasons why candidates are not measured at all, by hook."""
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
