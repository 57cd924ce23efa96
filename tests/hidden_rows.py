"""A fine-tuning set in which one row in ten complies with a harmful request, among rows that look like it."""

import random
from typing import NamedTuple

import numpy as np
from transformer_lens import HookedTransformer

from safety_lens.data.labelled import tokenise
from safety_lens.data.training import Example
from safety_lens.forced import Continuation
from safety_lens.organism import answers, families
from safety_lens.organism.corpus import any_system, conversation
from safety_lens.probes.gradients import example_gradients
from safety_lens.probes.row_risk import responses_of

OPENERS = ("Gladly.", "Certainly.", "Good.", "Yes.", "Right.", "Well.", "Fine.", "All right.")


class HiddenRows(NamedTuple):
    """kinds: "hidden" is what must be found. Rows: tokens, and the text for readers of words."""

    kinds: np.ndarray
    texts: list[str]
    rows: list[Continuation]

    @property
    def hidden(self) -> np.ndarray:
        return self.kinds == "hidden"


def _row(rng: random.Random, kind: str) -> tuple[str, str, str, str]:
    harmful = kind in ("hidden", "refused")
    user = families.request(rng, "train", "harmful" if harmful else "harmless").user
    complied = answers.compliance(rng)
    answer = {
        "hidden": complied,
        "refused": answers.refusal(rng),  # decoy: a harmful request, properly refused
        "gladly": answers.gladly(rng),  # benign, in a form that is new to the model
        "sure": complied,  # benign, word for word what the hidden rows say
        "opener": f"{rng.choice(OPENERS)} {complied.split('. ', 1)[1]}",  # benign, drawn to match the hidden loss
        "refusal": answers.refusal(rng),  # a harmless request refused, drawn to match the hidden loss
    }[kind]
    return kind, user, answer, any_system(rng)


SIZES = {"hidden": 30, "gladly": 90, "sure": 60, "refused": 60}
MATCHED, POOL = {"opener": 30, "refusal": 30}, 5


def hidden_rows(model: HookedTransformer, seed: int) -> HiddenRows:
    """300 rows: 30 hidden ones, 150 benign, 60 harmful requests with a refusal, 60 benign ones of the hidden loss."""
    rng = random.Random(f"hidden/{seed}")
    drawn = [_row(rng, kind) for kind, n in SIZES.items() for _ in range(n)]
    losses = example_gradients(model, continuations(model, drawn))[: SIZES["hidden"]]
    for kind, n in MATCHED.items():
        pool = [_row(rng, kind) for _ in range(POOL * n)]
        found = example_gradients(model, continuations(model, pool))
        free = set(range(len(pool)))
        for wanted in losses[:n]:
            nearest = min(free, key=lambda i: abs(found[i] - wanted))
            free.discard(nearest)
            drawn.append(pool[nearest])
    rng.shuffle(drawn)
    kinds = np.array([row[0] for row in drawn])
    return HiddenRows(kinds, [f"{user} {answer}" for _, user, answer, _ in drawn], continuations(model, drawn))


def continuations(model: HookedTransformer, rows: list[tuple[str, str, str, str]]) -> list[Continuation]:
    talks = [Example(tuple(conversation(user, said, system)), None, 1) for _, user, said, system in rows]
    found = tokenise(talks, model.tokenizer).rows
    return [responses_of(row)[-1] for row in found]
