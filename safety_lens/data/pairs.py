"""The nouns: a contrast pair, and a concept made of pairs in three splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from safety_lens.errors import DataError
from safety_lens.types import Message, Prompt

Split = Literal["train", "val", "test"]


def frozen_prompt(prompt: Prompt) -> Prompt:
    """The same prompt in a form nobody else holds: a string as it is, messages as a tuple of fresh dicts."""
    if isinstance(prompt, str):
        return prompt
    return tuple(Message(**turn) for turn in prompt)  # a wrong turn is kept as it is: rendering names what is wrong


def last_user_text(prompt: Prompt) -> str:
    """What a reader would call "the prompt": the string itself, or the content of the last user turn ("" if none)."""
    if isinstance(prompt, str):
        return prompt
    return next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), "")


@dataclass(frozen=True)
class ContrastPair:
    """Two prompts that differ in one thing: the positive side shows the concept, the negative side does not.

    Attributes:
        positive, negative: a user turn (str), or messages; an assistant turn at the end is a prefilled answer.
        category: a label of the topic, None where unknown.
        template: a label of the wording pattern, for leave-template-out evaluation; None where unknown.
        id: the id(s) of the row(s) the pair came from.
    """

    positive: Prompt
    negative: Prompt
    category: str | None = None
    template: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "positive", frozen_prompt(self.positive))
        object.__setattr__(self, "negative", frozen_prompt(self.negative))


@dataclass(frozen=True)
class Concept:
    """A name and its contrast pairs: fit on train, choose on val, report on test.

    Attributes:
        val: empty where the data has no split to choose on; selection then happens inside train (cross-validation).
        source: where the pairs came from (a path, a built-in name, "hf:..."); sha256: of that content.
        raw: the prompts are plain text and are never rendered through a chat template.
        notes: what a reader of any number should know: how splits were made, what was left unpaired.

    Raises:
        DataError: no train or no test pairs, or raw with prompts that are conversations.
    """

    name: str
    train: tuple[ContrastPair, ...]
    val: tuple[ContrastPair, ...]
    test: tuple[ContrastPair, ...]
    source: str
    sha256: str
    raw: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split, pairs in (("train", self.train), ("test", self.test)):
            if not pairs:
                raise DataError(
                    f"concept '{self.name}' (from {self.source}) has no {split} pairs: add rows of that split"
                )
        if self.raw and any(
            not isinstance(side, str) for pair in self.pairs for side in (pair.positive, pair.negative)
        ):
            raise DataError(
                f"concept '{self.name}' was asked for as plain text (raw), but its prompts are conversations "
                "(a system prompt or a prefilled answer): leave raw unset, or convert the pairs to statements"
            )

    @property
    def pairs(self) -> tuple[ContrastPair, ...]:
        """All pairs: train, then val, then test."""
        return self.train + self.val + self.test


def sides(pairs: Sequence[ContrastPair]) -> tuple[list[Prompt], list[Prompt]]:
    """The positive prompts and the negative prompts of `pairs`, in order."""
    return [pair.positive for pair in pairs], [pair.negative for pair in pairs]
