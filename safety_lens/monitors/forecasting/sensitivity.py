"""Where the safe answers are sensitive, and how much of the planned update goes there, beside what chance gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.forced import Continuation
from safety_lens.loading.effective import effective_weight
from safety_lens.loading.homes import homes
from safety_lens.loading.live import base_model
from safety_lens.monitors.forecasting.path import Path
from safety_lens.monitors.forecasting.planned import Throwaway
from safety_lens.probes.fisher import Overlap, Spectrum, energy, sampled_nll
from safety_lens.probes.gram import gram
from safety_lens.probes.matrices import matrices_of
from safety_lens.probes.products import inner_products

SHARE = 0.9
"""Of the Fisher trace, held by the directions that overlap is measured with."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Fisher information of the safe answers at the matrices that the run trains, and the update along it.

    trace: mean ‖g_n‖² of each matrix; update: ‖u‖² there; energy: ½·mean⟨g_n, u⟩² of the update's part in it, nats
    per t². overlap: of the whole update with the leading directions.
    """

    matrices: tuple[str, ...]
    trace: Float[np.ndarray, " matrix"]
    update: Float[np.ndarray, " matrix"]
    energy: Float[np.ndarray, " matrix"]
    spectrum: Spectrum
    overlap: Overlap
    mean_share: float


def first_update(spare: Throwaway, path: Path, h: float) -> dict[str, Float[Tensor, "d_out d_in"]]:
    """The direction in which the effective weights begin to move, dW/dt, by matrix of the hooked model.

    Taken between ±h of the path, so that adapters of any kind, and both of LoRA's factors, are in it.

    Raises:
        DataError: nothing that is trained is a matrix of the blocks (embeddings or norms only).
    """
    base = base_model(spare.live)
    found = {}
    for name, home in homes(spare.live).items():
        layer = base.get_submodule(home.module)
        if not any(p.requires_grad for p in layer.parameters()):
            continue
        with path.at(h):
            ahead = effective_weight(layer)[home.rows]
        with path.at(-h):
            behind = effective_weight(layer)[home.rows]
        found[name] = (ahead - behind) / (2 * h)
    if not found:
        raise DataError("the plan trains no linear map of a block: there is nothing to compare with safe answers")
    return found


def sensitivity(
    model: HookedTransformer,
    rows: Sequence[Continuation],
    update: dict[str, Float[Tensor, "d_out d_in"]],
    *,
    rank: int | None = None,
    seed: int = 0,
) -> Sensitivity:
    """Fisher information of the safe answers (tokens drawn from the model), and the update's overlap with it.

    rank: leading directions; default those that hold `SHARE` of the trace.

    Raises:
        DataError: a rank that the safety set cannot fill.
    """
    chosen = [matrix for matrix in matrices_of(model) if matrix.name in update]
    loss = sampled_nll(seed)
    products = inner_products(model, rows, [update], loss=loss, norms=True)
    kernel = gram(model, rows, chosen, loss=loss)
    spectrum = kernel.spectrum(rank) if rank is not None else kernel.spectrum().explaining(SHARE)
    order = [products.matrices.index(m.name) for m in chosen]
    squares = np.array([float(update[m.name].double().square().sum()) for m in chosen])
    return Sensitivity(
        tuple(m.name for m in chosen),
        products.squared_norms[order].mean(1),
        squares,
        energy(products.values[0, order]),
        spectrum,
        spectrum.overlap(products.total[0], float(squares.sum())),
        kernel.mean_share,
    )
