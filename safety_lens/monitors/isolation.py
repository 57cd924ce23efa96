"""Leaving a training run as it was found: random number streams, gradient mode, patched forward methods."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from safety_lens.loading.live import base_model


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run something without gradients and put every global random stream back, whatever happens inside."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextmanager
def plain_forward(trained: nn.Module) -> Iterator[None]:
    """Set aside a `forward` that was put on the instance: accelerate's autocast would make parity checks bfloat16."""
    patched: list[tuple[dict[str, Any], Any]] = []
    for module in {id(m): m for m in (trained, base_model(trained))}.values():
        if "forward" in vars(module) and "_original_forward" in vars(module):
            patched.append((vars(module), vars(module).pop("forward")))
    try:
        yield
    finally:
        for attributes, forward in patched:
            attributes["forward"] = forward
