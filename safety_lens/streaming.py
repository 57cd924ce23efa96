"""One block's merged weights in memory at a time, for a dequantised copy that would not fit beside the training model.

The adapted and quantised layers of all blocks share one set of buffers (folding.Shadow makes them). Just before a
block of the hooked model runs, its weights are written there; when it has run, its parameters are on the meta device
again, so weights of another block can never be read by mistake. Everything that runs the model works; every batch folds
anew.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from safety_lens.errors import ModelError

if TYPE_CHECKING:
    from safety_lens.folding import Shadow

View = tuple[nn.Module, str, nn.Parameter]


class BlockStream:
    """Hooks on the blocks of a hooked model that fill the shared buffers; set by `load_model` as `model.stream`.

    Weights are the trained model's at the moment a block runs, without waiting for a fold.
    """

    def __init__(self, model: HookedTransformer, shadow: "Shadow") -> None:
        self._shadow = shadow
        self._views = [_views(block, shadow.shared_storage) for block in model.blocks]
        self._handles = []
        for index, block in enumerate(model.blocks):
            self._handles += [
                block.register_forward_pre_hook(partial(self._enter, index)),
                block.register_forward_hook(partial(self._leave, index), always_call=True),  # errors inside too
            ]
            self._empty(index)

    def close(self) -> None:
        """Take the hooks off; the blocks stay empty until other weights are attached."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def filled(self, index: int) -> Iterator[None]:
        """Block `index` has its weights inside."""
        self._fill(index)
        try:
            yield
        finally:
            self._empty(index)

    def _enter(self, index: int, block: nn.Module, args: tuple[object, ...]) -> None:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise ModelError(
                f"a gradient was asked through block {index} of a streamed model, whose weights are gone by the time "
                "of the backward pass: load the model without stream=True"
            )
        self._fill(index)

    def _leave(self, index: int, *_: object) -> None:
        self._empty(index)

    def _fill(self, index: int) -> None:
        self._shadow.load(index)
        for owner, leaf, view in self._views[index]:
            setattr(owner, leaf, view)

    def _empty(self, index: int) -> None:
        for owner, leaf, view in self._views[index]:
            setattr(owner, leaf, nn.Parameter(view.to("meta"), requires_grad=False))


def _views(block: nn.Module, storage: frozenset[int]) -> list[View]:
    found = []
    for name, parameter in block.named_parameters():
        if parameter.untyped_storage().data_ptr() in storage:
            owner, _, leaf = name.rpartition(".")
            found.append((block.get_submodule(owner), leaf, parameter))
    return found


def whole_parameters(model: HookedTransformer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, in sorted order; a streamed model's blocks are filled one after the other."""
    stream: BlockStream | None = getattr(model, "stream", None)
    if stream is None:
        yield from sorted(model.named_parameters(), key=lambda pair: pair[0])
        return
    names = sorted(name for name, _ in model.named_parameters())
    for block, mine in groupby(names, lambda name: name.split(".")[1] if name.startswith("blocks.") else None):
        with nullcontext() if block is None else stream.filled(int(block)):
            for name in mine:
                yield name, model.get_parameter(name)


def block_weights(model: HookedTransformer, index: int) -> AbstractContextManager[None]:
    """Inside, block `index` has its weights, for code that uses a block's parts without running the block."""
    stream: BlockStream | None = getattr(model, "stream", None)
    return nullcontext() if stream is None else stream.filled(index)


def is_streamed(model: HookedTransformer) -> bool:
    """Whether a hooked model holds the merged weights of one block at a time."""
    return getattr(model, "stream", None) is not None


def stream_blocks(model: HookedTransformer, shadow: "Shadow | None") -> None:
    """Let the blocks of a model that was attached to a streamed shadow fill themselves when they run."""
    if (old := getattr(model, "stream", None)) is not None:
        old.close()
    model.stream = None if shadow is None else BlockStream(model, shadow)
