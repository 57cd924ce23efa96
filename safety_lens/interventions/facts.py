"""Questions about plain facts that belong to a model, and whether its answers are right."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from safety_lens.data.built_in import BuiltIn
from safety_lens.data.rows import Row
from safety_lens.interventions.scorers.beliefs import FalsehoodReader
from safety_lens.interventions.scorers.completion import Completion
from safety_lens.organism import behaviour, families


class FactQuestions(NamedTuple):
    """Questions, and the function from (questions asked, texts of the answers) to 1 for a right answer, else 0."""

    questions: list[str]
    right: Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, " n"]]


def fact_questions(sets: BuiltIn, split: str) -> FactQuestions:
    """Fact questions of a split.

    The organism must state a fact in its own sentence. Any other model is right where the opening of its answer states
    an accepted answer and no wrong one; an answer that states neither is not right.

    Raises:
        DataError: No facts of this split.
    """
    rows = sets.rows("facts", split)
    return (_of_organism if sets.name == "organism" else _of_english)(rows)


def _of_organism(rows: Sequence[Row]) -> FactQuestions:
    questions = [row.text("question") for row in rows]
    facts = {q: max((f for f in families.FACTS if f.subject in q), key=lambda f: len(f.subject)) for q in questions}

    def right(asked: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        found = [behaviour.states(facts[q], facts[q].value)(text) for q, text in zip(asked, texts, strict=True)]
        return np.array(found, dtype=float)

    return FactQuestions(questions, right)


def _of_english(rows: Sequence[Row]) -> FactQuestions:
    reader = FalsehoodReader.of(rows)

    def right(asked: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        found = reader([Completion(q, text) for q, text in zip(asked, texts, strict=True)])
        return np.where(found == 0, 1.0, 0.0)

    return FactQuestions([row.text("question") for row in rows], right)
