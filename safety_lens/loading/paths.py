"""Tokens of several prompts in one row of a batch: which columns come before a token on its own path, and how far.

A forward pass usually takes the columns of a row for one prompt. Where prompts begin alike, their common tokens can
stand once and the rest branch off behind them: each token then follows a path through the columns, and sees those on
it. Attention and position embeddings of this package read the paths of the running forward here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Paths:
    """behind: how many tokens a column is before the query on its path, 0 for itself, −1 where it is not on it.

    position: index of each query's token in its own prompt.
    """

    behind: Int[Tensor, "batch pos all_pos"]
    position: Int[Tensor, "batch pos"]

    def allowed(self, window: int | None) -> Bool[Tensor, "batch 1 pos all_pos"]:
        """Which columns a token sees: those on its path, within the window (itself included; None is all)."""
        seen = self.behind >= 0
        return (seen if window is None else seen & (self.behind < window))[:, None]


_RUNNING: ContextVar[Paths | None] = ContextVar("paths", default=None)


@contextmanager
def along(paths: Paths) -> Iterator[None]:
    """Let a forward pass follow these paths."""
    token = _RUNNING.set(paths)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def running_paths() -> Paths | None:
    """The paths of the running forward; None where a row is one prompt."""
    return _RUNNING.get()
