"""How far a live model's matrices have moved since a reference, as a function that can be differentiated.

Read from what is trained: LoRA's factors (the update is never spelled out), the masked product where single entries are
frozen, or the weight itself.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from safety_lens.errors import ModelError
from safety_lens.loading.effective import trained_weight
from safety_lens.loading.homes import Home, homes
from safety_lens.loading.live import active_adapters, base_model, unwrapped
from safety_lens.loading.masked import is_masked, mask_of
from safety_lens.loading.merging import is_masked_lora, is_plain_lora
from safety_lens.probes.products import Change, LowRank

Read = Callable[[], Change]


class Moved:
    """Call it for the change of every trained matrix since the reference: matrix name → change, differentiable.

    The reference is the model as it is now, until `reset`. matrices: names to follow, default all of the blocks; those
    that nothing trains stay where they are and are left out.

    Raises:
        ModelError: none of the matrices is trained, or one through an adapter whose update is not LoRA's product.
    """

    def __init__(self, trained: nn.Module, matrices: Iterable[str] | None = None) -> None:
        live = unwrapped(trained)
        base = base_model(live)
        places = homes(live)
        readers = {name: _reader(name, base.get_submodule(home.module), home) for name, home in places.items()}
        trainable = {name: read for name, read in readers.items() if read is not None}
        wanted = set(places) if matrices is None else set(matrices)
        if unknown := sorted(wanted - set(places)):
            raise ModelError(f"the model in training has no matrix {unknown[0]!r}: the gradients are of another model")
        self._readers = {name: read for name, read in trainable.items() if name in wanted}
        self.left_out = tuple(name for name in trainable if name not in wanted)
        """Matrices that are trained and not followed."""
        if not self._readers:
            at = ", ".join(sorted(trainable)[:4]) or "none at all"
            raise ModelError(
                f"none of the {len(wanted)} matrices to be followed is trained (trained: {at}): their change would be"
                " zero for ever. Make the penalty after the adapter is on the model, with gradients of what it trains"
            )
        self._reference: dict[str, Change] = {}
        self.reset()

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices that are followed."""
        return tuple(self._readers)

    @torch.no_grad()
    def reset(self) -> None:
        """Count changes from the model as it is now."""
        self._reference = {name: _copy(read()) for name, read in self._readers.items()}

    def __call__(self) -> dict[str, Change]:
        return {name: _since(read(), self._reference[name]) for name, read in self._readers.items()}


def _reader(name: str, layer: Any, home: Home) -> Read | None:
    """A function that reads what is trained of a matrix; None where nothing is."""
    if (weight := trained_weight(layer)) is not None:
        return lambda: _wide(home.take(weight))
    adapters = [
        adapter
        for adapter in active_adapters(layer)
        if any(p.requires_grad for key, p in layer.named_parameters() if adapter in key.split("."))
    ]
    if not adapters:
        return None
    if is_plain_lora(layer, adapters):
        return lambda: _joined([_factors(layer, adapter, home) for adapter in adapters])
    if is_masked_lora(layer, adapters):
        return lambda: torch.stack([_product(layer, adapter, home) for adapter in adapters]).sum(0)
    raise ModelError(
        f"{name}: a penalty follows plain LoRA, LoRA with frozen entries and full fine-tuning; this layer has another"
        " adapter (DoRA or another method)"
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _factors(layer: Any, adapter: str, home: Home) -> LowRank:
    up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    return LowRank(_wide(up[home.rows.to(up.device)]), _wide(down), float(layer.scaling[adapter]))


def _product(layer: Any, adapter: str, home: Home) -> Tensor:
    up, down = _wide(layer.lora_B[adapter].weight), _wide(layer.lora_A[adapter].weight)
    update = layer.scaling[adapter] * (up @ down)
    if is_masked(layer, adapter):
        kept = torch.ones(update.numel(), device=update.device, dtype=update.dtype)
        update = update * kept.index_fill(0, mask_of(layer, adapter), 0).view_as(update)
    found: Tensor = update[home.rows.to(update.device)]
    return found


def _joined(parts: list[LowRank]) -> LowRank:
    """A sum of products as one: factors side by side."""
    if len(parts) == 1:
        return parts[0]
    left = torch.cat([part.scale * part.left for part in parts], 1)
    return LowRank(left, torch.cat([part.right for part in parts]))


def _copy(change: Change) -> Change:
    if isinstance(change, LowRank):
        return LowRank(change.left.detach().clone(), change.right.detach().clone(), change.scale)
    return change.detach().clone()


def _since(now: Change, reference: Change) -> Change:
    if isinstance(now, LowRank) and isinstance(reference, LowRank):
        if not reference.left.any():  # an adapter that started at no effect
            return now
        return _joined([now, LowRank(reference.left, reference.right, -reference.scale)])
    assert isinstance(now, Tensor)  # a layer is read in the same way for ever
    assert isinstance(reference, Tensor)
    return now - reference


def squared_norm(change: Change) -> Tensor:
    """‖U‖² of one matrix, differentiable; from the factors where it has them."""
    if isinstance(change, LowRank):
        return change.scale**2 * ((change.left.T @ change.left) * (change.right @ change.right.T)).sum()
    return change.square().sum()
