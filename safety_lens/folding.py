"""Adapter weights folded into a hooked model, out of place: the model in training is never touched.

The shadow is a copy of the HF module tree whose tensors alias the live ones, with every adapted layer replaced by a
plain layer that owns its merged weight. Folding recomputes only those weights: W + scale · B · A in float32, rounded
once to the model's dtype, straight into the buffers that the hooked parameters are views of. peft's own
merge_adapter / unmerge_adapter on a live bf16 model changes a fifth of the adapted weights per cycle.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from safety_lens.errors import ModelError
from safety_lens.loading.architectures import blocks_of
from safety_lens.loading.hooked import attach, check_parity, main_device, main_dtype
from safety_lens.loading.live import (
    active_adapters,
    base_model,
    blocks_prefix,
    has_adapter,
    has_adapters,
    has_quantised,
    refuse_unfoldable,
    saved_module,
    stands_for_another,
    unwrapped,
)
from safety_lens.loading.merging import Slot, base_layer, fold_slot, shape_of
from safety_lens.loading.refusals import is_quantised, refuse_unreadable
from safety_lens.streaming import is_streamed, stream_blocks


class Shadow:
    """An aliasing copy of a model's module tree with adapters folded in; `refresh` recomputes the folded weights.

    adapters: which adapters to fold instead of the active ones. dtype: of dequantised weights; None is the dtype of
    most other weights (float32 after peft's prepare_model_for_kbit_training). streamed: the blocks share one set of
    buffers, filled by `load` when one of them is about to run: extra memory is one block (see streaming.BlockStream).

    Raises:
        ModelError: an adapter that has no merged weight (prompt learning, routed or activated adapters).
    """

    model: PreTrainedModel

    def __init__(
        self,
        trained: nn.Module,
        adapters: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        streamed: bool = False,
    ) -> None:
        refuse_unfoldable(trained)
        self.adapters = adapters
        self.slots: list[Slot] = []
        base = base_model(trained)
        self._dtype = dtype or main_dtype(base)
        self.made_from = _settled(trained, adapters, self._dtype, streamed)
        self._prefix = blocks_prefix(base) if streamed else None
        self._shared: dict[tuple[object, ...], Tensor] = {}
        # aliases of every parameter; buffers (rotary state) are copied, for a forward pass writes to them
        memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters()}
        seen: set[int] = set()
        for name, module in base.named_modules():
            if id(module) in seen:
                continue
            if stands_for_another(module):
                seen |= {id(inner) for inner in module.modules()}
                memo[id(module)] = self._plain(name, module, memo)
        self.model = cast(PreTrainedModel, copy.deepcopy(base, memo)).eval()
        for module in self.model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                hooks.clear()
        self._in_block: dict[int, list[Slot]] = {}
        for slot in self.slots:
            if (index := self._block(slot.name)) is not None:
                self._in_block.setdefault(index, []).append(slot)
        with torch.no_grad():
            for slot in self.slots:  # in a streamed shadow too: an adapter that cannot be merged is an error now
                self._fold(slot)
        if streamed:
            for index, block in enumerate(blocks_of(self.model)):
                block.forward = partial(self._load_and_run, index, block.forward)

    def _plain(self, name: str, module: Any, memo: dict[int, object]) -> Any:
        if isinstance(module, ModulesToSaveWrapper):
            return copy.deepcopy(saved_module(module), memo)
        base: Any = module.original_module if isinstance(module, TrainableTokensWrapper) else base_layer(module)
        dtype = self._dtype if is_quantised(base) else base.weight.dtype
        own = nn.Parameter(self._memory(name, shape_of(base), dtype, base.weight.device), requires_grad=False)
        if is_quantised(base):
            plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            plain.weight = own
            if base.bias is not None:
                plain.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        else:
            plain = copy.deepcopy(base, {**memo, id(base.weight): own})
        self.slots.append(Slot(name, module, plain))
        return plain

    def _memory(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        index = self._block(name)
        if index is None:
            return torch.empty(shape, dtype=dtype, device=device)
        key = (name.removeprefix(f"{self._prefix}.{index}."), shape, dtype, device)
        if key not in self._shared:
            self._shared[key] = torch.empty(shape, dtype=dtype, device=device)
        return self._shared[key]

    def _block(self, name: str) -> int | None:
        """The block whose turn a layer of a streamed shadow waits for; None where it owns its weight for good."""
        if self._prefix is None or not name.startswith(f"{self._prefix}."):
            return None
        return int(name.removeprefix(f"{self._prefix}.").partition(".")[0])

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute from the live model, in place, every owned weight that an adapter can have changed."""
        for slot in self.slots:
            if self._block(slot.name) is None and has_adapter(slot.live):
                self._fold(slot)

    @torch.no_grad()
    def load(self, index: int) -> None:
        """Write the weights of one block of a streamed shadow into the shared buffers."""
        for slot in self._in_block.get(index, ()):
            self._fold(slot)

    def _fold(self, slot: Slot) -> None:
        names = self.adapters if self.adapters is not None else active_adapters(slot.live)
        fold_slot(slot, list(names))

    def _load_and_run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.load(index)
        return forward(*args, **kwargs)

    @property
    def shared_storage(self) -> frozenset[int]:
        """Where the buffers lie that the blocks of a streamed shadow share."""
        return frozenset(buffer.untyped_storage().data_ptr() for buffer in self._shared.values())

    @property
    def owned_bytes(self) -> int:
        """Memory of the merged weights: what folding costs beside the live model."""
        storage = {
            weight.data_ptr(): weight.untyped_storage().nbytes() for weight in (s.plain.weight for s in self.slots)
        }
        return sum(storage.values())


SHADOWS: WeakKeyDictionary[HookedTransformer, Shadow] = WeakKeyDictionary()
"""The shadow behind each hooked model that load_model made of an adapted one, until a folder takes it over."""


class LoraFolder:
    """Keeps a hooked model equal to a model in training: `fold()` sets its weights to the effective ones.

    Works for any adapter that peft can merge, for several active adapters, and for full fine-tuning (nothing to do
    there unless storage moved). `trained` stays bit-identical: weights, gradients, modes, hooks and RNG. `model`
    moves to the device of `trained` and its weights become views; if it was loaded in another dtype it keeps that and
    its own copies.

    Raises:
        ModelError: `model` was not made by load_model, or `trained` is of another architecture or cannot be read.
        WeightSyncError: an adapter whose merged weight does not reproduce its live effect.
    """

    _built_from: list[object]

    def __init__(self, model: HookedTransformer, trained: PeftModel | PreTrainedModel) -> None:
        self.model = model
        self.trained = unwrapped(trained)
        origin = getattr(model, "origin", None)
        base = base_model(self.trained)
        if origin is None or origin.architecture != type(base).__name__:
            made = "not by load_model" if origin is None else f"from {origin.architecture}"
            raise ModelError(
                f"the hooked model was made {made} and the trained one is {type(base).__name__}: "
                "make the hooked model with load_model(trained)"
            )
        refuse_unreadable(self.trained)
        self._dtype = None if model.cfg.dtype == main_dtype(base) else model.cfg.dtype
        self._rebuild()
        if not has_quantised(self.trained):  # running those in eval mode can repack their weights
            check_parity(model, self.trained)

    def fold(self) -> None:
        """Hooked weights := the trained model's effective weights now. Never touches the trained model.

        Raises:
            ModelError: an adapter that cannot be merged, or storage that was given up (FSDP, offloading).
        """
        if self._fingerprint() != self._built_from:  # .to(), resize_token_embeddings, another adapter, another module
            refuse_unreadable(self.trained)
            self._rebuild()
            return
        if self._shadow is not None:
            self._shadow.refresh()
        if not self._views:  # some weight has another dtype than the model, so the hooked one has a copy
            attach(self.model, self._source)
            self._built_from = self._fingerprint()

    @contextmanager
    def unfolded(self) -> Iterator[bool]:
        """Give the hooked model the weights without any adapter, and fold again afterwards.

        Yields:
            Whether that is the untrained model: False where whole weights are trained, and nothing is changed then.
        """
        whole = any(p.requires_grad and "lora_" not in name for name, p in self.trained.named_parameters())
        if self._shadow is None or whole:
            yield False
            return
        self._shadow.adapters = ()
        try:
            self._shadow.refresh()
            yield True
        finally:
            self._shadow.adapters = None
            self._shadow.refresh()

    def _rebuild(self) -> None:
        streamed = is_streamed(self.model)
        self._shadow = None
        if has_adapters(self.trained):
            self._shadow = self._found(streamed) or Shadow(self.trained, dtype=self._dtype, streamed=streamed)
        self._source = base_model(self.trained) if self._shadow is None else self._shadow.model
        self.model.cfg.device = str(main_device(self._source))
        self.model.cfg.dtype = self._dtype or main_dtype(self._source)
        self._views = attach(self.model, self._source)
        if streamed:
            stream_blocks(self.model, self._shadow)
        self._built_from = self._fingerprint()

    def _found(self, streamed: bool) -> Shadow | None:
        """The shadow that load_model made of this very model, brought up to date: a second one would cost its memory
        again until the first is let go.
        """
        made = SHADOWS.pop(self.model, None)
        if made is None or made.made_from != _settled(
            self.trained, None, self._dtype or main_dtype(base_model(self.trained)), streamed
        ):
            return None
        made.refresh()
        return made

    def _fingerprint(self) -> list[object]:
        """Identity of every storage involved, and which adapters and saved modules are in force."""
        return _identity(self.trained) + _identity(self.model)


def _settled(
    trained: nn.Module, adapters: Sequence[str] | None, dtype: torch.dtype, streamed: bool
) -> tuple[object, ...]:
    """What a shadow depends on, for telling whether one fits."""
    return (adapters, dtype, streamed, *_identity(trained))


def _identity(model: nn.Module) -> list[object]:
    """Where every parameter is and lies, and which adapters are in force.

    Walks the tree itself and keeps one flat list: nn.Module's own iterators, and a tuple for each parameter, would take
    as long as folding a few small matrices.
    """
    waiting: list[nn.Module] = [model]
    seen = {id(model)}
    found: list[object] = []
    for module in waiting:  # it grows while it is walked
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
        for parameter in module._parameters.values():
            if parameter is not None:
                found += (id(parameter), parameter.data_ptr(), parameter.dtype)
        if isinstance(module, AuxiliaryTrainingWrapper):
            found += (tuple(module.active_adapters), module.disable_adapters)
    return found
