"""Generation: greedy text is that of transformers, rows do not see each other, edits act on every forward."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from scipy.stats import chisquare
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from safety_lens.data import Encoded
from safety_lens.errors import DataError, HookNameError
from safety_lens.generation import generate, stop_tokens
from safety_lens.models import hooks_at, load_model

NEW = 12
MIDDLE = "blocks.1.hook_resid_post"


@cache
def pair(name: str) -> tuple[PreTrainedModel, HookedTransformer]:
    hf = zoo.make(name)
    return hf, load_model(hf, tokenizer=zoo.tokenizer(), check=False)


def prompts(lengths: tuple[int, ...] = (3, 17, 9, 26, 5), seed: int = 0) -> list[Encoded]:
    g = torch.Generator().manual_seed(seed)
    rows = [tuple(torch.randint(4, zoo.VOCAB, (n,), generator=g).tolist()) for n in lengths]
    return [Encoded(ids=ids, text="", instruction=None, answer=None) for ids in rows]


def by_transformers(hf: PreTrainedModel, ids: tuple[int, ...]) -> list[int]:
    """transformers' own greedy continuation of one prompt alone, stop tokens ignored."""
    tokens = torch.tensor([ids])
    out = hf.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW
    )
    return out[0, len(ids) :].tolist()


def without_cache(model: HookedTransformer, ids: tuple[int, ...], edit: Any = None, steps: int = NEW) -> list[int]:
    """Greedy continuation by running the whole sequence again for every token."""
    hooks = [] if edit is None else [(MIDDLE, edit)]
    tokens = list(ids)
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        for _ in range(steps):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(ids) :]


def push(act: Tensor, hook: object) -> Tensor:
    """Adds the same large vector to every token."""
    return act + 4.0 * torch.randn(act.shape[-1], generator=torch.Generator().manual_seed(0)).to(act)


# --- greedy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*zoo.ARCHITECTURES, "qwen2_window", "phi3_window", "llama_llama3"])
@pytest.mark.parametrize("common", [0, 7])
def test_greedy_text_of_a_ragged_batch_is_what_transformers_writes_for_each_prompt_alone(
    name: str, common: int
) -> None:
    """Prompts that begin alike, too, of which one is the beginning of the others."""
    hf, model = pair(name)
    rows = prompts()
    if common:
        rows = [replace(row, ids=(*rows[1].ids[:common], *row.ids)) for row in rows]
        rows = [*rows, rows[0], replace(rows[0], ids=rows[1].ids[:common])]
    together = generate(model, rows, max_new_tokens=NEW, ignore_eos=True)
    for row, found in zip(rows, together, strict=True):
        # transformers never picks the stop token here (min_new_tokens), so compare up to where ours would have
        expected = by_transformers(hf, row.ids)
        upto = next((i for i, token in enumerate(found.tokens) if token == 2), NEW)
        assert list(found.tokens[:upto]) == expected[:upto]
    assert len({found.tokens for found in together}) > 1  # the rows do not all say the same


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_cached_text_is_that_of_running_everything_again(name: str) -> None:
    _, model = pair(name)
    rows = prompts(seed=1)
    for size in ("auto", 1, 2):
        found = generate(model, rows, max_new_tokens=NEW, ignore_eos=True, batch_size=size)
        assert [list(f.tokens) for f in found] == [without_cache(model, row.ids) for row in rows]


# --- sampling -------------------------------------------------------------------------------------------------------


def test_what_a_row_samples_does_not_depend_on_the_rows_beside_it() -> None:
    _, model = pair("llama")
    rows = prompts((3, 17, 9, 26, 5, 9, 9, 4), seed=2)
    whole = [g.tokens for g in generate(model, rows, max_new_tokens=NEW, temperature=1.0, seed=3, ignore_eos=True)]
    for size in (1, 3):
        again = generate(model, rows, max_new_tokens=NEW, temperature=1.0, seed=3, ignore_eos=True, batch_size=size)
        assert [g.tokens for g in again] == whole
    fewer = generate(model, rows[:3], max_new_tokens=NEW, temperature=1.0, seed=3, ignore_eos=True)
    assert [g.tokens for g in fewer] == whole[:3]


