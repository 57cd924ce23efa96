"""The formats of contrast data, each one function: rows in, pairs out.

`FORMATS` is the whole list. A format is recognised by the fields that its rows must have; a file is of one format.
Formats whose rows are pairs already are read row by row. Formats whose rows carry a label (harmful or harmless, true
or false) are paired up at random with a seed, inside each split; what finds no partner is counted in the notes.

What "positive" means: the side that shows the concept (harmful, unsafe, matching the behaviour, toxic, artifact, true).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from safety_lens.data.pairs import ContrastPair
from safety_lens.data.rows import Row
from safety_lens.errors import DataError
from safety_lens.types import Message, Prompt

TOXIC_FROM = 0.5
"""Perspective toxicity from which a prompt counts as toxic (Gehman et al. 2020, arXiv:2009.11462)."""


class Draft(NamedTuple):
    """A pair, the split its rows name (None: not split), and the row or the two rows it was read from."""

    pair: ContrastPair
    split: str | None
    rows: tuple[Row, ...] = ()


class Reading(NamedTuple):
    """The pairs of a file and what a reader should know about them."""

    drafts: list[Draft]
    notes: tuple[str, ...] = ()


class OneSidedError(DataError):
    """Labelled rows of one label only: there is nothing to pair them with."""


@dataclass(frozen=True)
class Format:
    """A way to write contrast data.

    Attributes:
        required: the fields by which a row of this format is recognised.
        read: rows and a seed (for formats that are paired up) to pairs.
        raw: the prompts are plain text by nature (statements, stories), never chat turns.
        optional: further fields that prompts are made of.
    """

    name: str
    required: tuple[str, ...]
    read: Callable[[Sequence[Row], int], Reading]
    raw: bool = False
    optional: tuple[str, ...] = ()

    @property
    def content(self) -> tuple[str, ...]:
        """The fields that hold what the prompts are made of."""
        return self.required + self.optional


def detect(rows: Sequence[Row]) -> Format:
    """The format that all rows are in.

    Raises:
        DataError: a row is of no format (names file, line and missing fields), or of another than the first row.
    """
    found = _format_of(rows[0])
    if found is None:
        raise rows[0].error(_unknown(rows[0]))
    for row in rows[1:]:
        missing = [name for name in found.required if row.fields.get(name) is None]
        if missing:
            other = _format_of(row)
            also = f"; this row looks like '{other.name}'. One file holds one format" if other else ""
            raise row.error(
                f"field {_listed(missing)} is missing (line {rows[0].line} is of format '{found.name}'){also}"
            )
    return found


def _format_of(row: Row) -> Format | None:
    present = {name for name, value in row.fields.items() if value is not None}
    return next((form for form in FORMATS if present.issuperset(form.required)), None)


def _unknown(row: Row) -> str:
    present = set(row.fields)
    nearest = max(FORMATS, key=lambda form: len(present.intersection(form.required)) / len(form.required))
    missing = [name for name in nearest.required if row.fields.get(name) is None]
    if len(missing) < len(nearest.required):
        return (
            f"field {_listed(missing)} is missing (nearest format: '{nearest.name}' with {_listed(nearest.required)})"
        )
    formats = "; ".join(f"{form.name}: {', '.join(form.required)}" for form in FORMATS)
    return f"no known format has the fields {_listed(sorted(present))}. Known formats: {formats}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


# Formats whose rows are pairs ------------------------------------------------------------


def read_arditi(rows: Sequence[Row], seed: int) -> Reading:
    """One system prompt (optional), two queries (Arditi et al. 2024, arXiv:2406.11717)."""

    def side(row: Row, query: str) -> Prompt:
        return _asked(row.text("system") if row.fields.get("system") else None, row.text(query))

    return _each(rows, lambda row: (side(row, "positive_query"), side(row, "negative_query")))


def read_caa(rows: Sequence[Row], seed: int) -> Reading:
    """One query, two system prompts."""

    def side(row: Row, system: str) -> Prompt:
        return _asked(row.text(system), row.text("user_query"))

    return _each(rows, lambda row: (side(row, "positive_system"), side(row, "negative_system")))


def read_questions(rows: Sequence[Row], seed: int) -> Reading:
    """A question and two answers, A/B or yes/no: the answer is prefilled, so that its letter can be read.

    Panickssery et al. 2024, arXiv:2312.06681; the data sets of Anthropic's model-written evaluations. Their answers
    begin with a space (" (A)") made for plain completion; where a chat template wants one, `render_prefill` puts it.
    """

    def side(row: Row, answer: str) -> Prompt:
        return _answered(row.text("question"), row.text(answer).strip())

    return _each(
        rows,
        lambda row: (side(row, "answer_matching_behavior"), side(row, "answer_not_matching_behavior")),
        category="behavior",
    )


def read_truthful(rows: Sequence[Row], seed: int) -> Reading:
    """A question, its best answer (positive) and its best false answer (TruthfulQA), both prefilled."""

    def side(row: Row, answer: str) -> Prompt:
        return _answered(row.text("question"), row.text(answer).strip())

    return _each(rows, lambda row: (side(row, "best_answer"), side(row, "best_incorrect_answer")))


def read_statements(rows: Sequence[Row], seed: int) -> Reading:
    """Two plain texts."""
    return _each(rows, lambda row: (row.text("positive"), row.text("negative")))


def read_messages(rows: Sequence[Row], seed: int) -> Reading:
    """Two whole conversations: the most general format, any pair can be written in it."""

    def side(row: Row, name: str) -> Prompt:
        from safety_lens.data.render import as_messages

        turns = row.fields[name]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise row.error(f"field '{name}' must be a list of messages with role and content")
        try:
            return as_messages(turns)
        except DataError as error:
            raise row.error(f"field '{name}': {error}") from error

    return _each(rows, lambda row: (side(row, "positive_messages"), side(row, "negative_messages")))


def read_artifacts(rows: Sequence[Row], seed: int) -> Reading:
    """A natural prompt and one that sets off an alignment artifact (positive)."""
    return _each(rows, lambda row: (row.text("artifact"), row.text("natural")))


def _each(rows: Sequence[Row], sides: Callable[[Row], tuple[Prompt, Prompt]], category: str = "category") -> Reading:
    drafts = []
    for row in rows:
        positive, negative = sides(row)
        pair = ContrastPair(positive, negative, row.label(category), row.label("template"), row.label("id"))
        drafts.append(Draft(pair, row.split, (row,)))
    return Reading(drafts)


def _asked(system: str | None, query: str) -> Prompt:
    if system is None:
        return query
    return (Message(role="system", content=system), Message(role="user", content=query))


def _answered(question: str, answer: str) -> Prompt:
    return (Message(role="user", content=question), Message(role="assistant", content=answer))


# Formats whose rows carry a label ------------------------------------------------------------


def read_instructions(rows: Sequence[Row], seed: int) -> Reading:
    """Requests labelled harmful (positive) or harmless."""
    return _pair_up(rows, seed, "instruction", lambda row: _one_of(row, "harmful", "harmless"), ("harmful", "harmless"))


def read_safe_prompts(rows: Sequence[Row], seed: int) -> Reading:
    """Prompts labelled unsafe (positive) or safe, as in XSTest."""
    return _pair_up(rows, seed, "prompt", lambda row: _one_of(row, "unsafe", "safe"), ("unsafe", "safe"))


def read_facts(rows: Sequence[Row], seed: int) -> Reading:
    """Statements labelled true (positive) or false."""
    return _pair_up(rows, seed, "statement", lambda row: row.flag("label"), ("true", "false"))


def read_toxic_prompts(rows: Sequence[Row], seed: int) -> Reading:
    """Openings of sentences with their Perspective toxicity in [0, 1]: toxic (positive) from `TOXIC_FROM`."""
    return _pair_up(rows, seed, "prompt", lambda row: row.number("toxicity") >= TOXIC_FROM, ("toxic", "non-toxic"))


def read_comments(rows: Sequence[Row], seed: int) -> Reading:
    """Comments labelled toxic (positive) or not."""
    return _pair_up(rows, seed, "text", lambda row: row.flag("toxic"), ("toxic", "non-toxic"))


def _one_of(row: Row, positive: str, negative: str) -> bool:
    value = row.text("label")
    if value not in (positive, negative):
        raise row.error(f"label must be '{positive}' or '{negative}', got '{value}'")
    return value == positive


def _pair_up(
    rows: Sequence[Row], seed: int, field: str, is_positive: Callable[[Row], bool], names: tuple[str, str]
) -> Reading:
    """Partner each positive row with a negative row of the same split, at random."""
    rng = Random(seed)
    drafts: list[Draft] = []
    notes = [f"{names[0]} and {names[1]} rows paired up at random with seed {seed}"]
    labelled = [(row, is_positive(row)) for row in rows]
    for split in sorted({row.split for row in rows}, key=str):
        positive = [row for row, label in labelled if label and row.split == split]
        negative = [row for row, label in labelled if not label and row.split == split]
        where = f"split '{split}'" if split else "the file"
        if not positive or not negative:
            counts = f"{len(positive)} {names[0]} and {len(negative)} {names[1]} rows"
            raise OneSidedError(f"{rows[0].file}: {where} is one-sided, {counts}; both are needed to make pairs")
        rng.shuffle(positive)
        rng.shuffle(negative)
        drafts += [Draft(_joined(p, n, field), split, (p, n)) for p, n in zip(positive, negative, strict=False)]
        left = abs(len(positive) - len(negative))
        if left:
            name = names[0] if len(positive) > len(negative) else names[1]
            notes.append(f"{left} {name} rows of {where} have no partner and are not used")
    return Reading(drafts, tuple(notes))


def _joined(positive: Row, negative: Row, field: str) -> ContrastPair:
    ids = [positive.label("id"), negative.label("id")]
    return ContrastPair(
        positive.text(field),
        negative.text(field),
        positive.label("category"),
        positive.label("template"),
        "|".join(str(name) for name in ids) if None not in ids else None,
    )


# The first format whose required fields are all there wins, so the more specific stand first.
FORMATS = (
    Format("arditi", ("positive_query", "negative_query"), read_arditi, optional=("system",)),
    Format("caa", ("user_query", "positive_system", "negative_system"), read_caa),
    Format("ab", ("question", "answer_matching_behavior", "answer_not_matching_behavior"), read_questions),
    Format("truthful", ("question", "best_answer", "best_incorrect_answer"), read_truthful),
    Format("messages", ("positive_messages", "negative_messages"), read_messages),
    Format("statements", ("positive", "negative"), read_statements, raw=True),
    Format("artifacts", ("natural", "artifact"), read_artifacts),
    Format("instructions", ("instruction", "label"), read_instructions),
    Format("facts", ("statement", "label"), read_facts, raw=True),
    Format("toxic-prompts", ("prompt", "toxicity"), read_toxic_prompts, raw=True),
    Format("safe-prompts", ("prompt", "label"), read_safe_prompts),
    Format("comments", ("text", "toxic"), read_comments, raw=True),
)
