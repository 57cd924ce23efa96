"""Training rows as tokens with labels: -100 wherever nothing is to be learned.

A response is what the model must produce after the generation prompt: from the first token behind it up to and
including the first control token, which ends the turn. Prompts, headers and what a template writes behind the end of a
turn carry no label. A token that reaches back over the edge into the prompt belongs to the prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from safety_lens.data.chat import control_tokens
from safety_lens.data.render import Tokenizer, has_template, render_messages
from safety_lens.data.training import Example
from safety_lens.errors import DataError
from safety_lens.types import Message

IGNORED = -100
"""The label of a token that is not learned, as torch's cross entropy has it."""

Span = tuple[int, int]


class Text(NamedTuple):
    """A text and the character spans of it that are responses."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Labelled:
    """One row as the model reads it. labels: the token itself where it is learned, else -100. line: of the file.

    cut: tokens that did not fit into the maximal length and are gone from the end.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    line: int
    cut: int = 0

    @property
    def learned(self) -> int:
        """Tokens that carry a label."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class TokenRows:
    """All rows as tokens. notes: what was cut or left out, with its number."""

    rows: tuple[Labelled, ...]
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.ids) for row in self.rows)


def tokenise(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int = 512,
    loss_on: str = "responses",
    raw: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> TokenRows:
    """Rows as tokens with labels.

    A conversation whose template changes earlier turns when more follow (Qwen 3 drops their thinking) becomes one row
    for each response, each in the context in which it is generated.

    Args:
        max_length: longer rows lose their end; a row that has no response token left is left out. Both are noted.
        loss_on: "responses" or "all" tokens.
        raw: plain text also where there is a template.

    Raises:
        DataError: a slow tokenizer, a conversation that cannot be shown as plain text, a template that refuses one
            (named by its row), or no row left.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} cannot tell which characters a token covers: use a fast tokenizer")
    label = LOSSES[loss_on]
    chat = has_template(tokenizer) and not raw
    control = control_tokens(tokenizer)
    rows: list[Labelled] = []
    notes = _Notes([], [], [], [])
    for example in examples:
        talk = chat and bool(example.messages)
        if talk and _holds_control(example.messages, control):
            notes.control.append(example.line)
            continue
        texts = _texts(example, tokenizer, talk, template_kwargs)
        found = [_labelled(text, tokenizer, example.line, plain=not talk, label=label) for text in texts]
        rows += notes.kept([_shortened(row, max_length) for row in found])
    if not rows:
        raise DataError(f"no row has a response token within {max_length} tokens; raise data.max_length")
    return TokenRows(tuple(rows), notes.sentences(len(examples), max_length))


class _Notes(NamedTuple):
    cut: list[int]
    lost: list[int]
    control: list[int]
    split: list[int]

    def kept(self, rows: Sequence[Labelled]) -> list[Labelled]:
        """The rows of one example that have something to learn; what happened to them is written down."""
        self.cut.extend(row.line for row in rows if row.cut)
        self.lost.extend(row.line for row in rows if not row.learned)
        self.split.extend(row.line for row in rows[1:2])
        return [row for row in rows if row.learned]

    def sentences(self, n: int, max_length: int) -> tuple[str, ...]:
        kinds = (
            (self.cut, f"rows are longer than {max_length} tokens and were cut at the end"),
            (self.lost, "rows have no response token within that length and are left out"),
            (self.control, "rows hold a control token of this tokenizer as text and are left out"),
            (self.split, "conversations became one row for each response, as the template changes earlier turns"),
        )
        return tuple(f"{len(lines)} of {n} {what} ({_lines(lines)})" for lines, what in kinds if lines)


def _lines(lines: Sequence[int]) -> str:
    unique = sorted(set(lines))
    return f"row {', '.join(map(str, unique[:8]))}" + (f" and {len(unique) - 8} more" if len(unique) > 8 else "")


def _holds_control(messages: Sequence[Message], control: set[str]) -> bool:
    return any(token in turn["content"] for turn in messages for token in control)


# --- texts and the spans of their responses -------------------------------------------------------------------------


