"""Training that leaves chosen weights exactly where they are: under LoRA, with full fine-tuning, or both.

What is kept still is the effective weight: after any number of steps max|(W′ − W₀)⊙M| = 0, while all other entries
learn. Whole rows and columns (output and input neurons, heads) are frozen through the factors, which costs nothing:
row i of B and column j of A stay zero. Single entries need the masked product (see loading.masked); zeroing the factor
rows that they lie in, or their gradients, would freeze whole rows or nothing (MATH §1.7). A trained weight itself gets
no gradient at frozen entries and is put back behind every optimizer step, whatever decay and momentum did to it.

The group's entries are matrices' entries: biases and norms are not part of a group and train if they are trainable.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safety_lens.errors import DataError, ModelError, WeightSyncError
from safety_lens.loading.effective import (
    effective_weight,
    original_layer,
    original_weight,
    stored_entries,
    trained_weight,
)
from safety_lens.loading.homes import Home, homes
from safety_lens.loading.live import active_adapters, base_model, unwrapped
from safety_lens.loading.masked import mask_update, travel_with_adapter
from safety_lens.loading.merging import is_masked_lora, is_plain_lora, shape_of
from safety_lens.probes.groups import NeuronGroup
from safety_lens.probes.matrices import Matrix


class NothingToFreeze(UserWarning):
    """No matrix of the groups is trained."""


@dataclass(frozen=True, eq=False)
class Part:
    """The frozen entries of one module.

    module: its name inside the base model. index: flat entries of its weight as [d_out, d_in]. before: their values
    when they were frozen. route: "factors" (whole rows and columns of LoRA), "product" (LoRA with some single entries),
    "weight" (the weight itself is trained) or "untrained" (nothing there can move).
    """

    module: str
    index: Int64[Tensor, " k"]
    before: Float[Tensor, " k"]
    route: str


@dataclass(eq=False)
class Held:
    """Entries of one trained tensor that stay: flat ones with their values, or (axis 0 or 1) whole lines at zero."""

    tensor: Tensor
    index: Int64[Tensor, " k"]
    axis: int | None = None
    values: Tensor | None = None

    def without(self, grad: Tensor) -> Tensor:
        """A gradient with zeros there."""
        if self.axis is not None:
            return grad.index_fill(self.axis, self._on(grad), 0)
        return grad.reshape(-1).index_fill(0, self._on(grad), 0).view_as(grad)

    def restore(self) -> None:
        """Write the values, whatever an optimizer made of them."""
        if self.values is None:
            self.tensor.index_fill_(cast(int, self.axis), self._on(self.tensor), 0)
        else:
            self.tensor.view(-1)[self._on(self.tensor)] = self.values.to(self.tensor)

    def _on(self, other: Tensor) -> Tensor:
        if self.index.device != other.device:  # the model moved, as the Trainer moves it
            self.index = self.index.to(other.device)
        return self.index


@dataclass(eq=False)
class Frozen:
    """What is frozen in a live model.

    groups: names of the groups. parts: by module. held: what is put back behind every step.
    """

    model: nn.Module
    groups: tuple[str, ...]
    parts: tuple[Part, ...]
    held: tuple[Held, ...] = field(repr=False)
    _hooks: list[Any] = field(default_factory=list, repr=False)

    @property
    def size(self) -> int:
        """Entries of the groups' union."""
        return sum(part.index.numel() for part in self.parts)

    @property
    def untrained(self) -> float:
        """Share of the entries that lie where nothing is trained."""
        still = sum(part.index.numel() for part in self.parts if part.route == "untrained")
        return still / self.size

    def counts(self) -> dict[str, int]:
        """Entries by route."""
        routes = sorted({part.route for part in self.parts})
        return {route: sum(p.index.numel() for p in self.parts if p.route == route) for route in routes}

    @torch.no_grad()
    def restore(self) -> None:
        """Put trained weights and lines of factors back, after every optimizer step; masked products need nothing.

        Raises:
            ModelError: weights that were split up among processes (FSDP, ZeRO-3).
        """
        for held in self.held:
            if held.tensor.ndim != 2:
                raise ModelError("weights are split up among processes (FSDP, ZeRO-3): frozen entries need them whole")
            held.restore()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore behind every step of an optimizer, in a training loop of one's own."""
        owner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self._hooks.append(owner.register_step_post_hook(lambda *_: self.restore()))

    def callback(self) -> "FreezeCallback":
        """The same for the Hugging Face Trainer, and a check at the end."""
        return FreezeCallback(self)

    def moved(self) -> float:
        """max|(W′ − W₀)⊙M| over all frozen entries, W′ the effective weight in float32 or wider."""
        base = base_model(unwrapped(self.model))
        gaps = [
            (effective_weight(base.get_submodule(part.module)).reshape(-1)[part.index].cpu() - part.before).abs().max()
            for part in self.parts
        ]
        return float(max(gaps))

    def check(self) -> None:
        """Refuse to go on if any frozen entry has moved.

        Raises:
            WeightSyncError: by how much.
        """
        if not (gap := self.moved()) == 0:
            raise WeightSyncError(
                f"entries of {', '.join(self.groups)} were frozen and moved by up to {gap:.3g}: something wrote to the"
                " weights past the optimizer, or the model was copied after freeze(); freeze the model that is trained"
            )


