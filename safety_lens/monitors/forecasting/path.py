"""The path that the optimiser would take: its first direction, and how that direction turns.

θ(t) = θ₀ + t·v + ½t²·a with t = Σ learning rates. SGD: v = −g. AdamW: v = −m/(√s + ε) − λθ with m and s the means of g
and g² over batches, which is where its bias-corrected averages start. a = dv/dt along the path, with the preconditioner
held: gradients at θ₀ ± h·v and their difference, so no second backward pass, which fused attention does not have
(Pearlmutter's Hv by central differences). A weight whose gradient is exactly 0 at the start (LoRA's A, as B = 0) has an
Adam direction as soon as t > 0: that limit is its v.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from safety_lens.data.labelled import IGNORED, Labelled, collate
from safety_lens.errors import DataError, ModelError
from safety_lens.monitors.forecasting.planned import micro_batches

EPSILON = 1e-8
"""Adam's."""
NEAR = 0.005
"""Share of their size by which weights are moved to see gradients change."""
Tensors = list[Tensor]


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of n batches. mean, rms: of every trained tensor's entries over the batches. losses, norms: of each
    batch, before clipping.
    """

    mean: Tensors
    rms: Tensors
    losses: Float[np.ndarray, " batch"]
    norms: Float[np.ndarray, " batch"]


@dataclass(frozen=True)
class Optimiser:
    """How a gradient becomes a direction: direction = −(scale ⊙ mean gradient) − decay·θ.

    scale: from the root mean square of the gradients over batches. follows: whether a tensor without a gradient at the
    start has a direction of full size right after it.
    """

    name: str
    scale: Callable[[Tensor], Tensor]
    follows: bool


SGD = Optimiser("sgd", torch.ones_like, False)
ADAMW = Optimiser("adamw", lambda rms: torch.where(rms > 0, 1 / (rms + EPSILON), 0.0), True)


def optimiser_named(name: str) -> Optimiser:
    """The optimiser behind a Trainer's `optim`.

    Raises:
        DataError: one whose first direction is not known here.
    """
    for known in (SGD, ADAMW):
        if name == known.name or name.startswith(f"{known.name}_"):
            return known
    raise DataError(
        f"training.optim {name!r}: the closed form knows sgd and adamw; choose one of them, or forecast with rehearsal"
        " alone, which runs any optimiser (--no-closed-form --rehearse 5)"
    )


@dataclass(frozen=True, eq=False)
class Path:
    """θ(t) = start + t·velocity + ½t²·acceleration of every trained tensor; t may be negative."""

    trained: Sequence[nn.Parameter]
    start: Tensors
    velocity: Tensors
    acceleration: Tensors
    gradients: Gradients

    def reaching(self, share: float) -> float:
        """The t at which trained weights have moved by this share of their size (root mean squares; zeros left out).

        Raises:
            ModelError: nothing moves at all: every gradient is 0.
        """
        move, size = _rms(self.velocity), _rms(self.start)
        if move == 0:
            raise ModelError("every gradient of the training rows is exactly 0: nothing would be learned from them")
        return share * (size or 1.0) / move

    @contextmanager
    def at(self, t: float) -> Iterator[None]:
        """The throwaway's weights at t; at the start again afterwards."""
        try:
            with torch.no_grad():
                for p, s, v, a in zip(self.trained, self.start, self.velocity, self.acceleration, strict=True):
                    p.copy_(s + t * v + 0.5 * t * t * a)
            yield
        finally:
            with torch.no_grad():
                for p, s in zip(self.trained, self.start, strict=True):
                    p.copy_(s)


