"""From a Hugging Face model in memory to a HookedTransformer whose parameters are views of its tensors.

`build` makes the module tree without weights, `attach` points its parameters at the HF tensors, `check_parity` runs
both on the same ragged batch. No weight processing, ever: activations are those of the HF model.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.components import LayerNorm, RMSNorm
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformers import PreTrainedModel

from safety_lens.errors import WeightSyncError
from safety_lens.loading.architectures import architecture_of, rope_parameters, settings, weights
from safety_lens.loading.attention import FaithfulAttention, FaithfulGroupedQueryAttention, PerForward, RotaryTable
from safety_lens.loading.components import (
    BoundedPosEmbed,
    FaithfulLayerNorm,
    FusedGatedMLP,
    FusedRMSNorm,
    OffsetRMSNorm,
    ScaledEmbed,
)

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Largest RMS logit difference at load, in units of the logits' standard deviation; a wrong conversion is near 1.

transformers itself takes norms in float32, so float64 models differ by that much.
"""


def build(
    hf: PreTrainedModel, *, share: bool = True, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> HookedTransformer:
    """A HookedTransformer in eval mode, without gradients and without a tokenizer, that computes what `hf` computes.

    share: parameters are views of the HF tensors where dtype and device allow it, else copies. dtype and device
    default to the model's own (the dtype of most of its weights).

    Raises:
        ModelError: an architecture or a config flag that TransformerLens cannot represent.
    """
    config = HookedTransformerConfig.from_dict(
        {
            **settings(hf),
            "model_name": type(hf).__name__,
            "original_architecture": type(hf).__name__,
            "init_weights": False,
            "tokenizer_name": None,
            "dtype": dtype or main_dtype(hf),
            "device": str(device or main_device(hf)),
        }
    )
    with warnings.catch_warnings(), torch.device("meta"):
        # TransformerLens 3.9 announces 4.0's removal of this class on every construction; we pin below 4
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(config, tokenizer=None, move_to_device=False)
        _swap_modules(model, architecture_of(hf).offset_norms)
    model.setup()  # names the hook points of the modules that were swapped in
    attach(model, hf, share=share)
    return model.requires_grad_(False).eval()


def attach(model: HookedTransformer, hf: PreTrainedModel, *, share: bool = True) -> bool:
    """Point every parameter of `model` at the tensors of `hf`, and its rotary tables at `hf`'s rotary module.

    Returns: whether every weight is a view (False: `share` was off, or dtype or device differ, so copies were made).
    """
    dtype, device = model.cfg.dtype, torch.device(model.cfg.device)
    found = weights(hf, model.cfg)
    d_vocab = found["unembed.W_U"].shape[1]
    model.cfg.d_vocab = model.cfg.d_vocab_out = d_vocab  # resize_token_embeddings changes it
    all_views = share
    for name, old in list(model.named_parameters()):
        owner_name, _, leaf = name.rpartition(".")
        source = found.pop(name, None)
        if source is None:
            assert leaf.startswith(("b_", "_b_")) or leaf == "b", f"no tensor for {name} in {type(hf).__name__}"
            shape = (d_vocab,) if leaf == "b_U" else old.shape
            new = torch.zeros(shape, dtype=dtype, device=device)
        else:
            new = source.to(device=device, dtype=dtype)
            all_views = all_views and new.data_ptr() == source.data_ptr()
            new = new if share else new.clone()
        setattr(model.get_submodule(owner_name), leaf, nn.Parameter(new, requires_grad=False))
    assert not found, f"the hooked model has no place for {sorted(found)}"
    _attach_buffers(model, hf, device)
    return all_views


def _attach_buffers(model: HookedTransformer, hf: PreTrainedModel, device: torch.device) -> None:
    rotary = getattr(getattr(hf, architecture_of(hf).body), "rotary_emb", None)
    tables: dict[str | None, RotaryTable] = {}
    for index, block in enumerate(model.blocks):
        attn = block.attn
        attn.mask = torch.empty((0, 0), dtype=torch.bool, device=device)
        attn.IGNORE = torch.tensor(-torch.inf, device=device)
        if rotary is None:
            continue
        kind, _ = rope_parameters(hf.config, index)
        table = tables.setdefault(kind, RotaryTable(rotary, kind, model.cfg.n_ctx))
        attn.table = table
        attn.rotary_cos, attn.rotary_sin = table.upto(1, model.embed.W_E)


def _swap_modules(model: HookedTransformer, offset_norms: bool) -> None:
    shared: dict[str, PerForward] = {}
    for index, block in enumerate(model.blocks):
        grouped = model.cfg.n_key_value_heads is not None
        attention = FaithfulGroupedQueryAttention if grouped else FaithfulAttention
        block.attn = attention(model.cfg, block.attn.attn_type, index)
        block.attn.shared = shared.setdefault(block.attn.attn_type, PerForward())
        if type(block.mlp) is GatedMLP:
            block.mlp = FusedGatedMLP(model.cfg)
    for name, module in list(model.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if type(module) is LayerNorm:
            setattr(model.get_submodule(owner), leaf, FaithfulLayerNorm(model.cfg, module.length))
        elif type(module) is RMSNorm:
            norm = OffsetRMSNorm if offset_norms else FusedRMSNorm
            setattr(model.get_submodule(owner), leaf, norm(model.cfg, module.length))
    if offset_norms:
        model.embed = ScaledEmbed(model.cfg)
    if model.cfg.positional_embedding_type == "standard":
        model.pos_embed = BoundedPosEmbed(model.cfg)


def main_dtype(hf: nn.Module) -> torch.dtype:
    """The floating dtype of most of a model's weights."""
    count: Counter[torch.dtype] = Counter()
    for parameter in hf.parameters():
        if parameter.is_floating_point():
            count[parameter.dtype] += parameter.numel()
    return count.most_common(1)[0][0]


def main_device(hf: nn.Module) -> torch.device:
    """The device of a model's first parameter; models spread over several are refused before this is asked."""
    return next(hf.parameters()).device


# --- parity ---------------------------------------------------------------------------------------------------------


def check_parity(model: HookedTransformer, hf: nn.Module) -> None:
    """Compare both models' logits on a left-padded ragged batch with explicit positions.

    `hf` is the model that was loaded, adapters live; it runs in eval mode without its hooks and is left as found.

    Raises:
        WeightSyncError: the RMS difference is above tolerance; the message has both numbers.
    """
    tokens, mask = _ragged_batch(model)
    with torch.no_grad(), as_found(hf):
        ours = model(tokens, attention_mask=mask).float()
        device = main_device(hf)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        theirs = hf(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            use_cache=False,
        ).logits.to(ours)
    keep = mask.bool()
    gap = (ours - theirs)[keep].pow(2).mean().sqrt()
    relative = float(gap / theirs[keep].std())
    tolerance = max(_TOLERANCE[model.cfg.dtype], _TOLERANCE[main_dtype(hf)])
    if not relative <= tolerance:  # NaN must fail too
        raise WeightSyncError(
            f"the hooked {model.cfg.model_name} does not reproduce the model it was made from: RMS logit difference "
            f"{relative:.3g} of the logits' standard deviation, tolerance {tolerance:.3g}. Weights changed while "
            "loading, or this config has a setting that Safety Lens does not know; please report it"
        )


def _ragged_batch(model: HookedTransformer) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Three rows of random tokens with left padding, long enough to leave a short attention window."""
    window = model.cfg.window_size or 0
    width = min(model.cfg.n_ctx, window + 8 if 8 <= window <= 56 else 16)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (3, width), generator=generator)
    mask = torch.ones_like(tokens)
    for row, pad in enumerate((0, width // 4, width // 2)):
        mask[row, :pad] = 0
    return tokens.to(model.cfg.device), mask.to(model.cfg.device)


_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode with its own hooks set aside, and put modes, hooks and RNG back whatever happens."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    hooks: list[dict[str, Any]] = [{name: getattr(module, name) for name in _HOOK_DICTS} for module in modules]
    with torch.random.fork_rng(devices=[]):
        try:
            for module in modules:
                module.training = False
                for name in _HOOK_DICTS:
                    setattr(module, name, type(getattr(module, name))())
            yield
        finally:
            for module, mode, found in zip(modules, modes, hooks, strict=True):
                module.training = mode
                for name, value in found.items():
                    setattr(module, name, value)
