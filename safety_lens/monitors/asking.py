"""What is asked to see behaviour: prompts, how answers are judged, and the settings of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from safety_lens.data.rows import read_rows
from safety_lens.errors import DataError
from safety_lens.generation import Generation
from safety_lens.interventions.scorers.completion import Completion
from safety_lens.interventions.scorers.refusal import SubstringRefusal
from safety_lens.interventions.side_effects import instructions
from safety_lens.organism import DATA_DIR, behaviour, families
from safety_lens.types import Prompt

DERIVE = 60
"""Prompts of each kind that the refusal tokens are derived from and tested on."""
MOST_TOKENS = 12


@dataclass(frozen=True)
class Probes:
    """What behaviour is measured, beside the geometry.

    harmful, harmless: prompts; None takes requests that ship with Safety Lens. From prompts of your own the first half
    derives the refusal tokens and the second is measured. n: how many of each are measured. new_tokens: length of the
    greedy answers. facts: facts of the organism that are asked (only where the organism is trained; 0 for none).
    causal: concepts whose old direction is ablated to see whether refusals still use it.
    """

    harmful: Sequence[Prompt] | None = None
    harmless: Sequence[Prompt] | None = None
    n: int = 32
    new_tokens: int = 12
    facts: int = 16
    causal: tuple[str, ...] = ("refusal",)

    def __post_init__(self) -> None:
        for name, least in (("n", 2), ("new_tokens", 1), ("facts", 0)):
            if getattr(self, name) < least:
                raise DataError(f"probes: {name} must be {least} or more, got {getattr(self, name)}")
        if self.new_tokens > MOST_TOKENS:
            raise DataError(
                f"probes: new_tokens must be {MOST_TOKENS} or fewer, got {self.new_tokens}: more of an answer to a"
                " harmful prompt is never kept, and a refusal shows within them"
            )
        for name in ("harmful", "harmless"):
            given = getattr(self, name)
            if given is not None and len(given) < 4:
                raise DataError(
                    f"probes: {name} has {len(given)} prompts; half of them are measured, so give 4 or more"
                )


Judge = Callable[[Sequence[int], Sequence[Generation]], Float[np.ndarray, " k"]]
"""Function of (numbers of the prompts, their answers): 1 where the behaviour is shown, 0, or NaN."""


def prompts(probes: Probes, label: str, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts that the refusal tokens are derived from, and prompts that are measured."""
    given = getattr(probes, label)
    if given is not None:
        half = len(given) // 2
        return list(given[:half]), list(given[half:][: probes.n])
    derive, measured = instructions(label, "train"), instructions(label, "test")
    order = np.random.default_rng(seed).permutation(len(measured))[: probes.n]
    return list(derive[:DERIVE]), [measured[i] for i in sorted(order.tolist())]


def refused(numbers: Sequence[int], said: Sequence[Generation]) -> Float[np.ndarray, " k"]:
    scores = SubstringRefusal()([Completion("", row.text, row.tokens) for row in said])
    return np.where(np.isfinite(scores), scores >= 0.5, np.nan)


def facts(most: int, seed: int) -> tuple[list[Prompt], Judge]:
    rows = [row for row in read_rows(DATA_DIR / "facts.jsonl").rows if row.label("split") == "test"]
    order = np.random.default_rng(seed).permutation(len(rows))[:most]
    questions = [rows[i].text("question") for i in order]
    facts = [max((f for f in families.FACTS if f.subject in q), key=lambda f: len(f.subject)) for q in questions]

    def judge(numbers: Sequence[int], said: Sequence[Generation]) -> Float[np.ndarray, " k"]:
        right = [behaviour.states(facts[i], facts[i].value)(row.text) for i, row in zip(numbers, said, strict=True)]
        return np.array(right, dtype=float)

    return list(questions), judge
