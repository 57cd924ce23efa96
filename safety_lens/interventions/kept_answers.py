"""Answers to harmful prompts: the one rule on what of them reaches the disk, a page or the terminal."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from safety_lens.generation import Generation
from safety_lens.interventions.scorers.completion import Completion, Scorer
from safety_lens.interventions.scorers.refusal import SubstringRefusal

KEPT_TOKENS = 12
"""Tokens of a refusal of a harmful prompt that are kept at most."""
WITHHELD = "(answer to a harmful prompt, not read as a refusal: withheld)"
"""Text that stands in a table for an answer that is withheld."""


class KeptAnswer(NamedTuple):
    """One answer as it may be kept.

    text, tokens: None where the answer is withheld. sha256: of the whole answer, so that two runs can be compared.
    """

    text: str | None
    tokens: tuple[int, ...] | None
    sha256: str


def kept_answers(
    answers: Sequence[Generation], harmful: Sequence[bool], tokenizer: Any, reader: Scorer | None = None
) -> list[KeptAnswer]:
    """Cut answers to harmful prompts down to what may be kept.

    An answer to any other prompt is kept whole. Of an answer to a harmful prompt the first `KEPT_TOKENS` tokens are
    kept where the reader calls it a refusal, and nothing but its hash where the reader does not.

    Args:
        harmful: for every answer, whether its prompt is a harmful one.
        tokenizer: of the model; without one no text of an answer to a harmful prompt is kept.
        reader: scores 1 for a refusal; `SubstringRefusal` by default.
    """
    reads = reader if reader is not None else SubstringRefusal()
    refused = np.asarray(reads([Completion("", g.text, g.tokens, g.first) for g in answers])) >= 0.5
    out = []
    for answer, unsafe, refusal in zip(answers, harmful, refused, strict=True):
        digest = hashlib.sha256(answer.text.encode("utf-8", "surrogatepass")).hexdigest()
        if not unsafe:
            out.append(KeptAnswer(answer.text, answer.tokens, digest))
        elif refusal and tokenizer is not None:
            head = answer.tokens[:KEPT_TOKENS]
            out.append(KeptAnswer(str(tokenizer.decode(list(head), skip_special_tokens=True)), head, digest))
        else:
            out.append(KeptAnswer(None, None, digest))
    return out
