"""The five modes: what is taken off which token. All in raw activation space; strength is counted in gaps.

With natural mean μ, artifact mean c, v = c − μ, gap g = ‖v‖, u = v/g, and the signed alignment a = ⟨o − μ, u⟩/g
(0 at the natural mean, 1 at the artifact mean), a token's activation o becomes, at scale s:

always      o − s·v                                        every token
proximity   o − s·v                                        where a > τ
adaptive    o − s·max(a, 0)·v                              where a > τ (default 0); s = 1 takes the whole excess off
sphere      o + s·g·w(t)·(o − c)/D, D = ‖o − c‖            where D < R; t = (D − r)/(R − r) from 0 to 1,
                                                           w(t) = (e^(−kt) − e^(−k))/(1 − e^(−k))
subspace    o − s·BᵀB(o − μ)                               every token; B = orth([v, components])

τ is the quantile of held-out natural tokens that leaves `false_fire` of them above. R is the `reach` quantile of the
held-out artifact prompts' distances to c, or less, so that at most `false_fire` of the natural tokens lie inside. r is
their 1 − `reach` quantile, at most R/2: in many dimensions all distances lie in a thin shell, and a weight that counted
from the centre would be that of the edge for every token. w falls from 1 at r to 0 at R, so nothing jumps there. B
holds v itself: the components are those of *uncentred* differences. The gated modes (proximity, sphere) have one μ, c,
τ, R for each category, acting one after the other with `false_fire` divided among them; the others have those of all
pairs. The signs are kept: a token that points away from the artifact is never pushed further.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safety_lens.errors import DataError
from safety_lens.interventions.edits import Edit, wide
from safety_lens.interventions.scopes import EVERYWHERE, Scope
from safety_lens.interventions.suppression.data import UNNAMED
from safety_lens.interventions.suppression.reading import HookFit

TIE = 1e-4
"""Gaps: alignments nearer than this are the same token read in another batch."""

Acts = Float[Tensor, "batch pos d"]
PerToken = Float[Tensor, "batch pos"]


@dataclass(frozen=True)
class Settings:
    """Parameters of the modes.

    false_fire: share of natural tokens that a gate may touch, at each hook. threshold: τ in gaps, instead of the one
    that `false_fire` gives. radius: R in gaps, instead of the fitted one. reach: share of the held-out artifact prompts
    that a fitted sphere holds, if `false_fire` allows. decay: k of the sphere. components: of the subspace, beside v.

    Raises:
        DataError: a value outside its range.
    """

    false_fire: float = 0.01
    threshold: float | None = None
    radius: float | None = None
    reach: float = 0.95
    decay: float = 2.0
    components: int = 5

    def __post_init__(self) -> None:
        checks = (
            ("false_fire", 0 < self.false_fire < 1, "between 0 and 1"),
            ("threshold", self.threshold is None or isfinite(self.threshold), "a finite number of gaps"),
            ("radius", self.radius is None or 0 < self.radius < float("inf"), "above 0"),
            ("reach", 0 < self.reach <= 1, "above 0 and at most 1"),
            ("decay", 0 < self.decay < float("inf"), "above 0"),
            ("components", self.components >= 1, "1 or more"),
        )
        for name, fine, wanted in checks:
            if not fine:
                raise DataError(f"{name} must be {wanted}, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Above:
    """A gate: the signed alignment is above `threshold` gaps."""

    at: HookFit
    threshold: float

    def margin(self, x: Acts) -> PerToken:
        """Alignment minus threshold, in gaps."""
        return self.at.alignment(x) - self.threshold

    def __call__(self, x: Acts) -> Bool[Tensor, "batch pos"]:
        return self.margin(x) > 0


@dataclass(frozen=True, eq=False)
class Inside:
    """A gate: the distance to the artifact mean is below `radius` gaps."""

    at: HookFit
    radius: float

    def margin(self, x: Acts) -> PerToken:
        """Radius minus distance, in gaps."""
        found: Tensor = self.radius - (wide(x) - self.at.artifact.to(wide(x))).norm(dim=-1) / self.at.gap
        return found

    def __call__(self, x: Acts) -> Bool[Tensor, "batch pos"]:
        return self.margin(x) > 0


@dataclass(frozen=True, eq=False)
class Shift:
    """o − s·v."""

    at: HookFit
    scale: float

    def __call__(self, x: Acts) -> Acts:
        return (wide(x) - self.scale * self.at.vector.to(wide(x))).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Excess:
    """o − s·max(a, 0)·v."""

    at: HookFit
    scale: float

    def __call__(self, x: Acts) -> Acts:
        amount = self.scale * self.at.alignment(x).clamp(min=0)
        return (wide(x) - amount[..., None] * self.at.vector.to(wide(x))).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Repel:
    """o + s·g·w(t)·(o − c)/D inside the sphere; a token exactly at the centre has no way out and stays."""

    at: HookFit
    scale: float
    radius: float
    inner: float
    decay: float

    def __call__(self, x: Acts) -> Acts:
        away = wide(x) - self.at.artifact.to(wide(x))
        distance = away.norm(dim=-1, keepdim=True)
        depth = ((distance / self.at.gap - self.inner) / (self.radius - self.inner)).clamp(0.0, 1.0)
        rest = torch.exp(torch.tensor(-self.decay, dtype=away.dtype, device=away.device))
        weight = (torch.exp(-self.decay * depth) - rest) / (1 - rest)
        push = self.scale * self.at.gap * weight * away / distance.clamp(min=torch.finfo(away.dtype).tiny)
        found: Tensor = (wide(x) + push).to(x.dtype)
        return found


@dataclass(frozen=True, eq=False)
class Flatten:
    """o − s·BᵀB(o − μ). basis: orthonormal rows."""

    at: HookFit
    scale: float
    basis: Float[Tensor, "k d"]

    def __call__(self, x: Acts) -> Acts:
        basis = self.basis.to(wide(x))
        inside = (wide(x) - self.at.natural.to(wide(x))) @ basis.T @ basis
        return (wide(x) - self.scale * inside).to(x.dtype)


def subspace_basis(at: HookFit, components: int) -> Float[Tensor, "k d"]:
    """Orthonormal rows that span v and the leading components; what is dependent beyond rounding is left out."""
    rows = torch.cat([at.unit[None], at.components[:components]]).double()
    kept: list[Tensor] = []
    for row in rows:
        for _ in range(2):  # twice is enough (Kahan): the first pass leaves rounding that the second removes
            for other in kept:
                row = row - (row @ other) * other
        if float(row.norm()) > 1e-3:
            kept.append(row / row.norm())
    return torch.stack(kept).to(at.natural)


def exceeded_by(values: Float[Tensor, " n"], share: float) -> float:
    """A limit that at most `share` of tokens like these exceed: their order statistic ⌈(n+1)(1 − share)⌉.

    (The rank of split conformal prediction: exact for exchangeable tokens.) The limit lies halfway to the next larger
    value: tokens of the chat template are the same in every prompt, and rounding must not push all of them across. With
    fewer than 1/share values it is the largest one, and `unresolved` says so.
    """
    ascending = values.double().sort().values
    rank = ceil((len(ascending) + 1) * (1 - share) - 1e-9)
    value = float(ascending[min(max(rank, 1), len(ascending)) - 1])
    apart = TIE * max(1.0, abs(value))
    larger = ascending[ascending > value + apart]
    return (value + float(larger[0])) / 2 if len(larger) else value + apart


def alignment_threshold(at: HookFit, settings: Settings) -> float:
    """τ in gaps."""
    return exceeded_by(at.aligned, settings.false_fire) if settings.threshold is None else settings.threshold


def sphere_radius(at: HookFit, settings: Settings) -> float:
    """R in gaps: the artifact quantile `reach`, or the radius that only `false_fire` of natural tokens are within."""
    if settings.radius is not None:
        return settings.radius
    allowed = -exceeded_by(-at.distance / at.gap, settings.false_fire)
    return min(float(torch.quantile(at.reach.double(), settings.reach)) / at.gap, allowed)


def unresolved(at: HookFit, false_fire: float) -> bool:
    """Whether the held-out natural tokens are too few to tell this false-fire rate from 0."""
    return (len(at.aligned) + 1) * false_fire < 1


Builder = Callable[[HookFit, float, Settings, Scope], Edit]


def _always(at: HookFit, scale: float, settings: Settings, scope: Scope) -> Edit:
    return Edit(Shift(at, scale), scope)


def _proximity(at: HookFit, scale: float, settings: Settings, scope: Scope) -> Edit:
    return Edit(Shift(at, scale), scope, gate=Above(at, alignment_threshold(at, settings)))


def _adaptive(at: HookFit, scale: float, settings: Settings, scope: Scope) -> Edit:
    floor_ = 0.0 if settings.threshold is None else settings.threshold
    return Edit(Excess(at, scale), scope, gate=Above(at, floor_))


def _sphere(at: HookFit, scale: float, settings: Settings, scope: Scope) -> Edit:
    radius = sphere_radius(at, settings)
    inner = min(float(torch.quantile(at.reach.double(), 1 - settings.reach)) / at.gap, radius / 2)
    return Edit(Repel(at, scale, radius, inner, settings.decay), scope, gate=Inside(at, radius))


def _subspace(at: HookFit, scale: float, settings: Settings, scope: Scope) -> Edit:
    return Edit(Flatten(at, scale, subspace_basis(at, settings.components)), scope)


MODES: dict[str, Builder] = {
    "always": _always,
    "proximity": _proximity,
    "adaptive": _adaptive,
    "sphere": _sphere,
    "subspace": _subspace,
}
GATED = ("proximity", "sphere")
"""Modes whose gate is fitted to a false-fire rate."""


def edits_of(
    mode: str, fits: Sequence[HookFit], scale: float, settings: Settings, scope: Scope = EVERYWHERE
) -> list[tuple[str, Edit]]:
    """The edits of a mode at every fitted hook, as TransformerLens hooks.

    Raises:
        DataError: an unknown mode, or a scale that is not a finite number from 0.
    """
    if mode not in MODES:
        raise DataError(f"no mode {mode!r}: choose auto, auto-size, {', '.join(MODES)}")
    check_scale(scale)
    chosen = centres(mode, fits)
    share = replace(settings, false_fire=settings.false_fire / len({at.category for at in chosen}))
    return [(at.hook, MODES[mode](at, scale, share, scope)) for at in chosen]


def centres(mode: str, fits: Sequence[HookFit]) -> list[HookFit]:
    """The fits that a mode uses: those of each category for the gated modes, that of all pairs for the others."""
    several = any(at.category != UNNAMED for at in fits)
    return [at for at in fits if (at.category != UNNAMED) == (several and mode in GATED)]


def check_scale(scale: float) -> None:
    """Refuse a scale that is not a finite number from 0.

    Raises:
        DataError: it is none.
    """
    if not isfinite(scale) or scale < 0:
        raise DataError(f"scale must be a finite number from 0 (no suppression) on, got {scale}")
