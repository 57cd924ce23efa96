"""Choosing tokens: the kept sets and probabilities of transformers' own warpers, and draws that follow them."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from scipy.stats import chisquare
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import HookedTransformer
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from safety_lens.data import Encoded
from safety_lens.errors import DataError
from safety_lens.generation import generate
from safety_lens.models import load_model
from safety_lens.sampling import Sampling

VOCAB = 50
GRID = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 0.05},
    {"temperature": 1.3, "repetition_penalty": 1.7},
    {"temperature": 0.8, "repetition_penalty": 0.6},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.8, "repetition_penalty": 1.2},
    {"temperature": 1.0, "top_k": 999, "top_p": 1.0},
]


def logits(rows: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def seen_tokens(rows: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (rows, 9), generator=torch.Generator().manual_seed(seed))


def theirs(scores: Tensor, ids: Tensor, **o: Any) -> Tensor:
    """Probabilities after transformers' processors, in the order its generate uses."""
    steps = LogitsProcessorList()
    if o.get("repetition_penalty", 1.0) != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(o["repetition_penalty"]))
    steps.append(TemperatureLogitsWarper(o["temperature"]))
    if o.get("top_k"):
        steps.append(TopKLogitsWarper(o["top_k"]))
    if o.get("top_p", 1.0) < 1:
        steps.append(TopPLogitsWarper(o["top_p"]))
    return steps(ids, scores.clone()).softmax(-1)


def seen_mask(ids: Tensor) -> Tensor:
    return torch.zeros(len(ids), VOCAB, dtype=torch.bool).scatter(1, ids, True)


def choose(monkeypatch: pytest.MonkeyPatch, scores: Tensor, ids: Tensor, uniforms: list[float], o: Any) -> Tensor:
    drawn = iter(uniforms)
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor([next(drawn)], dtype=torch.float64))
    return Sampling(**o).choose(scores, seen_mask(ids), [torch.Generator() for _ in scores])


@pytest.mark.parametrize("options", GRID)
def test_every_uniform_gives_the_token_of_transformers_cumulative_distribution(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (scores,), (ids,) = logits(1), seen_tokens(1)
    probabilities = theirs(scores[None], ids[None], **options)[0]
    grid = np.linspace(0, 1, 4001)[:-1] + 1e-5
    rows = scores.expand(len(grid), -1)
    found = choose(monkeypatch, rows, ids.expand(len(grid), -1), grid.tolist(), options)
    # inverse CDF over token ids: which tokens ever come, and how much of [0, 1) each of them has
    share = torch.bincount(found, minlength=VOCAB).double() / len(grid)
    assert_close(share, probabilities, atol=2 / len(grid), rtol=0)
    assert set(found.tolist()) <= set(probabilities.nonzero()[:, 0].tolist())
    expected = torch.searchsorted(probabilities.cumsum(0), torch.tensor(grid), right=True)
    assert (found == expected).double().mean() > 0.999  # sums in another order may move a fence by one rounding


def test_the_extreme_uniforms_never_pick_a_token_that_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"temperature": 1.0, "top_k": 3}
    scores, ids = logits(200, seed=3), seen_tokens(200)
    kept = theirs(scores, ids, **options) > 0
    for uniform in (0.0, 1 - 2**-53):
        found = choose(monkeypatch, scores, ids, [uniform] * 200, options)
        assert bool(kept.gather(1, found[:, None]).all())


@pytest.mark.parametrize("options", [GRID[0], GRID[-2]])
def test_draws_follow_the_distribution_of_transformers(options: dict[str, Any]) -> None:
    (scores,), (ids,) = logits(1, seed=4) / 2, seen_tokens(1)
    n = 20_000
    streams = [torch.Generator().manual_seed(i) for i in range(n)]
    found = Sampling(**options).choose(scores.expand(n, -1), seen_mask(ids[None]).expand(n, -1), streams)
    expected = (theirs(scores[None], ids[None], **options)[0] * n).numpy()
    counts = np.bincount(found.numpy(), minlength=VOCAB)
    common = expected >= 5
    observed, wanted = [*counts[common], counts[~common].sum()], [*expected[common], expected[~common].sum()]
    if wanted[-1] < 1e-9:
        assert observed.pop() == 0
        wanted.pop()
    assert chisquare(observed, wanted).pvalue > 0.001


def test_greedy_takes_the_best_after_the_penalty_as_transformers_does() -> None:
    scores, ids = logits(500, seed=5), seen_tokens(500)
    found = Sampling(repetition_penalty=1.8).choose(scores, seen_mask(ids), [])
    assert torch.equal(found, RepetitionPenaltyLogitsProcessor(1.8)(ids, scores.clone()).argmax(-1))
    assert not torch.equal(found, scores.argmax(-1))


