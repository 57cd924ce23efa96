"""Artifacts: folders of manifest.json, safetensors and JSON lines that say where they come from.

An artifact is written to a temporary folder beside its place and renamed, so a reader sees all of it or nothing.
Loading checks kind, schema, file hashes and, where a model is given, that it is the model the artifact was made with.
"""

import glob
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safety_lens.errors import ArtifactError, ModelMismatchError
from safety_lens.log import Measurement, read_measurements, write_measurements

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer

SCHEMA = 1
SAMPLE = 65_536  # values of each tensor that enter a fingerprint
MANIFEST, MEASUREMENTS = "manifest.json", "measurements.jsonl"
FROZEN = "frozen_entries.safetensors"
"""Next to an adapter: which entries its update leaves alone, and the sparse matrix that takes the rest of B·A back."""
UNLISTED = {
    "monitor": ("figures/drift-*.png", "figures/*/drift-*.png"),
    "neuron-drift": ("figures/neurons-*.png", "figures/*/neurons-*.png"),
    "groups": tuple(f"halves/{name}" for name in (MANIFEST, MEASUREMENTS, "groups.safetensors")),
}
"""Patterns of files in subfolders, per kind of artifact: manifests of version 0.1 list the top level alone."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """What an artifact folder holds. tensors: key → tensor, from the one safetensors file of its kind."""

    kind: str
    manifest: dict[str, Any]
    tensors: "dict[str, Tensor]"
    measurements: list[Measurement]


def fingerprint(model: "HookedTransformer") -> dict[str, Any]:
    """Identity of a model: name, revision, adapter, quantisation (of a GGUF file), size, and a hash of its weights.

    The hash covers name, shape and up to 65 536 evenly spaced values of every parameter, rounded to bfloat16: the same
    checkpoint gives the same hash in float32 and bfloat16, and a fine-tune or a folded adapter gives another.
    """
    import torch

    from safety_lens.streaming import whole_parameters

    digest = hashlib.sha256()
    for name, p in whole_parameters(model):
        flat = p.detach().reshape(-1)
        step = -(-flat.numel() // SAMPLE) if flat.numel() else 1
        values = flat[::step].to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{name}{tuple(p.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    origin = getattr(model, "origin", None)
    quantization = getattr(origin, "quantization", None)
    return {
        "name": getattr(origin, "name", None) or model.cfg.model_name,
        "revision": getattr(origin, "revision", None),
        "adapter": getattr(origin, "adapter", None),
        "architecture": model.cfg.original_architecture,
        "n_layers": model.cfg.n_layers,
        "d_model": model.cfg.d_model,
        "weights_sha256": digest.hexdigest(),
        **({"quantization": quantization} if quantization else {}),
    }


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any]:
    """Class, vocabulary size, and hashes of vocabulary and chat template (null where there is none)."""
    if tokenizer is None:
        return {"class": None, "vocab_sha256": None, "chat_template_sha256": None}
    vocab = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    template = tokenizer.chat_template
    return {
        "class": type(tokenizer).__name__,
        "vocab_size": len(tokenizer),
        "vocab_sha256": hashlib.sha256(vocab.encode()).hexdigest(),
        "chat_template_sha256": None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("safety-lens-tl", "torch", "transformers", "transformer-lens", "peft", "scikit-learn", "numpy", "scipy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def save_artifact(
    path: str | Path,
    kind: str,
    *,
    model: "HookedTransformer | None" = None,
    tensors: "Mapping[str, Tensor] | None" = None,
    measurements: Sequence[Measurement] = (),
    arguments: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    attach: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an artifact folder atomically.

    Args:
        kind: "directions", "activations", …; tensors go to `<kind>.safetensors`.
        arguments: every setting that shaped the content; must be JSON.
        extra: further manifest entries.
        attach: writes further files (plots, kept activations) into the folder before it is sealed.
        overwrite: replace an artifact of this kind that is already there, if it holds no other files.

    Raises:
        ArtifactError: the place is taken, or cannot be written.
    """
    path = Path(path)
    check_place(path, kind, overwrite)
    manifest = _manifest(kind, model, arguments, extra)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    try:
        if attach:
            attach(temporary)
        _write_content(temporary, kind, tensors or {}, measurements, manifest)
        temporary.chmod(0o755)
        check_place(path, kind, overwrite)  # again: somebody may have used the folder in the meantime
        _move_into_place(temporary, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def seal(
    folder: Path,
    kind: str,
    *,
    files: Sequence[str],
    model: "HookedTransformer | None" = None,
    measurements: Sequence[Measurement] = (),
    arguments: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Make a folder that long work has filled bit by bit an artifact: the manifest comes last and at once.

    Args:
        files: Patterns of the files that belong to it; what else lies in the folder does not enter the manifest.

    Raises:
        ArtifactError: it cannot be written.
    """
    try:
        _write_content(folder, kind, {}, measurements, _manifest(kind, model, arguments, extra), files)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}; what is there is kept") from error


def _manifest(
    kind: str,
    model: "HookedTransformer | None",
    arguments: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": kind,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "arguments": dict(arguments or {}),
        **dict(extra or {}),
    }
    if model is not None:
        manifest |= {"model": fingerprint(model), "tokenizer": tokenizer_fingerprint(model.tokenizer)}
    return manifest


def check_place(path: Path, kind: str, overwrite: bool = False, unlisted: Sequence[str] = ()) -> None:
    """Refuse a place that cannot be written, before any long work is done for it.

    Args:
        kind: Kind of artifact that is to be written; no other kind is replaced.
        overwrite: Accept an artifact of this kind, if every file in it is in its manifest or among the patterns.
        unlisted: Patterns of further files that belong to an artifact of this kind.

    Raises:
        ArtifactError: it holds something else (foreign files are named), or its nearest existing parent cannot be
            written.
    """
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ArtifactError(f"cannot write {path}: {parent} is not a folder that can be written; choose another --out")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} exists and is not an artifact; choose another --out")
    if not overwrite:
        raise ArtifactError(f"{path} already holds an artifact; choose another --out or pass --overwrite")
    try:
        listed = read_manifest(path, kind).get("files")
    except ArtifactError as error:
        raise ArtifactError(
            f"--overwrite replaces {kind!r} artifacts alone, and {error}; choose another --out"
        ) from error
    known = [MANIFEST, *(map(glob.escape, listed) if isinstance(listed, dict) else ())]
    refuse_foreign(path, [*known, *UNLISTED.get(kind, ()), *unlisted])


def refuse_foreign(folder: Path, known: Sequence[str]) -> None:
    """Refuse a folder that is to be replaced where it holds files that are not known, and name them.

    Args:
        known: Patterns of the files that may be removed, relative to the folder; `*` stays within one name.

    Raises:
        ArtifactError: a file or a link that no pattern matches.
    """
    foreign = [name for name in _files_below(folder) if not _matches(name, known)]
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise ArtifactError(
            f"--overwrite would delete what this command did not write in {folder}: {shown}; move these files away or"
            " choose another --out"
        )


def _files_below(folder: Path) -> list[str]:
    """Files and links below a folder, relative to it."""
    below = [(Path(at), *names) for at, *names in os.walk(folder)]
    names = [at / name for at, folders, files in below for name in (*files, *folders)]
    return sorted(p.relative_to(folder).as_posix() for p in names if p.is_symlink() or not p.is_dir())


def _matches(name: str, patterns: Sequence[str]) -> bool:
    path = PurePosixPath(name)
    return any(len(path.parts) == len(PurePosixPath(p).parts) and path.match(p) for p in patterns)


def _write_content(
    folder: Path,
    kind: str,
    tensors: "Mapping[str, Tensor]",
    measurements: Sequence[Measurement],
    manifest: dict[str, Any],
    belonging: Sequence[str] | None = None,
) -> None:
    from safetensors.torch import save_file

    if tensors:
        save_file(
            {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, folder / f"{kind}.safetensors"
        )
    write_measurements(folder / MEASUREMENTS, measurements)
    names = [name for name in _files_below(folder) if belonging is None or _matches(name, belonging)]
    manifest["files"] = {name: sha256_of(folder / name) for name in names if name != MANIFEST}
    unfinished = folder / f".{MANIFEST}"
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / MANIFEST)


def _move_into_place(temporary: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        temporary.replace(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent)) / path.name
    path.replace(old)
    temporary.replace(path)
    shutil.rmtree(old.parent)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_artifact(path: str | Path, model: "HookedTransformer | None" = None, *, kind: str | None = None) -> Artifact:
    """Read an artifact folder, checking that it is whole, of a known schema, and made with `model` where one is given.

    Raises:
        ArtifactError: missing, of another kind or schema, or changed since it was written.
        ModelMismatchError: made with another model; the message says what differs.
    """
    path = Path(path)
    manifest = read_manifest(path, kind)
    found = manifest.get("kind")
    for name, expected in manifest.get("files", {}).items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{path} is damaged: {name} is missing; make the artifact again")
        if sha256_of(file) != expected:
            raise ArtifactError(f"{path} is damaged: {name} is not what was written; make the artifact again")
    if model is not None:
        _check_model(path, manifest, model)
    tensor_file = path / f"{found}.safetensors"
    tensors: dict[str, Tensor] = {}
    if tensor_file.is_file():
        from safetensors.torch import load_file

        tensors = load_file(tensor_file)
    return Artifact(str(found), manifest, tensors, read_measurements(path / MEASUREMENTS))


def read_manifest(path: Path, kind: str | None = None) -> dict[str, Any]:
    """What an artifact folder says of itself; its files are not looked at. kind: what it must be.

    Raises:
        ArtifactError: no artifact, or one of another kind or schema.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a folder; an artifact is a folder with a {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} has no {MANIFEST}: it is not an artifact, or its writing was cut off") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path / MANIFEST} is not JSON ({error}); make the artifact again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        raise ArtifactError(f"{path} has schema {schema!r}; this version reads schema {SCHEMA}")
    if kind is not None and manifest.get("kind") != kind:
        raise ArtifactError(f"{path} holds {manifest.get('kind')!r}, not {kind!r}")
    return manifest


def _check_model(path: Path, manifest: dict[str, Any], model: "HookedTransformer") -> None:
    theirs, ours = manifest.get("model"), fingerprint(model)
    if theirs is None:
        raise ModelMismatchError(f"{path} does not say which model it was made with")
    if theirs["d_model"] != ours["d_model"] or theirs["n_layers"] != ours["n_layers"]:
        raise ModelMismatchError(
            f"{path} was made with {theirs['name']} (d_model {theirs['d_model']}, {theirs['n_layers']} layers); this"
            f" model is {ours['name']} (d_model {ours['d_model']}, {ours['n_layers']} layers)"
        )
    if theirs["weights_sha256"] != ours["weights_sha256"]:
        raise ModelMismatchError(
            f"{path} was made with {theirs['name']} (weights {theirs['weights_sha256'][:12]}); this model is"
            f" {ours['name']} (weights {ours['weights_sha256'][:12]}): same shape, other weights"
        )
