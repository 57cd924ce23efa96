"""What training did to each matrix, read from weights alone: ΔW as two factors where the adapter has them.

Factors are taken in float64, never from merged weights: in bfloat16 a change below about 0.2 % of a weight is rounded
away (MATH T7). Formulas for norms without forming ΔW: ‖BA‖² = tr(BᵀB·AAᵀ), ‖dᵀBA‖² = (dᵀB)·AAᵀ·(dᵀB)ᵀ.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from safety_lens.errors import ModelError
from safety_lens.loading.architectures import architecture_of, blocks_of
from safety_lens.loading.live import active_adapters, base_model, saved_module
from safety_lens.loading.merging import Slot, base_layer, dequantised, fold_slot, is_plain_lora

WRITERS = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h")
READERS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value"),
    *("gate_proj", "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h"),
)
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "wpe")
HEADS = ("lm_head", "embed_out")
LAST = 10**6
"""The block number of the unembedding: it reads what every block has written."""


@dataclass(frozen=True, eq=False)
class Change:
    """ΔW = up @ down [d_out, d_in] in float64 of one matrix (down None: up is ΔW itself), and the matrix before it.

    weight: before training, in the dtype it has and as the model holds it (a copy only where it is quantised). block:
    −1 for embeddings, LAST for the head. writes: whether its output is added to the residual stream (else it reads from
    it). norm: the norm between it and the residual stream, None where there is none. offset: whether the gain of that
    norm is 1 + weight.
    """

    name: str
    block: int
    writes: bool
    up: Float[Tensor, "d_out r"]
    down: Float[Tensor, "r d_in"] | None
    weight: Float[Tensor, "d_out d_in"]
    norm: Any
    offset: bool

    @property
    def before(self) -> Float[Tensor, "d_out d_in"]:
        """The weight before training, in float64."""
        return self.weight.double()

    @property
    def squared_norm(self) -> float:
        """‖ΔW‖² (Frobenius)."""
        if self.down is None:
            return float(self.up.square().sum())
        return float(((self.up.T @ self.up) * (self.down @ self.down.T)).sum())

    def along(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        """‖d̂ᵀΔW‖² of a matrix that writes, ‖ΔW d̂‖² of one that reads, for unit vectors of the residual stream.

        A norm between the residual stream and the matrix turns the vectors as it turns activations: by its gain, and
        by its centring where it centres.
        """
        turned = self._through_norm(directions)
        if self.writes:
            part = turned @ self.up
            return part.square().sum(1) if self.down is None else ((part @ (self.down @ self.down.T)) * part).sum(1)
        if self.down is None:
            return (turned @ self.up.T).square().sum(1)
        part = turned @ self.down.T
        return ((part @ (self.up.T @ self.up)) * part).sum(1)

    def on(self, x: Float[Tensor, " d_in"]) -> Float[Tensor, " d_out"]:
        """ΔW x."""
        return self.up @ x if self.down is None else self.up @ (self.down @ x)

    def whole(self) -> Float[Tensor, "d_out d_in"]:
        """ΔW."""
        return self.up if self.down is None else self.up @ self.down

    def _through_norm(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        if self.norm is None:
            return directions
        if isinstance(self.norm, nn.LayerNorm):
            directions = directions - directions.mean(1, keepdim=True)
        gain = self.norm.weight.detach().to(directions) + (1 if self.offset else 0)
        turned = directions * gain
        units: Tensor = turned / turned.norm(dim=1, keepdim=True)
        return units


def adapter_changes(live: nn.Module) -> Iterator[Change]:
    """One change for every adapted or replaced matrix of a live model with adapters, active ones only.

    Raises:
        ModelError: adapters that are merged into the base, or that have no merged weight.
    """
    base = base_model(live)
    seen: set[int] = set()
    for name, module in base.named_modules():
        if id(module) in seen or not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        seen |= {id(inner) for inner in module.modules()}
        if getattr(module, "merged", False):
            raise ModelError(f"{name}: the adapter is merged into the base; call unmerge_adapter() before an audit")
        if place := _place(base, name):
            yield _adapted(base, name, module, place)


def checkpoint_changes(base: PreTrainedModel, tuned: PreTrainedModel) -> Iterator[Change]:
    """One change for every matrix of a full checkpoint that differs from the base (tied matrices once)."""
    after = dict(tuned.named_parameters())
    for key, parameter in base.named_parameters():
        name = key.removesuffix(".weight")
        place = _place(base, name)
        if place is None or not key.endswith(".weight"):
            continue
        old, new = (_upright(base, name, p.detach()) for p in (parameter, after[key]))
        change = _difference(new, old)
        if change.any():
            yield _change(base, name, place, change, None, old)


def _adapted(base: PreTrainedModel, name: str, module: Any, place: tuple[int, bool]) -> Change:
    if isinstance(module, ModulesToSaveWrapper):
        replaced: Any = saved_module(module)
        original: Any = module.original_module
        old, new = (_upright(base, name, m.weight.detach()) for m in (original, replaced))
        return _change(base, name, place, _difference(new, old), None, old)
    names = list(active_adapters(module))
    layer: Any = base_layer(module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module)
    old = _upright(base, name, dequantised(layer))
    if is_plain_lora(module, names):
        mine = [n for n in names if n in module.lora_A and not module.disable_adapters]
        ups = [module.scaling[n] * module.lora_B[n].weight.detach().double() for n in mine]
        downs = [module.lora_A[n].weight.detach().double() for n in mine]
        if mine:
            return _change(base, name, place, torch.cat(ups, 1), torch.cat(downs, 0), old)
    plain = nn.Linear(1, 1, bias=False, device="meta")
    plain.weight = nn.Parameter(torch.empty_like(dequantised(layer), dtype=torch.float64), requires_grad=False)
    with torch.no_grad():
        fold_slot(Slot(name, module, plain), names)
    return _change(base, name, place, _upright(base, name, plain.weight.detach()) - old.double(), None, old)


def _difference(new: Tensor, old: Tensor) -> Tensor:
    """new − old in float64, with no other copy."""
    return new.to(torch.float64, copy=True).sub_(old)


def _change(
    base: PreTrainedModel, name: str, place: tuple[int, bool], up: Tensor, down: Tensor | None, weight: Tensor
) -> Change:
    block, writes = place
    norm, offset = _norm(base, name, block, writes), architecture_of(base).offset_norms
    return Change(name, block, writes, up, down, weight, norm, offset)


def _place(base: PreTrainedModel, name: str) -> tuple[int, bool] | None:
    """(block, whether it writes into the residual stream) of a matrix by name; None for norms and other vectors."""
    leaf = name.rpartition(".")[2]
    if leaf in EMBEDDINGS:
        return -1, True
    if leaf in HEADS:
        return LAST, False
    if leaf not in WRITERS and leaf not in READERS:
        return None
    return next(int(part) for part in name.split(".") if part.isdigit()), leaf in WRITERS


def _norm(base: PreTrainedModel, name: str, block: int, writes: bool) -> Any:
    """The norm through which a matrix reads, or through which Gemma 2 and 3 pass what it writes."""
    body: Any = getattr(base, architecture_of(base).body)
    if block == -1:
        return None
    if block == LAST:
        return _first(body, "norm", "ln_f", "final_layer_norm")
    layer = blocks_of(base)[block]
    attention = any(part in ("self_attn", "attn", "attention") for part in name.split("."))
    around = hasattr(layer, "pre_feedforward_layernorm")
    if writes:
        return (
            _first(layer, "post_attention_layernorm" if attention else "post_feedforward_layernorm") if around else None
        )
    if attention:
        return _first(layer, "input_layernorm", "ln_1")
    return _first(layer, "pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")


def _first(owner: Any, *names: str) -> Any:
    norm = next(getattr(owner, name) for name in names if hasattr(owner, name))
    if isinstance(norm, ModulesToSaveWrapper):
        return norm.original_module
    return base_layer(norm)


def _upright(base: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """[d_out, d_in]: Conv1D keeps its weight the other way round, and an embedding writes its rows."""
    if name.rpartition(".")[2] in EMBEDDINGS or (type(base).__name__ == "GPT2LMHeadModel" and not name.endswith(HEADS)):
        return weight.T
    return weight
