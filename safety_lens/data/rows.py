"""Files of rows: JSONL (one object a line) or CSV, read whole, every fault named by file and line."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safety_lens.errors import DataError

# What a row's "split" may say. "dev" is how public collections mark data that nobody has split.
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test", "dev": None}


@dataclass(frozen=True)
class Row:
    """One object of a file, with the place it came from, so that every complaint can name it."""

    fields: Mapping[str, Any]
    file: str
    line: int

    def error(self, problem: str) -> DataError:
        """The error that names this row."""
        return DataError(f"{self.file}, line {self.line}: {problem}")

    def text(self, name: str) -> str:
        """A field that must be a text with something in it."""
        if self.fields.get(name) is None:
            raise self.error(f"field '{name}' is missing")
        value = self.fields[name]
        if not isinstance(value, str):
            raise self.error(f"field '{name}' must be a text, got {_shown(value)}")
        if not value.strip():
            raise self.error(f"field '{name}' is empty")
        return value

    def label(self, name: str) -> str | None:
        """An optional field used as a label: texts and whole numbers become text, absent or null is None."""
        value = self.fields.get(name)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise self.error(f"field '{name}' must be a text or a whole number, got {_shown(value)}")

    def flag(self, name: str) -> bool:
        """A field that must be true or false; in a CSV file all cells are text, so "1", "0", "True", "False" count."""
        value = self.fields.get(name)
        if value is None:
            raise self.error(f"field '{name}' is missing")
        if isinstance(value, str) and value.lower() in ("1", "true", "0", "false"):
            return value.lower() in ("1", "true")
        if not isinstance(value, str) and value in (True, False):  # the numbers 0 and 1 compare equal to the booleans
            return bool(value)
        raise self.error(f"field '{name}' must be true or false, got {_shown(value)}")

    def number(self, name: str) -> float:
        """A field that must be a finite number, or in a CSV file the text of one."""
        value = self.fields.get(name)
        if value is None:
            raise self.error(f"field '{name}' is missing")
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(f"field '{name}' must be a number, got {_shown(value)}")
        return number

    @property
    def split(self) -> str | None:
        """ "train", "val" or "test"; None where the row is not split ("dev" or no field)."""
        name = self.label("split")
        if name is None:
            return None
        if name not in SPLIT_NAMES:
            raise self.error(f"unknown split '{name}': use train, val or test, or leave it out to have splits made")
        return SPLIT_NAMES[name]


class Table(NamedTuple):
    """The rows of a source and the sha256 of its content."""

    rows: list[Row]
    sha256: str


def read_rows(path: str | Path) -> Table:
    """Read a JSONL or CSV file, whole. Blank lines hold nothing and are passed over; everything else must be a row.

    Raises:
        DataError: no such file, not UTF-8, no rows, a line that is not one JSON object, an id that occurs twice.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"cannot read rows from {path}: it {what}; give a JSONL file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason}): save the file as UTF-8") from error
    parse = _PARSERS.get(path.suffix.lower(), _parse_jsonl)
    rows = parse(text, str(path))
    if not rows:
        raise DataError(f"{path} has no rows: write one JSON object a line")
    check_ids(rows)
    return Table(rows, hashlib.sha256(content).hexdigest())


def check_ids(rows: list[Row]) -> None:
    """Raise if two rows have the same id."""
    first: dict[str, int] = {}
    for row in rows:
        name = row.label("id")
        if name is None:
            continue
        if name in first:
            raise row.error(f"id '{name}' is already the id of line {first[name]}: ids must be unique")
        first[name] = row.line


def raw_rows(rows: list[Row], default: bool) -> bool:
    """Whether the rows say (field "raw", in all or in none) that they are plain text; `default` if they do not."""
    said = {row.flag("raw") for row in rows if row.fields.get("raw") is not None}
    if len(said) > 1 or (said and any(row.fields.get("raw") is None for row in rows)):
        raise rows[0].error("field 'raw' must be the same in all rows, or in none")
    return said.pop() if said else default


def _parse_jsonl(text: str, file: str) -> list[Row]:
    if text.lstrip()[:1] == "[":
        raise DataError(f"{file}, line 1: a JSON array; JSONL has one object a line, with no brackets around the file")
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would break at U+2028 inside a string
        if line.strip():
            rows.append(Row(_parse_object(line, file, number), file, number))
    return rows


def _parse_object(line: str, file: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_no_repeats)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {number}: not valid JSON ({error.msg} at column {error.colno})") from error
    except KeyError as error:
        raise DataError(f"{file}, line {number}: field {error} occurs twice in one object") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}, line {number}: must be a JSON object, got {_shown(value)}")
    return value


def _no_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(items)
    if len(fields) < len(items):
        names = [name for name, _ in items]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return fields


def _parse_csv(text: str, file: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for fields in reader:
            if None in fields or None in fields.values():
                width = len(reader.fieldnames or ())
                raise DataError(f"{file}, line {reader.line_num}: not the {width} cells that the header names")
            rows.append(Row(dict(fields), file, reader.line_num))
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: not valid CSV ({error})") from error
    return rows


_PARSERS: dict[str, Callable[[str, str], list[Row]]] = {".csv": _parse_csv}


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
