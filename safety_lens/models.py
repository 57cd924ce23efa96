"""The seam: any supported model as a HookedTransformer. Nothing else in the project loads models.

`load_model` reads hub ids, local folders and models in memory, with or without a PEFT adapter, and returns
TransformerLens' own HookedTransformer whose activations are those of the Hugging Face model.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformer_lens import HookedTransformer
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from safety_lens.artifacts import check_place
from safety_lens.errors import ArtifactError, HookNameError, ModelError
from safety_lens.folding import SHADOWS, Shadow
from safety_lens.loading.architectures import architecture_named
from safety_lens.loading.hooked import build, check_parity, main_device
from safety_lens.loading.hub import (
    Source,
    first_line,
    parse_device,
    parse_dtype,
    put_adapter,
    read_model,
    read_tokenizer,
    resolve,
    revision_of,
)
from safety_lens.loading.live import base_model, has_adapters, has_quantised, unwrapped
from safety_lens.loading.refusals import refuse_unreadable
from safety_lens.progress import progressed
from safety_lens.streaming import stream_blocks
from safety_lens.types import FwdHook, NamedHook

POINTS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_post": "mlp.hook_post",
    "z": "attn.hook_z",
}
"""Short names of hook points, once per block."""

_NEEDS_FLAG = {
    "attn.hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}


@dataclass(frozen=True)
class Origin:
    """Where a hooked model came from; set by `load_model` as `model.origin`.

    name: hub id, folder or "in memory". revision: hub commit where known. architecture: the HF class name.
    adapter: the adapter(s) whose effect the weights include. stop_tokens: ids that end a turn, from the generation
    settings. quantization: of the GGUF file that the weights were dequantised from, such as Q4_K_M.
    """

    name: str
    revision: str | None
    architecture: str
    config: PretrainedConfig = field(repr=False)
    adapter: str | None
    stop_tokens: tuple[int, ...] = field(default=(), compare=False)
    quantization: str | None = None


def load_model(
    source: str | Path | nn.Module = "organism",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "auto",
    share: bool = True,
    check: bool = True,
    stream: bool = False,
) -> HookedTransformer:
    """Load any supported model as a HookedTransformer whose activations equal Hugging Face's, for evaluation.

    `model.tokenizer` is the one given or the folder's, else None; `model.origin` is an Origin; `model.cfg.n_ctx` is
    the longest input that is exact. Gemma's `W_E` and norm gains are the checkpoint's own (not scaled, around zero).

    Args:
        source: "organism" (the model shipped with Safety Lens), a hub id, a local folder (of a model, or of an adapter
            that names its base), a GGUF file (FILE.gguf, FOLDER:FILE.gguf or HUB_ID:FILE.gguf; dequantised at every
            load, see `save_model`), or a PreTrainedModel or PeftModel in memory, which is never changed.
        tokenizer: Replaces the folder's own.
        adapter: Folder or hub id of a PEFT adapter; for a PeftModel in memory the name of one of its adapters.
        dtype: None keeps the model's own (float32 for GGUF).
        device: "auto" is cuda, else mps, else cpu; a model in memory stays where it is.
        share: Parameters are views of the HF tensors, so full fine-tuning is seen at once and loading costs no memory
            (for adapters see folding.LoraFolder); a dtype or device other than the model's own makes copies.
        check: Compare logits with the HF model on a ragged batch (for a bitsandbytes model: with its dequantised
            weights, if they are all of one dtype).
        stream: Merged and dequantised weights are held one block at a time and made again whenever a block runs: for
            adapters and bitsandbytes models whose whole copy does not fit into memory next to them.

    Raises:
        ModelError: a source that cannot be read, or a model that TransformerLens cannot represent, by name.
        WeightSyncError: the hooked model does not reproduce the HF model.
    """
    wanted = parse_dtype(dtype)
    if isinstance(source, nn.Module):
        target = None if str(device) == "auto" else parse_device(device)
        found = Source("in memory", adapter=None if adapter is None else str(adapter))
        model = _hook(unwrapped(source), found, dtype=wanted, device=target, share=share, check=check, stream=stream)
    else:
        found = resolve(source, adapter)
        hf = read_model(found.base, dtype=wanted, device=parse_device(device))
        progressed(f"loading {source}: steps", 1, 3)  # then: hooks, and logits compared with those of Hugging Face
        model = _hook(hf, found, dtype=wanted, device=None, share=share, check=check, stream=stream)
        tokenizer = tokenizer or read_tokenizer(found.base, found.adapter)
    _give_tokenizer(model, tokenizer)
    return model


def _hook(
    hf: nn.Module,
    found: Source,
    *,
    dtype: torch.dtype | None,
    device: torch.device | None,
    share: bool,
    check: bool,
    stream: bool,
) -> HookedTransformer:
    if stream and not (share and (device is None or device == main_device(hf))):
        raise ModelError("stream=True keeps no copies: it cannot be had with share=False or on another device")
    refuse_unreadable(hf)
    architecture_named(type(base_model(hf)).__name__)
    live, adapters, label = put_adapter(hf, found.adapter, owned=bool(found.base))
    shadow = Shadow(live, adapters, dtype, stream) if has_adapters(live) else None
    plain = live if shadow is None else shadow.model
    model = build(plain, share=share, dtype=dtype, device=device)
    if stream:
        stream_blocks(model, shadow)
    if shadow is not None:
        SHADOWS[model] = shadow
    # the live model is not run where it has other adapters active, or where running it repacks its weights
    reference = live if adapters is None and not has_quantised(live) else plain
    if check and (reference is live or len({p.dtype for p in plain.parameters()}) == 1):
        check_parity(model, reference)
    model.origin = Origin(
        found.name, revision_of(found.base), type(plain).__name__, plain.config, label, _stop_tokens(plain),
        getattr(plain.config, "gguf_quantization", None),
    )  # fmt: skip
    return model


def _give_tokenizer(model: HookedTransformer, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Plain assignment: TransformerLens' set_tokenizer loads another copy from disk or hub and changes its settings."""
    model.tokenizer = tokenizer
    if tokenizer is not None:  # what model.to_tokens and model.to_str_tokens ask for
        model.cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0
        model.cfg.default_prepend_bos = model.cfg.default_prepend_bos and tokenizer.bos_token is not None


