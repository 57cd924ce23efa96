"""Directions that should do nothing: random ones, and refits on shuffled labels."""

import hashlib
from collections.abc import Sequence

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


def random_set(parts: Sequence[Direction], number: int, seed: int = 0) -> tuple[Direction, ...]:
    """Random directions to stand beside several that are added together: one alone is `random_direction`.

    All parts go through one random isometry of the space they span into its orthogonal complement (into the whole space
    where that is too small): they keep their lengths and their angles to each other. Drawn one by one they would partly
    cancel along the residual stream, and be no match for a set whose parts agree.

    Raises:
        DataError: a direction without length, of width 1, or parts of different widths.
    """
    if len(parts) == 1:
        return (random_direction(parts[0], number, seed),)
    if len({len(part.vector) for part in parts}) > 1:
        raise DataError("directions of different widths have no common random control: sweep them one at a time")
    for part in parts:
        unit_of(part.vector)
    vectors = torch.stack([part.vector.cpu().double() for part in parts])
    _, sizes, rows = torch.linalg.svd(vectors, full_matrices=False)
    basis = rows[sizes > sizes[0] * 1e-10]
    stream = _stream(f"{seed}/{number}/{'+'.join(part.hook for part in parts)}")
    drawn = torch.randn(basis.shape[1], len(basis), generator=stream, dtype=torch.float64)
    if 2 * len(basis) <= basis.shape[1]:
        drawn = drawn - basis.T @ (basis @ drawn)
    frame = torch.linalg.qr(drawn).Q
    moved = vectors @ basis.T @ frame.T
    return tuple(
        Direction(part.concept, part.hook, vector.to(part.vector), f"random {number}")
        for part, vector in zip(parts, moved, strict=True)
    )


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
