"""Inner products ⟨g_n, U⟩ of every example's gradient with an update of the weights, without spelling out either.

For a linear map g_n = Σ_t δ_t x_tᵀ, so ⟨g_n, U⟩ = Σ_t δ_t · U x_t. For U = s·B·A that is s·Σ_t (Bᵀδ_t) · (A x_t): as
many numbers as the rank. All this happens in the space of the effective weights, in which LoRA's factors are a way to
write an update and not coordinates (B·R and R⁻¹·A are the same update, and at B = 0 nothing is invisible).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import ModelError
from safety_lens.forced import Continuation
from safety_lens.probes.gradients import Loss, Seen, example_gradients, response_nll
from safety_lens.probes.matrices import Matrix, matrices_of


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix scale · left @ right, as LoRA keeps it: left is B, right is A."""

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix spelled out."""
        return self.scale * (self.left @ self.right)


Change = Float[Tensor, "d_out d_in"] | LowRank
Update = Mapping[str, Change]
"""A change of the weights: matrix name → what is added to it. Matrices that it does not name stay as they are."""


def along(
    x: Float[Tensor, "*token d_in"], delta: Float[Tensor, "*token d_out"], change: Change
) -> Float[Tensor, "*token"]:
    """δ_t · U x_t of every token; summed over the tokens of an example it is ⟨g, U⟩. Differentiable in `change`."""
    if isinstance(change, LowRank):
        return change.scale * ((delta @ change.left.to(delta)) * (x @ change.right.to(x).T)).sum(-1)
    return ((delta @ change.to(delta)) * x).sum(-1)


def norm_squared(update: Update) -> float:
    """‖U‖² over all matrices of an update, from the factors where it has them."""
    total = 0.0
    for change in update.values():
        if isinstance(change, LowRank):
            left, right = change.left.double(), change.right.double()
            total += change.scale**2 * float(((left.T @ left) * (right @ right.T)).sum())
        else:
            total += float(change.double().square().sum())
    return total


@dataclass(frozen=True, eq=False)
class Products:
    """⟨g_n, U⟩ by update, matrix and example, float64.

    matrices: names, in the order of the axis. losses: of every example. squared_norms: ‖g_n‖² by matrix; NaN where it
    was not asked for.
    """

    matrices: tuple[str, ...]
    values: Float[np.ndarray, "update matrix n"]
    losses: Float[np.ndarray, " n"]
    squared_norms: Float[np.ndarray, "matrix n"]

    @property
    def total(self) -> Float[np.ndarray, "update n"]:
        """⟨g_n, U⟩ over all matrices."""
        found: Float[np.ndarray, "update n"] = self.values.sum(1)
        return found


def inner_products(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    updates: Sequence[Update],
    *,
    loss: Loss = response_nll,
    matrices: Sequence[Matrix] | None = None,
    norms: bool = False,
    batch_size: int | str = "auto",
) -> Products:
    """⟨g_n, U⟩ of every example and update: n forwards and backwards whatever the number of updates.

    matrices: where gradients are taken; default those that the updates name. norms: also ‖g_n‖² at each of them.

    Raises:
        ModelError: an update of another shape or of a matrix that the model does not have, or no matrix at all; a loss
            or gradient that is not finite.
        DataError: an example without prompt or response, or too long.
    """
    chosen = touched(model, updates) if matrices is None else list(matrices)
    if not chosen:
        raise ModelError("no matrix to take gradients of: the updates name none")
    place = {matrix.name: i for i, matrix in enumerate(chosen)}
    values = np.zeros((len(updates), len(chosen), len(examples)))
    squares = np.full((len(chosen), len(examples)), np.nan)

    def see(seen: Seen) -> None:
        at, rows = place[seen.matrix.name], seen.examples.cpu().numpy()
        for number, update in enumerate(updates):
            if (change := update.get(seen.matrix.name)) is not None:
                values[number, at, rows] = along(seen.x, seen.delta, change).double().sum(1).cpu().numpy()
        if norms:
            squares[at, rows] = squared_norms(seen).cpu().numpy()

    losses = example_gradients(model, examples, chosen, see, loss=loss, batch_size=batch_size)
    return Products(tuple(place), values, losses, squares)


def touched(model: HookedTransformer, updates: Sequence[Update]) -> list[Matrix]:
    """The matrices that the updates name, in the order of the forward pass.

    Raises:
        ModelError: a name that the model does not have, or a change of another shape.
    """
    known = {matrix.name: matrix for matrix in matrices_of(model)}
    for update in updates:
        for name, change in update.items():
            if name not in known:
                raise ModelError(f"an update names the matrix {name!r}, which this model does not have")
            if tuple(change.shape) != known[name].shape:
                raise ModelError(f"an update of {name} has shape {tuple(change.shape)}, not {known[name].shape}")
    names = {name for update in updates for name in update}
    return [matrix for matrix in known.values() if matrix.name in names]


def squared_norms(seen: Seen) -> Float[Tensor, " batch"]:
    """‖g_n‖² of every row of a batch at one matrix, float64, by whichever way is cheaper."""
    d_out, d_in, pos = seen.delta.shape[2], seen.x.shape[2], seen.x.shape[1]
    if pos * (d_out + d_in) < d_out * d_in:  # Σ_tt' (δ_t·δ_t')(x_t·x_t')
        pairs = (seen.delta @ seen.delta.mT) * (seen.x @ seen.x.mT)
        return pairs.double().sum((1, 2)).clamp(min=0.0)
    return torch.stack([(d.T @ x).double().square().sum() for d, x in zip(seen.delta, seen.x, strict=True)])
