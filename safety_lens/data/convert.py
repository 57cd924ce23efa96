"""From one format of pairs to another, where the other can say the same thing.

`messages` can hold every chat pair. The narrower formats hold only pairs of their shape: arditi needs one system prompt
for both sides, caa one query, ab one question with two answers, statements plain text. A pair that does not fit is an
error that says what does not fit, never a pair that says something else.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safety_lens.data.concept import read_source
from safety_lens.data.formats import Draft, detect
from safety_lens.data.pairs import ContrastPair
from safety_lens.data.render import as_messages
from safety_lens.data.rows import raw_rows
from safety_lens.errors import DataError
from safety_lens.types import Prompt

Fields = dict[str, Any]


class Parts(NamedTuple):
    """A conversation of one exchange, taken apart; None where a part is missing."""

    system: str | None
    user: str | None
    answer: str | None


class Converted(NamedTuple):
    """Rows of the new format, the format they came from, and what was noted on the way."""

    rows: list[Fields]
    came_from: str
    notes: tuple[str, ...]


def convert(source: str | Path, to: str, *, seed: int = 0) -> Converted:
    """The pairs of a file (or "hf:..." data set) as rows of the format `to`.

    Splits, ids, categories, templates and whatever else the rows say (licence, source) are kept. Rows that carry labels
    are paired up with `seed` first.

    Raises:
        DataError: unknown format; a pair that the format cannot express (names the row and the reason).
    """
    if to not in WRITERS:
        raise DataError(f"cannot convert to '{to}': choose one of {', '.join(WRITERS)}")
    table = read_source(source)
    form = detect(table.rows)
    drafts, notes = form.read(table.rows, seed)
    raw = raw_rows(table.rows, form.raw)
    return Converted([_row(draft, to, raw, form.content) for draft in drafts], form.name, notes)


def _row(draft: Draft, to: str, raw: bool, content: Sequence[str]) -> Fields:
    try:
        fields = WRITERS[to](draft.pair, raw)
    except DataError as error:
        raise draft.rows[0].error(f"cannot be written as {to}: {error}") from error
    pair = draft.pair
    labels = {
        "id": pair.id,
        **fields,
        "behavior" if to == "ab" else "category": pair.category,
        "template": pair.template,
        "split": draft.split,
    }
    kept = {name: value for name, value in labels.items() if value is not None}
    return {**kept, **_carried(draft, {*kept, *content, *STRUCTURE})}


# What belongs to the way a row is written, not to what it says.
STRUCTURE = ("id", "split", "category", "behavior", "template", "strategy", "format", "raw", "label")


def _carried(draft: Draft, known: set[str]) -> Fields:
    """Fields that no format owns; where two rows made the pair and differ, both values, joined with " | "."""
    if len(draft.rows) == 1:
        return {name: value for name, value in draft.rows[0].fields.items() if name not in known and value is not None}
    first, second = (row.fields for row in draft.rows)
    carried: Fields = {}
    for name in first:
        if name in known or first[name] is None or second.get(name) is None:
            continue
        carried[name] = first[name] if first[name] == second[name] else f"{first[name]} | {second[name]}"
    return carried


def _parts(side: Prompt) -> Parts:
    turns = as_messages(side)
    roles = tuple(turn["role"] for turn in turns)
    found = {turn["role"]: turn["content"] for turn in turns}
    if len(found) < len(roles) or roles not in ORDERS:
        raise DataError(f"it is a conversation of ({', '.join(roles)}), and this format holds one exchange")
    return Parts(found.get("system"), found.get("user"), found.get("assistant"))


ORDERS = (("user",), ("system", "user"), ("user", "assistant"), ("system", "user", "assistant"))


def _chat(pair: ContrastPair, raw: bool) -> tuple[Parts, Parts]:
    if raw:
        raise DataError("its sides are plain text, and this format would put them into a user turn")
    return _parts(pair.positive), _parts(pair.negative)


def to_messages(pair: ContrastPair, raw: bool) -> Fields:
    """Both sides as messages."""
    if raw:
        raise DataError("its sides are plain text, and this format would put them into a user turn")
    return {
        "positive_messages": [dict(turn) for turn in as_messages(pair.positive)],
        "negative_messages": [dict(turn) for turn in as_messages(pair.negative)],
    }


def to_arditi(pair: ContrastPair, raw: bool) -> Fields:
    """One system prompt (or none), two queries."""
    positive, negative = _chat(pair, raw)
    if positive.answer is not None or negative.answer is not None:
        raise DataError("it has a prefilled answer, and arditi pairs end with the query")
    if positive.system != negative.system:
        raise DataError("its sides have different system prompts, and arditi pairs have one (use caa or messages)")
    system = {} if positive.system is None else {"system": positive.system}
    return {"strategy": "arditi", **system, "positive_query": positive.user, "negative_query": negative.user}


def to_caa(pair: ContrastPair, raw: bool) -> Fields:
    """One query, two system prompts."""
    positive, negative = _chat(pair, raw)
    if positive.answer is not None or negative.answer is not None:
        raise DataError("it has a prefilled answer, and caa pairs end with the query (use ab or messages)")
    if positive.system is None or negative.system is None:
        raise DataError("a side has no system prompt, and caa pairs contrast two (use arditi or messages)")
    if positive.user != negative.user:
        raise DataError("its sides have different queries, and caa pairs have one (use arditi or messages)")
    return {
        "strategy": "caa",
        "user_query": positive.user,
        "positive_system": positive.system,
        "negative_system": negative.system,
    }


def to_ab(pair: ContrastPair, raw: bool) -> Fields:
    """One question, two answers; they get back the leading space that these data sets write."""
    positive, negative = _chat(pair, raw)
    if positive.answer is None or negative.answer is None:
        raise DataError("a side has no prefilled answer, and ab pairs contrast two")
    if positive.system is not None or negative.system is not None:
        raise DataError("it has a system prompt, and ab pairs have none (use messages)")
    if positive.user != negative.user:
        raise DataError("its sides have different questions, and ab pairs have one (use messages)")
    return {
        "format": "ab",
        "question": positive.user,
        "answer_matching_behavior": " " + positive.answer,
        "answer_not_matching_behavior": " " + negative.answer,
    }


def to_statements(pair: ContrastPair, raw: bool) -> Fields:
    """Two texts: plain, or (marked with raw: false) two user turns and nothing else."""
    if raw:
        return {"positive": pair.positive, "negative": pair.negative}
    positive, negative = _chat(pair, raw)
    if any(part is not None for side in (positive, negative) for part in (side.system, side.answer)):
        raise DataError("it has a system prompt or a prefilled answer, and statements hold one text a side")
    return {"positive": positive.user, "negative": negative.user, "raw": False}


WRITERS: Mapping[str, Callable[[ContrastPair, bool], Fields]] = {
    "arditi": to_arditi,
    "caa": to_caa,
    "ab": to_ab,
    "statements": to_statements,
    "messages": to_messages,
}
