"""Scores made by several processes: each takes every k-th example, and the sums are added up.

Examples are dealt out by number, without the repeats with which a DistributedSampler fills up, so the result is that of
one process.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError, ModelError, SafetyLensError
from safety_lens.forced import Continuation
from safety_lens.probes.attribution.scores import Score, Scores
from safety_lens.probes.examples import examples_sha256


def scored_across_processes(
    score: Score, model: HookedTransformer, examples: Sequence[Continuation], **settings: Any
) -> Scores:
    """`score(model, examples, **settings)` with the examples dealt out to all processes of the default group.

    Every process gets the scores of all examples. Outside torch.distributed this is the call itself.

    Raises:
        DataError: fewer examples than processes.
        ModelError: another process failed; its message is passed on. Errors of this process as `score` raises them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return score(model, examples, **settings)
    rank, world = dist.get_rank(), dist.get_world_size()
    if len(examples) < world:
        raise DataError(f"{len(examples)} examples cannot be shared out to {world} processes: use fewer processes")
    part: Scores | None = None
    error: SafetyLensError | None = None
    try:
        part = score(model, examples[rank::world], **settings)
    except SafetyLensError as caught:
        error = caught
    _raise_together(error, rank, world)
    assert part is not None
    found = reduced(part)
    return replace(found, source={**found.source, "examples_sha256": examples_sha256(examples), "processes": world})


def _raise_together(error: SafetyLensError | None, rank: int, world: int) -> None:
    """A process that failed alone would leave the others waiting for its sums for ever."""
    messages: list[str | None] = [None] * world
    dist.all_gather_object(messages, None if error is None else str(error))
    if error is not None:
        raise error
    failed = [(who, message) for who, message in enumerate(messages) if message is not None]
    if failed:
        raise ModelError(f"process {failed[0][0]} of {world}, scoring every {world}th example, failed: {failed[0][1]}")


def reduced(part: Scores) -> Scores:
    """Scores of all processes' examples from each process's own, equal on all of them. Sums are float64.

    Raises:
        DataError: scores that do not merge.
    """
    if part.power not in (1, 2):
        raise DataError("sums of roots do not merge: merge the weight scores, then aggregate them")
    counts = torch.tensor([part.weight, float(part.n)], dtype=torch.float64, device=_place())
    dist.all_reduce(counts)
    total = float(counts[0])
    values = {name: _reduced(scores, part.weight / total, part.power) for name, scores in part.values.items()}
    return replace(part, values=values, weight=total, n=int(counts[1]))


def _place() -> torch.device:
    """Where sums are exchanged: NCCL takes tensors of its own GPU alone."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _reduced(scores: Tensor, share: float, power: int) -> Tensor:
    total = scores.to(_place(), torch.float64).pow(power) * share
    dist.all_reduce(total)
    return total.pow(1 / power).to(scores)
