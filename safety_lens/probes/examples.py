"""Examples that scores are made on: a prompt, a response, and both as tokens.

What a score is about is decided here. Safety: harmful requests with the model's *own* refusals, so that the score asks
which weights produce them. Utility: ordinary requests with proper answers. Read from the built-in sets, from training
files of any format, or from files of prompts alone, which the model answers itself.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.data.built_in import built_in_for
from safety_lens.data.labelled import IGNORED, Labelled, tokenise
from safety_lens.data.training import Example as Conversation
from safety_lens.errors import DataError
from safety_lens.forced import Continuation
from safety_lens.generation import generate, stop_tokens
from safety_lens.probes.example_sets import KINDS, Asked, Kind, asked_of
from safety_lens.types import Prompt

LEAST = 8
"""Examples that must be left where the model answers the prompts itself."""


@dataclass(frozen=True)
class Example:
    """One example. prompt: the last user turn, or the text before the response. response: what the model is to say.

    continuation: both as the model reads them. label: "harmful", "harmless", … where the source says. line: of the
    file, or number in a built-in set, from 1.
    """

    prompt: str
    response: str
    continuation: Continuation
    label: str | None
    line: int


@dataclass(frozen=True, eq=False)
class ExampleSet(Sequence[Example]):
    """Examples of one source and split.

    name: the source. title: the same for a reader. notes: what was left out or cut, and why. sha256: of all tokens.
    """

    examples: tuple[Example, ...]
    name: str
    split: str | None
    notes: tuple[str, ...] = ()
    title: str = ""

    @property
    def continuations(self) -> list[Continuation]:
        return [example.continuation for example in self.examples]

    @property
    def sha256(self) -> str:
        return examples_sha256(self.continuations)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        return self.examples[index]

    def halves(self, seed: int = 0) -> "tuple[ExampleSet, ExampleSet]":
        """Two random halves: scores from each tell how much of a top set is the draw of examples (the ceiling)."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        cut = len(order) // 2
        first, second = (tuple(self.examples[i] for i in sorted(part)) for part in (order[:cut], order[cut:]))
        return (
            ExampleSet(first, f"{self.name} (half 1)", self.split),
            ExampleSet(second, f"{self.name} (half 2)", self.split),
        )


def examples_sha256(examples: Sequence[Continuation]) -> str:
    """A hash of the token ids of examples, in their order."""
    ids = [[list(row.prompt), list(row.tokens)] for row in examples]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def read_examples(
    source: str | Path,
    model: HookedTransformer,
    *,
    kind: str | None = None,
    split: str | None = None,
    label: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    keep: Callable[[str], bool] | None = None,
    max_new_tokens: int = 48,
    max_length: int = 512,
    raw: bool = False,
    template_kwargs: dict[str, Any] | None = None,
) -> ExampleSet:
    """Read examples and tokenise them as the model would meet them.

    Args:
        source: "safety" (harmful requests that the model itself refuses), "utility" (requests that it answers), "facts"
            (questions that it answers rightly), in the words of the model (`data.built_in`); or a JSONL, JSON or CSV
            file, or hf:NAME, of training rows in any format that fine-tuning takes, of rows with `instruction` or
            `prompt` and no response, or of contrast pairs. Prompts without a response are answered greedily.
        kind: What the examples of a file are for: "safety" takes the positive side of pairs and keeps the model's
            refusals, "utility" takes the negative side and keeps its answers.
        split: "train", "val" or "test". Default: train rows of a source that is split, else all rows. A file without
            splits is divided 60/20/20 by a hash of the prompt.
        label: rows of this label only.
        limit: examples to keep, drawn with `seed`.
        keep: whether an answer of the model counts, by its text, instead of what the kind says. Others are left out
            and counted in the notes.
        max_length: longer rows lose their end.

    Raises:
        DataError: a source, split or label that is not there, a malformed row (named), no tokenizer, or fewer than
            `LEAST` examples left where the model answers, with the reason.
    """
    if model.tokenizer is None:
        raise DataError("examples are tokenised, and this model has no tokenizer: pass tokenizer= to load_model")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be 1 or more, got {limit}")
    name = str(source)
    if kind is not None and kind not in KINDS:
        raise DataError(f"no kind of examples {kind!r}: choose {', '.join(KINDS)}")
    chosen, sets = KINDS.get(name, KINDS.get(kind or "")), built_in_for(model)
    asked, notes, found_split = asked_of(name, split, label, sets, chosen)
    order = list(range(len(asked)))
    if limit is not None:
        random.Random(seed).shuffle(order)
    settings = _Settings(model, min(max_length, model.cfg.n_ctx), max_new_tokens, raw, template_kwargs, keep)
    wanted = "of the kind asked for" if keep is not None or chosen is None else chosen.wanted
    kept, more = _prepared([asked[i] for i in order], settings, limit, wanted)
    title = f"built-in {name}, {sets.title}" if name in KINDS else name
    _check_enough(kept, title, [*notes, *more], asked, chosen, limit)
    kept.sort(key=lambda example: example.line)
    return ExampleSet(tuple(kept), name, found_split, (*notes, *more), title)


