"""Scorers of one's own: a regular expression, or any function of a completion."""

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from safety_lens.errors import DataError
from safety_lens.interventions.scorers.completion import Completion


class PatternScorer:
    """1 where the pattern occurs in a completion's text, else 0; case is ignored unless the pattern says (?-i:…)."""

    def __init__(self, pattern: str, name: str | None = None) -> None:
        """Raises DataError for a pattern that does not compile."""
        try:
            self._pattern = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise DataError(f"the pattern {pattern!r} is not a regular expression: {error}") from error
        self.name = name if name is not None else f"regex/{pattern}"

    def __call__(self, completions: Sequence[Completion]) -> Float[np.ndarray, " n"]:
        return np.array([float(self._pattern.search(c.text) is not None) for c in completions], dtype=float)


class CallableScorer:
    """Any function from a completion to a number (True is 1, None is NaN), under a name."""

    def __init__(self, score: Callable[[Completion], float | None], name: str) -> None:
        self._score, self.name = score, name

    def __call__(self, completions: Sequence[Completion]) -> Float[np.ndarray, " n"]:
        """Raises DataError where the function returns something that is no number."""
        found = [self._score(c) for c in completions]
        for value in found:
            if value is not None and not isinstance(value, (bool, int, float, np.number, np.bool_)):
                raise DataError(f"the scorer {self.name!r} returned {value!r}; it must return a number or None")
        return np.array([np.nan if value is None else float(value) for value in found], dtype=float)
