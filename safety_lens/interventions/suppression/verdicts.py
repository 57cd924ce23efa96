"""Scorers that belong to the shipped artifact pairs: did the organism hedge, and is what it said whole?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from safety_lens.interventions.scorers.completion import Completion, Scorer
from safety_lens.organism.answers import answer_kind


@dataclass(frozen=True)
class Verdict:
    """1 where a class of the organism's answers is one that counts, else 0."""

    name: str
    counts: Callable[[str], bool]

    def __call__(self, completions: Sequence[Completion]) -> Float[np.ndarray, " n"]:
        return np.array([float(self.counts(answer_kind(c.text))) for c in completions])


def _hedges(kind: str) -> bool:
    return kind.startswith("hedge/")


ORGANISM_SCORERS: tuple[Scorer, ...] = (
    Verdict("no_plain_answer", lambda kind: _hedges(kind) or kind == "other"),
    Verdict("hedge", _hedges),
    Verdict("well_formed", lambda kind: kind != "other"),
)
"""The first is what suppression should lower: answers that hedge, or are no sentence of the corpus at all."""
