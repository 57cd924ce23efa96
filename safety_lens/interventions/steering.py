"""Steering and ablation as lists of forward hooks, and a context that applies them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Literal

from transformer_lens import HookedTransformer

from safety_lens.errors import DataError, ModelMismatchError
from safety_lens.interventions.edits import Ablate, Add, Affine, Clamp, Edit, unit_of, vector_of
from safety_lens.interventions.scopes import Scope, scope_named
from safety_lens.interventions.strength import residual_norm as residual_norm
from safety_lens.models import named_hooks
from safety_lens.probes.directions import Direction
from safety_lens.types import FwdHook


def steer(
    direction: Direction,
    coeff: float = 1.0,
    *,
    at: str | Sequence[str] | None = None,
    scope: str | Scope = "all",
    units: Literal["raw"] | float = "raw",
) -> list[FwdHook]:
    """Add coeff · vector where the direction was read (contrastive activation addition, Panickssery et al. 2024).

    Args:
        coeff: 0 is bit for bit no edit; 1 in raw units adds the gap between the class means.
        at: hook name(s) instead of the direction's own.
        scope: "all", "prompt", "generated", "answer", "from:INDEX" or a Scope.
        units: "raw": the vector as it is. A number: the unit vector times that length is one unit, for instance
            `residual_norm(model, prompts, hook)`.

    Raises:
        DataError: a coefficient that is not finite, an unknown scope, or a direction without length.
    """
    _check_number("the coefficient", coeff)
    unit = unit_of(direction.vector)
    if units == "raw":
        vector = coeff * direction.vector.double()
    else:
        _check_number("the unit of strength", units)
        vector = coeff * units * unit
    edit = Edit(Add(vector.to(direction.vector)), scope_named(scope))
    return [(hook, edit) for hook in _sites(direction, at)]


def ablate(
    direction: Direction,
    strength: float = 1.0,
    *,
    at: str | Sequence[str] | None = None,
    scope: str | Scope = "all",
) -> list[FwdHook]:
    """Remove the component along the direction (Arditi et al. 2024, arXiv:2406.11717, eq. 4).

    Args:
        strength: 1 removes it, 0 is no edit, between them it is graded, 2 mirrors it.
        at: hook name(s); None is every site that writes into the residual stream (`is_writing_site`).

    Raises:
        DataError: a strength that is not finite, an unknown scope, or a direction without length.
    """
    _check_number("the ablation strength", strength)
    edit = Edit(Ablate(unit_of(direction.vector), strength), scope_named(scope))
    return [(is_writing_site, edit)] if at is None else [(hook, edit) for hook in _sites(direction, at)]


def clamp(
    direction: Direction,
    low: float,
    high: float,
    *,
    at: str | Sequence[str] | None = None,
    scope: str | Scope = "all",
) -> list[FwdHook]:
    """Keep the component along the direction within [low, high] activation units; an infinite limit is one-sided.

    Raises:
        DataError: limits that are NaN or in the wrong order, or a direction without length.
    """
    if not low <= high:
        raise DataError(f"clamp needs low <= high, got {low} and {high}")
    edit = Edit(Clamp(unit_of(direction.vector), low, high), scope_named(scope))
    return [(hook, edit) for hook in _sites(direction, at)]


def affine(
    direction: Direction,
    scale: float,
    shift: float,
    *,
    at: str | Sequence[str] | None = None,
    scope: str | Scope = "all",
) -> list[FwdHook]:
    """The component c along the direction becomes scale·c + shift (activation units).

    Raises:
        DataError: numbers that are not finite, or a direction without length.
    """
    _check_number("the scale", scale)
    _check_number("the shift", shift)
    edit = Edit(Affine(unit_of(direction.vector), scale, shift), scope_named(scope))
    return [(hook, edit) for hook in _sites(direction, at)]


def is_writing_site(name: str) -> bool:
    """Whether a hook writes into the residual stream: the embedding, attention and MLP outputs, block outputs."""
    return name == "blocks.0.hook_resid_pre" or name.endswith((".hook_attn_out", ".hook_mlp_out", ".hook_resid_post"))


@contextmanager
def applied(model: HookedTransformer, *hooks: Sequence[FwdHook]) -> Iterator[HookedTransformer]:
    """The model with interventions active: hook names and widths are checked, nothing is left behind.

    Raises:
        HookNameError: a hook that the model does not have.
        ModelMismatchError: a direction of another width than the model's activations at its hook.
    """
    flat = named_hooks(model, [hook for group in hooks for hook in group])
    check_widths(model, flat)
    with model.hooks(fwd_hooks=flat):
        yield model


def check_widths(model: HookedTransformer, hooks: Sequence[tuple[str, object]]) -> None:
    """Refuse vectors of another width than the residual stream, where they would act on it.

    Raises:
        ModelMismatchError: names both widths.
    """
    for name, fn in hooks:
        vector = vector_of(getattr(fn, "op", None))
        on_stream = "hook_resid" in name or name.endswith(("hook_attn_out", "hook_mlp_out", "hook_embed"))
        if vector is not None and on_stream and len(vector) != model.cfg.d_model:
            raise ModelMismatchError(
                f"the direction has width {len(vector)}, the model's d_model at {name} is {model.cfg.d_model}:"
                " it was made with another model"
            )


def _sites(direction: Direction, at: str | Sequence[str] | None) -> list[str]:
    return [direction.hook] if at is None else [at] if isinstance(at, str) else list(at)


def _check_number(what: str, value: float) -> None:
    if not isfinite(value):
        raise DataError(f"{what} must be a finite number, got {value}")
