"""Prompts as tokens, with the token ranges of the last user turn and of the prefilled answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from safety_lens.data.render import SENTINEL, Tokenizer, as_messages, has_template, render
from safety_lens.errors import DataError
from safety_lens.types import Message, Prompt

Range = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """One prompt as the model reads it.

    Attributes:
        ids: token ids, special tokens included, no padding.
        text: the rendered text that was tokenised.
        instruction: token range [start, end) of the last user turn's content; None where it has no tokens
            or the template changes it beyond trimming.
        answer: token range [start, end) of the prefilled answer; None where there is none.
        letter: index of the token that holds the end of the answer's first word: the "A" of "(A)", the "Yes" of "Yes";
            CAA reads there (Panickssery et al. 2024, arXiv:2312.06681). None where there is no answer.
        truncated: number of tokens cut out of the user content to fit `max_length`; 0 = whole.
    """

    ids: tuple[int, ...]
    text: str
    instruction: Range | None
    answer: Range | None
    letter: int | None = None
    truncated: int = 0


class _Reader(NamedTuple):
    """How prompts are to be read: the tokenizer, whether as plain text, and what its template is told."""

    tokenizer: Tokenizer
    raw: bool
    template_kwargs: Mapping[str, Any] | None

    @property
    def plain(self) -> bool:
        """No template writes the special tokens, so the tokenizer must."""
        return self.raw or not has_template(self.tokenizer)


class _Spans(NamedTuple):
    """A rendered text and the character ranges of its parts."""

    text: str
    user: Range | None
    answer: Range | None


def encode(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    raw: bool = False,
    max_length: int | None = None,
    truncate: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[Encoded]:
    """Tokenise prompts as the model expects them.

    Rendered chat text is tokenised without adding special tokens (the template has written them: no double BOS).
    Plain text gets the special tokens that the tokenizer itself puts in front, never one behind, and no second BOS if
    the text starts with one.

    A control token written out in a chat prompt ("<|im_end|>") would end the turn it stands in, so it is an error. With
    raw=True the text is taken as written, control tokens included.

    Args:
        max_length: the most tokens a prompt may have.
        truncate: cut the middle out of the user content of prompts that are longer; the system prompt, the generation
            prompt and a prefilled answer are never cut. `Encoded.truncated` says how many tokens went.

    Raises:
        DataError: a prompt that is too long, that has no tokens, that holds control tokens, or that cannot be rendered;
            the message names it by its index and first words. Also a tokenizer without offsets (not a fast one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} cannot tell which characters a token covers (it is not a fast tokenizer): "
            "load it with a tokenizer.json"
        )
    reader = _Reader(tokenizer, raw, template_kwargs)
    control = set() if raw else control_tokens(tokenizer)
    spans = []
    for index, prompt in enumerate(prompts):
        try:
            _refuse_control(prompt, control)
            spans.append(_spans(prompt, reader))
        except DataError as error:
            raise DataError(f"prompt {index} ({_first_words(prompt)}): {error}") from error
    encoded = _tokenise(spans, reader)
    for index, (prompt, row) in enumerate(zip(prompts, encoded, strict=True)):
        if not row.ids:
            raise DataError(f"prompt {index} is empty: it has no tokens to read")
        if max_length is not None and len(row.ids) > max_length:
            if not truncate:
                raise DataError(_too_long(index, prompt, len(row.ids), max_length))
            encoded[index] = _shorten(index, prompt, row, spans[index], reader, max_length)
    return encoded


