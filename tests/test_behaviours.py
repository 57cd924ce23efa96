"""Behaviours: log-odds of whole openings are exact, openings come from answers, and what cannot be read says why."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
import zoo
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.data.built_in import ORGANISM
from safety_lens.errors import ArtifactError, DataError
from safety_lens.forced import Continuation, continuation_logprobs
from safety_lens.interventions.behaviours import (
    BEHAVIOURS,
    Behaviour,
    Opening,
    Openings,
    Unreadable,
    _halves,
    collect_openings,
    derive_behaviour,
)
from safety_lens.interventions.openings import Branches
from safety_lens.interventions.scorers.completion import Completion
from safety_lens.interventions.steering import ablate, steer
from safety_lens.models import load_model
from safety_lens.monitors.behaviour import read_along
from safety_lens.probes.directions import Direction

FOUR = Openings((Opening((5, 6, 7, 8)), Opening((5, 6, 9)), Opening((11,)), Opening((5, 6, 7, 10, 12))))


@cache
def organism() -> HookedTransformer:
    return load_model("organism")


@cache
def refusal() -> Behaviour:
    return derive_behaviour(organism(), "refusal")


def test_one_kind_of_prompt_that_gives_both_labels_gives_twice_as_many() -> None:
    asked = [f"w{i}" for i in range(40)]
    both, one = (_halves(sides, 8, 0) for sides in ((asked[:20], asked[20:]), (asked, [])))
    assert [len(half) for half in both] == [len(half) for half in one] == [8, 8]


# --- log-odds of openings -------------------------------------------------------------------------------------------


def test_log_odds_equal_those_of_a_distribution_written_by_hand() -> None:
    branches = Branches.of([(0,), (1, 2)])
    first, second = np.array([0.2, 0.5, 0.3]), np.array([0.1, 0.1, 0.8])
    reading = branches.reading(1)
    reading.add([(0, ()), (0, (1,))], torch.tensor(np.log([first, second])).float() + 3.0)  # logits up to a constant
    p = 0.2 + 0.5 * 0.8
    np.testing.assert_allclose(reading.log_odds(), [np.log(p / (1 - p))], atol=1e-6)


def test_log_odds_stay_exact_where_the_openings_are_almost_certain() -> None:
    reading = Branches.of([(0,)]).reading(1)
    reading.add([(0, ())], torch.tensor([[60.0, 0.0, 0.0]]))
    np.testing.assert_allclose(reading.log_odds(), [60.0 - np.log(2)], rtol=1e-9)


@pytest.mark.parametrize("name", list(zoo.ARCHITECTURES))
@pytest.mark.parametrize("turned", [False, True])
def test_log_odds_equal_teacher_forcing_with_and_without_edits(name: str, turned: bool) -> None:
    model = load_model(zoo.make(name), tokenizer=zoo.tokenizer(), check=False)
    g = torch.Generator().manual_seed(0)
    prompts = encode_for(model, ["w1 w2 w3 " + synthetic.words(g, n) for n in (5, 19, 11)])
    if turned:  # its last tokens are those of an opening of the first prompt
        prompts[1] = replace(prompts[0], ids=(*prompts[0].ids, 5, 6))
    direction = Direction("joy", "blocks.1.hook_resid_post", 3 * torch.randn(64, generator=g), "dim")
    scopes = [steer(direction, scope=scope) for scope in ("all", "prompt", "generated", "answer")]
    for hooks in ([], ablate(direction), *scopes):
        p = np.zeros(len(prompts))
        for opening in FOUR.shown:
            rows = [Continuation(tuple(e.ids), opening.ids) for e in prompts]
            logs = continuation_logprobs(model, rows, hooks=hooks)
            p += [np.exp(float(x.double()[range(len(opening.ids)), list(opening.ids)].sum())) for x in logs]
        np.testing.assert_allclose(FOUR.log_odds(model, prompts, hooks), np.log(p) - np.log1p(-p), atol=2e-5)


@pytest.mark.parametrize("name", list(zoo.ARCHITECTURES))
def test_log_odds_and_predictions_along_answers_are_read_in_the_same_forwards(name: str) -> None:
    model = load_model(zoo.make(name), tokenizer=zoo.tokenizer(), check=False)
    g = torch.Generator().manual_seed(0)
    prompts = encode_for(model, ["w1 w2 w3 " + synthetic.words(g, n) for n in (5, 19, 11)])
    answers: list[tuple[int, ...]] = [(5, 6, 7, 8, 9, 11), (), (20, 21)]  # one that goes on behind an opening
    seen: list[list[torch.Tensor]] = [[], [], []]
    behaviour = Behaviour("b", Unreadable(), FOUR)
    odds = read_along(model, prompts, answers, behaviour, lambda i, logprobs: seen[i].append(logprobs))
    np.testing.assert_allclose(odds, FOUR.log_odds(model, prompts), atol=2e-5)
    assert [len(rows) for rows in seen] == [6, 0, 2]
    for i in (0, 2):
        [alone] = continuation_logprobs(model, [Continuation(tuple(prompts[i].ids), answers[i])])
        torch.testing.assert_close(torch.stack(seen[i]), alone, atol=2e-5, rtol=0)
    again: list[torch.Tensor] = []
    none = read_along(model, prompts, answers, None, lambda i, logprobs: again.append(logprobs))
    assert np.isnan(none).all()
    assert len(again) == 8


def test_log_odds_equal_those_of_transformers() -> None:
    hf = zoo.make("qwen2")
    model = load_model(hf, tokenizer=zoo.tokenizer(), check=False)
    prompts = encode_for(model, ["w1 w2 w3", "w1 w2 w9 w4"])
    for prompt, found in zip(prompts, FOUR.log_odds(model, prompts), strict=True):
        p = 0.0
        for opening in FOUR.shown:
            ids = torch.tensor([[*prompt.ids, *opening.ids]])
            with torch.no_grad():
                logs = hf(ids).logits[0, len(prompt.ids) - 1 : -1].double().log_softmax(-1)
            p += float(logs[range(len(opening.ids)), list(opening.ids)].sum().exp())
        assert found == pytest.approx(np.log(p / (1 - p)), abs=1e-4)


def test_an_opening_that_another_one_begins_is_counted_once() -> None:
    assert Openings((Opening((5, 6)), Opening((5, 6, 7)), Opening((5, 6)))).shown == (Opening((5, 6)),)
    with pytest.raises(DataError, match="openings need"):
        Openings((Opening(()),))
    with pytest.raises(DataError, match="openings need"):
        Openings(())


def test_a_prompt_that_leaves_no_room_for_the_openings_is_refused() -> None:
    model = load_model(zoo.make("llama"), tokenizer=zoo.tokenizer(), check=False)
    long = encode_for(model, [" ".join(["w1"] * (model.cfg.n_ctx - 1))])
    with pytest.raises(DataError, match="the model takes"):
        FOUR.log_odds(model, long)


# --- collecting -----------------------------------------------------------------------------------------------------


def test_openings_are_the_shortest_beginnings_that_other_answers_lack() -> None:
    model = load_model(zoo.make("llama"), tokenizer=zoo.tokenizer(), check=False)
    answers = [(1, 2, 3, 4, 5, 9), (1, 2, 3, 4, 6, 9), (1, 2, 3, 4, 5, 8), (7, 7, 7, 7, 7), (8, 9), (1, 2, 3, 4, 7, 7)]
    found = collect_openings(answers, np.array([1.0, 1, 1, 1, 1, 0]), [True] * 6, model)
    assert found is not None
    assert {o.ids: o.weight for o in found.shown} == {
        (1, 2, 3, 4, 5): 0.4,
        (1, 2, 3, 4, 6): 0.2,
        (7, 7, 7, 7): 0.2,
        (8, 9): 0.2,
    }
    assert found.shown[0].ids == (1, 2, 3, 4, 5)  # by falling weight
    assert [o.ids for o in found.other] == [(1, 2, 3, 4, 7)]
    hidden = collect_openings(answers, np.array([1.0, 1, 1, 1, 1, 0]), [True] * 5 + [False], model)
    assert hidden is not None
    assert hidden.other == ()


def test_answers_that_begin_alike_give_no_openings() -> None:
    model = load_model(zoo.make("llama"), tokenizer=zoo.tokenizer(), check=False)
    assert collect_openings([(1, 2, 3, 4)] * 6, np.array([1.0, 1, 1, 0, 0, 0]), [True] * 6, model) is None


# --- deriving -------------------------------------------------------------------------------------------------------


def test_the_organisms_refusal_openings_are_its_refusals() -> None:
    found = refusal()
    assert found.fault is None
    assert found.openings is not None
    assert all("sorry" in o.text.lower() or "can't" in o.text or "cannot" in o.text for o in found.openings.shown)
    assert not any("sorry" in o.text.lower() for o in found.openings.other)
    assert found.auroc.value > 0.95
    assert min(found.shown, found.other) >= 40
    held = [encode_for(organism(), ORGANISM.requests(label, "test")[:24]) for label in ("harmful", "harmless")]
    refused, answered = (found.openings.log_odds(organism(), side) for side in held)
    assert refused.mean() > 0 > answered.mean()


def test_log_odds_agree_with_the_labels_of_answers() -> None:
    prompts = [r for label in ("harmful", "harmless") for r in ORGANISM.requests(label, "test")[:24]]
    labels = refusal().labels(organism(), prompts)
    odds = refusal().log_odds(organism(), prompts)
    assert ((odds > 0) == (labels == 1)).mean() > 0.9


def test_a_behaviour_is_read_back_as_it_was_stored() -> None:
    entry = json.loads(json.dumps(refusal().entry()))
    found = Behaviour.from_entry(entry, organism())
    assert found.openings == refusal().openings
    assert (found.name, found.auroc, found.shown, found.other) == ("refusal", *_numbers(refusal()))
    assert found.reader([Completion("p", "I'm sorry, I cannot.")]) == [1.0]
    with pytest.raises(ArtifactError, match="derive it again"):
        Behaviour.from_entry({**entry, "openings": {"shown": [{"ids": "x"}]}}, organism())


def _numbers(found: Behaviour) -> tuple[Any, int, int]:
    return found.auroc, found.shown, found.other


def test_equal_seeds_give_equal_openings() -> None:
    small = {"n": 32, "seed": 4}
    assert (
        derive_behaviour(organism(), "refusal", **small).entry()
        == derive_behaviour(organism(), "refusal", **small).entry()
    )


def test_a_model_that_never_refuses_has_a_fault_and_unknown_log_odds() -> None:
    harmless = ORGANISM.requests("harmless", "train")
    found = derive_behaviour(organism(), "refusal", prompts=(harmless[:20], harmless[20:40]))
    assert found.openings is None
    assert found.fault is not None
    assert "0 of 20 answers" in found.fault
    assert np.isnan(found.log_odds(organism(), harmless[:2])).all()
    assert Behaviour.from_entry(found.entry(), organism()).fault == found.fault


class Coin:
    """A reader that labels answers without looking at them."""

    name = "coin"

    def __call__(self, completions: Sequence[Completion]) -> Float[np.ndarray, " n"]:
        return np.random.default_rng(len(completions)).integers(0, 2, len(completions)).astype(float)


def test_labels_without_meaning_do_not_pass_the_held_out_test() -> None:
    from dataclasses import replace

    spec = replace(BEHAVIOURS["refusal"], reader=lambda sets: Coin())
    found = derive_behaviour(organism(), spec)
    assert found.openings is None
    assert found.fault is not None
    assert "held-out" in found.fault or "no opening" in found.fault


def test_prompts_given_twice_and_unknown_names_are_refused() -> None:
    same = ORGANISM.requests("harmless", "train")[:12]
    with pytest.raises(DataError, match="given twice"):
        derive_behaviour(organism(), "refusal", prompts=(same, same))
    with pytest.raises(DataError, match="no behaviour 'refusals': choose refusal"):
        derive_behaviour(organism(), "refusals")
