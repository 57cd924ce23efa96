"""Conditional steering: every row decides from its own prompt, once, before anything that depends on it."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import HookedTransformer

from safety_lens.activations import capture
from safety_lens.data import Concept, ContrastPair, Encoded, load_concept
from safety_lens.errors import DataError, HookNameError, ModelError
from safety_lens.forced import Continuation, continuation_kl, continuation_logprobs
from safety_lens.generation import generate
from safety_lens.interventions.conditions import Condition, conditional, fit_condition, when
from safety_lens.interventions.rows import by_row
from safety_lens.interventions.scopes import EVERYWHERE, GENERATED, scope_named
from safety_lens.interventions.steering import ablate, applied, steer
from safety_lens.models import load_model
from safety_lens.positions import all_tokens
from safety_lens.probes.directions import Direction
from safety_lens.stats import wilson

EARLY, MIDDLE, LATE = (f"blocks.{n}.hook_resid_post" for n in (0, 1, 2))
LENGTHS = (3, 17, 9, 26, 5, 9, 12, 1)


@cache
def hooked(name: str = "llama") -> HookedTransformer:
    return load_model(zoo.make(name), tokenizer=zoo.tokenizer(), check=False)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Encoded]:
    g = torch.Generator().manual_seed(seed)
    rows = [tuple(torch.randint(4, zoo.VOCAB, (n,), generator=g).tolist()) for n in lengths]
    return [Encoded(ids=ids, text="", instruction=None, answer=None) for ids in rows]


def direction(seed: int = 0, norm: float = 20.0, hook: str = MIDDLE) -> Direction:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return Direction("random", hook, vector / vector.norm() * norm, "random")


def scores_by_hand(model: HookedTransformer, rows: list[Encoded], d: Direction, hook: str, reads: str) -> list[float]:
    """Cosines from each prompt alone: mean over its tokens without the first, or the last."""
    out = []
    for row in rows:
        acts = capture(model, [row], [hook], positions=all_tokens).acts[hook].double()
        read = {"mean": acts[1:].mean(0) if len(acts) > 1 else acts[0], "last": acts[-1]}[reads]
        out.append(float(read @ d.vector.double() / read.norm() / d.vector.double().norm()))
    return out


def halving(model: HookedTransformer, rows: list[Encoded], hook: str = EARLY, reads: Any = "mean") -> Condition:
    """A condition that holds for half of the rows."""
    d = direction(seed=5, hook=hook)
    found = sorted(scores_by_hand(model, rows, d, hook, reads))
    return Condition(d, (found[len(found) // 2 - 1] + found[len(found) // 2]) / 2, hook, reads)


def holds(condition: Condition, model: HookedTransformer, rows: list[Encoded]) -> list[bool]:
    found = scores_by_hand(model, rows, condition.direction, condition.hook, condition.reads)
    return [s > condition.threshold for s in found]


def written(model: HookedTransformer, rows: list[Encoded], hooks: Any = (), **more: Any) -> list[tuple[int, ...]]:
    return [g.tokens for g in generate(model, rows, hooks=hooks, max_new_tokens=6, ignore_eos=True, **more)]


# --- deciding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen2_window"])
@pytest.mark.parametrize("reads", ["mean", "last"])
def test_each_row_of_a_padded_cached_batch_is_steered_exactly_where_its_own_prompt_fires(name: str, reads: str) -> None:
    model, rows = hooked(name), prompts()
    condition = halving(model, rows, reads=reads)
    fires = holds(condition, model, rows)
    assert 0 < sum(fires) < len(rows)
    steered = steer(replace(direction(), vector=direction().vector * (20 if name == "gemma3" else 1)))
    found = written(model, rows, conditional(condition, steered))
    plain, always = written(model, rows), written(model, rows, steered)
    assert found == [a if fire else p for fire, a, p in zip(fires, always, plain, strict=True)]
    assert sum(a != p for a, p in zip(always, plain, strict=True)) >= 6


def test_the_scores_are_the_cosines_of_each_prompt_alone() -> None:
    model, rows = hooked(), prompts()
    for reads in ("mean", "last"):
        seen: dict[int, float] = {}
        condition = halving(model, rows, reads=reads).watched(lambda row, score, fires, s=seen: s.update({row: score}))
        written(model, rows, condition.hooks)
        expected = scores_by_hand(model, rows, condition.direction, EARLY, reads)
        assert_close([seen[i] for i in range(len(rows))], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "answer", "from:-2"])
def test_a_condition_restricts_any_scope_and_a_threshold_of_one_turns_it_off(scope: str) -> None:
    model, rows = hooked(), prompts()
    condition = halving(model, rows)
    fires = holds(condition, model, rows)
    edit = steer(direction(), scope=scope)
    found = written(model, rows, conditional(condition, edit))
    always, plain = written(model, rows, edit), written(model, rows)
    assert found == [a if fire else p for fire, a, p in zip(fires, always, plain, strict=True)]
    assert written(model, rows, conditional(replace(condition, threshold=1.0), edit)) == plain
    assert written(model, rows, conditional(replace(condition, threshold=-1.0), edit)) == always


def test_batches_of_every_size_and_sampling_decide_alike() -> None:
    model, rows = hooked(), prompts()
    hooks = conditional(halving(model, rows), steer(direction()))
    whole = written(model, rows, hooks, temperature=1.0, seed=3)
    for size in (1, 3):
        assert written(model, rows, hooks, temperature=1.0, seed=3, batch_size=size) == whole


def test_rows_may_have_conditions_of_their_own() -> None:
    model, rows = hooked(), prompts()
    one, other = halving(model, rows), halving(model, rows, reads="last")
    edit = steer(direction())
    lists = [conditional(one if i % 2 else other, edit) if i % 4 else edit for i in range(len(rows))]
    alone = [written(model, [row], hooks)[0] for row, hooks in zip(rows, lists, strict=True)]
    assert written(model, rows, by_row(model, lists)) == alone


def test_the_signed_score_tells_the_two_ends_apart_and_the_unsigned_one_does_not() -> None:
    u = direction().vector
    acts = torch.stack([u, -u, torch.zeros(64)])
    assert_close(Condition(direction(), 0.5, MIDDLE).scores(acts), torch.tensor([1.0, -1.0, 0.0]).double())
    assert_close(Condition(direction(), 0.5, MIDDLE, signed=False).scores(acts), torch.tensor([1.0, 1.0, 0.0]).double())


def test_the_unsigned_score_is_the_similarity_of_cast_where_its_squashing_is_small() -> None:
    """CAST: cos(h, tanh(c cᵀ h / cᵀ c)); tanh(x) → x for small x."""
    d = direction(norm=1.0)
    h = torch.randn(20, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e-3
    c = d.vector.double()
    squashed = torch.tanh((h @ c)[:, None] * c / (c @ c))
    cast = torch.nn.functional.cosine_similarity(h, squashed, dim=1)
    assert_close(Condition(d, 0.5, MIDDLE, signed=False).scores(h), cast, atol=1e-4, rtol=0)


def test_teacher_forcing_decides_from_the_prompt_alone() -> None:
    model, rows = hooked(), prompts()
    condition = halving(model, rows)
    fires = holds(condition, model, rows)
    forced = [Continuation(r.ids, (5, 6, 7, 8)) for r in rows]
    (found,) = continuation_kl(model, forced, [conditional(condition, steer(direction()))])
    (always,) = continuation_kl(model, forced, [steer(direction())])
    for fire, a, b in zip(fires, found, always, strict=True):
        np.testing.assert_allclose(a, b if fire else np.zeros(4), atol=1e-4)
    assert len(continuation_logprobs(model, forced, hooks=conditional(condition, ablate(direction(), at=LATE)))) == 8


# --- order and forgetting -------------------------------------------------------------------------------------------


def test_an_edit_before_its_condition_is_an_error_that_says_so_and_not_an_old_decision() -> None:
    model, rows = hooked(), prompts()
    late = halving(model, rows, hook=LATE)
    edit = steer(direction(hook=EARLY), scope=when(late))
    for hooks in ([*late.hooks, *edit], [*steer(direction(hook=LATE), scope=when(late)), *late.hooks]):
        with pytest.raises(ModelError, match=r"has not decided yet: put condition.hooks .* before the edit"):
            written(model, rows, hooks)
    written(model, rows, late.hooks)  # decisions of an earlier call must not serve a later one
    with pytest.raises(ModelError, match="has not decided yet"):
        written(model, rows, [*late.hooks, *edit])
    with pytest.raises(ModelError, match="has not decided yet"):
        written(model, rows, steer(direction(), scope=when(late, GENERATED)))


def test_generated_tokens_may_be_edited_before_the_condition_for_they_come_later() -> None:
    model, rows = hooked(), prompts()
    late = halving(model, rows, hook=LATE)
    fires = holds(late, model, rows)
    edit = steer(direction(hook=EARLY), scope="generated")
    found = written(model, rows, conditional(late, edit))
    always, plain = written(model, rows, edit), written(model, rows)
    assert found == [a if fire else p for fire, a, p in zip(fires, always, plain, strict=True)]


def test_a_condition_at_the_edited_hook_comes_first_in_the_list() -> None:
    model, rows = hooked(), prompts()
    same = halving(model, rows, hook=MIDDLE)
    fires = holds(same, model, rows)
    always, plain = written(model, rows, steer(direction())), written(model, rows)
    found = written(model, rows, conditional(same, steer(direction())))
    assert found == [a if fire else p for fire, a, p in zip(fires, always, plain, strict=True)]


def test_outside_an_engine_a_condition_cannot_know_the_prompt_and_says_so() -> None:
    model = hooked()
    hooks = conditional(halving(model, prompts()), steer(direction()))
    with applied(model, hooks), pytest.raises(ModelError, match="use it inside generate, capture"):
        model(torch.tensor([[5, 6, 7]]))


def test_only_edits_can_be_made_conditional() -> None:
    def push(act: Tensor, hook: object) -> Tensor:
        return act + 1

    with pytest.raises(DataError, match="only edits can be made conditional"):
        conditional(Condition(direction(), 0.0, EARLY), [(MIDDLE, push)])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"threshold": float("nan")}, "finite threshold"), ({"reads": "first"}, "reads mean or last, not 'first'")],
)
def test_conditions_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(Condition(direction(), 0.0, EARLY), **change)


def test_the_scope_says_what_it_is() -> None:
    condition = Condition(direction(), 0.0, EARLY)
    assert when(condition, scope_named("answer")).name == f"answer when random at {EARLY}"
    assert not when(condition, EVERYWHERE).spares_prompt


# --- fitting --------------------------------------------------------------------------------------------------------


@cache
def organism() -> HookedTransformer:
    return load_model("organism", device="cpu")


@cache
def fitted(**how: Any) -> Condition:
    refusal, middle = (
        load_concept("refusal", model="organism"),
        f"blocks.{organism().cfg.n_layers // 2}.hook_resid_post",
    )
    return fit_condition(organism(), refusal, hook=middle, **how)


def test_on_the_organism_a_condition_fires_on_harmful_requests_and_rarely_on_harmless_ones() -> None:
    refusal = load_concept("refusal", model="organism")
    others = [p.negative for p in load_concept("toxicity", model="organism").train]
    condition = fit_condition(
        organism(), refusal, others, hook=f"blocks.{organism().cfg.n_layers // 2}.hook_resid_post", false_fire=0.05
    )
    evidence = condition.evidence
    assert evidence is not None
    assert evidence.n_hit == len(refusal.test)
    assert evidence.hit.low > 0.5
    assert evidence.false_fire.low <= 0.05
    assert evidence.hit.low > evidence.false_fire.high
    # the same by generating, which reads the prompts in other batches
    seen: dict[int, bool] = {}
    watched = condition.watched(lambda row, score, fires: seen.update({row: fires}))
    tests = [p.positive for p in refusal.test]
    generate(organism(), tests, hooks=watched.hooks, max_new_tokens=1)
    assert evidence.hit == wilson(sum(seen.values()), len(tests))


def test_a_condition_gates_an_intervention_on_the_organism() -> None:
    condition = fitted(false_fire=0.05)
    refusal = load_concept("refusal", model="organism")
    rows = [p for pair in refusal.test[:12] for p in (pair.positive, pair.negative)]
    seen: dict[int, bool] = {}
    gate = condition.watched(lambda row, score, fires: seen.update({row: fires}))
    d = Direction(
        "random",
        condition.hook,
        torch.randn(organism().cfg.d_model, generator=torch.Generator().manual_seed(0)) * 5,
        "r",
    )
    found = [g.tokens for g in generate(organism(), rows, hooks=conditional(gate, steer(d)), max_new_tokens=6)]
    always = [g.tokens for g in generate(organism(), rows, hooks=steer(d), max_new_tokens=6)]
    plain = [g.tokens for g in generate(organism(), rows, max_new_tokens=6)]
    assert found == [always[i] if seen[i] else plain[i] for i in range(len(rows))]
    assert 0 < sum(seen.values()) < len(rows)


def noise(n: int, seed: int) -> Concept:
    """Pairs of random tokens: nothing tells the sides apart."""
    rng = np.random.default_rng(seed)

    def pairs(count: int) -> tuple[ContrastPair, ...]:
        texts = [" ".join(f"w{i}" for i in rng.integers(4, zoo.VOCAB, 8)) for _ in range(2 * count)]
        return tuple(ContrastPair(a, b) for a, b in zip(texts[::2], texts[1::2], strict=True))

    return Concept("noise", pairs(20), pairs(n), pairs(n), "random tokens", "none", raw=True)


def test_the_false_fire_share_on_new_prompts_is_at_most_the_target_on_average_even_for_noise() -> None:
    shares = []
    for seed in range(8):
        condition = fit_condition(hooked(), noise(59, seed), hook=MIDDLE, false_fire=0.1)
        assert condition.evidence is not None
        shares.append(condition.evidence.false_fire.value)
        assert any("does not fire more often" in note for note in condition.evidence.notes)
    mean, error = np.mean(shares), np.std(shares, ddof=1) / math.sqrt(len(shares))
    assert mean <= 0.1 + 3 * error
    assert mean >= 0.1 - 1 / 60 - 3 * error  # and not by never firing


def test_a_target_that_few_prompts_cannot_promise_is_said_so() -> None:
    condition = fit_condition(hooked(), noise(10, 0), hook=MIDDLE, false_fire=0.01)
    assert condition.evidence is not None
    assert condition.evidence.n_threshold == 10
    assert "0.01 was asked for (needs 99)" in condition.evidence.notes[0]


def test_natural_prompts_join_threshold_and_report_and_none_stands_on_two_sides() -> None:
    concept = noise(15, 1)
    extra = [f"w{i} w{i + 1} w{i + 2}" for i in range(4, 44)]
    known = [p.negative for p in (*concept.train, *concept.val, *concept.test)]
    found = fit_condition(hooked(), concept, [*extra, *extra, *known], hook=MIDDLE, false_fire=0.05).evidence
    assert found is not None
    assert (found.n_threshold, found.n_false, found.n_hit) == (15 + 20, 15 + 20, 15)


def test_a_given_direction_is_used_as_it_is_and_its_hook_is_the_default() -> None:
    d = direction(seed=3, hook=LATE)
    condition = fit_condition(hooked(), noise(15, 2), direction=d)
    assert condition.hook == LATE
    assert torch.equal(condition.direction.vector, d.vector)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {}, "needs a hook to read at"),
        ({"val": ()}, {"hook": MIDDLE}, "needs val pairs"),
        ({}, {"hook": MIDDLE, "false_fire": 0.0}, "between 0 and 1"),
        ({}, {"hook": MIDDLE, "false_fire": float("nan")}, "between 0 and 1"),
        ({}, {"hook": MIDDLE, "reads": "first"}, "mean or last"),
    ],
)
def test_conditions_that_cannot_be_fitted_say_why(
    change: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        fit_condition(hooked(), replace(noise(5, 0), **change), **arguments)


def test_a_mistyped_hook_is_refused() -> None:
    with pytest.raises(HookNameError):
        fit_condition(hooked(), noise(5, 0), hook="blocks.1.hook_resid_pots")
