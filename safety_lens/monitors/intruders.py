"""Intruder dimensions: leading singular vectors of a trained matrix that no singular vector of the base resembles.

Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1: among the k leading left singular vectors of W + ΔW, those
whose largest |cosine| with any left singular vector of W is below a threshold.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy import linalg
from torch import Tensor

EXACT_UP_TO = 1024
"""Matrices whose smaller side is at most this are decomposed completely."""
_KEPT, _PASSES = 64, 4


class Intruders(NamedTuple):
    """How many there are. low, high: bounds; they differ where a large matrix was decomposed only in part."""

    value: float
    low: float
    high: float


def count_intruders(
    before: Float[Tensor, "d_out d_in"],
    changes: Sequence[Float[Tensor, "d_out d_in"]],
    *,
    k: int = 10,
    threshold: float = 0.5,
    seed: int = 0,
) -> list[Intruders]:
    """For each change, intruders among the k leading left singular vectors of before + change.

    Up to EXACT_UP_TO all singular vectors of `before` are compared. Beyond, the leading ones by randomised subspace
    iteration (Halko et al. 2011): with largest cosine c to these, and the part of the vector outside their span of
    length s, the largest cosine with all of them lies in [c, max(c, s)], which gives the bounds.
    """
    k = min(k, *before.shape)
    if min(before.shape) <= EXACT_UP_TO:
        base = _left(before, min(before.shape))
        return [_counted(_left(before + change, k).T @ base, None, threshold) for change in changes]
    generator = torch.Generator().manual_seed(seed)
    base = _leading(before, 2 * _KEPT, generator)
    counted = []
    for change in changes:
        inside = _leading(before + change, _KEPT, generator)[:, :k].T @ base
        outside = (1 - inside.square().sum(1)).clamp(min=0).sqrt()
        counted.append(_counted(inside, outside, threshold))
    return counted


def _counted(cosines: Float[Tensor, "k n"], outside: Float[Tensor, " k"] | None, threshold: float) -> Intruders:
    largest = cosines.abs().max(1).values
    possible = int((largest < threshold).sum())
    certain = possible if outside is None else int((torch.maximum(largest, outside) < threshold).sum())
    return Intruders(float(certain) if certain == possible else float("nan"), float(certain), float(possible))


def random_like(change: Float[Tensor, "d_out d_in"], rank: int, seed: int) -> Float[Tensor, "d_out d_in"]:
    """A random change of rank `rank` with the same Frobenius norm: how many intruders any change makes."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(change.shape[0], rank, generator=generator, dtype=torch.float64)
    down = torch.randn(rank, change.shape[1], generator=generator, dtype=torch.float64)
    random: Tensor = (up @ down).to(change)
    random *= change.norm() / random.norm()
    return random


def _left(weight: Float[Tensor, "d_out d_in"], n: int) -> Float[Tensor, "d_out n"]:
    """The n leading left singular vectors, from the smaller of the two Gram matrices.

    In float32 above 256: several times faster, and a threshold on cosines needs no more. Vectors of singular values
    that are zero to that precision are zero here.
    """
    wide = weight.double() if min(weight.shape) <= 256 else weight.float()
    tall = wide.shape[0] > wide.shape[1]
    gram = (wide.T @ wide if tall else wide @ wide.T).cpu().numpy()
    size = len(gram)
    # the driver for a few vectors is the fast one for a few, and slower than the other for all of them
    some = {} if n == size else {"subset_by_index": (size - n, size - 1)}
    found, raw = linalg.eigh(gram, driver="evd" if n == size else "evr", **some)
    vectors = torch.from_numpy(raw[:, ::-1].copy()).to(wide)
    if not tall:
        return vectors
    values = torch.from_numpy(found[::-1].copy()).to(wide).clamp(min=0).sqrt()
    seen = values > values[0] * wide.shape[1] ** 0.5 * torch.finfo(wide.dtype).eps ** 0.5
    left: Tensor = wide @ vectors / values.clamp(min=torch.finfo(wide.dtype).tiny) * seen
    return left


def _leading(weight: Float[Tensor, "d_out d_in"], n: int, generator: torch.Generator) -> Float[Tensor, "d_out n"]:
    wide = weight.float()
    n = min(n, *wide.shape)
    guess = wide @ torch.randn(wide.shape[1], n, generator=generator).to(wide)
    for _ in range(_PASSES):
        basis = torch.linalg.qr(guess).Q
        guess = wide @ (wide.T @ basis)
    basis = torch.linalg.qr(guess).Q
    leading: Tensor = basis @ torch.linalg.svd(basis.T @ wide, full_matrices=False).U
    return leading