def find_path(
    live: nn.Module,
    trained: Sequence[nn.Parameter],
    batches: Sequence[Sequence[Labelled]],
    optimiser: Optimiser,
    *,
    near: float = NEAR,
    clip: float = 0.0,
    decay: float = 0.0,
    micro: int = 8,
) -> Path:
    """Three passes over the batches: at the start, and at θ₀ ± h·v.

    near: h in relative size: the step moves weights by this share of their root mean square. clip: the largest norm of
    a batch's gradient, 0 for any. decay: AdamW's weight decay. micro: rows of a forward.

    Raises:
        ModelError: a loss that is not finite; the training row is named.
    """

    def gradients() -> Gradients:
        return batch_gradients(live, trained, batches, clip=clip, micro=micro)

    start = [p.detach().clone() for p in trained]
    none = [torch.zeros_like(s) for s in start]
    first = gradients()
    scales = [optimiser.scale(rms) for rms in first.rms]
    velocity = [
        -scale * mean - (decay * s if optimiser.follows else 0.0)
        for scale, mean, s in zip(scales, first.mean, start, strict=True)
    ]
    probe = Path(trained, start, velocity, none, first)
    h = probe.reaching(near)
    with probe.at(h):
        ahead = gradients()
    with probe.at(-h):
        behind = gradients()
    acceleration = []
    for i, scale in enumerate(scales):
        if optimiser.follows and not bool(first.rms[i].any()):
            velocity[i] = velocity[i] - optimiser.scale(ahead.rms[i]) * ahead.mean[i]
            acceleration.append(none[i])
        else:
            acceleration.append(-scale * (ahead.mean[i] - behind.mean[i]) / (2 * h))
    return Path(trained, start, velocity, acceleration, first)


def _rms(tensors: Sequence[Tensor]) -> float:
    """Root mean square of the entries that are not 0."""
    squares = sum(float(t.double().square().sum()) for t in tensors)
    entries = sum(int(t.count_nonzero()) for t in tensors)
    return (squares / entries) ** 0.5 if entries else 0.0


def batch_gradients(
    live: nn.Module,
    trained: Sequence[nn.Parameter],
    batches: Sequence[Sequence[Labelled]],
    *,
    clip: float = 0.0,
    micro: int = 8,
) -> Gradients:
    """Mean and root mean square over batches of the gradient of each batch's mean token loss; no `.grad` is written.

    Raises:
        DataError: no batch. ModelError: a loss that is not finite; the training row is named.
    """
    if not batches:
        raise DataError("there is no batch of training rows to take gradients of")
    mean = [torch.zeros_like(p) for p in trained]
    square = [torch.zeros_like(p) for p in trained]
    losses, norms = [], []
    was_training = live.training
    live.eval()  # no dropout: a direction is to be found, not a sample of it
    try:
        for rows in batches:
            loss, found = _gradient(live, trained, rows, micro)
            norm = float(torch.stack([g.double().norm() for g in found]).norm())
            shrink = min(1.0, clip / norm) if clip > 0 and norm > 0 else 1.0
            for m, s, g in zip(mean, square, found, strict=True):
                m.add_(g, alpha=shrink / len(batches))
                s.addcmul_(g, g, value=shrink**2 / len(batches))
            losses.append(loss)
            norms.append(norm)
    finally:
        live.train(was_training)
    return Gradients(mean, [s.sqrt() for s in square], np.array(losses), np.array(norms))


def _gradient(
    live: nn.Module, trained: Sequence[nn.Parameter], rows: Sequence[Labelled], micro: int
) -> tuple[float, Tensors]:
    total = sum(_learned(row) for row in rows)
    loss, found = 0.0, [torch.zeros_like(p) for p in trained]
    for part in micro_batches(rows, micro):
        with torch.enable_grad():
            value = _loss(live, part) * (sum(map(_learned, part)) / total)
            grads = torch.autograd.grad(value, list(trained), allow_unused=True)
        for f, g in zip(found, grads, strict=True):
            if g is not None:
                f.add_(g)
        loss += float(value.detach())
    if not np.isfinite(loss) or not all(bool(f.isfinite().all()) for f in found):
        raise ModelError(_culprit(live, rows))
    return loss, found


def _learned(row: Labelled) -> int:
    return sum(label != IGNORED for label in row.labels[1:])


def _loss(live: nn.Module, rows: Sequence[Labelled]) -> Tensor:
    batch = collate([{"input_ids": row.ids, "labels": row.labels} for row in rows])
    device = next(live.parameters()).device
    out: Any = live(**{name: value.to(device) for name, value in batch.items()})
    found: Tensor = out.loss
    return found


def _culprit(live: nn.Module, rows: Sequence[Labelled]) -> str:
    for row in rows:
        with torch.no_grad():
            loss = float(_loss(live, [row]))
        if not np.isfinite(loss):
            return f"training row {row.line} has loss {loss}: mend or leave out that row, or load the model in float32"
    return "the gradient of a batch of training rows is not finite: load the model in float32"
