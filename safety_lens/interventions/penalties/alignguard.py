"""AlignGuard's terms, as alignment-risk 1.14.1 computes them, in the space of the effective weights.

ΔW is split into Δ_A, its projection on the leading eigenvectors v_i of the safety set's Fisher information, and the
rest Δ_T (Das et al. 2025, arXiv:2508.02079):
    λ_a Σ_i λ_i⟨v_i, ΔW⟩² + λ_t Σ_j h_j Δ_T,j²
    + λ_nc [α·mean_j (1 + β σ(|Δ_j| − τ))·|Δ_A,j Δ_T,j| + (1 − α)·⟨Δ_A, Δ_T⟩²/(‖Δ_A‖²‖Δ_T‖² + ε)]
The last, "geodesic" term is identically zero, value and gradient, because Δ_A and Δ_T are orthogonal by construction:
it is computed so that this can be seen, and (1 − α) only takes weight from the term before it. h defaults to the safety
set's own Fisher diagonal, as there, so λ_t penalises what is left of the safety curvature a second time.

There, all of this lives in the space of LoRA's factors, where A has no gradient at the start and one update can be
written in many ways; here it does not depend on how the update is factored.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from safety_lens.errors import ModelError
from safety_lens.interventions.penalties.moved import Moved
from safety_lens.interventions.penalties.terms import Terms, check_weights
from safety_lens.probes.fisher import Gram, Spectrum
from safety_lens.probes.gram import pair_products
from safety_lens.probes.products import Change, LowRank
from safety_lens.probes.stored import Stored, StoredGradients

EPSILON = 1e-12
Dense = dict[str, Float[Tensor, "d_out d_in"]]


class AlignGuard:
    """The AlignGuard-style preset; call it for its terms.

    Args:
        trained, gradients: as for FisherPenalty.
        lambda_a, lambda_t, lambda_nc: ≥ 0; weights of the safety part, the rest, and their collision. alpha: in [0, 1],
            of the collision term; what is left goes to the term that is always zero.
        beta, tau: steepness and place of the collision term's weighting by |Δ_j|.
        explained: share of the Fisher trace that Δ_A's directions hold (of all of it).
        metric: h by matrix name; default the safety set's Fisher diagonal. Every trained matrix is spelled out here
            and in Δ_A and Δ_T: this preset costs several times the trained matrices' own memory.

    Raises:
        DataError: a negative weight, alpha or explained out of range. ModelError: as FisherPenalty, or a metric that
            lacks a matrix.
    """

    def __init__(
        self,
        trained: nn.Module,
        gradients: StoredGradients,
        *,
        lambda_a: float = 0.25,
        lambda_t: float = 0.5,
        lambda_nc: float = 0.1,
        alpha: float = 0.5,
        beta: float = 4.0,
        tau: float = 0.01,
        explained: float = 0.9,
        metric: Mapping[str, Float[Tensor, "d_out d_in"]] | None = None,
    ) -> None:
        check_weights(
            lambda_a=lambda_a, lambda_t=lambda_t, lambda_nc=lambda_nc, alpha=alpha, one_minus_alpha=1 - alpha, beta=beta
        )
        self.lambda_a, self.lambda_t, self.lambda_nc = lambda_a, lambda_t, lambda_nc
        self.alpha, self.beta, self.tau = alpha, beta, tau
        self.moved = Moved(trained, gradients.by_matrix)
        parts = {name: gradients.by_matrix[name] for name in self.moved.matrices}
        self.gradients = StoredGradients(parts, gradients.losses)
        self.spectrum = _spectrum(self.gradients, explained)
        self.metric = {name: mean_square(part) for name, part in parts.items()} if metric is None else dict(metric)
        if missing := [name for name in parts if name not in self.metric]:
            raise ModelError(f"the metric has no entries for {missing[0]}, which is trained")

    def reset_reference(self) -> None:
        """Count changes from the model as it is now."""
        self.moved.reset()

    def __call__(self) -> Terms:
        update = {name: _dense(change) for name, change in self.moved().items()}
        along, coefficients = self._safety_part(update)
        rest = {name: update[name] - along[name] for name in update}
        eigenvalues = torch.as_tensor(self.spectrum.eigenvalues).to(coefficients)
        task = [(self.metric[name].to(part) * part.square()).sum() for name, part in rest.items()]
        collision = self._collision(update, along, rest)
        return Terms(
            {
                "safety": self.lambda_a * (eigenvalues * coefficients.square()).sum(),
                "task": self.lambda_t * torch.stack(task).sum(),
                "collision": self.lambda_nc * self.alpha * collision,
                "geodesic": self.lambda_nc * (1 - self.alpha) * geodesic(along, rest),
            }
        )

    def _safety_part(self, update: Mapping[str, Change]) -> tuple[Dense, Float[Tensor, " rank"]]:
        """Δ_A and the coefficients ⟨v_i, ΔW⟩; v_i = Σ_n u_in g_n/√(m λ_i) is never made."""
        products = self.gradients.products(update)
        vectors = torch.as_tensor(self.spectrum.vectors).to(products)
        scale = (len(vectors) * torch.as_tensor(self.spectrum.eigenvalues).to(products)).sqrt()
        coefficients = (products @ vectors) / scale
        weights = vectors @ (coefficients / scale)
        return {name: weighted_sum(part, weights) for name, part in self.gradients.by_matrix.items()}, coefficients

    def _collision(self, update: Dense, along: Dense, rest: Dense) -> Float[Tensor, ""]:
        total = [
            ((1 + self.beta * torch.sigmoid(change.abs() - self.tau)) * (along[name] * rest[name]).abs()).sum()
            for name, change in update.items()
        ]
        return torch.stack(total).sum() / sum(change.numel() for change in update.values())


def geodesic(along: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """⟨Δ_A, Δ_T⟩²/(‖Δ_A‖²‖Δ_T‖² + ε): zero, but for rounding, whenever the two are an orthogonal split."""

    def inner(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([(one[name] * other[name]).sum() for name in one]).sum()

    return inner(along, rest).square() / (inner(along, along) * inner(rest, rest) + EPSILON)


def _spectrum(gradients: StoredGradients, explained: float) -> Spectrum:
    values = np.sum([pair_products(part) for part in gradients.by_matrix.values()], axis=0)
    return Gram(values, gradients.numel, gradients.losses).spectrum().explaining(explained)


def _dense(change: Change) -> Float[Tensor, "d_out d_in"]:
    return change.dense() if isinstance(change, LowRank) else change


def weighted_sum(part: Stored, weights: Float[Tensor, " n"]) -> Float[Tensor, "d_out d_in"]:
    """Σ_n w_n g_n at one matrix."""
    lengths = torch.tensor(part.lengths, device=part.x.device)
    by_token = torch.repeat_interleave(weights.to(part.x), lengths)
    return (part.delta * by_token[:, None]).T @ part.x


def mean_square(part: Stored) -> Float[Tensor, "d_out d_in"]:
    """mean_n g_n² of every entry: the Fisher diagonal at one matrix."""
    total = part.x.new_zeros(part.delta.shape[1], part.x.shape[1])
    for x, delta in part.examples():
        total += (delta.T @ x).square()
    return total / len(part.lengths)
