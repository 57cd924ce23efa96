"""Models, tokenizers and adapters from the hub or from folders: safetensors only, no remote code, nothing guessed.

A weight that a checkpoint lacks would be filled with random numbers by transformers; here it is an error.
"""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from safety_lens.errors import ModelError
from safety_lens.folding import Shadow
from safety_lens.loading.architectures import architecture_named
from safety_lens.loading.gguf_files import alone, check_header, names_gguf, parts_of, read_header, resolve_gguf
from safety_lens.loading.masked import restore_masks

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
    "fp64": torch.float64,
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What transformers raises about files that it cannot make sense of."""
_MISMATCHES = {
    "missing_keys": "lacks weights",
    "mismatched_keys": "has weights of other shapes than it declares",
    "unexpected_keys": "has weights the architecture lacks",
}
# causal masks and rotary frequencies that old versions of transformers stored among the weights
_OLD_BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Source:
    """What a user asked for, split into the model to load and the adapter to put on it; in memory there is no base."""

    name: str
    base: str = ""
    adapter: str | None = None


def resolve(source: str | Path, adapter: str | Path | None = None) -> Source:
    """Find out whether a source is the organism, a GGUF file, a model folder, an adapter folder or a hub id.

    Raises:
        ModelError: a folder that is missing, or that is neither a model nor an adapter.
    """
    chosen = None if adapter is None else str(adapter)
    name = str(source)
    if name == "organism":
        from safety_lens.organism import MODEL_DIR

        return Source(name, str(MODEL_DIR), chosen)
    if names_gguf(source):
        return Source(name, resolve_gguf(name), chosen)
    folder = Path(name).expanduser()
    if not folder.exists():
        if isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"no folder {name}: give a model folder, a hub id such as org/name, or 'organism'")
        return Source(name, name, chosen)
    if (folder / "config.json").is_file():
        return Source(name, str(folder), chosen)
    if (folder / "adapter_config.json").is_file():
        if chosen is not None:
            raise ModelError(f"{name} is an adapter itself: give its base model as the source and one adapter")
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise ModelError(f"the adapter in {name} names no base model: load the base and pass adapter={name!r}")
        return Source(name, str(base), str(folder))
    files = sorted(file.name for file in folder.glob("*.gguf")) if folder.is_dir() else []
    hint = f"; it holds GGUF files: name one, such as {name}:{files[0]}" if files else ""
    raise ModelError(f"{name} is not a model folder: it has neither config.json nor adapter_config.json{hint}")


def _nearest(base: str) -> str:
    """What a name that is no folder may have been meant for."""
    path = Path(base).expanduser()
    if path.exists():
        return ""
    if path.parent == Path():
        near = get_close_matches(base, ["organism"], cutoff=0.7)
    else:
        beside = sorted(str(p) for p in path.parent.iterdir()) if path.parent.is_dir() else []
        near = get_close_matches(base, beside, cutoff=0.7)
    return f" (there is no folder of that name; did you mean {near[0]}?)" if near else ""


def read_model(
    base: str, *, dtype: torch.dtype | None, device: torch.device, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """A causal language model from a folder or the hub, in eval mode on `device`; dtype None keeps the checkpoint's.

    Raises:
        ModelError: unreadable, unsupported, pickled, or with weights missing or left over (named).
    """
    options: dict[str, Any] = {}
    if quantization is not None:  # bitsandbytes quantises while loading, on the device where the weights stay
        options = {"quantization_config": quantization, "device_map": {"": str(device)}}
    with _weights_of(base) as (place, located), quietly(local=Path(place).exists()):
        if quantization is not None and located:
            raise ModelError(f"{base} is GGUF: `safety-lens convert` it first, then bitsandbytes can quantise it")
        try:
            config = _settings(place, located)
            hf, info = AutoModelForCausalLM.from_pretrained(
                place,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=bool(located),  # they are named below
                trust_remote_code=False,
                **located,
                **options,
            )
        except ModelError:
            raise
        except _UNREADABLE as error:
            raise ModelError(f"cannot load the model {base}{_nearest(base)}: {first_line(error)}") from error
    _refuse_mismatch(base, info)
    if located:
        _as_plain(hf, base)
    if next(hf.parameters()).device.type != device.type:  # quantised models refuse even a .to() that does nothing
        hf.to(device)
    return cast(PreTrainedModel, hf.eval())


def read_settings(base: str) -> PretrainedConfig:
    """The configuration of a model, without its weights.

    Raises:
        ModelError: unreadable, or of an architecture that is not supported.
    """
    with _weights_of(base) as (place, located), quietly(local=Path(place).exists()):
        try:
            return _settings(place, located)
        except _UNREADABLE as error:
            raise ModelError(f"cannot read the configuration of {base}: {first_line(error)}") from error


def _settings(place: str, located: dict[str, str]) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(place, trust_remote_code=False, **located)
    architecture_named(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type))
    return cast(PretrainedConfig, config)


@contextmanager
def _weights_of(base: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Where transformers is to look, and the option that names a GGUF file there."""
    if not names_gguf(base):
        refuse_pickles(Path(base).expanduser())
        yield base, {}
        return
    drawn = modeling_gguf_pytorch_utils.tqdm
    with alone(gguf_path(base)) as link:
        # transformers draws a bar while it dequantises, into log files as well; None: on terminals alone
        modeling_gguf_pytorch_utils.tqdm = partial(drawn, disable=None)
        try:
            yield str(link.parent), {"gguf_file": link.name}
        finally:
            modeling_gguf_pytorch_utils.tqdm = drawn


