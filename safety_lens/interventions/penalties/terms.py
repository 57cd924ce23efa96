"""What a penalty returns: its terms by name, to be added to a loss."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from safety_lens.errors import DataError


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of a penalty, weights included, each 0 or more and differentiable in what is trained."""

    by_name: Mapping[str, Float[Tensor, ""]]

    @property
    def total(self) -> Float[Tensor, ""]:
        """Their sum: what is added to the loss of the task."""
        return torch.stack(list(self.by_name.values())).sum()

    def values(self) -> dict[str, float]:
        """The terms as numbers, for a log."""
        return {name: float(term.detach()) for name, term in self.by_name.items()}


Penalty = Callable[[], Terms]


@runtime_checkable
class Drawing(Protocol):
    """A penalty whose calls differ, because it draws examples."""

    def seek(self, calls: int) -> None:
        """Go on as after so many calls, in a run that is resumed."""


def check_weights(**weights: float) -> None:
    """Refuse weights below zero: a penalty can hold a model at its safe answers and never drive it away from them.

    Raises:
        DataError: a weight that is negative or not finite, named.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"{name} must be 0 or more, got {weight}: a penalty only ever holds a model back")
