"""Read positions: which tokens of an encoded prompt an activation is taken from.

Every rule works on the token ranges that encoding recorded (`Encoded.instruction`, `Encoded.answer`), so padding,
batching and cache reuse can never shift it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safety_lens.data import Encoded
from safety_lens.errors import DataError


@dataclass(frozen=True)
class Positions:
    """A rule that picks token indices of one prompt.

    pick: function of an `Encoded` giving indices into its unpadded ids, non-empty and ascending.
    mean: average the picked tokens into one row, else every token is a row.
    """

    name: str
    pick: Callable[[Encoded], Sequence[int]]
    mean: bool = False


def _last(k: int) -> Callable[[Encoded], Sequence[int]]:
    def pick(encoded: Encoded) -> Sequence[int]:
        if len(encoded.ids) < k:
            raise DataError(f"asked for the last {k} tokens, but {_quote(encoded)} has {len(encoded.ids)}")
        return range(len(encoded.ids) - k, len(encoded.ids))

    return pick


def _quote(encoded: Encoded) -> str:
    return f"prompt {encoded.text[-60:]!r}"


def _span(kind: str) -> Callable[[Encoded], Sequence[int]]:
    def pick(encoded: Encoded) -> Sequence[int]:
        span = {"instruction": encoded.instruction, "answer": encoded.answer, "all": (0, len(encoded.ids))}[kind]
        if span is None or span[0] >= span[1]:
            raise DataError(f"asked for the {kind} tokens, but {_quote(encoded)} has none; use --positions last")
        return range(*span)

    return pick


def _after_instruction(encoded: Encoded) -> Sequence[int]:
    if encoded.instruction is None or encoded.instruction[1] >= len(encoded.ids):
        raise DataError(
            f"asked for the post-instruction tokens, but {_quote(encoded)} has no template after the instruction;"
            " use --positions last"
        )
    return range(encoded.instruction[1], len(encoded.ids))


def _letter(encoded: Encoded) -> Sequence[int]:
    if encoded.letter is None:
        raise DataError(f"asked for the answer letter, but {_quote(encoded)} carries no prefilled answer with a letter")
    return (encoded.letter,)


last_token = Positions("last", _last(1))
answer_letter = Positions("answer_letter", _letter)
post_instruction = Positions("post_instruction", _after_instruction)
all_tokens = Positions("all", _span("all"))


def last_k(k: int) -> Positions:
    """Each of the last k tokens as a row of its own."""
    return Positions(f"last:{_positive(k)}", _last(k))


def mean_last(k: int) -> Positions:
    """Mean over the last k tokens."""
    return Positions(f"mean:{_positive(k)}", _last(k), mean=True)


def mean_over(span: str) -> Positions:
    """Mean over a span: "instruction" (the last user turn), "answer" (the prefilled answer) or "all"."""
    if span not in ("instruction", "answer", "all"):
        raise DataError(f"mean over {span!r} is not a span; choose instruction, answer or all")
    return Positions(f"mean:{span}", _span(span), mean=True)


def _positive(k: int) -> int:
    if k < 1:
        raise DataError(f"the number of tokens to read must be at least 1, got {k}")
    return k


def parse_positions(text: str) -> Positions:
    """The rule a spelling names: last, last:K, mean:K, mean:SPAN, answer_letter, post_instruction, all.

    Raises:
        DataError: the spelling is none of these.
    """
    named = {p.name: p for p in (last_token, answer_letter, post_instruction, all_tokens)}
    if text in named:
        return named[text]
    if found := re.fullmatch(r"(last|mean):(\d+)", text):
        return {"last": last_k, "mean": mean_last}[found[1]](int(found[2]))
    if found := re.fullmatch(r"mean:(instruction|answer|all)", text):
        return mean_over(found[1])
    raise DataError(
        f"positions {text!r} is not known; write last, last:K, mean:K, mean:instruction, mean:answer, mean:all,"
        " answer_letter, post_instruction or all"
    )
