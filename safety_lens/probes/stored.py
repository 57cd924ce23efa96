"""Per-example gradients kept as the two tensors they are made of: tokens × (d_in + d_out) numbers instead of weights.

A Gram matrix needs the gradients of all examples of a matrix side by side, and a penalty needs them again at every
step; neither fits when every gradient is as large as the model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.forced import Continuation
from safety_lens.probes.gradients import Loss, Seen, example_gradients, response_nll
from safety_lens.probes.matrices import Matrix
from safety_lens.probes.products import LowRank, Update, along

LEFT, RIGHT = ".left", ".right"
"""What the names of a matrix' LoRA factors end with: ∂L/∂B is kept under "…W_Q.left", ∂L/∂A under "…W_Q.right"."""


@dataclass(frozen=True, eq=False)
class Stored:
    """The gradients of all examples for one matrix: tokens of all examples one after the other.

    lengths: tokens of each example; tokens at which the output gradient is 0 are left out, and where tokens outnumber
    the narrower side, that side's axes stand in for them. Gradient n is the sum of δ_t x_tᵀ over its tokens.
    """

    x: Float[Tensor, "token d_in"]
    delta: Float[Tensor, "token d_out"]
    lengths: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Entries of one gradient."""
        return self.x.shape[1] * self.delta.shape[1]

    def examples(self) -> Iterator[tuple[Float[Tensor, "pos d_in"], Float[Tensor, "pos d_out"]]]:
        """(x, δ) of every example in turn."""
        yield from zip(self.x.split(self.lengths), self.delta.split(self.lengths), strict=True)

    def summed(self, values: Float[Tensor, " token"]) -> Float[Tensor, " n"]:
        """Sums over the tokens of every example, in float64."""
        rows = torch.repeat_interleave(torch.tensor(self.lengths, device=values.device))
        return values.new_zeros(len(self.lengths), dtype=torch.float64).index_add(0, rows, values.double())


@dataclass(frozen=True, eq=False)
class StoredGradients:
    """Gradients of n examples by matrix name, and their losses."""

    by_matrix: dict[str, Stored]
    losses: Float[np.ndarray, " n"]

    def products(self, update: Update) -> Float[Tensor, " n"]:
        """⟨g_n, U⟩ over the matrices that both know, float64; differentiable in the tensors of the update."""
        parts = [s.summed(along(s.x, s.delta, update[name])) for name, s in self.by_matrix.items() if name in update]
        return torch.stack(parts).sum(0)

    @property
    def numel(self) -> int:
        """Entries of one example's gradient."""
        return sum(stored.numel for stored in self.by_matrix.values())


def store_gradients(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    matrices: Sequence[Matrix],
    *,
    loss: Loss = response_nll,
    factors: Mapping[str, LowRank] | None = None,
    batch_size: int | str = "auto",
) -> StoredGradients:
    """Keep inputs and output gradients of every example at every matrix, float32 or wider, on the model's device.

    factors: LoRA factors by matrix name. Then the gradients kept are those of the factors, ∂L/∂B = s·g·Aᵀ and
    ∂L/∂A = s·Bᵀ·g, under the names "….left" and "….right"; matrices without factors are left out. At B = 0 the second
    is exactly 0: gradients in this space do not see A before training has begun.

    Raises:
        DataError, ModelError: as `example_gradients`.
    """
    chosen = [m for m in matrices if factors is None or m.name in factors]
    kept: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}

    def see(seen: Seen) -> None:
        for name, x, delta in _parts(seen, factors):
            x, delta, real = _fewest(x, delta, seen.delta.ne(0).any(-1))
            here = kept.setdefault(name, {})
            here |= {n: (x[b, real[b]], delta[b, real[b]]) for b, n in enumerate(seen.examples.tolist())}

    losses = example_gradients(model, examples, chosen, see, loss=loss, batch_size=batch_size)
    order = [name for m in chosen for name in (m.name, m.name + LEFT, m.name + RIGHT) if name in kept]
    return StoredGradients({name: _joined(kept.pop(name), len(examples)) for name in order}, losses)


def _parts(seen: Seen, factors: Mapping[str, LowRank] | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    name = seen.matrix.name
    if factors is None:
        yield name, seen.x, seen.delta
        return
    adapter = factors[name]
    yield name + LEFT, adapter.scale * (seen.x @ adapter.right.to(seen.x).T), seen.delta
    yield name + RIGHT, seen.x, adapter.scale * (seen.delta @ adapter.left.to(seen.delta))


def _fewest(
    x: Float[Tensor, "batch pos d_in"], delta: Float[Tensor, "batch pos d_out"], real: Bool[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch row d_in"], Float[Tensor, "batch row d_out"], Bool[Tensor, "batch row"]]:
    """The same gradients from no more rows than the narrower side has: Σ_t δ_t x_tᵀ = Σ_k (Σ_t x_tk δ_t) e_kᵀ."""
    narrow = min(x.shape[2], delta.shape[2])
    if x.shape[1] <= narrow:
        return x, delta, real
    unit = torch.eye(narrow, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    every = real.new_ones(len(x), narrow)
    if x.shape[2] == narrow:
        return unit, x.mT @ delta, every
    return delta.mT @ x, unit, every


def _joined(kept: dict[int, tuple[Tensor, Tensor]], n: int) -> Stored:
    pairs = [kept[i] for i in range(n)]
    lengths = tuple(len(x) for x, _ in pairs)
    return Stored(torch.cat([x for x, _ in pairs]), torch.cat([d for _, d in pairs]), lengths)