def _texts(
    example: Example, tokenizer: Tokenizer, talk: bool, template_kwargs: Mapping[str, Any] | None
) -> tuple[Text, ...]:
    try:
        if talk:
            return chat_texts(example.messages, tokenizer, template_kwargs)
    except DataError as error:
        raise DataError(f"training row {example.line}: {error}") from error
    if example.plain is None:
        raise DataError(
            f"training row {example.line} is a conversation that only a chat template can show, and there is none: use"
            " a chat model, or instruction or prompt rows"
        )
    before, response = example.plain
    return (Text(before + response, ((len(before), len(before) + len(response)),)),)


def chat_texts(
    messages: Sequence[Message], tokenizer: Tokenizer, template_kwargs: Mapping[str, Any] | None = None
) -> tuple[Text, ...]:
    """A conversation through the chat template, with the span of every assistant turn: end of turn included.

    One text where the template writes each turn the same whatever follows, else one for each response.

    Raises:
        DataError: the template refuses the messages, or an answer does not follow its generation prompt.
    """
    whole = render_messages(messages, tokenizer, add_generation_prompt=False, template_kwargs=template_kwargs)
    found = []
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before, upto = messages[:index], messages[: index + 1]
        opening = render_messages(before, tokenizer, add_generation_prompt=True, template_kwargs=template_kwargs)
        closed = render_messages(upto, tokenizer, add_generation_prompt=False, template_kwargs=template_kwargs)
        if not closed.startswith(opening):
            raise DataError(
                f"the template's answer in message {index} does not begin where its generation prompt ends, so what is"
                " to be learned is not what would be generated; set template_kwargs (such as enable_thinking)"
            )
        found.append(Text(closed, ((len(opening), len(closed)),)))
    starts = [text.spans[0][0] for text in found]
    if all(whole.startswith(text.text.rstrip()) for text in found) and starts == sorted(starts):
        return (Text(whole, tuple(text.spans[0] for text in found)),)
    return tuple(found)


# --- tokens and labels ----------------------------------------------------------------------------------------------


def _responses(ids: Sequence[int], spoken: Sequence[bool]) -> tuple[int, ...]:
    return tuple(token if said else IGNORED for token, said in zip(ids, spoken, strict=True))


def _everything(ids: Sequence[int], spoken: Sequence[bool]) -> tuple[int, ...]:
    return tuple(ids)


LOSSES: dict[str, Callable[[Sequence[int], Sequence[bool]], tuple[int, ...]]] = {
    "responses": _responses,
    "all": _everything,
}
"""What is learned, by name: labels from the tokens and whether each belongs to a response."""


def _labelled(
    text: Text,
    tokenizer: Tokenizer,
    line: int,
    *,
    plain: bool,
    label: Callable[[Sequence[int], Sequence[bool]], tuple[int, ...]],
) -> Labelled:
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    batch = tokenizer(
        text.text,
        add_special_tokens=plain and not (bos and text.text.startswith(bos)),  # a template has written its own
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids, offsets = list(batch["input_ids"]), list(batch["offset_mapping"])
    end = len(text.text)
    if plain and eos is not None and not (ids and ids[-1] == eos):  # a template ends the turn itself
        ids, offsets = [*ids, eos], [*offsets, (end, end)]
    spoken = [False] * len(ids)
    for start, stop in text.spans:
        for index in _turn(ids, offsets, (start, stop), set(tokenizer.all_special_ids) | _special(tokenizer)):
            spoken[index] = True
    if plain and eos is not None:
        spoken[-1] = True
    return Labelled(tuple(ids), label(ids, spoken), line)


def _special(tokenizer: Tokenizer) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _turn(ids: Sequence[int], offsets: Sequence[Span], span: Span, control: set[int]) -> list[int]:
    """Tokens that begin inside the span, up to and with the first control token."""
    inside = []
    for index, (start, end) in enumerate(offsets):
        if start >= span[0] and end <= span[1] and end > start:
            inside.append(index)
            if ids[index] in control:
                break
    return inside


def _shortened(row: Labelled, max_length: int) -> Labelled:
    if len(row.ids) <= max_length:
        return row
    return Labelled(row.ids[:max_length], row.labels[:max_length], row.line, len(row.ids) - max_length)


def collate(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Int[Tensor, "batch pos"]]:
    """Rows of one batch, padded on the right: padding has no attention and no label."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[Sequence[int]], filler: int) -> Int[Tensor, "batch pos"]:
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in values])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }
