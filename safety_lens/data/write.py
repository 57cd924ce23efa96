"""Writing rows: whole files or nothing, and never over a file that is there, unless told to."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safety_lens.errors import DataError


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raise if something is there that may not be replaced: a file without `overwrite`, a folder ever."""
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a folder; choose another --out")
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists: choose another --out, or pass --overwrite to replace it")


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]], *, overwrite: bool = False) -> Path:
    """Write JSONL through a temporary file in the same folder, so that an interrupted write leaves the old state.

    Raises:
        DataError: the file exists and `overwrite` is False, or the place cannot be written.
    """
    path = Path(path)
    refuse_taken(path, overwrite)
    text = "".join(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes files that only the owner may read
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
