"""Estimators: from activations of two sides to one direction.

An estimator is a plain function `(pos, neg) -> vector`; METHODS is the table by which the edge looks one up. All share
one convention: the vector points from the negatives to the positives, and its length is the gap between the two means
along it, so that adding it moves the mean of the negatives level with the mean of the positives, whatever the method.
Fitting happens in float64. A gap of zero gives the zero vector ("no direction"), never NaN; rows that are not finite
are a DataError.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from safety_lens.errors import DataError

Estimator = Callable[[Float[Tensor, "n_pos d"], Float[Tensor, "n_neg d"]], Float[Tensor, " d"]]


def _as_float64(
    pos: Float[Tensor, "n_pos d"], neg: Float[Tensor, "n_neg d"]
) -> tuple[Float[Tensor, "n_pos d"], Float[Tensor, "n_neg d"]]:
    if not len(pos) or not len(neg):
        raise DataError(f"need prompts on both sides, got {len(pos)} positive and {len(neg)} negative")
    if not bool(torch.isfinite(pos).all() & torch.isfinite(neg).all()):
        raise DataError("activations are not finite (NaN or overflow): load the model with another dtype")
    return pos.double(), neg.double()


def _with_gap_as_length(
    axis: Float[Tensor, " d"], pos: Float[Tensor, "n_pos d"], neg: Float[Tensor, "n_neg d"]
) -> Float[Tensor, " d"]:
    """The axis, pointing to the positives, as long as the gap between the class means along it."""
    unit = axis / axis.norm()
    out = ((pos.mean(0) - neg.mean(0)) @ unit) * unit
    return out if bool(torch.isfinite(out).all()) else torch.zeros_like(axis)


def diff_in_means(pos: Float[Tensor, "n_pos d"], neg: Float[Tensor, "n_neg d"]) -> Float[Tensor, " d"]:
    """Mean of the positives minus mean of the negatives, unnormalised.

    On paired data this is also the CAA vector: CAA is a pairing and a read position, not another formula (Rimsky et al.
    2024, arXiv:2312.06681; Marks & Tegmark 2023, arXiv:2310.06824).

    Raises:
        DataError: either side has no rows.
    """
    wide_pos, wide_neg = _as_float64(pos, neg)
    return (wide_pos.mean(0) - wide_neg.mean(0)).to(pos.dtype)


def whitened_direction(pos: Float[Tensor, "n_pos d"], neg: Float[Tensor, "n_neg d"]) -> Float[Tensor, " d"]:
    """Fisher's linear discriminant Σ⁻¹(μ₊ − μ₋), Σ the pooled within-class covariance shrunk as Ledoit & Wolf (2004).

    Solved in sample space (Woodbury), so the cost grows with rows, not with d².

    Raises:
        DataError: either side has no rows.
    """
    wide_pos, wide_neg = _as_float64(pos, neg)
    centred = torch.cat([wide_pos - wide_pos.mean(0), wide_neg - wide_neg.mean(0)])
    n, d = centred.shape
    gram = centred @ centred.T
    target = gram.trace() / (n * d)
    squared = (gram**2).sum() / n**2  # ‖S‖² of the sample covariance S
    distance = squared / d - target**2
    noise = ((gram.diagonal() ** 2).mean() - squared) / (n * d)
    shrink = float((noise / distance).clamp(0, 1)) if distance > 0 else 1.0
    gap = wide_pos.mean(0) - wide_neg.mean(0)
    ridge, weight = shrink * target, (1 - shrink) / n
    if ridge <= 0:  # no spread inside the classes: nothing to whiten
        return diff_in_means(pos, neg)
    if weight == 0:
        return _with_gap_as_length(gap, wide_pos, wide_neg).to(pos.dtype)
    inner = gram + ridge / weight * torch.eye(n, dtype=gram.dtype, device=gram.device)
    solved = gap - centred.T @ torch.linalg.solve(inner, centred @ gap)
    return _with_gap_as_length(solved, wide_pos, wide_neg).to(pos.dtype)


def pca_direction(pos: Float[Tensor, "n_pos d"], neg: Float[Tensor, "n_neg d"]) -> Float[Tensor, " d"]:
    """First principal axis of the paired differences, *uncentred*, sign set by the mean difference.

    Centring the differences would remove what they share, which is the concept (the default of several libraries does).
    Zou et al. 2023, arXiv:2310.01405 (representation reading), without the centring.

    Raises:
        DataError: the sides have different numbers of rows, or none.
    """
    wide_pos, wide_neg = _as_float64(pos, neg)
    if len(pos) != len(neg):
        raise DataError(f"pca needs pairs: {len(pos)} positive and {len(neg)} negative rows; use dim, or pair them up")
    differences = wide_pos - wide_neg
    _, vectors = torch.linalg.eigh(differences @ differences.T)
    return _with_gap_as_length(differences.T @ vectors[:, -1], wide_pos, wide_neg).to(pos.dtype)


def logistic_direction(pos: Float[Tensor, "n_pos d"], neg: Float[Tensor, "n_neg d"]) -> Float[Tensor, " d"]:
    """L2-regularised logistic regression on standardised features, its weights carried back to raw activations.

    Raises:
        DataError: either side has no rows.
    """
    wide_pos, wide_neg = _as_float64(pos, neg)
    rows = torch.cat([wide_pos, wide_neg])
    scale = rows.std(0, correction=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    labels = [1] * len(pos) + [0] * len(neg)
    model = LogisticRegression(C=1.0, max_iter=2000).fit(((rows - rows.mean(0)) / scale).cpu().numpy(), labels)
    weights = torch.from_numpy(model.coef_[0]).to(scale) / scale
    return _with_gap_as_length(weights, wide_pos, wide_neg).to(pos.dtype)


def _geometric_median(rows: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The point of least summed distance to the rows: Weiszfeld's iteration with Vardi & Zhang's step at a row."""
    centre = rows.mean(0)
    for _ in range(500):
        distance = (rows - centre).norm(dim=1)
        away = distance > 1e-12 * (1 + centre.norm())
        if not away.any():
            return centre
        weights = 1 / distance[away]
        pull = (rows[away] * weights[:, None]).sum(0) / weights.sum()
        here = (~away).sum() / ((rows[away] - centre) * weights[:, None]).sum(0).norm().clamp(min=1e-300)
        step = (1 - here).clamp(0, 1) * (pull - centre)
        centre = centre + step
        if step.norm() <= 1e-10 * (1 + centre.norm()):
            break
    return centre


def robust_direction(pos: Float[Tensor, "n_pos d"], neg: Float[Tensor, "n_neg d"]) -> Float[Tensor, " d"]:
    """Difference of geometric medians: a few prompts with massive activations cannot turn it.

    The length is the gap between those medians, not between the means. Vardi & Zhang 2000, PNAS 97:1423.

    Raises:
        DataError: either side has no rows.
    """
    wide_pos, wide_neg = _as_float64(pos, neg)
    return (_geometric_median(wide_pos) - _geometric_median(wide_neg)).to(pos.dtype)


METHODS: dict[str, Estimator] = {
    "dim": diff_in_means,
    "whitened": whitened_direction,
    "pca": pca_direction,
    "logistic": logistic_direction,
    "robust": robust_direction,
}


def estimator(method: str) -> Estimator:
    """The estimator of this name.

    Raises:
        DataError: there is none.
    """
    if method not in METHODS:
        raise DataError(f"method {method!r} is not known; choose from {', '.join(METHODS)}")
    return METHODS[method]
