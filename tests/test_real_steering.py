"""Steering and safety examples on a real chat model, with built-in requests and its own answers."""

import json
from pathlib import Path

import pytest
from transformer_lens import HookedTransformer

from safety_lens.data.built_in import ENGLISH
from safety_lens.errors import DataError
from safety_lens.interventions.answer_pairs import answer_pairs
from safety_lens.interventions.scorers import CallableScorer
from safety_lens.interventions.steering import steer
from safety_lens.interventions.sweeping.plan import Decoding
from safety_lens.models import load_model
from safety_lens.probes import extract_directions
from safety_lens.probes.example_sets import answers_plainly, refuses
from safety_lens.probes.examples import read_examples

pytestmark = pytest.mark.real
WORDS = ("happy", "glad", "excited", "thrilled", "delighted", "joy", "love", "wonderful")


@pytest.fixture(scope="module")
def model(smollm2_folder: Path) -> HookedTransformer:
    return load_model(smollm2_folder, check=False)


def test_adding_a_happy_direction_makes_answers_happier(model: HookedTransformer, tmp_path: Path) -> None:
    splits = ["train"] * 24 + ["val"] * 6 + ["test"] * 6
    pairs = tmp_path / "happy.jsonl"
    asked = ENGLISH.requests("harmless", "train")[: len(splits)]
    rows = [
        {"user_query": query, "positive_system": "You are overjoyed and full of happiness.",
         "negative_system": "You are sad and full of despair.", "split": split}
        for query, split in zip(asked, splits, strict=True)
    ]  # fmt: skip
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    from safety_lens.data import load_concept

    found = extract_directions(model, load_concept(str(pairs)), null_repeats=20)
    scorer = CallableScorer(lambda c: any(word in c.text.casefold() for word in WORDS), "happy")
    prompts = [f"How are you feeling about {thing}?" for thing in ("today", "work", "the weather", "music")]
    prompts += [f"Tell me about your {thing}." for thing in ("morning", "family", "garden", "holiday")]
    hooks = steer(found["blocks.14.hook_resid_post"], 2.0)
    result = answer_pairs(model, prompts, hooks, scorers=[scorer], decoding=Decoding(16))
    rows_of = {row.metric: row for row in result.measurements("happy/dim")}
    assert rows_of["happy/change"].value > 0
    same = answer_pairs(model, prompts[:2], steer(found["blocks.14.hook_resid_post"], 0.0), decoding=Decoding(16))
    assert [g.tokens for g in same.answers["without"]] == [g.tokens for g in same.answers["with"]]


def test_utility_examples_are_the_models_own_answers_and_too_few_refusals_name_the_flag(
    model: HookedTransformer, tmp_path: Path
) -> None:
    found = read_examples("utility", model, limit=8, max_new_tokens=16)
    assert len(found) == 8
    assert all(answers_plainly(example.response) for example in found)
    assert {example.prompt for example in found} <= set(ENGLISH.requests("harmless", "train"))
    harmless = tmp_path / "requests.jsonl"
    texts = ENGLISH.requests("harmless", "val")[:10]
    harmless.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    with pytest.raises(DataError, match=r"At least 8 refusals .* \(--safety FILE\)"):
        read_examples(harmless, model, kind="safety", max_new_tokens=16)


def test_safety_examples_are_its_own_refusals(model: HookedTransformer, tmp_path: Path) -> None:
    # it refuses about one harmful request in ten, so the requests of one split alone are too few for it
    harmful = [text for split in ("train", "val", "test") for text in ENGLISH.requests("harmful", split)]
    file = tmp_path / "harmful.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in harmful), encoding="utf-8")
    found = read_examples(file, model, kind="safety", max_new_tokens=16)
    assert all(refuses(example.response) for example in found)
    assert {example.prompt for example in found} <= set(harmful)
    assert len(found) < len(harmful) / 2
    assert any(f"of {len(harmful)} answers of the model are not refusals" in note for note in found.notes)
