"""Controls of a causal choice: directions that could do something, drawn or fitted at the same hook, of equal length.

An isotropic random direction is near a no-op in a residual stream with a few large directions. These controls are not:
draws from the covariance of the activations, refits on shuffled labels, and directions of other concepts. Of drawn and
shuffled ones the part along the direction itself is removed: that part has the effect of the direction by construction,
and where the behaviour has the largest variance of all it would be most of them.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.activations import capture, encode_for
from safety_lens.data import load_concept
from safety_lens.data.built_in import built_in_for
from safety_lens.errors import DataError
from safety_lens.interventions.edits import unit_of
from safety_lens.positions import Positions
from safety_lens.probes.directions import Direction
from safety_lens.probes.evaluate import fit_direction
from safety_lens.probes.selection import Candidates

CONCEPT_PAIRS = 16
"""Training pairs of another concept from which its direction is fitted."""
ALONG = 1e-6
"""Share of a vector across the direction below which it is rounding."""


def variance_matched(candidates: Candidates, like: Direction, n: int, seed: int) -> Iterator[Direction]:
    """Draw directions from the covariance of the training activations within the two sides, rescaled.

    A draw is Σᵢ gᵢ xᵢ with gᵢ standard normal and xᵢ the activations centred within their side.
    """
    sides = candidates.acts.sides["train"][like.hook]
    centred = torch.cat([side.double() - side.double().mean(0) for side in (sides.pos, sides.neg)])
    stream = torch.Generator().manual_seed(seed)
    for _ in range(n):
        drawn = torch.randn(len(centred), generator=stream, dtype=torch.float64) @ centred
        yield from _across(drawn, like, "random")


def shuffled_labels(candidates: Candidates, like: Direction, n: int, seed: int) -> Iterator[Direction]:
    """Refit the direction on training pairs of which half, drawn anew each time, have their sides swapped."""
    sides, rng = candidates.acts.sides["train"][like.hook], np.random.default_rng(seed)
    for _ in range(n):
        vector = fit_direction(candidates.fit, sides.swapped((rng.permutation(len(sides)) < len(sides) // 2).tolist()))
        if vector is not None:
            yield from _across(vector.double(), like, "shuffled")


CONTROLS = {
    "random": (variance_matched, "directions drawn from the covariance of the activations"),
    "shuffled": (shuffled_labels, "refits on shuffled labels"),
}
"""Controls that are drawn many times: the function, and what they are for a reader."""


def other_concepts(model: HookedTransformer, like: Direction, positions: Positions) -> dict[str, Direction]:
    """Fit the directions of the other built-in concepts at a hook, rescaled to the length of a direction.

    Concepts whose prompts cannot be read at these positions are left out.
    """
    out = {}
    for name in built_in_for(model).concepts:
        if name == like.concept:
            continue
        try:
            vector = _concept_vector(model, name, like.hook, positions)
        except DataError:  # their prompts do not have such a position
            continue
        if float(vector.norm()) > 0:
            out[name] = as_long(vector, like, name)
    return out


def _concept_vector(model: HookedTransformer, name: str, hook: str, positions: Positions) -> Float[Tensor, " d"]:
    concept = load_concept(name, model=model)
    pairs = concept.train[:CONCEPT_PAIRS]
    prompts = [p.positive for p in pairs] + [p.negative for p in pairs]
    rows = capture(model, encode_for(model, prompts, raw=concept.raw), [hook], positions=positions).acts[hook]
    if len(rows) != len(prompts):
        raise DataError(f"{positions.name} gives several rows for a prompt")
    found: Tensor = rows[: len(pairs)].double().mean(0) - rows[len(pairs) :].double().mean(0)
    return found


def _across(vector: Float[Tensor, " d"], like: Direction, method: str) -> Iterator[Direction]:
    """The part of a vector across a direction, as long as it; nothing where all of the vector lies along it."""
    unit = unit_of(like.vector)
    rest = vector - (vector @ unit) * unit
    if float(rest.norm()) > ALONG * float(vector.norm()):
        yield as_long(rest, like, method)


def as_long(vector: Float[Tensor, " d"], like: Direction, method: str) -> Direction:
    """A direction at the same hook and of the same length."""
    scaled = vector.double() * (like.norm / float(vector.double().norm()))
    return Direction(like.concept, like.hook, scaled.to(like.vector), method)
