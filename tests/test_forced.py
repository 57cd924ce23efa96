"""Teacher forcing: log-probabilities are those of a plain forward, and KL is what its definition gives in float64."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from safety_lens.data import Encoded
from safety_lens.errors import DataError, HookNameError, ModelMismatchError
from safety_lens.forced import Continuation, continuation_kl, continuation_logprobs
from safety_lens.generation import generate
from safety_lens.interventions.rows import by_row
from safety_lens.interventions.steering import ablate, applied, steer
from safety_lens.models import load_model
from safety_lens.probes.directions import Direction

MIDDLE = "blocks.1.hook_resid_post"
SHAPES = [(3, 7), (17, 1), (9, 4), (1, 5), (26, 12), (5, 7)]


@cache
def pair(name: str) -> tuple[PreTrainedModel, HookedTransformer]:
    hf = zoo.make(name)
    return hf, load_model(hf, tokenizer=zoo.tokenizer(), check=False)


def rows(shapes: Any = SHAPES, seed: int = 0) -> list[Continuation]:
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, zoo.VOCAB, (n,), generator=g).tolist())

    return [Continuation(draw(n), draw(m)) for n, m in shapes]


def direction(norm: float = 8.0, seed: int = 0) -> Direction:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return Direction("random", MIDDLE, vector / vector.norm() * norm, "random")


def plain(model: HookedTransformer, row: Continuation, hooks: Any = ()) -> Tensor:
    """Float64 log-probabilities of one row alone, from a forward of everything."""
    with torch.no_grad(), applied(model, list(hooks)):
        logits = model(torch.tensor([[*row.prompt, *row.tokens]]))[0]
    return logits[len(row.prompt) - 1 : -1].double().log_softmax(-1)


@pytest.mark.parametrize("name", [*zoo.ARCHITECTURES, "gemma3_softcap", "neox_tied_linear"])
def test_log_probabilities_of_a_padded_batch_are_those_transformers_gives_each_row_alone(name: str) -> None:
    hf, model = pair(name)
    for row, found in zip(rows(), continuation_logprobs(model, rows()), strict=True):
        with torch.no_grad():
            logits = hf(torch.tensor([[*row.prompt, *row.tokens]])).logits[0]
        expected = logits[len(row.prompt) - 1 : -1].log_softmax(-1)
        assert found.shape == (len(row.tokens), zoo.VOCAB)
        assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 2, "auto"])
def test_batches_change_nothing(size: int | str) -> None:
    _, model = pair("mistral")
    hooks = steer(direction(), 0.5)
    found = continuation_logprobs(model, rows(), hooks=hooks, batch_size=size)
    for row, one in zip(rows(), found, strict=True):
        assert_close(one.double(), plain(model, row, hooks), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_kl_is_the_float64_hand_computation(name: str) -> None:
    _, model = pair(name)
    edits = [steer(direction(), 0.3), ablate(direction()), []]
    found = continuation_kl(model, rows(), edits)
    for hooks, of_edit in zip(edits, found, strict=True):
        for row, kl in zip(rows(), of_edit, strict=True):
            p, q = plain(model, row), plain(model, row, hooks)
            expected = (p.exp() * (p - q)).sum(-1)
            assert_close(torch.from_numpy(kl), expected, atol=1e-4, rtol=1e-3)
    assert min(k.max() for k in found[0]) > 1e-3  # the edit did something in every row


@pytest.mark.parametrize("name", ["llama", "gemma3", "neox"])
def test_the_kl_of_no_edit_and_of_strength_zero_is_exactly_zero(name: str) -> None:
    _, model = pair(name)
    nothing = [[], steer(direction(), 0.0), ablate(direction(), 0.0), by_row(model, [[]] * len(SHAPES))]
    for of_edit in continuation_kl(model, rows(), nothing):
        assert all((kl == 0).all() for kl in of_edit)


def test_kl_is_never_negative_or_unknown_however_small_or_large_the_edit() -> None:
    _, model = pair("llama")
    found = continuation_kl(model, rows(), [steer(direction(), c) for c in (1e-7, 1e-4, 1e-2, 1.0, 1e4)])
    values = [np.concatenate(f) for f in found]
    assert all(np.isfinite(v).all() and (v >= 0).all() for v in values)
    means = [v.mean() for v in values]
    # log-probabilities are float32: edits of 1e-4 and less differ by rounding alone, and stay below all larger ones
    assert max(means[:2]) < 1e-6
    assert [max(means[:2]), *means[2:]] == sorted([max(means[:2]), *means[2:]])
    assert means[2] > 1e-6


def test_edits_of_generated_tokens_leave_the_first_prediction_and_change_the_next() -> None:
    _, model = pair("llama")
    several = [r for r in rows() if len(r.tokens) > 1]
    (generated,), (answer,) = (
        continuation_kl(model, several, [steer(direction(), scope=s)]) for s in ("generated", "answer")
    )
    for late, early in zip(generated, answer, strict=True):
        assert late[0] == 0
        assert early[0] > 0
        assert late[1] > 0


def test_forced_and_generated_text_are_edited_alike() -> None:
    _, model = pair("qwen2")
    prompts = [r.prompt for r in rows()]
    encoded = [Encoded(ids, "", None, None) for ids in prompts]
    for scope in ("all", "prompt", "generated", "answer", "from:2", "from:-2"):
        hooks = steer(direction(), scope=scope)
        texts = generate(model, encoded, hooks=hooks, max_new_tokens=6, ignore_eos=True)
        forced = [Continuation(ids, g.tokens) for ids, g in zip(prompts, texts, strict=True)]
        for row, found in zip(forced, continuation_logprobs(model, forced, hooks=hooks), strict=True):
            assert tuple(found.argmax(-1).tolist()) == row.tokens, scope


def test_hooks_behind_the_blocks_and_at_the_embedding_are_seen() -> None:
    _, model = pair("gpt2")
    for at in ("ln_final.hook_normalized", "hook_embed", "hook_pos_embed", "blocks.3.hook_resid_post"):
        hooks = steer(direction(), at=at)
        for row, found in zip(rows(), continuation_logprobs(model, rows(), hooks=hooks), strict=True):
            assert_close(found.double(), plain(model, row, hooks), atol=1e-4, rtol=0)


def test_hooks_that_the_model_already_has_count_for_both_sides() -> None:
    _, model = pair("llama")
    d = direction()
    with applied(model, steer(d, at="ln_final.hook_normalized")):
        (nothing,) = continuation_kl(model, rows(), [[]])
        found = continuation_logprobs(model, rows())
    assert all((kl == 0).all() for kl in nothing)
    for row, one in zip(rows(), found, strict=True):
        assert_close(one.double(), plain(model, row, steer(d, at="ln_final.hook_normalized")), atol=1e-4, rtol=0)


def test_rows_may_have_an_edit_each() -> None:
    _, model = pair("llama")
    lists = [steer(direction(), 0.2 * i) for i in range(len(SHAPES))]
    (together,) = continuation_kl(model, rows(), [by_row(model, lists)])
    for row, hooks, kl in zip(rows(), lists, together, strict=True):
        ((alone,),) = continuation_kl(model, [row], [hooks])
        np.testing.assert_allclose(kl, alone, atol=1e-5)


def test_a_row_may_fill_the_context_exactly_and_not_exceed_it() -> None:
    _, model = pair("gpt2")
    (full,) = rows([(100, 29)])  # the last token is predicted, not read
    (found,) = continuation_logprobs(model, [full])
    assert len(found) == 29
    with pytest.raises(DataError, match="row 0 has 130 tokens; the model takes 128"):
        continuation_logprobs(model, rows([(100, 30)]))


@pytest.mark.parametrize("row", [Continuation((), (5,)), Continuation((5,), ())])
def test_rows_without_prompt_or_continuation_are_refused(row: Continuation) -> None:
    _, model = pair("llama")
    with pytest.raises(DataError, match=r"row 0 has . prompt and . continuation tokens: needs both"):
        continuation_kl(model, [row], [[]])


def test_mistyped_hooks_and_wrong_widths_are_refused() -> None:
    _, model = pair("llama")
    with pytest.raises(HookNameError):
        continuation_kl(model, rows(), [[], steer(direction(), at="blocks.1.hook_resid_pots")])
    with pytest.raises(ModelMismatchError):
        continuation_kl(model, rows(), [steer(Direction("x", MIDDLE, torch.ones(3), "dim"))])
