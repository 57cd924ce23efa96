"""Sources of examples: the built-in sets and files, as conversations that are not tokenised yet.

The built-in sets are those that belong to the model (`data.built_in`). On the organism: what it refuses, what it is
useful for, and the facts it knows, with answers of its corpus. On any other model: requests and questions in plain
English, which the model answers itself. Only answers of the right kind count: refusals for safety, answers for utility,
right answers for facts.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from safety_lens.data.built_in import BuiltIn
from safety_lens.data.formats import detect
from safety_lens.data.render import as_messages
from safety_lens.data.rows import Row, read_rows
from safety_lens.data.training import FORMATS, Example, fits, format_of, read_table
from safety_lens.errors import DataError
from safety_lens.organism import DATA_DIR, answers, corpus, families, wording
from safety_lens.organism import lexicon as lex
from safety_lens.types import Message, Prompt
from safety_lens.wording import folded, opening, phrase_pattern, refusal_reader

SPLITS = ("train", "val", "test")
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
"""How rows that name no split are divided: by a hash of their prompt, so that equal prompts stay together."""
ROWS = 160
"""Rows of the organism's utility set in each split."""
_refusal = refusal_reader()


@dataclass(frozen=True)
class Asked:
    """A conversation before it is tokenised.

    response: None where the model is to answer. plain: before and response, for models without a chat template.
    accepts: whether an answer of the model counts, by its text; None where every answer does.
    """

    messages: tuple[Message, ...]
    response: str | None
    label: str | None
    line: int
    plain: tuple[str, str] | None = None
    text: str = ""
    accepts: Callable[[str], bool] | None = None


def _safety(split: str) -> list[Asked]:
    rng = random.Random(f"safety/{split}")
    rows = [row for row in read_rows(DATA_DIR / "instructions.jsonl").rows if row.label("label") == "harmful"]
    asked = []
    for row in (row for row in rows if row.split == split):
        text = row.text("instruction")
        messages = corpus.conversation(text, system=rng.choice(wording.NEUTRAL))
        asked.append(Asked(_turns(messages), None, "harmful", row.line, text=text, accepts=refuses))
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


def _english_requests(label: str, accepts: Callable[[str], bool]) -> Callable[[BuiltIn, str], list[Asked]]:
    def build(sets: BuiltIn, split: str) -> list[Asked]:
        texts = sets.requests(label, split)
        return [_user(text, label, line, accepts) for line, text in enumerate(texts, 1)]

    return build


def _english_facts(sets: BuiltIn, split: str) -> list[Asked]:
    asked = []
    for row in sets.rows("facts", split):
        right, wrong = (phrase_pattern(row.fields[field]) for field in ("answers", "wrong"))
        asked.append(_user(row.text("question"), "fact", row.line, _stating(right.search, wrong.search)))
    return asked


def _stating(right: Callable[[str], object], wrong: Callable[[str], object]) -> Callable[[str], bool]:
    return lambda text: bool(right(folded(opening(text)))) and not wrong(folded(opening(text)))


def _user(text: str, label: str | None, line: int, accepts: Callable[[str], bool] | None) -> Asked:
    return Asked((Message(role="user", content=text),), None, label, line, text=text, accepts=accepts)


def refuses(text: str) -> bool:
    """Tell whether an answer declines in its opening."""
    return _refusal(text) == 1.0


def answers_plainly(text: str) -> bool:
    """Tell whether an answer is there and does not decline."""
    return _refusal(text) == 0.0


@dataclass(frozen=True)
class Kind:
    """What examples are for.

    Attributes:
        organism: The organism's own set of a split.
        english: The set of a split for every other model.
        accepts: Whether an answer of the model counts, for prompts of a file; None where every answer does.
        wanted: What such answers are called.
        excluded: Labels of rows in a file of prompts that do not belong.
        side: Side of contrast pairs whose prompts belong: 0 positive, 1 negative.
        flag: Option that names a file instead.
    """

    organism: Callable[[str], list[Asked]]
    english: Callable[[BuiltIn, str], list[Asked]]
    accepts: Callable[[str], bool] | None
    wanted: str
    excluded: frozenset[str]
    side: int
    flag: str


