"""What a scorer reads and what a scorer is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from safety_lens.errors import DataError

NAN = float("nan")


@dataclass(frozen=True)
class Completion:
    """One text to be judged.

    prompt: what the user asked, as plain text. text: what the model answered. tokens: the ids of the answer.
    first: a value read from the logits that chose its first token (`Generation.first`), NaN where none was read.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...] = ()
    first: float = NAN


@runtime_checkable
class Scorer(Protocol):
    """Completions in, one number each out: higher means more of what `name` says, NaN that it could not be scored.

    `name` becomes the metric of a `Measurement` ("toxicity", "refusal", "lexicon/rude").
    """

    @property
    def name(self) -> str:
        """The metric's name."""

    def __call__(self, completions: Sequence[Completion]) -> Float[np.ndarray, " n"]:
        """Scores in the order of the completions."""


def first_reader(
    scorers: Sequence[Scorer],
) -> Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]] | None:
    """Function that a scorer wants to see the logits of the first new token with; None where no scorer does.

    Raises:
        DataError: two scorers ask for it; `generate` reads one value per answer.
    """
    found = [s for s in scorers if getattr(s, "read_first", None) is not None]
    if len(found) > 1:
        raise DataError(f"{' and '.join(s.name for s in found)} both read the first logits: use one of them at a time")
    return getattr(found[0], "read_first") if found else None  # noqa: B009  not part of the protocol
