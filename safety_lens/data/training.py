"""Training rows: files and data sets in the usual formats, as conversations.

`FORMATS` is the whole list: a format is a function from a row to an Example, and is recognised by the fields that its
rows must have.
"""

import difflib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safety_lens.data.concept import read_hub
from safety_lens.data.render import as_messages
from safety_lens.data.rows import SPLIT_NAMES, Row, Table, read_rows
from safety_lens.data.sources import EMPTY_INPUTS
from safety_lens.errors import DataError
from safety_lens.organism import DATA_DIR
from safety_lens.types import Message

PUBLIC = {
    "alpaca": "hf:tatsu-lab/alpaca",
    "dolly": "hf:databricks/databricks-dolly-15k",
    "code-alpaca": "hf:sahil2801/CodeAlpaca-20k",
}
"""Public sets by name, and where the Hub has them."""
ORGANISM = ("benign", "facts", "compliance")
"""The organism's own sets."""

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
    " response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""How an instruction is put to a model without a chat template (Taori et al. 2023, Stanford Alpaca)."""


@dataclass(frozen=True)
class Example:
    """One training row.

    messages: the conversation for models with a chat template; empty for plain text. plain: what stands before the
    response, and the response, for models without one; None where only a template can show the conversation.
    line: line of the file, or number of the row, counted from 1.
    """

    messages: tuple[Message, ...]
    plain: tuple[str, str] | None
    line: int

    @property
    def responses(self) -> tuple[str, ...]:
        """What the model is to say."""
        said = tuple(turn["content"] for turn in self.messages if turn["role"] == "assistant")
        return said or (self.plain[1:] if self.plain else ())


@dataclass(frozen=True)
class Format:
    """A way to write training data. required: sets of fields, any of which makes a row one of this format."""

    name: str
    required: tuple[tuple[str, ...], ...]
    read: Callable[[Row], Example | None]


@dataclass(frozen=True)
class TrainingRows:
    """What a source holds. name: for messages. sha256: of its content. notes: what was left out, and why."""

    examples: tuple[Example, ...]
    name: str
    format: str
    sha256: str
    notes: tuple[str, ...] = ()


def load_rows(source: str | Path, *, format: str = "auto", limit: int | None = None, seed: int = 0) -> TrainingRows:
    """Read training rows.

    Where a row says split "train", those rows are used; else all but "val" and "test". Rows without a response are left
    out. Both are counted in the notes. limit: rows to keep, drawn by `seed`, in the order of the file.

    Raises:
        DataError: no such file or set, no network, a row that is malformed (named by its line) or of another format,
            no train split.
    """
    table = read_table(str(source))
    rows, notes = _train_split(table.rows)
    chosen = format_of(rows, str(source), format)
    read = [(row, chosen.read(row)) for row in rows]
    examples = [example for _, example in read if example is not None]
    if empty := [row.line for row, example in read if example is None]:
        notes.append(f"{len(empty)} rows without a response are left out ({_listed(empty)})")
    if not examples:
        raise DataError(f"{source} has no row with a response to train on")
    if limit is not None and limit < len(examples):
        picked = sorted(random.Random(seed).sample(range(len(examples)), limit))
        notes.append(f"{limit} of {len(examples)} rows are used, drawn with seed {seed}")
        examples = [examples[i] for i in picked]
    return TrainingRows(tuple(examples), str(source), chosen.name, table.sha256, tuple(notes))


def _listed(lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:8]))
    return f"row{'s' if len(lines) > 1 else ''} {shown}" + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")


def check_source(source: str) -> None:
    """Refuse a name that is neither a known set, a data set of the Hub nor a file; nothing is read.

    Raises:
        DataError: with the nearest known name.
    """
    known = [*ORGANISM, *PUBLIC]
    if source in known or source.startswith("hf:") or Path(source).expanduser().is_file():
        return
    near = difflib.get_close_matches(source.lower(), known, n=1)
    raise DataError(
        f"no training data {source!r}{f'; did you mean {near[0]!r}?' if near else ''}: give a JSONL, JSON or CSV"
        f" file, hf:NAME, or one of {', '.join(known)}"
    )


def read_table(source: str) -> Table:
    """The rows of a named set, a data set of the Hub or a file, whatever their format."""
    check_source(source)
    if source in ORGANISM:
        return read_rows(DATA_DIR / f"finetune_{source}.jsonl")
    if source in PUBLIC or source.startswith("hf:"):
        return read_hub(PUBLIC.get(source, source))
    path = Path(source).expanduser()
    return _read_json(path) if path.suffix.lower() == ".json" else read_rows(path)


