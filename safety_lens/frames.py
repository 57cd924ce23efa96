"""Which token every column of the running forward pass holds.

With a key-value cache a hook sees one token at a time, and with padding one column is another token in every row, so an
edit cannot tell from its input alone what it edits. The engines (`capture`, `generate`, `continuation_logprobs`) say so
here; edits that act on some tokens only, or differently in every row, read it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from safety_lens.errors import ModelError


@dataclass(frozen=True, eq=False)
class Frame:
    """position: index of each column's token in its own row, padding not counted, −1 for padding itself.

    prompt: how many tokens of the row of each column are the prompt; the tokens from there on are the model's answer.
    ends is 1, but in trees, whose columns belong to several prompts.
    row: which prompt of the caller's list each row of the batch is.
    run: a mark that all forwards over the same rows share (a prompt and the tokens written behind it); None where no
    engine runs.
    """

    position: Int[Tensor, "batch pos"]
    prompt: Int[Tensor, "batch ends"]
    row: Int[Tensor, " batch"]
    run: object | None = None

    def part(self, rows: Bool[Tensor, " batch"] | Int[Tensor, " part"]) -> "Frame":
        """The frame of some rows of the batch."""
        return replace(self, position=self.position[rows], prompt=self.prompt[rows], row=self.row[rows])


_RUNNING: ContextVar[Frame | None] = ContextVar("running", default=None)


@contextmanager
def running(frame: Frame) -> Iterator[None]:
    """Let edits see this frame while a forward pass runs."""
    token = _RUNNING.set(frame)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def frame_of(act: Tensor) -> Frame:
    """The frame of the running forward; where no engine runs, `act` holds whole prompts without padding.

    Raises:
        ModelError: `act` does not have [batch, pos] of the running forward as its first axes.
    """
    frame = _RUNNING.get()
    if frame is None:
        batch, pos = act.shape[:2]
        columns = torch.arange(pos, device=act.device).expand(batch, pos)
        return Frame(columns, torch.full((batch, 1), pos, device=act.device), torch.arange(batch, device=act.device))
    if frame.position.shape != act.shape[:2]:
        raise ModelError(
            f"an edit met an activation of shape {tuple(act.shape)} in a forward of {tuple(frame.position.shape)}"
            " tokens: edits work at hooks with [batch, pos, ...] (not attention scores or patterns)"
        )
    return frame


def whole(mask: Int[Tensor, "batch pos"], prompt: Int[Tensor, " batch"], row: Int[Tensor, " batch"]) -> Frame:
    """The frame of a forward that starts at token 0 of every row; padding (mask 0) may stand on either side."""
    position = torch.where(mask > 0, mask.cumsum(1) - 1, -1)
    return Frame(position, prompt[:, None], row, object())
