"""Refusal by its wording, as a scorer; `safety_lens.wording` has the phrases and the known errors."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from safety_lens.interventions.scorers.completion import Completion
from safety_lens.wording import DEFAULT, refusal_reader
from safety_lens.wording import opening as opening
from safety_lens.wording import phrase_pattern as phrase_pattern


class SubstringRefusal:
    """1 where the opening of an answer declines in one of the phrases, 0 where it does not, NaN for an empty answer."""

    name = "refusal"

    def __init__(self, phrases: Sequence[str] = DEFAULT) -> None:
        """Raises DataError for no phrases, or an empty one (it would match every text)."""
        self._read = refusal_reader(phrases)

    def __call__(self, completions: Sequence[Completion]) -> Float[np.ndarray, " n"]:
        return np.array([self._read(c.text) for c in completions], dtype=float)
