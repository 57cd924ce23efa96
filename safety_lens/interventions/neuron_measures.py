"""What is measured while a group is taken out: safety, plain speech, facts, loss. One number a prompt.

Read every one on prompts that took no part in choosing the group: the splits "val" and "test".
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.data.built_in import BuiltIn
from safety_lens.forced import Continuation
from safety_lens.generation import generate
from safety_lens.interventions.facts import fact_questions
from safety_lens.interventions.fluency import fluency
from safety_lens.interventions.neuron_effects import Measure, losses
from safety_lens.interventions.scorers.refusal_tokens import RefusalTokens, refusal_log_odds
from safety_lens.organism import answers
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


def facts_measure(sets: BuiltIn, limit: int | None = None, split: str = "test") -> Measure:
    """1 where the greedy answer to a built-in fact question is right."""
    found = fact_questions(sets, split)
    step = 1 if limit is None else max(1, len(found.questions) // limit)
    questions = found.questions[::step][:limit]

    def read(model: HookedTransformer) -> Float[np.ndarray, " prompt"]:
        return found.right(questions, [g.text for g in generate(model, questions, max_new_tokens=24)])

    return Measure("facts_accuracy", read, controlled=False, share=True)