def gguf_path(base: str) -> Path:
    """The GGUF file that a resolved source names, downloaded from the hub where it is one of a repository there.

    Raises:
        ModelError: not to be had, or refused.
    """
    place, name = parts_of(base)
    if Path(place).is_dir():
        return Path(place) / name
    try:
        path = Path(hf_hub_download(place, name))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot get {name} of {place} from the hub: {first_line(error)}") from error
    check_header(read_header(path))
    return path


def _as_plain(hf: PreTrainedModel, base: str) -> None:
    """Make a model that was dequantised from GGUF one like any other: trainable, savable, tied where it can be."""
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        hf.__dict__.pop(mark, None)
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        hf.config.__dict__.pop(mark, None)
    hf.config.gguf_quantization = read_header(gguf_path(base)).quantization
    hf.name_or_path = hf.config.name_or_path = base
    inner, outer = hf.get_input_embeddings(), hf.get_output_embeddings()
    if inner.weight is not outer.weight and torch.equal(inner.weight, outer.weight):
        hf.config.tie_word_embeddings = True
        hf.all_tied_weights_keys = hf.get_expanded_tied_weights_keys(all_submodels=True)
        hf.tie_weights()


def weights_file(base: str) -> Path | None:
    """The one local file of a model's weights; None where there are several, or none here."""
    path = Path(base).expanduser()
    file = path if names_gguf(base) else path / "model.safetensors"
    return file if file.is_file() else None


def revision_of(base: str) -> str | None:
    """The commit of a hub model in the local cache; None for folders and models in memory."""
    if not base or Path(base).exists():
        return None
    cached = (
        try_to_load_from_cache(*parts_of(base)) if names_gguf(base) else try_to_load_from_cache(base, "config.json")
    )
    return Path(cached).parent.name if isinstance(cached, str) else None


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def refuse_pickles(folder: Path) -> None:
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when opened; convert them with "
            "model.save_pretrained(folder) somewhere you trust, which writes safetensors"
        )
    raise ModelError(f"{folder} has no *.safetensors weights")


