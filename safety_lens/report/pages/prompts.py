"""Prompts of a page: their tokens, what is folded away, and what of an answer is left out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformer_lens import HookedTransformer

from safety_lens.data import Encoded
from safety_lens.types import Prompt

HARMFUL = "harmful"
STORED_TOKENS = 12
"""Of an answer to a prompt labelled harmful, no more than this stands on a page."""


@dataclass(frozen=True)
class PagePrompt:
    """A prompt with a label; the label "harmful" folds it away until it is clicked."""

    prompt: Prompt
    label: str | None = None


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt as it stands on the page.

    tokens: decoded one by one. start: tokens at the front that all prompts share. cut: tokens of a harmful prompt's
    answer that are left out.
    """

    tokens: tuple[str, ...]
    label: str | None
    start: int
    cut: int

    @property
    def harmful(self) -> bool:
        return self.label == HARMFUL


def shorten(encoded: Encoded, label: str | None) -> Encoded:
    """The prompt without what follows the first tokens of its answer, where it is labelled harmful."""
    if label != HARMFUL or encoded.answer is None:
        return encoded
    end = min(encoded.answer[1], encoded.answer[0] + STORED_TOKENS)
    return replace(encoded, ids=encoded.ids[:end], answer=(encoded.answer[0], end))


def shown_prompts(
    model: HookedTransformer, asked: Sequence[PagePrompt], whole: Sequence[Encoded], kept: Sequence[Encoded]
) -> tuple[ShownPrompt, ...]:
    """whole, kept: the prompts as they were encoded, and as they were shortened."""
    start = _common_start(kept)
    words: dict[int, str] = {}
    for i in {i for e in kept for i in e.ids}:
        words[i] = str(model.tokenizer.decode([i]))
    return tuple(
        ShownPrompt(tuple(words[i] for i in now.ids), one.label, start, len(full.ids) - len(now.ids))
        for one, full, now in zip(asked, whole, kept, strict=True)
    )


def _common_start(encoded: Sequence[Encoded]) -> int:
    """Leading tokens that are the same in all prompts: begin-of-text and template, whose activations are the same in
    every prompt and often far larger than any other. Of a single prompt: what stands before the user's words."""
    different = list(dict.fromkeys(e.ids for e in encoded))
    if len(different) == 1:
        only = encoded[0]
        return 0 if only.instruction is None else only.instruction[0]
    shortest = min(map(len, different))
    same = next((k for k in range(shortest) if len({ids[k] for ids in different}) > 1), shortest)
    return min(same, shortest - 1)
