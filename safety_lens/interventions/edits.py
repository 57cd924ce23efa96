"""Edits: what is done to an activation, to which tokens, under which gate.

An `Edit` is a TransformerLens hook function, so an intervention is TransformerLens' own list of (hook name, function).
An edit returns a new tensor and never writes into the one it is given.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safety_lens.errors import DataError, ModelMismatchError
from safety_lens.frames import Frame, frame_of
from safety_lens.interventions.scopes import EVERYWHERE, Scope

Op = Callable[[Float[Tensor, "batch pos d"]], Float[Tensor, "batch pos d"]]
Gate = Callable[[Float[Tensor, "batch pos d"]], Bool[Tensor, "batch pos"]]
Watch = Callable[[Frame, Float[Tensor, "batch pos d"], Bool[Tensor, "batch pos"]], None]


def wide(x: Tensor) -> Tensor:
    """Arithmetic of half-precision activations runs in float32 and is rounded once."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@dataclass(frozen=True, eq=False)
class Add:
    """x + vector. vector: [d], coefficient included, in activation units."""

    vector: Float[Tensor, " d"]

    def __call__(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        return (wide(x) + self.vector.to(wide(x))).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Ablate:
    """x − strength·(x·u)u. unit: [d], length 1; strength 1 removes the component, 2 mirrors it, 0 leaves it."""

    unit: Float[Tensor, " d"]
    strength: float = 1.0

    def __call__(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        real = wide(x)
        u = self.unit.to(real)
        return (real - self.strength * (real @ u)[..., None] * u).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Clamp:
    """Moves the component along `unit` into [low, high] and leaves everything across it; low = high sets it."""

    unit: Float[Tensor, " d"]
    low: float
    high: float

    def __call__(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        real = wide(x)
        u = self.unit.to(real)
        along = real @ u
        return (real + (along.clamp(self.low, self.high) - along)[..., None] * u).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Affine:
    """The component c along `unit` becomes scale·c + shift (scale 0, shift = mean component: affine ablation)."""

    unit: Float[Tensor, " d"]
    scale: float
    shift: float

    def __call__(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        real = wide(x)
        u = self.unit.to(real)
        along = real @ u
        return (real + ((self.scale - 1) * along + self.shift)[..., None] * u).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Edit:
    """A hook function that applies `op` to the tokens that `scope` and `gate` allow, and returns a new tensor.

    op: function of activations [batch, pos, d] (heads flattened) alone. gate: which tokens, seen from their
    activations; None is all. watch: told the frame, the activations as they came and the tokens that were changed.

    Raises:
        ModelError: the hook's activations are not [batch, pos, ...].
        ModelMismatchError: they are of another width than the op's vector.
    """

    op: Op
    scope: Scope = EVERYWHERE
    gate: Gate | None = None
    watch: Watch | None = None

    @property
    def spares_prompt(self) -> bool:
        """Whether every prompt token but the last is left as it is: its keys and values may then be shared."""
        return self.scope.spares_prompt

    def __call__(self, act: Tensor, hook: Any = None) -> Tensor:
        frame = frame_of(act)
        x = act.flatten(2)
        check_width(self.op, x, hook)
        touched = self.scope(frame)
        if self.gate is not None:
            touched = touched & self.gate(x)
        if self.watch is not None:
            self.watch(frame, x, touched)
        return torch.where(touched[..., None], self.op(x), x).view_as(act)

    def watched(self, watch: Watch) -> "Edit":
        """The same edit, telling `watch` what it does."""
        return replace(self, watch=watch)


def vector_of(op: object) -> Float[Tensor, " d"] | None:
    """The vector an op works with; None where it has none."""
    found = getattr(op, "vector", None)
    return found if found is not None else getattr(op, "unit", None)


def check_width(op: object, x: Float[Tensor, "batch pos d"], hook: Any) -> None:
    """Refuse a vector of another width than the activations it would act on.

    Raises:
        ModelMismatchError: names both widths and the hook.
    """
    vector = vector_of(op)
    if vector is not None and len(vector) != x.shape[-1]:
        raise ModelMismatchError(
            f"the direction has width {len(vector)}, the model's activations at {getattr(hook, 'name', 'this hook')}"
            f" have {x.shape[-1]}: it was made with another model or at another kind of hook"
        )


def unit_of(vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The vector at length 1, in float64.

    Raises:
        DataError: its length is zero or not finite.
    """
    norm = float(torch.linalg.vector_norm(vector.double()))
    if not isfinite(norm) or norm == 0:
        raise DataError(f"a direction needs a finite length above 0, this one has {norm}")
    return vector.double().div(norm)
