"""The probability of an answer letter, for questions with two options."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.errors import ModelError
from safety_lens.forced import Continuation, continuation_logprobs
from safety_lens.types import FwdHook, Prompt

PART = 64
"""Prompts whose whole next-token distributions are held at once."""


class AnswerProbability(NamedTuple):
    """first: P(first answer) / (P(first) + P(second)) in [0, 1]. mass: P(first) + P(second), which says how much the
    model was answering at all; near 0 the ratio means little.
    """

    first: Float[np.ndarray, " prompt"]
    mass: Float[np.ndarray, " prompt"]


def answer_probability(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    answers: tuple[str, str] = ("A", "B"),
    *,
    hooks: Sequence[FwdHook] = (),
    raw: bool = False,
) -> AnswerProbability:
    """How probable the first of two answers is as the next token (Panickssery et al. 2024, arXiv:2312.06681).

    Each answer counts with and without a space before it, wherever that is one token. Prompts may end with a prefilled
    answer such as "(".

    Raises:
        ModelError: an answer that is not a single token of this tokenizer, or answers that share one.
    """
    encoded = encode_for(model, prompts, raw=raw)
    ids = [single_tokens(model.tokenizer, answer) for answer in answers]
    if shared := set(ids[0]) & set(ids[1]):
        raise ModelError(f"the answers {answers[0]!r} and {answers[1]!r} share the token {shared.pop()}")
    logs = []
    for start in range(0, len(encoded), PART):
        # the continuation's only token is never run: its row is the distribution behind the prompt
        rows = [Continuation(tuple(e.ids), (ids[0][0],)) for e in encoded[start : start + PART]]
        found = torch.stack([row[0] for row in continuation_logprobs(model, rows, hooks=hooks)]).double()
        logs.append(torch.stack([found[:, list(each)].logsumexp(-1) for each in ids], -1))
    both = torch.cat(logs) if logs else torch.zeros(0, 2, dtype=torch.float64)
    return AnswerProbability((both[:, 0] - both[:, 1]).sigmoid().numpy(), both.exp().sum(-1).numpy())


def single_tokens(tokenizer: Any, answer: str) -> tuple[int, ...]:
    """The ids that are exactly this answer, alone or behind a space.

    Raises:
        ModelError: neither form is a single known token.
    """
    forms = {form: tokenizer.encode(form, add_special_tokens=False) for form in (answer, f" {answer}")}
    ids = {i[0] for i in forms.values() if len(i) == 1 and i[0] != tokenizer.unk_token_id}
    found = tuple(sorted(i for i in ids if tokenizer.decode([i]).strip() == answer))
    if not found:
        split = {form: tokenizer.convert_ids_to_tokens(i) for form, i in forms.items()}
        raise ModelError(f"the answer {answer!r} is not one token of this tokenizer ({split}): choose other answers")
    return found
