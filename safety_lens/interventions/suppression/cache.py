"""Work that is kept: one artifact folder per model, data, template and settings, never per name."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.artifacts import fingerprint, load_artifact, save_artifact, tokenizer_fingerprint
from safety_lens.errors import ArtifactError
from safety_lens.interventions.suppression.data import ArtifactPairs
from safety_lens.log import Measurement

VERSION = 1
"""Raised when what is cached is computed in another way."""


def cache_folder() -> Path:
    """SAFETY_LENS_CACHE, or `safety-lens` in XDG_CACHE_HOME (~/.cache)."""
    named = os.environ.get("SAFETY_LENS_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safety-lens"


def place(kind: str, model: HookedTransformer, pairs: ArtifactPairs, settings: Mapping[str, Any]) -> Path:
    """Where work is kept: a hash of weights, dtype, tokenizer, chat template, pairs with their parts, and settings."""
    identity = {
        "version": VERSION,
        "weights": fingerprint(model)["weights_sha256"],
        "dtype": str(model.cfg.dtype),
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
        "pairs": pairs.sha256,
        "settings": dict(settings),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / f"{kind}-{digest[:20]}"


@dataclass(frozen=True, eq=False)
class Kept:
    """What a piece of work leaves: tensors (safetensors), measurements (JSON lines), further facts (JSON)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def remembered(
    kind: str,
    model: HookedTransformer,
    pairs: ArtifactPairs,
    settings: Mapping[str, Any],
    work: Callable[[], Kept],
    *,
    cache: bool = True,
) -> Kept:
    """The work, done or recalled; written whole or not at all.

    Raises:
        ArtifactError: what was kept is damaged (the message names the folder to remove), or cannot be written.
    """
    if not cache:
        return work()
    path = place(kind, model, pairs, settings)
    if path.exists():
        try:
            held = load_artifact(path, model, kind=kind)
        except ArtifactError as error:
            raise ArtifactError(f"{error} (a cache: remove {path} and run again)") from error
        return Kept(held.tensors, held.measurements, held.manifest["facts"])
    done = work()
    arguments = json.loads(json.dumps(dict(settings), default=str))
    save_artifact(
        path,
        kind,
        model=model,
        tensors=done.tensors,
        measurements=done.measurements,
        arguments=arguments,
        extra={"facts": done.facts},
        overwrite=True,
    )
    return done