def test_equal_prompts_sample_different_text_and_another_seed_other_text() -> None:
    _, model = pair("llama")
    rows = prompts((7,), seed=4) * 4

    def sample(seed: int) -> list[tuple[int, ...]]:
        return [
            g.tokens for g in generate(model, rows, max_new_tokens=NEW, temperature=1.0, seed=seed, ignore_eos=True)
        ]

    assert len(set(sample(0))) == 4
    assert not set(sample(0)) & set(sample(1))
    assert sample(0) == sample(0)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_tokens_are_sampled_with_the_frequencies_of_the_tempered_softmax(temperature: float) -> None:
    _, model = pair("llama")
    (row,) = prompts((4,), seed=5)
    n = 3000
    with torch.no_grad():
        logits = model(torch.tensor([row.ids]))[0, -1].double()
    found = generate(model, [row] * n, max_new_tokens=1, temperature=temperature, seed=6, ignore_eos=True)
    counts = np.bincount([g.tokens[0] for g in found], minlength=zoo.VOCAB)

    def p_value(probabilities: np.ndarray) -> float:
        common = probabilities * n >= 5  # the rest is one class
        observed, expected = counts[common].tolist(), (probabilities[common] * n).tolist()
        observed, expected = [*observed, n - sum(observed)], [*expected, n - sum(expected)]
        return float(chisquare(observed, expected).pvalue)

    assert p_value((logits / temperature).softmax(-1).numpy()) > 0.001
    assert p_value(logits.softmax(-1).numpy()) < 1e-6


def test_a_low_temperature_becomes_greedy() -> None:
    _, model = pair("llama")
    rows = prompts(seed=7)
    cold = generate(model, rows, max_new_tokens=5, temperature=1e-4, ignore_eos=True)
    assert [g.tokens for g in cold] == [g.tokens for g in generate(model, rows, max_new_tokens=5, ignore_eos=True)]


# --- edits ----------------------------------------------------------------------------------------------------------


def test_an_edit_that_adds_nothing_leaves_every_token_and_one_that_adds_changes_every_row() -> None:
    _, model = pair("llama")
    rows = prompts(seed=8)
    plain = generate(model, rows, max_new_tokens=NEW, ignore_eos=True)
    nothing = generate(model, rows, max_new_tokens=NEW, ignore_eos=True, hooks=[(MIDDLE, lambda act, hook: act + 0.0)])
    pushed = generate(model, rows, max_new_tokens=NEW, ignore_eos=True, hooks=[(MIDDLE, push)])
    assert [g.tokens for g in nothing] == [g.tokens for g in plain]
    assert all(a.tokens != b.tokens for a, b in zip(pushed, plain, strict=True))


def test_edited_text_with_the_cache_is_edited_text_without_it_in_every_row() -> None:
    _, model = pair("llama")
    rows = prompts(seed=9)
    found = generate(model, rows, max_new_tokens=NEW, ignore_eos=True, hooks=[(MIDDLE, push)])
    assert [list(g.tokens) for g in found] == [without_cache(model, row.ids, push) for row in rows]


def test_an_edit_of_generated_tokens_alone_acts_after_the_first_token_under_the_cache() -> None:
    _, model = pair("llama")
    rows = prompts(seed=10)

    def generated_only(act: Tensor, hook: object) -> Tensor:
        return push(act, hook) if act.shape[1] == 1 else act

    plain = generate(model, rows, max_new_tokens=NEW, ignore_eos=True)
    found = generate(model, rows, max_new_tokens=NEW, ignore_eos=True, hooks=[(MIDDLE, generated_only)])
    assert [g.tokens[0] for g in found] == [g.tokens[0] for g in plain]
    assert all(a.tokens[1:] != b.tokens[1:] for a, b in zip(found, plain, strict=True))


