"""Fisher energy: a penalty on changes of the weights that the safe answers are sensitive to.

λ_a·½·mean_n⟨g_n, ΔW⟩² + λ_t·‖ΔW‖², with g_n the gradients of a cached safety set in the space of the effective
weights (MATH §4.7). With `sampled_nll` gradients the first term is, to second order, the mean KL per token between
the safe answers before and now (nats). It needs no forward pass: a step costs as much as two thin products over the
stored tokens. It is a statement about small changes: far from the reference the answers can move though it does not.
"""

import torch
from torch import nn

from safety_lens.interventions.penalties.moved import Moved, squared_norm
from safety_lens.interventions.penalties.terms import Terms, check_weights
from safety_lens.probes.stored import StoredGradients


class FisherPenalty:
    """λ_a · Fisher energy + λ_t · ‖ΔW‖², ΔW the change of the effective weights since the reference.

    Args:
        trained: the model in training, after its adapter was put on. gradients: of safe answers by this model as it is
            now: `store_gradients(load_model(trained), examples, matrices, loss=sampled_nll())`.
        energy: λ_a ≥ 0, loss per nat per token. Thousands: where the model is sure of its answers, the energy of a
            change that takes them away is tiny. anchor: λ_t ≥ 0, loss per squared unit of weight; 0 leaves it out.

    Raises:
        DataError: a negative weight. ModelError: gradients of nothing that is trained, or of another model.
    """

    def __init__(
        self, trained: nn.Module, gradients: StoredGradients, *, energy: float = 20_000.0, anchor: float = 0.0
    ) -> None:
        check_weights(energy=energy, anchor=anchor)
        self.gradients, self.energy, self.anchor = gradients, energy, anchor
        self.moved = Moved(trained, gradients.by_matrix)

    def __call__(self) -> Terms:
        update = self.moved()
        products = self.gradients.products(update)
        terms = {"fisher_energy": self.energy * 0.5 * products.square().mean()}
        if self.anchor:
            total = torch.stack([squared_norm(change).to(products) for change in update.values()]).sum()
            terms["anchor"] = self.anchor * total.clamp(min=0)  # a difference of factors can round below zero
        return Terms(terms)

    def reset_reference(self) -> None:
        """Count changes from the model as it is now. The gradients stay those of the model they were taken from."""
        self.moved.reset()
