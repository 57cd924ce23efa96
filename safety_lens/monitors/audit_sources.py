"""Whose weights an audit compares: the base, what was trained from it, and the refusal of anything else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from safety_lens.errors import ModelError, ModelMismatchError
from safety_lens.loading.gguf_files import names_gguf
from safety_lens.loading.hub import put_adapter, read_model, resolve
from safety_lens.loading.live import base_model, has_adapters, unwrapped
from safety_lens.monitors.weight_changes import Change, adapter_changes, checkpoint_changes


def changes_of(hf: PreTrainedModel, name: str, adapter: str | Path | nn.Module, other_base: bool) -> Iterator[Change]:
    if isinstance(adapter, nn.Module):
        live: Any = unwrapped(adapter)
        _same_model(hf, name, base_model(live), "the trained model in memory")
        return adapter_changes(live) if has_adapters(live) else checkpoint_changes(hf, live)
    folder = Path(adapter).expanduser()
    if (folder / "config.json").is_file() or names_gguf(adapter):
        tuned = read_model(resolve(adapter).base, dtype=None, device=torch.device("cpu"))
        _same_model(hf, name, tuned, str(adapter))
        return checkpoint_changes(hf, tuned)
    declared = _declared_base(folder)
    if declared is not None and not other_base and not _same_name(name, declared):
        raise ModelMismatchError(
            f"the adapter {adapter} was trained on {declared}, and this base is {name}; give its own base (or "
            "other_base=True where both have the same weights)"
        )
    try:
        live, _, _ = put_adapter(hf, adapter)
    except ModelError as error:
        if not folder.exists():
            raise ModelError(
                f"there is no folder {adapter}, and no adapter of that name could be had: {error}"
            ) from error
        raise ModelMismatchError(
            f"the adapter {adapter} was trained on {declared or 'another base'} and does not fit the base {name}: "
            f"{error}"
        ) from error
    return adapter_changes(live)


def _declared_base(folder: Path) -> str | None:
    """The base that an adapter folder names; None where it was trained from a model in memory, or is no folder."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return None
    return json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") or None


def read_base(base: str | Path | nn.Module) -> PreTrainedModel:
    if isinstance(base, nn.Module):
        inner = base_model(unwrapped(base))
        if isinstance(inner, PreTrainedModel):
            return inner
        raise ModelError(f"an audit compares Hugging Face weights; the base given is a {type(inner).__name__}")
    return read_model(resolve(base).base, dtype=None, device=torch.device("cpu"))


def name_of(base: str | Path | nn.Module, hf: PreTrainedModel) -> str:
    if not isinstance(base, nn.Module):
        return resolve(base).base
    return str(getattr(hf.config, "_name_or_path", "") or "") or f"a {type(hf).__name__} in memory"


def _same_name(ours: str, theirs: str) -> bool:
    """Equal places, or a folder and a hub id that end in the same name; a model in memory without a name fits any."""
    return ours.endswith(" in memory") or Path(ours).expanduser().name == Path(theirs).expanduser().name


def _same_model(hf: PreTrainedModel, name: str, other: Any, label: str) -> None:
    """Refuse another architecture or other shapes, and, below an adapter, other base weights."""
    theirs = str(getattr(other.config, "_name_or_path", "") or "") or label
    ours = {key: p.shape for key, p in hf.named_parameters()}
    if hf is other:
        return
    if has_adapters(other):
        mine = dict(hf.named_parameters())
        for key, p in other.named_parameters():
            q = mine.get(key.replace(".base_layer", "").replace(".original_module", ""))
            if q is not None and p.is_floating_point() and (q.shape != p.shape or not torch.equal(q.to(p), p)):
                raise ModelMismatchError(f"{label} ({theirs}) was trained on other weights than {name}: {key} differs")
        return
    if type(hf) is not type(other) or ours != {key: p.shape for key, p in other.named_parameters()}:
        raise ModelMismatchError(
            f"{label} ({theirs}, {type(other).__name__}) has other matrices than {name} ({type(hf).__name__}): "
            "it was not trained from this base"
        )
