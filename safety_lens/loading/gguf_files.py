"""Model files in GGUF: how a source names one, and what its header says before anything heavy is imported.

A file that transformers could not load, or would load as another model than the one that was stored, is refused from
its header. Weights are not read here: `hub.read_model` lets transformers dequantise them.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safety_lens.errors import ModelError

ENDING = ".gguf"
ARCHITECTURES = ("gemma2", "gemma3", "llama", "qwen2", "qwen3")
"""GGUF's names of the architectures that are read; `llama` is that of Mistral too."""

_HEAD_WIDTHS = {"gemma2": 256, "gemma3": 256, "qwen3": 128}
"""Width of a head where transformers takes it, or the attention scale, from its defaults and not from the file."""
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_COUNTS = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the table of tensors: its shape as in torch, its type and its offset as GGUF numbers them."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata of a GGUF file, with the length of an array in its place, and its table of tensors."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_start: int
    size: int

    @property
    def quantization(self) -> str:
        """Name of the file's quantisation such as Q4_K_M; where the file does not say, the type of most weights."""
        import gguf

        try:
            return gguf.LlamaFileType(self.metadata["general.file_type"]).name.split("_", 1)[1]
        except (KeyError, ValueError):
            weights: Counter[int] = Counter()
            for tensor in self.tensors:
                weights[tensor.type] += prod(tensor.shape)
            return str(gguf.GGMLQuantizationType(weights.most_common(1)[0][0]).name)


def names_gguf(source: str | Path) -> bool:
    """Whether a source means a GGUF file: FILE.gguf, FOLDER:FILE.gguf or HUB_ID:FILE.gguf."""
    return str(source).lower().endswith(ENDING) and not Path(source).expanduser().is_dir()


def parts_of(source: str) -> tuple[str, str]:
    """Folder or hub id, and file name, of a source that names a GGUF file."""
    path = Path(source).expanduser()
    place, colon, name = source.rpartition(":")
    if path.is_file() or not colon or not place:
        return str(path.parent), path.name
    return str(Path(place).expanduser()) if Path(place).expanduser().is_dir() else place, name


def resolve_gguf(source: str) -> str:
    """The path of a local GGUF file, checked, or `HUB_ID:FILE` as it is.

    Raises:
        ModelError: no such file, or one that is refused (see `read_header`).
    """
    place, name = parts_of(source)
    folder = Path(place)
    if folder.is_dir():
        if not (folder / name).is_file():
            there = ", ".join(sorted(file.name for file in folder.glob(f"*{ENDING}"))) or "none"
            raise ModelError(f"no file {folder / name}; GGUF files in that folder: {there}")
        check_header(read_header(folder / name))
        return str(folder / name)
    if ":" not in source or place.startswith((".", "/", "~")) or place.count("/") > 1:
        raise ModelError(f"no file {source}: give FILE.gguf, FOLDER:FILE.gguf or HUB_ID:FILE.gguf")
    return source


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """A link in a folder of its own: transformers reads settings of other models that lie next to a file."""
    with TemporaryDirectory() as folder:
        link = Path(folder) / file.name
        link.symlink_to(file.absolute())
        yield link


# --- the header -----------------------------------------------------------------------------------------------------