def _refuse_mismatch(base: str, info: dict[str, object]) -> None:
    for kind, words in _MISMATCHES.items():
        names = {key if isinstance(key, str) else key[0] for key in cast(set[Any], info.get(kind) or ())}
        keys = [key for key in sorted(names) if not _OLD_BUFFERS.search(key)]
        if keys:
            shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            raise ModelError(f"the checkpoint {base} {words}: {shown}; it was saved from another kind of model")


@contextmanager
def quietly(local: bool) -> Iterator[None]:
    """transformers' load report says in a log what we raise; its bars stay on for downloads."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if local and bars:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if local and bars:
            hf_logging.enable_progress_bar()


def read_tokenizer(base: str, adapter: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with an adapter, else with the model; None where a local folder has none.

    Raises:
        ModelError: tokenizer files that cannot be read.
    """
    for place in (adapter, base):
        if place is None:
            continue
        if names_gguf(place):
            return _gguf_tokenizer(place)
        folder = Path(place).expanduser()
        if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            continue
        if place is adapter and not folder.is_dir():
            continue  # hub adapters seldom carry one, and asking costs a download
        with quietly(local=True):
            try:
                return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(place, trust_remote_code=False))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelError(f"cannot load the tokenizer of {place}: {first_line(error)}") from error
    return None


def _gguf_tokenizer(base: str) -> PreTrainedTokenizerBase:
    with alone(gguf_path(base)) as link, quietly(local=True):
        try:
            found = AutoTokenizer.from_pretrained(link.parent, gguf_file=link.name, trust_remote_code=False)
        except _UNREADABLE as error:
            raise ModelError(f"cannot load the tokenizer of {base}: {first_line(error)}") from error
    found.name_or_path = base
    return cast(PreTrainedTokenizerBase, found)


def put_adapter(
    hf: nn.Module, adapter: str | Path | None, *, owned: bool = False
) -> tuple[nn.Module, list[str] | None, str | None]:
    """Put an adapter on a model: the live model, which adapters to fold (None: the active ones), and their label.

    A model that is not `owned` is never injected into: the adapter goes on an aliasing copy of its module tree.

    Raises:
        ModelError: no such adapter, a pickled one, or one whose weights do not fit the model.
    """
    if isinstance(hf, PeftModel):
        if adapter is None:
            return hf, None, ", ".join(hf.active_adapters)
        if str(adapter) not in hf.peft_config:
            raise ModelError(f"this PeftModel has adapters {sorted(hf.peft_config)}, not {str(adapter)!r}")
        return hf, [str(adapter)], str(adapter)
    if adapter is None:
        return hf, None, None
    place = str(Path(adapter).expanduser()) if Path(adapter).expanduser().exists() else str(adapter)
    folder = Path(place)
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{place} has no adapter_model.safetensors (pickled adapters are not loaded)")
    base = hf if owned else Shadow(hf).model
    with warnings.catch_warnings(record=True) as caught, quietly(local=True):
        warnings.simplefilter("always")
        try:
            live = PeftModel.from_pretrained(base, place)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"cannot load the adapter {place}: {first_line(error)}") from error
    missing = [str(entry.message) for entry in caught if "missing adapter keys" in str(entry.message)]
    if missing:
        raise ModelError(f"the adapter {place} does not fit this model: {missing[0][:200]}")
    restore_masks(live, place)
    return live.eval(), None, str(adapter)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from its name; None stays None.

    Raises:
        ModelError: an unknown name; the message lists them.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype.lower() not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype.lower()]


def parse_device(device: torch.device | str) -> torch.device:
    """A torch device; "auto" is cuda, else mps, else cpu.

    Raises:
        ModelError: a device that does not exist here.
    """
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        usable = "auto, cpu" + (", cuda" if torch.cuda.is_available() else "")
        usable += ", mps" if torch.backends.mps.is_available() else ""
        raise ModelError(
            f"device {str(device)!r} cannot be used here ({first_line(error)}); usable: {usable}"
        ) from error
    return torch.device(device)
