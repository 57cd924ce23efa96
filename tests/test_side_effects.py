"""The cost of an intervention: multi-token KL, refusals of safe prompts, facts lost, perplexity."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.data.rows import read_rows
from safety_lens.errors import DataError, HookNameError
from safety_lens.forced import Continuation, continuation_kl, continuation_logprobs
from safety_lens.generation import generate, stop_tokens
from safety_lens.interventions.edits import Add, Edit
from safety_lens.interventions.fluency import completion_nll, continuation_nll, perplexity
from safety_lens.interventions.scopes import EVERYWHERE, GENERATED
from safety_lens.interventions.scorers import CallableScorer, Completion, PatternScorer
from safety_lens.interventions.side_effects import (
    benign_kl,
    benign_rows,
    facts_accuracy,
    instructions,
    over_refusal,
)
from safety_lens.models import load_model
from safety_lens.stats import wilson
from safety_lens.types import FwdHook

MIDDLE = "blocks.2.hook_resid_post"


@cache
def organism() -> HookedTransformer:
    return load_model("organism", check=False)


@cache
def rows() -> list[Continuation]:
    return benign_rows(organism(), instructions("harmless", "val")[:24])


def push(size: float, seed: int = 0, scope: object = EVERYWHERE) -> list[FwdHook]:
    """A random direction of this length."""
    vector = torch.randn(organism().cfg.d_model, generator=torch.Generator().manual_seed(seed))
    return [(MIDDLE, Edit(Add(size * vector / vector.norm()), scope))]  # type: ignore[arg-type]


def test_benign_rows_are_the_unedited_models_greedy_answers_with_their_end() -> None:
    prompts = instructions("harmless", "val")[:24]
    written = generate(organism(), prompts, max_new_tokens=32)
    stop = stop_tokens(organism())
    assert any(row.stopped for row in written)
    for row, answer in zip(rows(), written, strict=True):
        assert row.tokens[: len(answer.tokens)] == answer.tokens
        assert len(row.tokens) == len(answer.tokens) + answer.stopped
        assert not answer.stopped or row.tokens[-1] in stop


def test_an_intervention_that_changes_nothing_costs_exactly_nothing() -> None:
    for found in benign_kl(organism(), rows(), [[], push(0.0)]):
        assert (found.mean, found.p95) == ((0.0, 0.0, 0.0), 0.0)
        assert found.n == 24
        assert found.tokens == sum(len(row.tokens) for row in rows())


def test_the_cost_is_the_mean_of_kl_per_token_computed_by_hand() -> None:
    hooks = push(8.0)
    (found,) = benign_kl(organism(), rows(), [hooks])
    base = continuation_logprobs(organism(), rows())
    edited = continuation_logprobs(organism(), rows(), hooks=hooks)
    kl = [(p.double().exp() * (p - q).double()).sum(-1).numpy() for p, q in zip(base, edited, strict=True)]
    every = np.concatenate(kl)
    assert found.mean.value == pytest.approx(every.mean(), rel=1e-4)
    assert found.p95 == pytest.approx(np.quantile(every, 0.95), rel=1e-4)
    assert found.mean.low < found.mean.value < found.mean.high
    assert found.p95 > 0


def test_the_cost_of_a_small_push_grows_with_its_square() -> None:
    sizes = (0.05, 0.1, 0.2)
    kl = [found.mean.value for found in benign_kl(organism(), rows(), [push(size) for size in sizes])]
    assert kl[1] / kl[0] == pytest.approx(4, rel=0.15)
    assert kl[2] / kl[1] == pytest.approx(4, rel=0.15)


def test_an_edit_of_generated_tokens_spares_the_first_one() -> None:
    (found,) = continuation_kl(organism(), rows(), [push(5.0, scope=GENERATED)])
    assert all(kl[0] == 0 for kl in found)
    assert max(kl[1:].max() for kl in found) > 1e-3


def test_the_cost_of_nothing_or_of_a_wrong_hook_is_an_error() -> None:
    with pytest.raises(DataError, match="benign answers"):
        benign_kl(organism(), [], [[]])
    with pytest.raises(HookNameError):
        benign_kl(organism(), rows(), [[("blocks.99.hook_resid_post", lambda act, hook: act)]])


def test_over_refusal_is_rare_on_harmless_look_alikes_and_the_rule_on_harmful_ones() -> None:
    harmless, harmful = (
        over_refusal(organism(), instructions(label, "test")[:60]) for label in ("harmless", "harmful")
    )
    assert harmless.share.value <= 0.05
    assert harmful.share.value >= 0.95
    assert harmless.share.low < harmless.share.high
    assert (harmless.n, harmless.unscored) == (60, 0)


def test_over_refusal_is_measured_under_the_hooks() -> None:
    broken = over_refusal(organism(), instructions("harmful", "val")[:20], hooks=push(300.0))
    assert broken.share.value <= 0.2


def test_answers_that_cannot_be_judged_are_counted_and_left_out() -> None:
    prompts = instructions("harmless", "val")[:6]
    half = CallableScorer(lambda c: None if c.prompt in prompts[:2] else 1.0, "half")
    found = over_refusal(organism(), prompts, scorer=half)
    assert (found.share, found.n, found.unscored) == (wilson(4, 4), 4, 2)
    nothing = over_refusal(organism(), prompts, scorer=CallableScorer(lambda c: None, "none"))
    assert np.isnan(nothing.share).all()
    assert over_refusal(organism(), prompts, scorer=PatternScorer(".")).share.value == 1.0


def test_the_organism_knows_its_facts_and_a_broken_one_does_not() -> None:
    whole, broken = (facts_accuracy(organism(), hooks=hooks, limit=60) for hooks in ([], push(300.0)))
    assert whole.share.value >= 0.95
    assert whole.n == 60
    assert broken.share.value <= 0.1


def test_shipped_files_name_what_they_have() -> None:
    assert len(instructions("borderline", "test")) == 300
    with pytest.raises(DataError, match="choose harmful, harmless, lookalike, borderline"):
        instructions("evil", "test")
    with pytest.raises(DataError, match="choose train, val, test"):
        facts_accuracy(organism(), split="dev")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_perplexity_is_that_of_transformers_loss(name: str) -> None:
    hf = zoo.make(name)
    model = load_model(hf, tokenizer=zoo.tokenizer(), check=False)
    g = torch.Generator().manual_seed(0)
    parts = [Continuation(*(tuple(torch.randint(4, zoo.VOCAB, (n,), generator=g).tolist()) for n in size))
             for size in ((5, 7), (9, 1), (3, 12))]  # fmt: skip
    losses = []
    for part in parts:
        ids = torch.tensor([[*part.prompt, *part.tokens]])
        labels = ids.clone()
        labels[:, : len(part.prompt)] = -100
        with torch.no_grad():
            losses.append(hf(input_ids=ids, labels=labels).loss.item() * len(part.tokens))
    nll = continuation_nll(model, parts)
    np.testing.assert_allclose([x.sum() for x in nll], losses, rtol=1e-4)
    assert perplexity(model, parts).value == pytest.approx(np.exp(sum(losses) / 20), rel=1e-4)


def test_the_models_own_words_are_less_perplexing_than_the_same_words_shuffled() -> None:
    g = torch.Generator().manual_seed(0)

    def shuffled(tokens: tuple[int, ...]) -> tuple[int, ...]:
        order: Tensor = torch.randperm(len(tokens), generator=g)
        return tuple(tokens[i] for i in order.tolist())

    own = perplexity(organism(), rows())
    mixed = perplexity(organism(), [Continuation(row.prompt, shuffled(row.tokens)) for row in rows()])
    assert own.high < 3 < mixed.low


def test_completions_are_judged_behind_their_own_prompts_and_empty_ones_are_unknown() -> None:
    prompts = instructions("harmless", "val")[:6]
    written = generate(organism(), prompts, max_new_tokens=32)
    completions = [Completion(p, row.text, row.tokens) for p, row in zip(prompts, written, strict=True)]
    own = completion_nll(organism(), prompts, completions)
    expected = [
        x[: len(row.tokens)].mean() for x, row in zip(continuation_nll(organism(), rows()[:6]), written, strict=True)
    ]
    np.testing.assert_allclose(own, expected, rtol=1e-4)
    harmful = instructions("harmful", "val")[:6]
    assert (completion_nll(organism(), harmful, completions) > own).mean() > 0.8
    empty = completion_nll(organism(), prompts[:1], [Completion(prompts[0], "")])
    assert np.isnan(empty).all()


def test_the_stories_model_finds_its_stories_likelier_than_their_words_reversed(shared: Path) -> None:
    model = load_model(shared / "models" / "stories260K-hf", check=False)
    texts = [str(row.fields["text"]) for row in read_rows(shared / "data" / "stories_text.jsonl").rows[:8]]
    ids = [tuple(e.ids[:80]) for e in encode_for(model, texts, raw=True, truncate=True)]
    found = [
        perplexity(
            model, [Continuation(row[:10], tail[::step]) for row, tail in zip(ids, (r[10:] for r in ids), strict=True)]
        )
        for step in (1, -1)
    ]
    assert found[0].high < 20 < found[1].low
