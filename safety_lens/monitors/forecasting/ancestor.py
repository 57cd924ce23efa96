"""alignment-risk's own numbers (version 1.14.1), for comparison with its users' records; not to be acted on.

Faults are kept on purpose: λ counts twice, more overlap gives a later collapse, plain gradient descent whatever the
optimiser, the variance "explained" is relative to the 32 directions kept, and LoRA's A is invisible where B = 0. Only
the Hessian product differs in its making: central differences instead of a second backward pass, which fused attention
kernels refuse.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from safety_lens.data.labelled import IGNORED, Labelled
from safety_lens.errors import DataError, ModelError
from safety_lens.forced import Continuation
from safety_lens.monitors.forecasting.path import SGD, batch_gradients, find_path

MOST_PARAMETERS = 500_000
MOST_SAMPLES = 128
RANK, VARIANCE, FLOOR = 32, 0.9, 0.1
HORIZON = 2000


@dataclass(frozen=True)
class AncestorForecast:
    """projected_ratio: ‖P g‖/‖g‖ of one batch. epsilon, gamma: with the learning rate in them. collapse_step: None
    where its curve stays below the threshold for 2000 steps. rank: directions kept.
    """

    projected_ratio: float
    lambda_min: float
    epsilon: float
    gamma: float
    rank: int
    collapse_step: int | None


def ancestor_forecast(
    safety: Float[np.ndarray, "m d"],
    g: Float[np.ndarray, " d"],
    hg: Float[np.ndarray, " d"],
    *,
    learning_rate: float,
    threshold: float = 0.1,
) -> AncestorForecast:
    """From per-example safety gradients, the gradient of one fine-tuning batch, and the Hessian times it.

    Raises:
        DataError: safety gradients that are all 0.
    """
    _, singular, basis = np.linalg.svd(safety, full_matrices=False)
    values = (singular**2 / len(safety))[:RANK]
    if not values.sum() > 0:
        raise DataError("every safety gradient is 0: alignment-risk has no subspace to look at")
    rank = int(np.searchsorted(values.cumsum() / values.sum(), VARIANCE) + 1)
    values, basis = values[:rank], basis[:rank]
    on_g, on_a = basis @ g, basis @ hg
    epsilon = learning_rate * float(np.sqrt((values * on_g**2).sum()))
    gamma = learning_rate**2 * float(np.sqrt((values * on_a**2).sum()))
    floor = float(np.quantile(values, FLOOR, method="lower"))
    t = np.arange(HORIZON + 1, dtype=float)
    loss = 0.5 * floor * np.maximum(0.5 * gamma * t**2 - epsilon * t, 0.0) ** 2
    crossed = np.flatnonzero(loss >= threshold)
    ratio = float(np.linalg.norm(on_g) / (np.linalg.norm(g) + 1e-12))
    return AncestorForecast(ratio, floor, epsilon, gamma, rank, int(crossed[0]) if len(crossed) else None)


def ancestor_of(
    live: nn.Module,
    trained: Sequence[nn.Parameter],
    safety: Sequence[Continuation],
    batch: Sequence[Labelled],
    *,
    learning_rate: float,
    threshold: float = 0.1,
) -> AncestorForecast:
    """The same, with the gradients taken here: in the trained tensors themselves, LoRA's factors included.

    Raises:
        ModelError: more trained weights than alignment-risk takes.
    """
    count = sum(p.numel() for p in trained)
    if count > MOST_PARAMETERS:
        raise ModelError(
            f"alignment-risk refuses {count:,} trained weights (its limit is {MOST_PARAMETERS:,}): leave out --ancestor"
        )
    rows = [_labelled(row, i) for i, row in enumerate(safety[:MOST_SAMPLES])]
    each = np.stack([_flat(batch_gradients(live, trained, [[row]]).mean) for row in rows])
    path = find_path(live, trained, [batch], SGD, micro=len(batch))
    return ancestor_forecast(
        each, -_flat(path.velocity), _flat(path.acceleration), learning_rate=learning_rate, threshold=threshold
    )


def _labelled(row: Continuation, number: int) -> Labelled:
    return Labelled((*row.prompt, *row.tokens), (*[IGNORED] * len(row.prompt), *row.tokens), number)


def _flat(tensors: Sequence[Tensor]) -> Float[np.ndarray, " d"]:
    found: Float[np.ndarray, " d"] = torch.cat([t.detach().double().flatten() for t in tensors]).cpu().numpy()
    return found