def _check_enough(
    kept: Sequence[Example],
    title: str,
    reasons: Sequence[str],
    asked: Sequence[Asked],
    kind: Kind | None,
    limit: int | None,
) -> None:
    """Refuse a set that is empty, or too small because the model's own answers are of another kind."""
    own = kind is not None and all(row.response is None for row in asked)
    least = min(LEAST, len(asked), LEAST if limit is None else limit) if own else 1
    if len(kept) >= least:
        return
    what = f"no example of {title} is left" if not kept else f"{len(kept)} examples of {title} are left, too few"
    advice = ""
    if own and kind is not None:
        advice = (
            f". At least {least} {kind.wanted} of this model are needed: name prompts for which it gives them, or rows"
            f" with responses ({kind.flag})"
        )
    raise DataError(f"{what} to score: {'; '.join(reasons) or 'it has no rows'}{advice}")


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    model: HookedTransformer
    max_length: int
    max_new_tokens: int
    raw: bool
    template_kwargs: dict[str, Any] | None
    keep: Callable[[str], bool] | None


def _prepared(
    asked: Sequence[Asked], settings: _Settings, limit: int | None, wanted: str
) -> tuple[list[Example], list[str]]:
    given = [row for row in asked if row.response is not None]
    if given:
        return _tokenised(given, settings, limit)
    kept: list[Example] = []
    seen = 0
    while seen < len(asked) and (limit is None or len(kept) < limit):
        part = asked[seen : seen + (len(asked) if limit is None else limit - len(kept))]
        seen += len(part)
        kept += _self_answered(part, settings)
    if seen == len(kept):
        return kept, []
    return kept, [f"{seen - len(kept)} of {seen} answers of the model are not {wanted} and are left out"]


def _self_answered(asked: Sequence[Asked], settings: _Settings) -> list[Example]:
    prompts = [row.text if settings.raw else list(row.messages) for row in asked]
    found = own_answers(
        settings.model, prompts, settings.max_new_tokens, raw=settings.raw, template_kwargs=settings.template_kwargs
    )
    examples = [
        Example(row.text, text, continuation, row.label, row.line)
        for row, (continuation, text) in zip(asked, found, strict=True)
    ]
    counts = [settings.keep or row.accepts or (lambda text: True) for row in asked]
    return [example for example, accepts in zip(examples, counts, strict=True) if accepts(example.response)]


def own_answers(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 48,
    *,
    raw: bool = False,
    template_kwargs: dict[str, Any] | None = None,
) -> list[tuple[Continuation, str]]:
    """The model's greedy answer to every prompt, as tokens and text. One that ends does so with the stop token."""
    encoded = encode_for(model, prompts, raw=raw, template_kwargs=template_kwargs)
    written = generate(model, encoded, max_new_tokens=max_new_tokens)
    stop = sorted(stop_tokens(model))[:1]
    return [
        (Continuation(tuple(e.ids), (*row.tokens, *stop) if row.stopped else row.tokens), row.text)
        for e, row in zip(encoded, written, strict=True)
    ]


def _tokenised(asked: Sequence[Asked], settings: _Settings, limit: int | None) -> tuple[list[Example], list[str]]:
    by_line = {row.line: row for row in asked}
    conversations = [Conversation(row.messages, row.plain, row.line) for row in asked[:limit]]
    found = tokenise(
        conversations,
        settings.model.tokenizer,
        max_length=settings.max_length,
        raw=settings.raw,
        template_kwargs=settings.template_kwargs,
    )
    last = {row.line: row for row in found.rows}  # of a conversation with several responses, the last is scored
    examples = []
    for line, labelled in last.items():
        row = by_line[line]
        continuation = _continuation(labelled)
        if continuation.prompt:
            examples.append(Example(row.text, row.response or "", continuation, row.label, line))
    notes = list(found.notes)
    if bare := len(last) - len(examples):
        notes.append(f"{bare} of {len(last)} rows have no prompt and are left out")
    return examples, notes


def _continuation(row: Labelled) -> Continuation:
    """The last stretch of tokens with labels, and all that stands before it."""
    end = max(i for i, label in enumerate(row.labels) if label != IGNORED) + 1
    start = end
    while start > 0 and row.labels[start - 1] != IGNORED:
        start -= 1
    return Continuation(row.ids[:start], row.ids[start:end])