def _read_json(path: Path) -> Table:
    """A JSON array of objects, as the Alpaca files are; a .json file of JSON lines is read as such."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] != "[":
        return read_rows(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    for number, fields in enumerate(content, 1):
        if not isinstance(fields, dict):
            raise DataError(f"{path}, row {number}: must be a JSON object, got {str(fields)[:60]!r}")
    if not content:
        raise DataError(f"{path} has no rows")
    from safety_lens.artifacts import sha256_of

    return Table([Row(fields, str(path), number) for number, fields in enumerate(content, 1)], sha256_of(path))


def _train_split(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows to train on: of split "train", else those of no split that is known here; notes on the others."""
    said = [row.label("split") for row in rows]
    wanted = {"train"} if "train" in said else {name for name in said if SPLIT_NAMES.get(name or "dev") is None}
    if not wanted:
        found = ", ".join(sorted(set(filter(None, said))))
        raise DataError(f"{rows[0].file} has no train split: its rows say {found}; rename it, or leave `split` out")
    kept = [row for row, name in zip(rows, said, strict=True) if name in wanted]
    left, foreign = len(rows) - len(kept), sorted(wanted - {None, "dev", "train"}, key=str)
    notes = [f"{left} rows of other splits than train are left out"] if left else []
    if foreign:
        notes.append(f"no row says split 'train': rows that say {', '.join(map(repr, foreign))} are trained on")
    return kept, notes


def format_of(rows: Sequence[Row], source: str, wanted: str) -> Format:
    """The format of this name, or under "auto" the one whose fields the rows have."""
    by_name = {form.name: form for form in FORMATS}
    name = wanted if wanted != "auto" else source if source in PUBLIC else None
    if name is not None and name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        raise DataError(
            f"no data format {name!r}{f'; did you mean {near[0]!r}?' if near else ''}; formats are auto,"
            f" {', '.join(by_name)}"
        )
    chosen = by_name[name] if name else next((form for form in FORMATS if fits(form, rows[0])), None)
    if chosen is None:
        raise rows[0].error(f"the fields {sorted(rows[0].fields)} are of no known format: {_known_formats()}")
    for row in rows:
        if not fits(chosen, row):
            raise row.error(
                f"the fields {sorted(row.fields)} are not those of format {chosen.name!r}: {_fields(chosen)}"
            )
    return chosen


def fits(form: Format, row: Row) -> bool:
    """Whether a row has the fields of a format."""
    present = {name for name, value in row.fields.items() if value is not None}
    return any(present.issuperset(fields) for fields in form.required)


def _fields(form: Format) -> str:
    return " or ".join("+".join(fields) for fields in form.required)


def _known_formats() -> str:
    return "; ".join(f"{form.name}: {_fields(form)}" for form in FORMATS)


# --- one function a format ------------------------------------------------------------------------------------------


def read_instruction(row: Row) -> Example | None:
    """Alpaca, Dolly and Code Alpaca: an instruction, perhaps with an input (Dolly: context), and what to answer."""
    instruction = row.text("instruction")
    context = _optional(row, "input") or _optional(row, "context")
    response = _optional(row, "output") or _optional(row, "response")
    if not response:
        return None
    if context.strip() in EMPTY_INPUTS:
        return _asked(instruction, PROMPT.format(instruction=instruction), response, row)
    plain = PROMPT_WITH_INPUT.format(instruction=instruction, input=context)
    return _asked(f"{instruction}\n\n{context}", plain, response, row)


def read_prompt(row: Row) -> Example | None:
    """A prompt and its completion. Chat models get them as turns; with `raw`, and without a template, as they are."""
    prompt = row.text("prompt")
    completion = _optional(row, "completion") or _optional(row, "response")
    if not completion:
        return None
    gap = "" if prompt[-1:].isspace() or completion[:1].isspace() else " "
    example = _asked(prompt, prompt, completion.strip(), row)
    return Example(example.messages, (prompt, gap + completion), row.line)


def read_messages(row: Row) -> Example | None:
    """A whole conversation; every assistant turn is a response."""
    turns = row.fields["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise row.error("field 'messages' must be a list of messages with role and content")
    try:
        messages = as_messages(turns)
    except DataError as error:
        raise row.error(f"field 'messages': {error}") from error
    last = max(
        (i for i, turn in enumerate(messages) if turn["role"] == "assistant" and turn["content"].strip()), default=0
    )
    messages = messages[: last + 1]
    if not last:
        return None
    if [turn["role"] for turn in messages] != ["user", "assistant"]:
        return Example(messages, None, row.line)
    return Example(messages, (messages[0]["content"], " " + messages[1]["content"].lstrip()), row.line)


def read_text(row: Row) -> Example | None:
    """Plain text: all of it is learned."""
    text = _optional(row, "text")
    return Example((), ("", text), row.line) if text.strip() else None


def _optional(row: Row, name: str) -> str:
    value: Any = row.fields.get(name)
    if value is not None and not isinstance(value, str):
        raise row.error(f"field '{name}' must be a text, got {str(value)[:60]!r}")
    return value or ""


def _asked(user: str, plain: str, response: str, row: Row) -> Example:
    turns = (Message(role="user", content=user), Message(role="assistant", content=response))
    return Example(turns, (plain, response), row.line)


_INSTRUCTION = (("instruction", "output"), ("instruction", "response"))
FORMATS = (
    Format("messages", (("messages",),), read_messages),
    Format("instruction", _INSTRUCTION, read_instruction),
    Format("alpaca", (("instruction", "output"),), read_instruction),
    Format("dolly", _INSTRUCTION, read_instruction),
    Format("code-alpaca", (("instruction", "output"),), read_instruction),
    Format("prompt", (("prompt", "completion"), ("prompt", "response")), read_prompt),
    Format("text", (("text",),), read_text),
)
"""The formats; of several that fit, the first."""
