"""What can be wrong with a set of pairs before any model has seen it.

Every check gives one `Finding`. An *error* makes numbers wrong (a test prompt in train, an empty side); a *warning*
makes them easy to misread (one side is longer, one word tells the sides apart). A clean check is listed too: silence is
not evidence that something was looked at.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safety_lens.data.chat import encode
from safety_lens.data.concept import read_source
from safety_lens.data.formats import Draft, Format, OneSidedError, detect
from safety_lens.data.pairs import last_user_text
from safety_lens.data.render import Tokenizer, as_messages
from safety_lens.data.rows import Row, raw_rows
from safety_lens.data.splits import normalised, split_pairs
from safety_lens.errors import DataError
from safety_lens.types import Prompt

Level = Literal["ok", "warning", "error"]

LENGTH_AUROC = (0.35, 0.65)
"""Outside this range length alone tells the sides apart better than a usable direction may be thought to."""
WORD_SHARES = (0.95, 0.05)
"""A word in at least this share of one side and at most that share of the other gives the answer away."""
ANSWER_SHARE = 0.6
"""A/B answers: one letter may be the positive answer this often; beyond, the letter is a cue (Tan et al. 2024)."""


class Finding(NamedTuple):
    """The outcome of one check: how many rows or pairs it concerns (n), and what to know."""

    level: Level
    check: str
    n: int
    message: str


def validate(
    source: str | Path, *, tokenizer: Tokenizer | None = None, max_length: int | None = None, seed: int = 0
) -> list[Finding]:
    """Check the pairs of a file, a built-in concept or a data set.

    Args:
        tokenizer: also render and count tokens, as a model with this tokenizer would read them; built-in names then
            mean the sets of that model.
        max_length: token limit; None: what the tokenizer says its model takes.

    Raises:
        DataError: the file cannot be read at all, or is of no known format.
    """
    table = read_source(source, tokenizer)
    form = _format(table.rows)
    faults = [fault for row in table.rows if (fault := _row_fault(row, form))]
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        return [Finding("error", "rows", len(faults), f"{shown}. Further checks need sound rows")]
    findings = [Finding("ok", "rows", len(table.rows), f"format {form.name}")]
    try:
        drafts, notes = form.read(table.rows, seed)
    except DataError as error:
        return [*findings, Finding("error", "pairs", 0, str(error))]
    unpaired = [note for note in notes if "no partner" in note]
    level: Level = "warning" if unpaired else "ok"
    findings.append(Finding(level, "pairs", len(drafts), "; ".join(unpaired) or "every row is in a pair"))
    findings += [check(drafts) for check in CHECKS]
    findings.append(_splits(drafts, seed, str(source)))
    if tokenizer is not None:
        findings.append(_tokens(drafts, tokenizer, max_length, raw_rows(table.rows, form.raw)))
    return findings


def _format(rows: Sequence[Row]) -> Format:
    """The format most rows are in: one bad row must not hide what the others are."""
    names: Counter[str] = Counter()
    forms = {}
    for row in rows:
        try:
            form = detect([row])
        except DataError:
            continue
        names[form.name] += 1
        forms[form.name] = form
    return forms[names.most_common(1)[0][0]] if names else detect(rows)


def _row_fault(row: Row, form: Format) -> str | None:
    """Why this row, taken alone, cannot be read; None if it can."""
    try:
        if (found := detect([row])) != form:
            raise row.error(f"is of format '{found.name}', most rows are '{form.name}'")
        for name in form.required:
            if isinstance(row.fields[name], str):
                row.text(name)
        _ = row.split
        form.read([row], 0)
    except OneSidedError:  # one labelled row always is; whether the file is comes later
        return None
    except DataError as error:
        return str(error)
    return None


# Checks on pairs --------------------------------------------------------------------------------


def identical_sides(drafts: Sequence[Draft]) -> Finding:
    """Pairs whose two sides are the same prompt, exactly or but for case, spaces and punctuation at the ends."""
    same = [d for d in drafts if _shape(d.pair.positive) == _shape(d.pair.negative)]
    if not same:
        return Finding("ok", "identical sides", 0, "every pair has two different sides")
    return Finding("error", "identical sides", len(same), f"nothing to contrast: {_named(same)}")


def repeated_pairs(drafts: Sequence[Draft]) -> Finding:
    """Pairs that occur more than once inside a split: they count twice and make intervals too narrow."""
    seen: set[object] = set()
    again = []
    for draft in drafts:
        key = (draft.split, _shape(draft.pair.positive), _shape(draft.pair.negative))
        again += [draft] if key in seen else []
        seen.add(key)
    if not again:
        return Finding("ok", "repeated pairs", 0, "no pair occurs twice in a split")
    return Finding("warning", "repeated pairs", len(again), f"the same pair again: {_named(again)}")


def leaked_prompts(drafts: Sequence[Draft]) -> Finding:
    """Prompts of val or test that train also has, exactly or after normalisation."""
    train = [d for d in drafts if d.split == "train"]
    held_out = [d for d in drafts if d.split in ("val", "test")]
    exact = _sharing(train, held_out, lambda text: text)
    close = [d for d in _sharing(train, held_out, normalised) if d not in exact]
    if exact:
        also = f"; {len(close)} more differ only in case, spaces or end punctuation" if close else ""
        return Finding(
            "error", "leaked prompts", len(exact), f"held-out prompts that train has too: {_named(exact)}{also}"
        )
    if close:
        message = f"held-out prompts that train has but for case, spaces or end punctuation: {_named(close)}"
        return Finding("error", "leaked prompts", len(close), message)
    return Finding("ok", "leaked prompts", 0, "no held-out prompt is in train")


def leaked_templates(drafts: Sequence[Draft]) -> Finding:
    """Templates that train shares with val or test."""
    train = {d.pair.template for d in drafts if d.split == "train"} - {None}
    shared = sorted({str(d.pair.template) for d in drafts if d.split in ("val", "test") and d.pair.template in train})
    if not shared:
        return Finding("ok", "leaked templates", 0, "no template is in two splits")
    message = f"also in train: {', '.join(shared)}; held-out numbers speak of new words in known patterns"
    return Finding("warning", "leaked templates", len(shared), message)


def length_imbalance(drafts: Sequence[Draft]) -> Finding:
    """AUROC of the character count alone, positive against negative (0.5 = length says nothing)."""
    import numpy as np

    from safety_lens.stats import auroc_interval

    positive, negative = (
        np.array([len(_text(side)) for side in side_list], dtype=float) for side_list in _two_sides(drafts)
    )
    value, low, high = auroc_interval(positive, negative)
    ratio = positive.mean() / negative.mean()
    message = f"AUROC of length {value:.2f} [{low:.2f}, {high:.2f}], mean lengths {ratio:.2f} : 1"
    if LENGTH_AUROC[0] <= value <= LENGTH_AUROC[1]:
        return Finding("ok", "length imbalance", 0, message)
    longer = "positive" if value > 0.5 else "negative"
    return Finding("warning", "length imbalance", len(drafts), f"{message}: the {longer} side is longer")


def telltale_words(drafts: Sequence[Draft]) -> Finding:
    """Words that stand on nearly every positive side and on nearly no negative side, or the other way round."""
    counts = [Counter(word for side in part for word in set(_words(side))) for part in _two_sides(drafts)]
    n = len(drafts)
    most, least = WORD_SHARES[0] * n, WORD_SHARES[1] * n
    found = {
        name: sorted(word for word in here if here[word] >= most and there[word] <= least)
        for name, here, there in (("positive", counts[0], counts[1]), ("negative", counts[1], counts[0]))
    }
    if not any(found.values()):
        return Finding("ok", "telltale words", 0, "no single word tells the sides apart")
    said = "; ".join(f"{name}: {', '.join(words[:6])}" for name, words in found.items() if words)
    message = f"one word tells the sides apart ({said}): a direction may be this word, see the lexical control"
    return Finding("warning", "telltale words", sum(map(len, found.values())), message)


def answer_balance(drafts: Sequence[Draft]) -> Finding:
    """How often one and the same answer is the positive one, where answers are prefilled and few (A/B, yes/no)."""
    answers = [Counter(filter(None, map(_answer, part))) for part in _two_sides(drafts)]
    if not answers[0] or len(answers[0] + answers[1]) > 5:
        return Finding("ok", "answer balance", 0, "no fixed answers")
    answer, count = answers[0].most_common(1)[0]
    message = f"{answer!r} is the positive answer in {count} of {len(drafts)} pairs"
    if count <= ANSWER_SHARE * len(drafts):
        return Finding("ok", "answer balance", 0, message)
    return Finding("warning", "answer balance", count, f"{message}: the letter itself is a cue")


CHECKS: tuple[Callable[[Sequence[Draft]], Finding], ...] = (
    identical_sides,
    repeated_pairs,
    leaked_prompts,
    leaked_templates,
    length_imbalance,
    telltale_words,
    answer_balance,
)


def _splits(drafts: Sequence[Draft], seed: int, source: str) -> Finding:
    try:
        splits = split_pairs(drafts, seed, source)
    except DataError as error:
        return Finding("error", "splits", 0, str(error))
    sizes = f"{len(splits.train)}/{len(splits.val)}/{len(splits.test)} train/val/test"
    shared = [note for note in splits.notes if "system prompts" in note]  # the others have checks of their own
    return Finding("warning" if shared else "ok", "splits", len(drafts), "; ".join([sizes, *shared]))


def _tokens(drafts: Sequence[Draft], tokenizer: Tokenizer, max_length: int | None, raw: bool) -> Finding:
    """Whether every prompt can be rendered, and fits."""
    limit = max_length or tokenizer.model_max_length
    lengths, faults = [], []
    for draft in drafts:
        for side in (draft.pair.positive, draft.pair.negative):
            try:
                lengths.append(len(encode([side], tokenizer, raw=raw)[0].ids))
            except DataError as error:
                faults.append(draft.rows[0].error(str(error).removeprefix("prompt 0 ")))
    if faults:
        return Finding("error", "tokens", len(faults), f"cannot be rendered for this tokenizer: {faults[0]}")
    over = sum(length > limit for length in lengths)
    message = f"longest prompt {max(lengths)} tokens, mean {sum(lengths) / len(lengths):.0f}"
    if limit >= 10**9:  # what transformers writes for "not known"
        return Finding("ok", "tokens", 0, f"{message}; the tokenizer names no limit, give --max-length")
    if over:
        return Finding(
            "error", "tokens", over, f"{message}; {over} over the limit of {limit}: shorten or use --truncate"
        )
    return Finding("ok", "tokens", 0, f"{message}, limit {limit}")


def _two_sides(drafts: Sequence[Draft]) -> tuple[list[Prompt], list[Prompt]]:
    return [d.pair.positive for d in drafts], [d.pair.negative for d in drafts]


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def _shape(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    return tuple((turn["role"], normalised(turn["content"])) for turn in as_messages(prompt))


def _words(prompt: Prompt) -> list[str]:
    return [word.strip(".,;:!?\"'()[]") for word in _text(prompt).casefold().split()]


def _answer(prompt: Prompt) -> str | None:
    last: Any = None if isinstance(prompt, str) else prompt[-1]
    return last["content"] if last and last["role"] == "assistant" else None


def _sharing(train: Sequence[Draft], held_out: Sequence[Draft], key: Callable[[str], str]) -> list[Draft]:
    def keys(draft: Draft) -> set[str]:
        return {key(last_user_text(side)) for side in (draft.pair.positive, draft.pair.negative)}

    known = {text for draft in train for text in keys(draft)}
    return [draft for draft in held_out if keys(draft) & known]


def _named(drafts: Sequence[Draft]) -> str:
    names = [f"line {draft.rows[0].line}" for draft in drafts]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
