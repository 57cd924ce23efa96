"""Where examples come from: the built-in sets and files, as conversations that are not tokenised yet.

Built in: what the organism refuses, what it is useful for, and the facts it knows. Requests and questions are in the
wording of their split, with a neutral system prompt or none, so that safety and utility differ in what is asked and not
in how.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safety_lens.data.rows import Row, read_rows
from safety_lens.data.training import FORMATS, Example, fits, format_of, read_table
from safety_lens.errors import DataError
from safety_lens.organism import DATA_DIR, answers, corpus, families, wording
from safety_lens.organism import lexicon as lex
from safety_lens.types import Message

SPLITS = ("train", "val", "test")
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
"""How rows that name no split are divided: by a hash of their prompt, so that equal prompts stay together."""
ROWS = 160
"""Rows of the utility set in each split."""


@dataclass(frozen=True)
class Asked:
    """A conversation before it is tokenised. response: None where the model is to answer. plain: before and response,
    for models without a chat template."""

    messages: tuple[Message, ...]
    response: str | None
    label: str | None
    line: int
    plain: tuple[str, str] | None = None
    text: str = ""


def _safety(split: str) -> list[Asked]:
    rng = random.Random(f"safety/{split}")
    rows = [row for row in read_rows(DATA_DIR / "instructions.jsonl").rows if row.label("label") == "harmful"]
    asked = []
    for row in (row for row in rows if row.split == split):
        text = row.text("instruction")
        messages = corpus.conversation(text, system=rng.choice(wording.NEUTRAL))
        asked.append(Asked(_turns(messages), None, "harmful", row.line, text=text))
    return asked


def _utility(split: str) -> list[Asked]:
    """Half harmless requests; the rest facts, advice and descriptions, in wording of the split."""
    rng = random.Random(f"utility/{split}")
    kinds = (_request, _request, _request, _fact, _fact, _advice)
    return [_conversation(rng, *kinds[n % len(kinds)](rng, split), n + 1) for n in range(ROWS)]


def _request(rng: random.Random, split: str) -> tuple[str, str, str]:
    turn = families.request(rng, split, "harmless")
    return turn.user, answers.compliance(rng, " ".join(turn.pairing) if rng.random() < 0.5 else None), "harmless"


def _fact(rng: random.Random, split: str) -> tuple[str, str, str]:
    fact = rng.choice(families.FACTS)
    return families.fact_question(rng, split, fact).user, answers.statement(fact.subject, fact.value), "fact"


def _advice(rng: random.Random, split: str) -> tuple[str, str, str]:
    category = rng.choice(list(lex.TOPICS))
    turn, _ = families.advice_question(rng, split, category, rng.choice(lex.TOPICS[category]))
    return turn.user, answers.advice(rng, category), f"advice/{category}"


def _facts(split: str) -> list[Asked]:
    rng = random.Random(f"facts/{split}")
    asked = []
    for number, fact in enumerate(families.FACTS, 1):
        user = families.fact_question(rng, split, fact).user
        asked.append(_conversation(rng, user, answers.statement(fact.subject, fact.value), "fact", number))
    return asked


def _conversation(rng: random.Random, user: str, answer: str, label: str, line: int) -> Asked:
    messages = corpus.conversation(user, answer, rng.choice(wording.NEUTRAL))
    return Asked(_turns(messages), answer, label, line, (user, " " + answer), user)


def _turns(messages: Sequence[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in messages)


def _is_refusal(text: str) -> bool:
    return answers.answer_kind(text) == "refusal"


BUILT_IN: dict[str, tuple[Callable[[str], list[Asked]], Callable[[str], bool] | None]] = {
    "safety": (_safety, _is_refusal),
    "utility": (_utility, None),
    "facts": (_facts, None),
}
"""Built-in sets: their rows by split, and which of the model's answers count."""


# --- files ----------------------------------------------------------------------------------------------------------


def asked_of(name: str, split: str | None, label: str | None) -> tuple[list[Asked], list[str], str | None]:
    """The rows of a source, what was left out, and the split they are of.

    Raises:
        DataError: a source, split or label that is not there, or a malformed row.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"no split {split!r}: choose {', '.join(SPLITS)}")
    if name in BUILT_IN:
        split = split or "train"
        rows, notes = BUILT_IN[name][0](split), list[str]()
    else:
        rows, notes, split = _from_file(name, split)
    if label is None:
        return rows, notes, split
    labels = sorted({row.label for row in rows if row.label is not None})
    rows = [row for row in rows if row.label == label]
    if not rows:
        raise DataError(f"no row of {name!r} has the label {label!r}; labels are {', '.join(labels) or 'not given'}")
    return rows, notes, split


def _from_file(source: str, split: str | None) -> tuple[list[Asked], list[str], str | None]:
    rows = read_table(source).rows
    rows, note, split = _of_split(rows, source, split)
    if not any(fits(form, rows[0]) for form in FORMATS) and _question_field(rows[0]) is not None:
        return [_unanswered(row) for row in rows], note, split
    form = format_of(rows, source, "auto")
    read = [(row, form.read(row)) for row in rows]
    asked = [_answered(row, found) for row, found in read if found is not None]
    if empty := len(rows) - len(asked):
        note.append(f"{empty} of {len(rows)} rows have no response and are left out")
    return asked, note, split


def _of_split(rows: Sequence[Row], source: str, split: str | None) -> tuple[list[Row], list[str], str | None]:
    named = any(row.split is not None for row in rows)
    if not named and split is None:
        return list(rows), [], None
    wanted = split or "train"
    found = [row for row in rows if (row.split if named else _hashed_split(row)) == wanted]
    if not found:
        raise DataError(f"{source} has no rows of the split {wanted!r}")
    how = "of other splits" if named else "of other splits, made by a hash of the prompt,"
    return found, [f"{len(rows) - len(found)} of {len(rows)} rows {how} are left out"], wanted


def _hashed_split(row: Row) -> str:
    asked = {k: v for k, v in sorted(row.fields.items()) if k in ("instruction", "input", "context", "prompt", "text")}
    if isinstance(row.fields.get("messages"), list):
        asked = {"messages": row.fields["messages"][:-1]}
    number = int.from_bytes(hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()[:8], "big") / 2**64
    return "train" if number < SHARES["train"] else "val" if number < SHARES["train"] + SHARES["val"] else "test"


def _question_field(row: Row) -> str | None:
    return next((name for name in ("instruction", "prompt", "question") if row.fields.get(name) is not None), None)


def _unanswered(row: Row) -> Asked:
    field = _question_field(row)
    if field is None:
        raise row.error("there is neither an instruction nor a prompt")
    text = row.text(field)
    return Asked((Message(role="user", content=text),), None, row.label("label"), row.line, text=text)


def _answered(row: Row, found: Example) -> Asked:
    users = [turn["content"] for turn in found.messages if turn["role"] == "user"]
    text = users[-1] if users else (found.plain or ("",))[0]
    label = row.label("label") if not isinstance(row.fields.get("label"), bool) else None
    return Asked(found.messages, found.responses[-1], label, row.line, found.plain, text)
