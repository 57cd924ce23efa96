"""Token scopes: which tokens of a row an edit may touch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from jaxtyping import Bool
from torch import Tensor

from safety_lens.errors import DataError
from safety_lens.frames import Frame


@dataclass(frozen=True)
class Scope:
    """name: as it is typed. touches: mask of the tokens an edit may touch, never padding.

    spares_prompt: no prompt token but the last is touched, whatever the row.
    """

    name: str
    touches: Callable[[Frame], Bool[Tensor, "batch pos"]]
    spares_prompt: bool = False

    def __call__(self, frame: Frame) -> Bool[Tensor, "batch pos"]:
        return self.touches(frame)


def _everywhere(frame: Frame) -> Bool[Tensor, "batch pos"]:
    return frame.position >= 0


def _prompt(frame: Frame) -> Bool[Tensor, "batch pos"]:
    return (frame.position >= 0) & (frame.position < frame.prompt)


def _generated(frame: Frame) -> Bool[Tensor, "batch pos"]:
    return frame.position >= frame.prompt


@cache
def from_position(index: int) -> Scope:
    """Tokens from an index on: counted from the row's start, or, where negative, from the end of its prompt.

    from_position(-1) starts at the last prompt token, which chooses the first token of the answer.
    """

    def touches(frame: Frame) -> Bool[Tensor, "batch pos"]:
        start = frame.prompt + index if index < 0 else index
        return (frame.position >= start) & (frame.position >= 0)

    return Scope(f"from:{index}", touches, spares_prompt=index == -1)


EVERYWHERE = Scope("all", _everywhere)
PROMPT = Scope("prompt", _prompt)
GENERATED = Scope("generated", _generated, spares_prompt=True)
ANSWER = Scope("answer", from_position(-1).touches, spares_prompt=True)
SCOPES = {scope.name: scope for scope in (EVERYWHERE, PROMPT, GENERATED, ANSWER)}
"""all: prompt and generated tokens. prompt: prompt tokens. generated: tokens the model wrote (its first one is chosen
before any edit). answer: the last prompt token and all generated ones."""


def scope_named(name: str | Scope) -> Scope:
    """ "all", "prompt", "generated", "answer" or "from:INDEX" as a scope; a scope passes through.

    Raises:
        DataError: another name.
    """
    if isinstance(name, Scope):
        return name
    if name in SCOPES:
        return SCOPES[name]
    if found := re.fullmatch(r"from:(-?\d+)", name):
        return from_position(int(found[1]))
    raise DataError(
        f"no token scope {name!r}: choose {', '.join(SCOPES)} or from:INDEX (negative: from the prompt's end)"
    )
