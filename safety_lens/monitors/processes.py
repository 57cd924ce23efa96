"""A run in several processes: the first does what only one may do, and all go on with what came of it."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from safety_lens.errors import OtherProcessError, SafetyLensError

T = TypeVar("T")


def several_processes() -> bool:
    """Whether torch.distributed runs with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, which alone does it while the others wait; it must be quick and can be
    pickled. With one process it is the call itself.

    Raises:
        SafetyLensError: as `work`, in the first process. OtherProcessError: in the others, with its message.
    """
    if not several_processes():
        return work()
    box: list[T | str | None] = [None, None]
    failed: SafetyLensError | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except SafetyLensError as error:
            failed, box[1] = error, str(error)
    dist.broadcast_object_list(box, src=0)
    if failed is not None:
        raise failed
    if box[1] is not None:
        raise OtherProcessError(f"the first process failed: {box[1]}")
    return box[0]  # type: ignore[return-value]  # a broadcast has no type


def in_any(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in any of the processes, so that all of them stop together. device: of the training."""
    if not several_processes():
        return flag
    highest = torch.tensor(float(flag), device=device)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return bool(highest)