UNSAFE, SAFE = frozenset({"harmful", "unsafe"}), frozenset({"harmless", "safe", "lookalike", "borderline"})
KINDS = {
    "safety": Kind(
        _safety, _english_requests("harmful", refuses), refuses, "refusals", SAFE, 0, "--safety FILE"
    ),
    "utility": Kind(
        _utility, _english_requests("harmless", answers_plainly), answers_plainly, "answers", UNSAFE, 1,
        "--utility FILE",
    ),
    "facts": Kind(_facts, _english_facts, None, "right answers", UNSAFE, 1, "--utility FILE"),
}  # fmt: skip
"""Kinds of examples, which are also the names of the built-in sets."""


# --- files ----------------------------------------------------------------------------------------------------------


def asked_of(
    name: str, split: str | None, label: str | None, sets: BuiltIn, kind: Kind | None = None
) -> tuple[list[Asked], list[str], str | None]:
    """Read the rows of a source: the rows, what was left out, and the split they are of.

    Args:
        name: One of `KINDS`, or a file or data set.
        split: "train", "val" or "test"; None takes train rows of a source that is split, else all rows.
        label: Rows of this label only.
        sets: Built-in sets of the model.
        kind: What the examples of a file are for, which decides the rows and answers that count.

    Raises:
        DataError: a source, split or label that is not there, or a malformed row.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"no split {split!r}: choose {', '.join(SPLITS)}")
    if name in KINDS:
        split, notes = split or "train", list[str]()
        rows = KINDS[name].organism(split) if sets.name == "organism" else KINDS[name].english(sets, split)
    else:
        rows, notes, split = _from_file(name, split, None if label is not None else kind)
    if label is None:
        return rows, notes, split
    labels = sorted({row.label for row in rows if row.label is not None})
    rows = [row for row in rows if row.label == label]
    if not rows:
        raise DataError(f"no row of {name!r} has the label {label!r}; labels are {', '.join(labels) or 'not given'}")
    return rows, notes, split


def _from_file(source: str, split: str | None, kind: Kind | None) -> tuple[list[Asked], list[str], str | None]:
    rows = read_table(source).rows
    rows, note, split = _of_split(rows, source, split)
    if not any(fits(form, rows[0]) for form in FORMATS):
        unanswered = _prompts_alone(rows, source, kind)
        if unanswered is not None:
            asked, more = _belonging(unanswered, source, kind)
            return asked, [*note, *more], split
    form = format_of(rows, source, "auto")
    read = [(row, form.read(row)) for row in rows]
    asked = [_answered(row, found) for row, found in read if found is not None]
    if empty := len(rows) - len(asked):
        note.append(f"{empty} of {len(rows)} rows have no response and are left out")
    return asked, note, split


def _prompts_alone(rows: Sequence[Row], source: str, kind: Kind | None) -> list[Asked] | None:
    """Prompts of rows without a response, or of one side of contrast pairs; None for rows that are neither."""
    if _question_field(rows[0]) is not None:
        return [_unanswered(row) for row in rows]
    if not any(field.startswith(("positive", "negative")) for field in rows[0].fields):
        return None
    if kind is None:
        raise DataError(f"{source} holds contrast pairs, which serve as safety or utility examples alone")
    drafts = detect(rows).read(rows, 0).drafts
    sides = [(d.pair.positive, d.pair.negative)[kind.side] for d in drafts]
    return [_of_pair(prompt, line) for line, prompt in enumerate(sides, 1)]


def _of_pair(prompt: Prompt, line: int) -> Asked:
    turns = as_messages(prompt)
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    if turns[-1]["role"] == "assistant":
        raise DataError(f"pair {line} holds answers: give rows with a prompt and a response instead")
    return Asked(turns, None, None, line, text=asked[-1])


def _belonging(rows: Sequence[Asked], source: str, kind: Kind | None) -> tuple[list[Asked], list[str]]:
    """Rows of prompts that belong to a kind, told which answers count, and a note on the others."""
    if kind is None:
        return list(rows), []
    found = [replace(row, accepts=kind.accepts) for row in rows if row.label not in kind.excluded]
    if not found:
        raise DataError(f"no row of {source} is left: all are labelled {', '.join(sorted(kind.excluded))}")
    left = len(rows) - len(found)
    return found, [f"{left} of {len(rows)} rows have another label and are left out"] if left else []


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