class _Cursor:
    """Reads forward through a file and refuses to go past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def skip(self, size: int) -> int:
        """Where the next `size` bytes begin; they are passed over."""
        start = self.at
        if size < 0 or start + size > len(self.data):
            raise ModelError(f"{self.path} is cut short or damaged: its header goes on beyond its end")
        self.at += size
        return start

    def take(self, layout: str) -> Any:
        start = self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.data, start)[0]

    def text(self) -> str:
        size = self.take("<Q")
        start = self.skip(size)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path} is damaged: a name in its header is not UTF-8") from error

    def value(self) -> Any:
        """A metadata value; an array as its length."""
        kind = self.take("<I")
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        inner, count = (self.take("<I"), self.take("<Q")) if kind == _ARRAY else (None, 0)
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(count):
                self.skip(self.take("<Q"))
        else:
            raise ModelError(f"{self.path} is damaged: its metadata have a value of unknown type {inner or kind}")
        return count

    def tensor(self) -> GgufTensor:
        name, dims = self.text(), self.take("<I")
        if not 1 <= dims <= 4:
            raise ModelError(f"{self.path} is damaged: its tensor {name!r} has {dims} dimensions")
        shape = tuple(self.take("<Q") for _ in range(dims))
        return GgufTensor(name, shape[::-1], self.take("<I"), self.take("<Q"))


def read_header(path: Path) -> GgufHeader:
    """Read metadata and the table of tensors.

    Raises:
        ModelError: no GGUF file of version 2 or 3, or one that is cut short or damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(cursor: _Cursor) -> GgufHeader:
    cursor.skip(4)
    version = cursor.take("<I")
    if version not in (2, 3):
        raise ModelError(f"{cursor.path} is GGUF version {version}; versions 2 and 3 are read (little-endian)")
    n_tensors, n_values = cursor.take("<Q"), cursor.take("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.text()
        metadata[key] = cursor.value()
    tensors = tuple(cursor.tensor() for _ in range(n_tensors))
    step = metadata.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1:
        raise ModelError(f"{cursor.path} is damaged: general.alignment is {step!r}")
    return GgufHeader(cursor.path, metadata, tensors, -(-cursor.at // step) * step, len(cursor.data))


def check_header(header: GgufHeader) -> None:
    """Refuse a file that is no whole language model with a tokenizer, of an architecture that is read faithfully.

    Raises:
        ModelError: names what is wrong and what to do.
    """
    _refuse_other_kinds(header)
    _refuse_unfaithful(header)
    _refuse_sizes(header)
    _refuse_cut(header)


def _refuse_other_kinds(header: GgufHeader) -> None:
    path, said = header.path, header.metadata
    architecture, kind = said.get("general.architecture"), said.get("general.type", "model")
    if "controlvector" in (architecture, kind):
        raise ModelError(f"{path} is a control vector, not a model: give it as --directions next to a --model")
    if kind == "adapter":
        raise ModelError(f"{path} is an adapter, not a model: load its base and a PEFT adapter (adapter_config.json)")
    if said.get("split.count", 1) not in (0, 1):
        raise ModelError(f"{path} is one of {said['split.count']} parts: join them with llama-gguf-split --merge")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path} is of architecture {architecture!r}; of GGUF files, these are read: {', '.join(ARCHITECTURES)}"
        )
    if not said.get("tokenizer.ggml.model") or not said.get("tokenizer.ggml.tokens"):
        raise ModelError(
            f"{path} has no tokenizer (tokenizer.ggml.tokens): convert the model again, with its tokenizer"
        )


def _refuse_unfaithful(header: GgufHeader) -> None:
    """What transformers passes over when it reads GGUF, so that another model would come of it."""
    said, architecture = header.metadata, header.metadata["general.architecture"]
    stored = sorted(t.name for t in header.tensors if t.name.startswith("rope_f"))
    scaling = said.get(f"{architecture}.rope.scaling.type", "none")
    if stored or scaling != "none":
        raise ModelError(
            f"{header.path} scales its rotary frequencies ({stored[0] if stored else scaling}), which transformers does"
            " not read from GGUF: load the checkpoint that it was made from"
        )
    width = said.get(f"{architecture}.attention.key_length")
    if architecture in _HEAD_WIDTHS and width != _HEAD_WIDTHS[architecture]:
        raise ModelError(
            f"{header.path} has attention heads of width {width}; from GGUF, transformers reads {architecture} with"
            f" {_HEAD_WIDTHS[architecture]} alone: load the checkpoint that it was made from"
        )


def _refuse_sizes(header: GgufHeader) -> None:
    """Metadata that are missing would become transformers' defaults: those of a model of 7 billion weights."""
    architecture, tensors = header.metadata["general.architecture"], {t.name: t for t in header.tensors}
    sizes: dict[str, int] = {}
    for key in _COUNTS:
        size = header.metadata.get(f"{architecture}.{key}")
        if not isinstance(size, int) or not 1 <= size < 2**31:
            raise ModelError(f"{header.path} is damaged: {architecture}.{key} is {size!r}")
        sizes[key] = size
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blk.") and name.split(".")[1].isdigit()}
    if blocks != set(range(sizes["block_count"])):
        raise ModelError(
            f"{header.path} is damaged: {sizes['block_count']} blocks are declared, {len(blocks)} are there"
        )
    rows = header.metadata.get(f"{architecture}.vocab_size", header.metadata["tokenizer.ggml.tokens"])
    embedding = tensors.get("token_embd.weight")
    if embedding is None or embedding.shape != (rows, sizes["embedding_length"]):
        raise ModelError(
            f"{header.path} is damaged: token_embd.weight is {embedding and embedding.shape}, not"
            f" {(rows, sizes['embedding_length'])}"
        )


def _refuse_cut(header: GgufHeader) -> None:
    """Sizes of all tensors against the size of the file."""
    import gguf

    for tensor in header.tensors:
        try:
            block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
        except (KeyError, ValueError) as error:
            raise ModelError(f"{header.path}: {tensor.name} is stored as unknown type {tensor.type}") from error
        end = header.data_start + tensor.offset + -(-prod(tensor.shape) // block) * width
        if end > header.size:
            raise ModelError(
                f"{header.path} is cut short: {tensor.name} ends at byte {end:,}, the file at {header.size:,}"
            )