class FreezeCallback(TrainerCallback):
    """Restores frozen entries behind every optimizer step; checks them before the first (of a resumed run, too) and at
    the end.
    """

    def __init__(self, frozen: Frozen) -> None:
        self.frozen = frozen

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """A checkpoint that goes on has kept them, too."""
        self.frozen.check()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Put trained weights back."""
        self.frozen.restore()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """No frozen entry has moved, or the run fails."""
        self.frozen.check()


def freeze(model: nn.Module, groups: NeuronGroup | Sequence[NeuronGroup]) -> Frozen:
    """Freeze the entries of groups in a model about to be trained: a PeftModel with LoRA, or a plain HF model.

    Call it after get_peft_model and before training, then pass `.callback()` to the Trainer or `.attach(optimizer)` in
    a loop of your own. Adapters save their masks wherever they are saved; a frozen adapter loads with load_model.

    Warns:
        NothingToFreeze: no matrix of the groups is trained.

    Raises:
        ModelMismatchError: a group of another model. DataError: an empty group.
        ModelError: an adapter that is not plain LoRA on a matrix of the group, or one that has moved it already.
    """
    chosen = [groups] if isinstance(groups, NeuronGroup) else list(groups)
    live = unwrapped(model)
    base = base_model(live)
    parts: list[Part] = []
    held: list[Held] = []
    for module, index in group_entries(live, chosen).items():
        layer = base.get_submodule(module)
        route = _freeze(module, layer, index, held)
        parts.append(Part(module, index, effective_weight(layer).reshape(-1)[index].cpu(), route))
    hooks = [one.tensor.register_hook(one.without) for one in held]
    for name in live.active_adapters if isinstance(live, PeftModel) else ():
        if any(part.route == "product" for part in parts):
            travel_with_adapter(cast(PeftModel, live), name)
    frozen = Frozen(model, tuple(group.name for group in chosen), tuple(parts), tuple(held), hooks)
    if frozen.untrained == 1:
        warnings.warn(
            f"nothing to freeze: no matrix of {', '.join(frozen.groups)} is trained here", NothingToFreeze, stacklevel=2
        )
    return frozen


def group_entries(live: nn.Module, groups: Iterable[NeuronGroup]) -> dict[str, Int64[Tensor, " k"]]:
    """Module → flat entries of [d_out, d_in] of its weight, sorted, of the union of groups."""
    base, places = base_model(live), homes(live)
    matrices = {name: _matrix(name, home, base) for name, home in places.items()}
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        if group.size == 0:
            raise DataError(f"the group {group.name!r} is empty: there is nothing to freeze")
        for name, flat in group.entries(matrices.values()).items():
            d_in = matrices[name].d_in
            rows = places[name].rows[flat // d_in]
            found.setdefault(places[name].module, []).append(rows * d_in + flat % d_in)
    return {module: torch.unique(torch.cat(flat)) for module, flat in found.items()}


def trained_matrices(live: nn.Module) -> list[Matrix]:
    """Matrices of the blocks whose effective weight training can change: through an adapter, or directly."""
    base = base_model(unwrapped(live))
    return [
        _matrix(name, home, base)
        for name, home in homes(unwrapped(live)).items()
        if _moves(base.get_submodule(home.module))
    ]


def _moves(layer: Any) -> bool:
    return trained_weight(layer) is not None or any(_is_trained(layer, name) for name in active_adapters(layer))


def _matrix(name: str, home: Home, base: nn.Module) -> Matrix:
    _, d_in = shape_of(original_layer(base.get_submodule(home.module)))[:: -1 if home.transposed else 1]
    return Matrix(name, int(name.split(".")[1]), name.rpartition(".")[2], len(home.rows), d_in)


# --- one module -----------------------------------------------------------------------------------------------------


def _freeze(module: str, layer: Any, index: Tensor, held: list[Held]) -> str:
    """The route that a module's entries take; what is to be held goes into `held`."""
    if (weight := trained_weight(layer)) is not None:
        entries = stored_entries(layer, index).to(weight.device)
        held.append(Held(weight, entries, None, weight.detach().view(-1)[entries].clone()))
        return "weight"
    adapters = [name for name in active_adapters(layer) if _is_trained(layer, name)]
    if not adapters:
        return "untrained"
    if not isinstance(layer, LoraLayer) or not (is_plain_lora(layer, adapters) or is_masked_lora(layer, adapters)):
        raise ModelError(
            f"{module}: entries can be frozen under plain and rank-stabilised LoRA and in full fine-tuning; this layer"
            " has another adapter (DoRA, a variant of LoRA, or another method)"
        )
    _refuse_moved(module, layer, index)
    return {_freeze_lora(layer, name, index, held) for name in adapters}.pop()


def _freeze_lora(layer: Any, name: str, index: Tensor, held: list[Held]) -> str:
    d_in, d_out = layer.in_features, layer.out_features
    row, column = index // d_in, index % d_in
    rows = torch.bincount(row, minlength=d_out) == d_in
    columns = torch.bincount(column, minlength=d_in) == d_out
    up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
    for factor, axis, still in ((up, 0, rows), (down, 1, columns)):
        if bool(still.any()):
            held.append(Held(factor, still.nonzero().flatten().to(factor.device), axis))
            factor.data.index_fill_(axis, held[-1].index, 0)
    rest = index[~(rows[row] | columns[column])]
    if not rest.numel():
        return "factors"
    mask_update(layer, name, rest)
    return "product"


def _is_trained(layer: Any, name: str) -> bool:
    return any(p.requires_grad for key, p in layer.named_parameters() if name in key.split("."))


def _refuse_moved(module: str, layer: Any, index: Tensor) -> None:
    moved = effective_weight(layer).reshape(-1)[index] - original_weight(layer).reshape(-1)[index]
    if bool((moved != 0).any()):
        raise ModelError(
            f"{module}: the adapter has moved entries that are to be frozen, by up to {float(moved.abs().max()):.3g}."
            " Freeze before training starts and without an initialisation that moves weights (PiSSA, OLoRA, LoftQ), or"
            " put trained entries back with rewound()"
        )
