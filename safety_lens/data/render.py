"""Prompts as the text that the model reads: its own chat template, exactly.

Three steps that stay apart:

1. `render_messages`: what the template says, nothing added. This is what the golden renderings are compared with.
2. `render`: the conventions of this project on top. A string is one user turn. A conversation that ends with an
   assistant turn is a *prefilled answer*: generation prompt, then the answer, no end of turn; so the model is read in
   the middle of answering. A tokenizer without a template gets plain text.
3. `encode` (chat.py): tokens, and the token ranges of the last user turn and of the prefilled answer.

What a template decides and you should know:
- Thinking templates (Qwen3): `template_kwargs={"enable_thinking": False}` ends the generation prompt with an empty
  think block, and the last token then lies behind it. Two settings are two read positions: never compare across them.
- Templates without a system role (Gemma 2) raise; folding the system prompt into the user turn is your choice to make.
- Templates that print today's date (Llama 3.2) change from day to day: pin it, `template_kwargs={"date_string": ...}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from safety_lens.errors import DataError
from safety_lens.types import Message, Prompt

# transformers' PreTrainedTokenizerBase; not imported here, so that the command line can show its help without it
Tokenizer = Any

ROLES = ("system", "user", "assistant")
# Private-use characters: no template trims them, no tokenizer knows them as control tokens, no prompt holds them.
SENTINEL = "\ue000content\ue001"
ANSWER_SENTINEL = "\ue000answer\ue001"


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer brings a chat template; without one, prompts are plain text."""
    return bool(getattr(tokenizer, "chat_template", None))


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """The prompt as messages: a string is one user turn.

    Raises:
        DataError: no messages, a role other than system/user/assistant, a content that is not a string, or fields
            that would be lost (tool calls, images).
    """
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    if not prompt:
        raise DataError("a conversation needs at least one message, got none")
    for index, turn in enumerate(prompt):
        if turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise DataError(
                f"message {index} must have a role out of {', '.join(ROLES)} and a text as content, "
                f"got {str(dict(turn))[:120]}"
            )
        if extra := sorted(set(turn) - {"role", "content"}):
            raise DataError(f"message {index} has {', '.join(extra)}; only role and content can be read here")
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in prompt)


def render_messages(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Exactly what the tokenizer's chat template renders.

    Args:
        template_kwargs: passed to the template as they are, e.g. `{"enable_thinking": False}`.

    Raises:
        DataError: no template, or the template refuses these messages (its own reason is in the message).
    """
    from jinja2.exceptions import TemplateError

    if not has_template(tokenizer):
        raise DataError("this tokenizer has no chat template: pass plain text (a string), or a tokenizer that has one")
    try:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(template_kwargs or {}),
        )
    except TemplateError as error:
        raise DataError(_template_refusal(str(error), messages)) from error
    return str(text)


def _template_refusal(reason: str, messages: Sequence[Message]) -> str:
    roles = ", ".join(turn["role"] for turn in messages)
    said = f"the chat template refuses a conversation of ({roles}): {reason}."
    if any(turn["role"] == "system" for turn in messages):
        return f"{said} Drop the system prompt, or fold it into the user turn"
    return f"{said} Change the order of the turns to what the template accepts"


def render(
    prompt: Prompt,
    tokenizer: Tokenizer,
    *,
    raw: bool = False,
    add_generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text that the model reads for a prompt.

    Args:
        prompt: a user turn, or messages. If the last message is the assistant's it is a prefilled answer (see
            `render_prefill`), unless `add_generation_prompt` is False: then the template closes the turn.
        raw: return the string untouched.

    Raises:
        DataError: raw with messages; a conversation that plain text cannot show; a template that refuses it.
    """
    if raw:
        if not isinstance(prompt, str):
            raise DataError("raw prompts are plain strings, got messages: pass a string, or leave raw unset")
        return prompt
    messages = as_messages(prompt)
    if not has_template(tokenizer):
        return _plain(messages)
    if messages[-1]["role"] == "assistant" and add_generation_prompt:
        return render_prefill(messages, tokenizer, template_kwargs=template_kwargs)
    return render_messages(
        messages, tokenizer, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs
    )


def render_prefill(
    messages: Sequence[Message], tokenizer: Tokenizer, *, template_kwargs: Mapping[str, Any] | None = None
) -> str:
    """Generation prompt, then the content of the last (assistant) message as written, with no end of turn.

    Templates whose generation prompt ends flush (Llama 2, Mistral: "[/INST]") put a space before every answer. The
    same white space is put here, found by rendering an answer through the template: tokens are those of a real answer.
    """
    opening = render_messages(messages[:-1], tokenizer, add_generation_prompt=True, template_kwargs=template_kwargs)
    answer = messages[-1]["content"]
    if answer[:1].isspace():
        return opening + answer
    marked = [*messages[:-1], Message(role="assistant", content=ANSWER_SENTINEL)]
    closed = render_messages(marked, tokenizer, add_generation_prompt=False, template_kwargs=template_kwargs)
    before = closed.partition(ANSWER_SENTINEL)[0]
    gap = before[len(opening) :] if before.startswith(opening) else ""
    return opening + (gap if gap.isspace() else "") + answer  # a think block is not a gap: enable_thinking rules it


def _plain(messages: Sequence[Message]) -> str:
    roles = [turn["role"] for turn in messages]
    if roles == ["user"]:
        return messages[0]["content"]
    if roles == ["user", "assistant"]:
        question, answer = (turn["content"] for turn in messages)
        return question + ("" if question[-1:].isspace() or answer[:1].isspace() else " ") + answer
    raise DataError(
        f"this tokenizer has no chat template, so a conversation of ({', '.join(roles)}) cannot be shown to the model: "
        "use a chat model, or pairs of plain text (format statements)"
    )