# --- stopping, text, state ------------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_row_and_is_not_part_of_it() -> None:
    _, model = pair("llama")
    assert stop_tokens(model) == {2}
    rows = prompts((6,) * 40, seed=11)
    running = generate(model, rows, max_new_tokens=NEW, temperature=1.5, ignore_eos=True)
    found = generate(model, rows, max_new_tokens=NEW, temperature=1.5)
    for long, short in zip(running, found, strict=True):
        end = long.tokens.index(2) if 2 in long.tokens else NEW
        assert short.tokens == long.tokens[:end]
        assert short.stopped is (2 in long.tokens)
    assert 0 < sum(g.stopped for g in found) < len(found)
    assert not any(g.stopped for g in running)


def test_every_stop_token_of_the_generation_settings_ends_a_row() -> None:
    hf = zoo.make("llama")
    hf.generation_config.eos_token_id = [2, 57]
    model = load_model(hf, check=False)
    assert stop_tokens(model) == {2, 57}
    rows = prompts((6,) * 30, seed=12)
    assert not any(57 in g.tokens for g in generate(model, rows, max_new_tokens=NEW, temperature=1.5))
    running = generate(model, rows, max_new_tokens=NEW, temperature=1.5, ignore_eos=True)
    assert any(57 in g.tokens for g in running)


def test_text_is_the_decoded_tokens_and_results_keep_the_order_of_the_prompts() -> None:
    _, model = pair("llama")
    texts = ["w5 w6 w7 w8 w9 w10", "w11", "w12 w13"]
    found = generate(model, texts, max_new_tokens=4, raw=True, batch_size=1)
    assert [g.prompt for g in found] == texts
    for g in found:
        assert g.text.split() == [f"w{t}" for t in g.tokens if t > 3]


def test_the_model_the_rng_and_the_mode_are_left_as_found() -> None:
    _, model = pair("llama")

    def state() -> list[Any]:
        hooks = [len(h.fwd_hooks) + len(h._forward_hooks) for h in model.hook_dict.values()]
        return [hooks, model.context_level, model.training, torch.get_rng_state().tolist()]

    def broken(act: Tensor, hook: object) -> Tensor:
        raise RuntimeError("an edit failed")

    before = state()
    generate(model, prompts(), max_new_tokens=3, temperature=1.0, hooks=[(MIDDLE, push)])
    with pytest.raises(RuntimeError, match="an edit failed"):
        generate(model, prompts(), max_new_tokens=3, hooks=[(MIDDLE, broken)])
    assert state() == before


def test_progress_adds_up_to_the_number_of_prompts() -> None:
    _, model = pair("llama")
    done: list[int] = []
    generate(model, prompts(), max_new_tokens=1, batch_size=2, on_batch=done.append)
    assert sum(done) == 5


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"max_new_tokens": 126}, "prompt 0 has 3 tokens; with 126 new ones it exceeds the model's context of 128"),
        ({"batch_size": 0}, "positive number, got 0"),
        ({"batch_size": "all"}, "got 'all'"),
    ],
)
def test_requests_that_cannot_be_met_say_why(arguments: dict[str, Any], message: str) -> None:
    _, model = pair("llama")
    with pytest.raises(DataError, match=message):
        generate(model, prompts((3,)), **arguments)


def test_a_mistyped_hook_is_refused_with_the_nearest_name() -> None:
    _, model = pair("llama")
    with pytest.raises(HookNameError, match=hooks_at(model)[3]):
        generate(model, prompts(), hooks=[("blocks.3.hook_resid_pos", push)])


def test_a_prompt_and_its_continuation_may_fill_the_context_exactly() -> None:
    _, model = pair("llama")
    (found,) = generate(model, prompts((3,)), max_new_tokens=125, ignore_eos=True)
    assert len(found.tokens) == 125
