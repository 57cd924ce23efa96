"""Importance of directions in a matrix' output space instead of entries: ActSVD of Wei et al. 2024 (§3.2, appendix).

The best rank-r approximation of W on inputs X, in the Frobenius norm of W X, is U_r U_rᵀ W with U the left singular
vectors of W X. They are the eigenvectors of W C Wᵀ with C = Σ x xᵀ, so no activations are kept, and C of disjoint
examples add up.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.forced import Continuation
from safety_lens.probes.attribution.inputs import Read, positions_named, read_inputs
from safety_lens.probes.attribution.scores import scored_matrices
from safety_lens.probes.matrices import Matrix
from safety_lens.types import FwdHook


def input_moments(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    *,
    matrices: Sequence[Matrix] | None = None,
    layers: Sequence[int] | None = None,
    positions: str = "response",
    hooks: Sequence[FwdHook] = (),
    batch_size: int | str = "auto",
) -> dict[str, Float[Tensor, "d_in d_in"]]:
    """Σ x xᵀ over the chosen tokens for the inputs of every matrix, float64; not centred. Merged by adding.

    Raises:
        DataError: no example, one that is empty or too long, or no such token rule.
        ModelError: an activation that is not finite.
    """
    chosen = scored_matrices(model, matrices, layers)
    moments: dict[str, Tensor] = {}

    def see(found: Read) -> None:
        rows = found.x[found.read].double()
        name = found.matrix.name
        moments[name] = moments[name].addmm_(rows.T, rows) if name in moments else rows.T @ rows

    read_inputs(model, examples, chosen, see, positions=positions_named(positions), hooks=hooks, batch_size=batch_size)
    return moments


def output_directions(
    weight: Float[Tensor, "d_out d_in"], moment: Float[Tensor, "d_in d_in"]
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, " rank"]]:
    """U, the directions of W X by how much of it they carry, and σ² of each, float64, largest first.

    rank is min(d_out, d_in): what a matrix of this shape can have.
    """
    wide = weight.double()
    values, vectors = torch.linalg.eigh(wide @ moment.to(wide) @ wide.T)
    rank = min(weight.shape)
    return vectors.flip(1)[:, :rank], values.flip(0)[:rank].clamp(min=0)


def without_top(
    weight: Float[Tensor, "d_out d_in"], moment: Float[Tensor, "d_in d_in"], rank: int
) -> Float[Tensor, "d_out d_in"]:
    """W − U_r U_rᵀ W: the matrix without its r most important output directions on these inputs."""
    top = _top(weight, moment, rank)
    return (weight.double() - top @ (top.T @ weight.double())).to(weight)


def without_bottom(
    weight: Float[Tensor, "d_out d_in"], moment: Float[Tensor, "d_in d_in"], rank: int
) -> Float[Tensor, "d_out d_in"]:
    """U_k U_kᵀ W with k = min(d_out, d_in) − r: the matrix without its r least important directions."""
    top = _top(weight, moment, min(weight.shape) - rank)
    return (top @ (top.T @ weight.double())).to(weight)


def safety_directions(
    weight: Float[Tensor, "d_out d_in"],
    safety: Float[Tensor, "d_in d_in"],
    utility: Float[Tensor, "d_in d_in"],
    *,
    r_safety: int,
    r_utility: int,
) -> Float[Tensor, "d_out d_in"]:
    """ΔW = (I − Π_u) Π_s W: what serves safety and lies outside what serves utility. Wei et al. remove it: W − ΔW.

    Π_s and Π_u keep all but the r_safety and r_utility least important directions of each. 0 where both are equal.

    Raises:
        DataError: a rank outside 0 … min(d_out, d_in).
    """
    full = min(weight.shape)
    for_safety = _top(weight, safety, full - r_safety)
    for_utility = _top(weight, utility, full - r_utility)
    kept = for_safety @ (for_safety.T @ weight.double())
    return (kept - for_utility @ (for_utility.T @ kept)).to(weight)


def _top(weight: Tensor, moment: Tensor, rank: int) -> Float[Tensor, "d_out rank"]:
    full = min(weight.shape)
    if not 0 <= rank <= full:
        raise DataError(f"a {tuple(weight.shape)} matrix has ranks 0 to {full}; {rank} was asked for")
    return output_directions(weight, moment)[0][:, :rank]
