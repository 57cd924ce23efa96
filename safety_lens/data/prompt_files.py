"""Files of prompts: JSONL, JSON, CSV with a text and perhaps a system prompt, or plain text with one prompt a line."""

from pathlib import Path

from safety_lens.data.rows import Row, read_rows
from safety_lens.errors import DataError
from safety_lens.types import Prompt

FIELDS = ("prompt", "text", "instruction")
"""Fields that may hold the text, in this order."""


def read_prompt_file(file: Path) -> list[Prompt]:
    """Read the prompts of a file.

    Raises:
        DataError: No such file, no prompts, or a row without a text.
    """
    if file.suffix.lower() == ".txt":
        return list(read_lines(file))
    rows = read_rows(file).rows
    if not rows:
        raise DataError(f"{file} has no prompts")
    return [with_system(prompt_text(row), system_text(row)) for row in rows]


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file that are not empty.

    Raises:
        DataError: No such file, no lines, or no UTF-8 text.
    """
    if not file.is_file():
        raise DataError(f"cannot read prompts from {file}: no such file")
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason})") from error
    if not lines:
        raise DataError(f"{file} has no prompts: write one a line")
    return lines


def prompt_text(row: Row) -> str:
    """Text of a row: the first of FIELDS that it has.

    Raises:
        DataError: None of them, or an empty one.
    """
    for name in FIELDS:
        value = row.fields.get(name)
        if isinstance(value, dict) and isinstance(value.get("text"), str) and value["text"].strip():
            return str(value["text"])  # RealToxicityPrompts: {"prompt": {"text": …, "toxicity": …}}
        if value is not None:
            return row.text(name)
    raise row.error(f"a prompt needs one of the fields {', '.join(FIELDS)}")


def system_text(row: Row) -> str | None:
    """System prompt of a row, None where it has none."""
    return row.text("system") if row.fields.get("system") else None


def with_system(text: str, system: str | None) -> Prompt:
    """The prompt as a model is given it: text alone, or a conversation that begins with the system prompt."""
    if system is None:
        return text
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]