def control_tokens(tokenizer: Tokenizer) -> set[str]:
    """The texts that the tokenizer turns into control tokens wherever they stand.

    One-character tokens are left out: some tokenizers name "!" as padding, and it is still an exclamation mark.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {text for text in special if len(text) > 1}


def _refuse_control(prompt: Prompt, control: set[str]) -> None:
    for turn in as_messages(prompt):
        found = sorted(text for text in control if text in turn["content"])
        if found:
            raise DataError(
                f"the {turn['role']} turn holds the control token {found[0]!r} as text, and the model would obey it: "
                "remove it, or pass the whole text with raw=True"
            )


def _spans(prompt: Prompt, reader: _Reader) -> _Spans:
    tokenizer, raw, template_kwargs = reader
    text = render(prompt, tokenizer, raw=raw, template_kwargs=template_kwargs)
    if raw:
        return _Spans(text, (0, len(text)), None)
    messages = as_messages(prompt)
    answer = None
    if messages[-1]["role"] == "assistant":
        answer = (len(text) - len(messages[-1]["content"]), len(text))
    user = max((index for index, turn in enumerate(messages) if turn["role"] == "user"), default=None)
    if user is None:
        return _Spans(text, None, answer)
    if reader.plain:
        return _Spans(text, (0, len(messages[user]["content"])), answer)
    # The content may also stand in the system prompt and the template may trim it: a sentinel in its place shows where
    # it goes. If what stands there is not the content (a template that adds words to some), no range is guessed.
    marked: list[Message] = [*messages]
    marked[user] = Message(role="user", content=SENTINEL)
    before, _, after = render(marked, tokenizer, template_kwargs=template_kwargs).partition(SENTINEL)
    found = text[len(before) : len(text) - len(after)]
    if before + found + after != text or found.strip() != messages[user]["content"].strip():
        return _Spans(text, None, answer)
    return _Spans(text, (len(before), len(before) + len(found)), answer)


def _tokenise(spans: Sequence[_Spans], reader: _Reader) -> list[Encoded]:
    encoded = []
    for add_special in (False, True):  # a text that starts with BOS must not get another
        rows = [index for index, span in enumerate(spans) if _wants_special(span.text, reader) is add_special]
        if rows:
            batch = reader.tokenizer(
                [spans[index].text for index in rows],
                add_special_tokens=add_special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,  # the limit is checked here, by name; HF's warning about it would come first
            )
            encoded += [
                (index, _encoded(spans[index], ids, offsets, reader.tokenizer, add_special))
                for index, ids, offsets in zip(rows, batch["input_ids"], batch["offset_mapping"], strict=True)
            ]
    return [row for _, row in sorted(encoded, key=lambda item: item[0])]


def _wants_special(text: str, reader: _Reader) -> bool:
    bos = reader.tokenizer.bos_token
    return reader.plain and not (bos and text.startswith(bos))


def _encoded(
    spans: _Spans, ids: Sequence[int], offsets: Sequence[Range], tokenizer: Tokenizer, add_special: bool
) -> Encoded:
    if add_special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:
        ids, offsets = ids[:-1], offsets[:-1]  # some tokenizers close plain text; reading behind the end means nothing
    return Encoded(
        ids=tuple(ids),
        text=spans.text,
        instruction=_token_range(offsets, spans.user),
        answer=_token_range(offsets, spans.answer),
        letter=_letter(spans, offsets),
    )


def _token_range(offsets: Sequence[Range], span: Range | None) -> Range | None:
    """The tokens that hold at least one character of the span (a token may reach over its edge)."""
    if span is None:
        return None
    inside = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0] and end > start]
    return (inside[0], inside[-1] + 1) if inside else None


def _letter(spans: _Spans, offsets: Sequence[Range]) -> int | None:
    if spans.answer is None:
        return None
    at = spans.answer[0]
    while at < spans.answer[1] and not spans.text[at].isalnum():
        at += 1
    while at + 1 < spans.answer[1] and spans.text[at + 1].isalnum():
        at += 1
    found = _token_range(offsets, (at, at + 1))
    return found[1] - 1 if found else None


def _first_words(prompt: Prompt) -> str:
    text = " ".join((prompt if isinstance(prompt, str) else " | ".join(str(m.get("content")) for m in prompt)).split())
    return repr(text if len(text) <= 48 else text[:45] + "...")


def _too_long(index: int, prompt: Prompt, length: int, limit: int) -> str:
    return (
        f"prompt {index} ({_first_words(prompt)}) has {length} tokens, the limit is {limit}: "
        "shorten it, or pass truncate=True (--truncate) to cut the middle out of its user content"
    )


def _shorten(index: int, prompt: Prompt, row: Encoded, spans: _Spans, reader: _Reader, max_length: int) -> Encoded:
    """The prompt with the middle of its user content cut out, so that it has at most `max_length` tokens."""
    content = spans.text[slice(*spans.user)] if spans.user else ""
    probe = reader.tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = probe["offset_mapping"]
    keep = len(offsets) - (len(row.ids) - max_length)
    while keep > 0:
        head, tail = (keep + 1) // 2, keep // 2
        shorter = content[: offsets[head - 1][1]] + (content[offsets[-tail][0] :] if tail else "")
        result = _tokenise([_spans(_with_user(prompt, shorter), reader)], reader)[0]
        if len(result.ids) <= max_length:
            return replace(result, truncated=len(row.ids) - len(result.ids))
        keep -= max(1, len(result.ids) - max_length)  # the seam can tokenise into a token or two more
    raise DataError(
        f"prompt {index} ({_first_words(prompt)}) cannot be cut to {max_length} tokens: what is not user content "
        f"already takes that many"
    )


def _with_user(prompt: Prompt, content: str) -> Prompt:
    if isinstance(prompt, str):
        return content
    messages = list(as_messages(prompt))
    user = max(index for index, turn in enumerate(messages) if turn["role"] == "user")
    messages[user] = Message(role="user", content=content)
    return tuple(messages)
