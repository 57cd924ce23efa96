"""Whether anybody can see what passes a hook point."""

import torch
from torch import nn


def unwatched(*points: nn.Module) -> bool:
    """Whether nobody can tell what passes these hook points: no hooks on them and no gradients wanted.

    Where that is so, steps between them may be fused or run in place: on a CPU, touching fresh memory for every
    [batch, pos, d_mlp] result costs more than the arithmetic.
    """
    hooked = any(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks for point in points)
    return not hooked and not torch.is_grad_enabled()
