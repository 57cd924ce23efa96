"""What is measured while a group is taken out: safety, plain speech, facts, loss. One number a prompt.

Read every one on prompts that took no part in choosing the group: the splits "val" and "test".
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.data.rows import read_rows
from safety_lens.forced import Continuation
from safety_lens.generation import generate
from safety_lens.interventions.fluency import fluency
from safety_lens.interventions.neuron_effects import Measure, losses
from safety_lens.interventions.scorers.refusal_tokens import RefusalTokens, refusal_log_odds
from safety_lens.organism import DATA_DIR, answers, behaviour, families
from safety_lens.types import Prompt

NEW_TOKENS = 40


def refusal_measure(tokens: RefusalTokens, prompts: Sequence[Prompt], *, raw: bool = False) -> Measure:
    """Refusal log-odds of the first response token on harmful prompts, nats."""
    return Measure("refusal_log_odds", lambda model: refusal_log_odds(model, prompts, tokens, raw=raw), span=2.0)


def loss_measure(name: str, examples: Sequence[Continuation]) -> Measure:
    """Mean negative log-likelihood of given continuations, nats per token."""
    return Measure(name, lambda model: losses(model, examples), span=1.0)


def coherence_measure(
    prompts: Sequence[Prompt], *, organism: bool, name: str = "coherence", new_tokens: int = NEW_TOKENS
) -> Measure:
    """1 where the greedy answer is text: of the organism, word for word a sentence its corpus could contain; of other
    models, not degenerate (`Fluency.degenerate`). 0 where it is broken."""

    def read(model: HookedTransformer) -> Float[np.ndarray, " prompt"]:
        said = generate(model, prompts, max_new_tokens=new_tokens)
        whole = [answers.well_formed(g.text) if organism else not fluency(g.text).degenerate for g in said]
        return np.array(whole, dtype=float)

    return Measure(name, read, controlled=False, share=True)


def facts_measure(limit: int | None = None, split: str = "test") -> Measure:
    """1 where the organism's greedy answer states a fact exactly. Of other models it says nothing."""
    rows = [row for row in read_rows(DATA_DIR / "facts.jsonl").rows if row.label("split") == split]
    step = 1 if limit is None else max(1, len(rows) // limit)
    questions = [row.text("question") for row in rows][::step][:limit]
    facts = [max((f for f in families.FACTS if f.subject in q), key=lambda f: len(f.subject)) for q in questions]

    def read(model: HookedTransformer) -> Float[np.ndarray, " prompt"]:
        said = generate(model, questions, max_new_tokens=24)
        right = [behaviour.states(f, f.value)(g.text) for f, g in zip(facts, said, strict=True)]
        return np.array(right, dtype=float)

    return Measure("facts_accuracy", read, controlled=False, share=True)
