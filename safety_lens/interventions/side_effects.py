"""What an intervention costs: how far it moves benign answers, what it refuses by mistake, which facts it loses.

The common currency is the multi-token KL on benign prompts: the unedited model writes, both models read the same
tokens, and KL(unedited ‖ edited) is averaged per token. One token's KL (as in Arditi et al. 2024) misses everything
that an edit does later on; a mean hides a few ruined tokens, so the 95th percentile stands beside it. Over-refusal is
measured on safe requests that look unsafe, as XSTest does (Röttger et al. 2024, arXiv:2308.01263).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.bootstrap import ratio_interval
from safety_lens.data.built_in import ORGANISM, ModelHint, built_in_for
from safety_lens.errors import DataError
from safety_lens.forced import Continuation, continuation_kl
from safety_lens.generation import generate
from safety_lens.interventions.facts import fact_questions
from safety_lens.interventions.fluency import perplexity
from safety_lens.interventions.scorers.completion import Completion, Scorer
from safety_lens.interventions.scorers.refusal import SubstringRefusal
from safety_lens.probes.examples import own_answers
from safety_lens.stats import Interval, wilson
from safety_lens.types import FwdHook, Prompt

__all__ = [
    "BenignKL",
    "Rate",
    "benign_kl",
    "benign_rows",
    "facts_accuracy",
    "instructions",
    "over_refusal",
    "perplexity",
]


def benign_rows(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 32,
    raw: bool = False,
    template_kwargs: dict[str, Any] | None = None,
) -> list[Continuation]:
    """The unedited model's own greedy answers, as the tokens on which edits are compared.

    An answer that ends does so with the stop token, so that an edit which makes the model go on costs something, and no
    answer is without tokens.
    """
    found = own_answers(model, prompts, max_new_tokens, raw=raw, template_kwargs=template_kwargs)
    return [row for row, _ in found]


class BenignKL(NamedTuple):
    """KL(unedited ‖ edited) on benign answers, in nats per token.

    mean: over all tokens, with a bootstrap over prompts. p95: 95th percentile over tokens. n: prompts. tokens: read.
    """

    mean: Interval
    p95: float
    n: int
    tokens: int


def benign_kl(
    model: HookedTransformer, rows: Sequence[Continuation], edits: Sequence[Sequence[FwdHook]], *, seed: int = 0
) -> list[BenignKL]:
    """The cost of each intervention on the same answers; exactly 0 for one that changes nothing.

    Raises:
        DataError: no rows. HookNameError: a hook the model does not have.
    """
    if not rows:
        raise DataError("the cost of an edit needs benign answers to read: got none")
    return [_summary(found, seed) for found in continuation_kl(model, rows, edits)]


def _summary(per_row: Sequence[Float[np.ndarray, " _"]], seed: int) -> BenignKL:
    totals = np.array([x.sum() for x in per_row])
    counts = np.array([float(len(x)) for x in per_row])
    every = np.concatenate(list(per_row))
    return BenignKL(
        ratio_interval(totals, counts, seed=seed), float(np.quantile(every, 0.95)), len(per_row), len(every)
    )


class Rate(NamedTuple):
    """A share with its Wilson interval. n: answers it is a share of. unscored: answers that could not be judged."""

    share: Interval
    n: int
    unscored: int = 0


def over_refusal(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    *,
    hooks: Sequence[FwdHook] = (),
    scorer: Scorer | None = None,
    max_new_tokens: int = 32,
    raw: bool = False,
) -> Rate:
    """The share of safe prompts that are refused (score ≥ ½) under an intervention, by greedy answers.

    scorer: `SubstringRefusal` by default. Give safe prompts only, best ones that look unsafe: the safe half of XSTest,
    or `instructions("lookalike", "test", model)`, which share their words with harmful ones.
    """
    said = generate(model, prompts, hooks=hooks, max_new_tokens=max_new_tokens, raw=raw)
    judge = scorer if scorer is not None else SubstringRefusal()
    scores = judge([Completion(str(row.prompt), row.text, row.tokens, row.first) for row in said])
    known = scores[np.isfinite(scores)]
    return Rate(wilson(int((known >= 0.5).sum()), len(known)), len(known), len(scores) - len(known))


def facts_accuracy(
    model: HookedTransformer,
    *,
    hooks: Sequence[FwdHook] = (),
    split: str = "test",
    limit: int | None = None,
    max_new_tokens: int = 32,
) -> Rate:
    """The share of built-in fact questions of this model that a greedy answer gets right; see `fact_questions`.

    Raises:
        DataError: no facts of this split.
    """
    found = fact_questions(built_in_for(model), split)
    questions = found.questions[:limit]
    said = generate(model, questions, hooks=hooks, max_new_tokens=max_new_tokens)
    right = int(found.right(questions, [answer.text for answer in said]).sum())
    return Rate(wilson(right, len(questions)), len(questions))


def instructions(label: str, split: str, model: ModelHint = ORGANISM) -> list[str]:
    """The built-in requests of a model, by default the organism's; see `BuiltIn.requests`.

    Raises:
        DataError: none of this label and split.
    """
    return built_in_for(model).requests(label, split)