def _stop_tokens(hf: nn.Module) -> tuple[int, ...]:
    """End-of-text ids of the generation settings: chat models often name an end of turn that the tokenizer does not."""
    ids = getattr(getattr(hf, "generation_config", None), "eos_token_id", None)
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (int(ids),)


def load_hf(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "auto",
    quantization: BitsAndBytesConfig | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase | None]:
    """The Hugging Face model and tokenizer of a hub id, folder or "organism", for training and for comparison.

    Only safetensors are read and no remote code runs. With an adapter the model is a PeftModel. The tokenizer is None
    where the folder has none. quantization: how bitsandbytes is to hold the base, for QLoRA.

    Raises:
        ModelError: see load_model.
    """
    found = resolve(source, adapter)
    hf = read_model(found.base, dtype=parse_dtype(dtype), device=parse_device(device), quantization=quantization)
    live, _, _ = put_adapter(hf, found.adapter, owned=True)
    return live, read_tokenizer(found.base, found.adapter)


def save_model(source: str | Path, out: str | Path, *, dtype: torch.dtype | str | None = None) -> Path:
    """Write a model as a folder of safetensors with its tokenizer; an adapter is merged into its base.

    Args:
        source: As for `load_model`; of use for a GGUF file, which is dequantised at every load.
        out: Folder to write; all of it appears at once.
        dtype: None keeps the model's own, which is float32 for a GGUF file.

    Raises:
        ModelError: see load_model.
        ArtifactError: the place is taken, or cannot be written.
    """
    out = Path(out)
    check_place(out, "model")
    hf, tokenizer = load_hf(source, dtype=dtype, device="cpu")
    plain = hf.merge_and_unload() if isinstance(hf, PeftModel) else hf
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.tmp-", dir=out.parent) as temporary:
            content = Path(temporary) / out.name
            plain.save_pretrained(content)
            if tokenizer is not None:
                tokenizer.save_pretrained(content)
            content.replace(out)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write {out}: {first_line(error)}; nothing was left there") from error
    return out


def hooks_at(model: HookedTransformer, point: str = "resid_post", layers: Sequence[int] | None = None) -> list[str]:
    """Full hook names of one point in every block, or in the blocks given (negative counts from the end).

    point: resid_pre, resid_mid, resid_post, attn_out, mlp_out, mlp_post (after the activation), z (per head), or
    TransformerLens' spelling such as "mlp.hook_post", "attn.hook_z", "hook_z".

    Raises:
        HookNameError: no such point or block.
    """
    suffix = _suffix(model, point)
    n_layers = model.cfg.n_layers
    wanted = range(n_layers) if layers is None else layers
    outside = [layer for layer in wanted if not -n_layers <= layer < n_layers]
    if outside:
        raise HookNameError(f"block {outside[0]} was asked for, but this model has {n_layers}: 0 to {n_layers - 1}")
    return [f"blocks.{layer % n_layers}.{suffix}" for layer in wanted]


def _suffix(model: HookedTransformer, point: str) -> str:
    inside = {name.split(".", 2)[2] for name in model.hook_dict if name.startswith("blocks.0.")}
    candidates = (POINTS.get(point, point), point, f"attn.{point}", f"mlp.{point}")
    for candidate in candidates:
        if candidate in inside:
            return candidate
    if point == "resid_mid":
        raise HookNameError(f"{model.cfg.model_name} runs attention and MLP in parallel: there is no resid_mid")
    raise HookNameError(f"no hook point {point!r} in a block; short names are {', '.join(POINTS)}")


def check_hooks(model: HookedTransformer, names: Iterable[str]) -> None:
    """Refuse hook names that the model does not have, or that would never fire.

    Raises:
        HookNameError: names the nearest existing hook and the model's layer count.
    """
    for name in names:
        if name not in model.hook_dict:
            near = difflib.get_close_matches(str(name), list(model.hook_dict), n=1, cutoff=0.0)
            raise HookNameError(
                f"no hook named {name!r}: the nearest is {near[0]!r}; this model has {model.cfg.n_layers} blocks, "
                f"0 to {model.cfg.n_layers - 1}"
            )
        for ending, flag in _NEEDS_FLAG.items():
            if name.endswith(ending) and not getattr(model.cfg, flag):
                raise HookNameError(f"hook {name!r} fires only with model.cfg.{flag}, which is off")


def named_hooks(model: HookedTransformer, hooks: Iterable[FwdHook]) -> list[NamedHook]:
    """Forward hooks with every filter of names replaced by the names it lets through, all of them checked.

    Raises:
        HookNameError: a name that the model does not have, or a filter that lets none through.
    """
    out: list[NamedHook] = []
    for name, fn in hooks:
        names = [name] if isinstance(name, str) else [at for at in model.hook_dict if name(at)]
        if not names:
            raise HookNameError(f"no hook of this model passes the filter {getattr(name, '__name__', name)}")
        check_hooks(model, names)
        out += [(at, fn) for at in names]
    return out
