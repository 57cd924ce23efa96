"""Directions that should do nothing: random ones, and refits on shuffled labels."""

import hashlib

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safety_lens.errors import DataError
from safety_lens.interventions.edits import unit_of
from safety_lens.probes.directions import Direction
from safety_lens.probes.estimators import estimator
from safety_lens.probes.evaluate import fit_direction
from safety_lens.probes.reading import ConceptActivations


def random_direction(direction: Direction, number: int, seed: int = 0) -> Direction:
    """A random direction at the same hook: as long as the direction, orthogonal to it, the same for the same arguments.

    Raises:
        DataError: a direction without length, or of width 1.
    """
    vector = _orthogonal(direction.vector, _stream(f"{seed}/{number}/{direction.hook}")) * direction.norm
    return Direction(direction.concept, direction.hook, vector.to(direction.vector), f"random {number}")


def _orthogonal(vector: Float[Tensor, " d"], stream: torch.Generator) -> Float[Tensor, " d"]:
    if len(vector) < 2:
        raise DataError("a direction of width 1 has no orthogonal one")
    along = unit_of(vector.cpu())
    drawn = torch.randn(len(vector), generator=stream, dtype=torch.float64)
    drawn = drawn - (drawn @ along) * along
    return unit_of(drawn - (drawn @ along) * along)


def _stream(label: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def shuffled_directions(
    acts: ConceptActivations, *, method: str = "dim", n: int = 5, seed: int = 0
) -> list[dict[str, Direction]]:
    """Directions refitted on the training pairs with the sides of half the pairs, drawn at random, swapped.

    Entry k maps each hook to its refit; a hook without a gap is left out. Half the pairs exactly, as in the probes'
    null: with a random share a remainder of the concept would be left.
    """
    fit, rng = estimator(method), np.random.default_rng(seed)
    out = []
    for number in range(n):
        found = {}
        swap: list[bool] | None = None
        for hook in acts.hooks:
            sides = acts.sides["train"][hook]
            swap = (rng.permutation(len(sides)) < len(sides) // 2).tolist() if swap is None else swap
            vector = fit_direction(fit, sides.swapped(swap))
            if vector is not None:
                found[hook] = Direction(acts.concept.name, hook, vector, f"shuffled {number}")
        out.append(found)
    return out