def test_a_penalty_on_bfloat16_logits_is_taken_in_float32() -> None:
    scores, ids = logits(500, seed=6, dtype=torch.bfloat16), seen_tokens(500)
    found = Sampling(repetition_penalty=1.05).choose(scores, seen_mask(ids), [])
    assert torch.equal(found, RepetitionPenaltyLogitsProcessor(1.05)(ids, scores.float()).argmax(-1))


def test_a_row_draws_the_same_whatever_rows_stand_beside_it() -> None:
    scores = logits(6, seed=7)
    sampling = Sampling(temperature=1.0, top_p=0.9)

    def draw(rows: list[int]) -> list[int]:
        return sampling.choose(scores[rows], None, [torch.Generator().manual_seed(r) for r in rows]).tolist()

    together = draw([0, 1, 2, 3, 4, 5])
    assert [draw([r])[0] for r in range(6)] == together
    assert draw([5, 2, 0]) == [together[5], together[2], together[0]]


def test_choosing_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    Sampling(temperature=1.0).choose(logits(2), None, [torch.Generator() for _ in range(2)])
    assert torch.equal(torch.get_rng_state(), before)


# --- in generation --------------------------------------------------------------------------------------------------


@cache
def hooked() -> HookedTransformer:
    return load_model(zoo.make("qwen2"), tokenizer=zoo.tokenizer(), check=False)


def prompts(lengths: tuple[int, ...]) -> list[Encoded]:
    g = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(4, zoo.VOCAB, (n,), generator=g).tolist()) for n in lengths]
    return [Encoded(ids=ids, text="", instruction=None, answer=None) for ids in rows]


OPTIONS = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.3}


def test_sampled_text_of_a_row_is_that_of_the_row_alone_with_every_option_on() -> None:
    model, rows = hooked(), prompts((3, 17, 9, 9, 26, 5))
    streams = [(7, i) for i in range(len(rows))]
    together = generate(model, rows, max_new_tokens=8, ignore_eos=True, streams=streams, **OPTIONS)
    for row, stream, found in zip(rows, streams, together, strict=True):
        (alone,) = generate(model, [row], max_new_tokens=8, ignore_eos=True, streams=[stream], **OPTIONS)
        assert alone.tokens == found.tokens
    back = generate(model, rows[::-1], max_new_tokens=8, ignore_eos=True, streams=streams[::-1], **OPTIONS)
    assert [g.tokens for g in back[::-1]] == [g.tokens for g in together]


def test_equal_streams_draw_equal_numbers_for_equal_prompts() -> None:
    model = hooked()
    rows = prompts((6,)) * 4
    found = generate(
        model, rows, max_new_tokens=8, ignore_eos=True, temperature=1.0, streams=[(0, 1), (0, 1), (0, 2), (1, 1)]
    )
    texts = [g.tokens for g in found]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    with pytest.raises(DataError, match="4 prompts need as many random streams, got 1"):
        generate(model, rows, max_new_tokens=1, streams=[(0, 0)])


def test_each_step_chooses_from_the_distribution_transformers_would_with_the_answer_penalised_too() -> None:
    model = hooked()
    rows = prompts((5, 12))
    for row, found in zip(
        rows, generate(model, rows, max_new_tokens=10, ignore_eos=True, repetition_penalty=2.5), strict=True
    ):
        ids = list(row.ids)
        for token in found.tokens:
            with torch.no_grad():
                last = model(torch.tensor([ids]))[:, -1]
            assert token == int(RepetitionPenaltyLogitsProcessor(2.5)(torch.tensor([ids]), last.clone()).argmax())
            ids.append(token)
    plain = generate(model, rows, max_new_tokens=10, ignore_eos=True)
    assert len(set(plain[0].tokens)) < 10  # the model repeats itself, the penalty has work to do


def test_the_first_logits_are_read_behind_the_prompt_before_any_choice() -> None:
    model = hooked()
    rows = prompts((3, 17, 9))
    found = generate(model, rows, max_new_tokens=2, read_first=lambda scores: scores[:, 5] - scores[:, 6])
    with torch.no_grad():
        expected = [float(s[5] - s[6]) for s in (model(torch.tensor([r.ids]))[0, -1] for r in rows)]
    assert_close([g.first for g in found], expected, atol=1e-4, rtol=0)
    assert math.isnan(generate(model, rows[:1], max_new_tokens=1)[0].first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be above 0"),
    ],
)
def test_values_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Sampling(**options)
