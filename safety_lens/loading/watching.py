"""Whether anybody can see what passes a hook point."""

import torch
from torch import nn


def unwatched(*points: nn.Module) -> bool:
    """Whether nobody can tell what passes these hook points: no hooks on them and no gradients wanted.

    Where that is so, steps between them may be fused or run in place: on a CPU, touching fresh memory for every
    [batch, pos, d_mlp] result costs more than the arithmetic.
    """
    return not hooked(*points) and not torch.is_grad_enabled()


def hooked(*points: nn.Module) -> bool:
    """Whether somebody has a hook on one of these points."""
    return any(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks for point in points)
