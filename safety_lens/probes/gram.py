"""Gram matrices of per-example gradients, accumulated matrix by matrix: nothing of the model's size is ever made."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.forced import Continuation
from safety_lens.probes.fisher import Gram, sampled_nll
from safety_lens.probes.gradients import Loss, Predictions, Seen, example_gradients
from safety_lens.probes.matrices import Matrix
from safety_lens.probes.products import LowRank
from safety_lens.probes.stored import Stored, store_gradients

BUDGET = 2**31
"""Bytes that stored inputs and output gradients may take; more matrices than fit are done in several passes."""
CHUNK = 2**26
"""Numbers in one block of spelled-out gradients."""


def gram(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    matrices: Sequence[Matrix],
    *,
    loss: Loss | None = None,
    factors: Mapping[str, LowRank] | None = None,
    batch_size: int | str = "auto",
    budget: int = BUDGET,
    share: bool = False,
) -> Gram:
    """⟨g_i, g_j⟩ of all pairs of examples, summed over matrices.

    loss: default `sampled_nll()`. factors: gradients of LoRA's factors instead of the effective weights (see
    `store_gradients`). budget: bytes of stored tensors; examples run once for each group of blocks that fits. share:
    split the examples over the processes of torch.distributed; every one returns the whole matrix, equal to one
    process's.

    Raises:
        DataError: no example, fewer examples than processes, or one that is too long.
        ModelError: a loss or gradient that is not finite.
    """
    loss = loss or sampled_nll()
    rank, world = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
    if len(examples) < world:
        raise DataError(f"{len(examples)} examples for {world} processes: give every process one")
    mine = [examples[i] for i in range(rank, len(examples), world)]
    chosen = [m for m in matrices if factors is None or m.name in factors]
    if not chosen:
        raise DataError("no matrix to take gradients of" + (": none of them has factors" if factors else ""))
    values, losses, dimension = np.zeros((len(examples), len(examples))), np.empty(len(mine)), 0
    for group in _groups(chosen, -(-sum(map(_tokens, examples)) // world), budget):
        kept = store_gradients(
            model, mine, group, loss=_numbered(loss, rank, world), factors=factors, batch_size=batch_size
        )
        losses = kept.losses
        for name in list(kept.by_matrix):
            part = _everyone(kept.by_matrix.pop(name), len(examples)) if share else kept.by_matrix.pop(name)
            values += pair_products(part)
            dimension += part.numel
    return Gram(values, dimension, _interleaved(losses, len(examples)) if share else losses)


def _tokens(example: Continuation) -> int:
    return len(example.prompt) + len(example.tokens)


def _groups(matrices: Sequence[Matrix], tokens: int, budget: int) -> Iterator[list[Matrix]]:
    """Consecutive matrices whose stored tensors fit into the budget, in float32; at least one."""
    group: list[Matrix] = []
    for matrix in matrices:
        if group and tokens * 4 * sum(m.d_in + m.d_out for m in [*group, matrix]) > budget:
            yield group
            group = []
        group.append(matrix)
    yield group


def _numbered(loss: Loss, rank: int, world: int) -> Loss:
    """The loss as one process would see it: examples numbered in the whole list, so that draws are the same."""

    def renumbered(predictions: Predictions) -> Float[Tensor, " batch"]:
        return loss(replace(predictions, examples=predictions.examples * world + rank))

    return renumbered if world > 1 else loss


def pair_products(part: Stored) -> Float[np.ndarray, "n n"]:
    """⟨g_i, g_j⟩ at one matrix, by tokens or by spelling gradients out in blocks of rows, whichever is cheaper."""
    n, tokens, d_out, d_in = len(part.lengths), len(part.x), part.delta.shape[1], part.x.shape[1]
    by_tokens = tokens**2 * (d_out + d_in) // 2
    return (_by_tokens if by_tokens < d_out * d_in * (tokens + n**2) else _by_blocks)(part)


def _by_tokens(part: Stored) -> Float[np.ndarray, "n n"]:
    """Σ_tt' (δ_t·δ_t')(x_t·x_t') over the tokens of i and j; each pair of examples once."""
    n = len(part.lengths)
    total = torch.zeros(n, n, dtype=torch.float64, device=part.x.device)
    start = 0
    for i, (x, delta) in enumerate(part.examples()):
        rest = Stored(part.x[start:], part.delta[start:], part.lengths[i:])
        pairs = (rest.delta @ delta.T).mul_(rest.x @ x.T)
        total[i, i:] = rest.summed(pairs.sum(1, dtype=torch.float64))
        start += len(x)
    return (total + total.triu(1).T).cpu().numpy()


def _by_blocks(part: Stored) -> Float[np.ndarray, "n n"]:
    n, d_out, d_in = len(part.lengths), part.delta.shape[1], part.x.shape[1]
    total = torch.zeros(n, n, dtype=torch.float64, device=part.x.device)
    step = max(1, CHUNK // (n * d_in))
    for start in range(0, d_out, step):
        stop = min(start + step, d_out)
        block = part.x.new_empty(n, stop - start, d_in)
        for i, (x, delta) in enumerate(part.examples()):
            torch.matmul(delta[:, start:stop].T, x, out=block[i])
        flat = block.flatten(1)
        total += (flat @ flat.T).double()
    return total.cpu().numpy()


# --- several processes ------------------------------------------------------------------------------------------------


def _everyone(mine: Stored, n: int) -> Stored:
    """What all processes stored for a matrix, in the order of the whole list of examples."""
    world = dist.get_world_size()
    lengths = [0] * n
    counts: list[list[int] | None] = [None] * world
    dist.all_gather_object(counts, list(mine.lengths))
    for rank, found in enumerate(counts):
        lengths[rank::world] = found or []
    tokens = [sum(found or []) for found in counts]
    parts = []
    for tensor in (mine.x, mine.delta):
        whole = _gathered(tensor, tokens)
        split = [w.split(found or []) for w, found in zip(whole, counts, strict=True)]
        parts.append(torch.cat([split[i % world][i // world] for i in range(n)]))
    return Stored(parts[0], parts[1], tuple(lengths))


def _gathered(tensor: Float[Tensor, "token d"], tokens: Sequence[int]) -> list[Float[Tensor, "_ d"]]:
    """The tensors of all processes, which may differ in their number of tokens."""
    padded = tensor.new_zeros(max(tokens), tensor.shape[1])
    padded[: len(tensor)] = tensor
    found = [torch.empty_like(padded) for _ in tokens]
    dist.all_gather(found, padded)
    return [part[:count] for part, count in zip(found, tokens, strict=True)]


def _interleaved(mine: Float[np.ndarray, " part"], n: int) -> Float[np.ndarray, " n"]:
    world = dist.get_world_size()
    found: list[list[float]] = [[] for _ in range(world)]
    dist.all_gather_object(found, mine.tolist())
    return np.array([found[i % world][i // world] for i in range(n)])


# --- the diagonal ----------------------------------------------------------------------------------------------------


def fisher_diagonal(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    matrices: Sequence[Matrix],
    *,
    loss: Loss | None = None,
    batch_size: int | str = "auto",
) -> dict[str, Float[Tensor, "d_out d_in"]]:
    """mean_n g_n² of every entry by matrix name, float32 or wider: as large as the matrices themselves."""
    total: dict[str, Tensor] = {}

    def see(seen: Seen) -> None:
        here = total.setdefault(seen.matrix.name, seen.x.new_zeros(seen.matrix.shape))
        for x, delta in zip(seen.x, seen.delta, strict=True):
            here.add_((delta.T @ x).square_())

    example_gradients(model, examples, matrices, see, loss=loss or sampled_nll(), batch_size=batch_size)
    return {m.name: total[m.name] / len(examples) for m in matrices}


def largest_entries(diagonal: Mapping[str, Float[Tensor, "d_out d_in"]], k: int) -> dict[str, Int[Tensor, " chosen"]]:
    """Flat indices of the k largest entries of all matrices together: the axes of a diagonal subspace.

    Ties are broken by the order of the matrices and then by index.

    Raises:
        DataError: k is not between 1 and the number of entries.
    """
    flat = torch.cat([values.flatten() for values in diagonal.values()])
    if not 0 < k <= len(flat):
        raise DataError(f"{k} entries were asked of {len(flat)}")
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    parts = chosen.split([values.numel() for values in diagonal.values()])
    return {name: part.nonzero()[:, 0] for name, part in zip(diagonal, parts, strict=True)}
