"""Controls: words, length and embeddings are found where they separate the pairs, and say chance where they do not."""

import numpy as np
import pytest
import synthetic
import torch
import zoo
from transformer_lens import HookedTransformer

from safety_lens.data import Concept, ContrastPair
from safety_lens.models import hooks_at, load_model
from safety_lens.probes.controls import (
    bigram_scores,
    constant_if_blind,
    embedding_scores,
    length_scores,
    lexical_scores,
    prompt_text,
    word_counts,
)
from safety_lens.probes.directions import Evidence
from safety_lens.probes.evaluate import HeldOut, plain_scores
from safety_lens.probes.extract import extract_directions
from safety_lens.probes.reading import ConceptActivations, read_concepts
from safety_lens.stats import auroc

CONTROLS = ("lexical", "bigram", "length", "embedding")


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_model(zoo.make("llama"), tokenizer=synthetic.chat_tokenizer(), check=False)


def chat(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def matched(g: torch.Generator) -> tuple[object, object]:
    """Both sides random words under random systems: nothing tells them apart."""
    return chat(synthetic.words(g, 3), synthetic.words(g, 6)), chat(synthetic.words(g, 3), synthetic.words(g, 6))


def system_word(g: torch.Generator) -> tuple[object, object]:
    """The same user turn on both sides; the sides differ by one word of the system prompt, always the same."""
    user = synthetic.words(g, 6)
    return chat("w20 w81 w22", user), chat("w20 w82 w22", user)


def longer(g: torch.Generator) -> tuple[object, object]:
    """Random words, more of them on the positive side."""
    return synthetic.words(g, 9), synthetic.words(g, 5)


def read(model: HookedTransformer, concept: Concept) -> ConceptActivations:
    return read_concepts(model, [concept], hooks_at(model, layers=[1]))[0]


def area(scores: HeldOut) -> float:
    return float(auroc(scores.pos, scores.neg))


def evidence(model: HookedTransformer, sides: object) -> Evidence:
    found = extract_directions(model, synthetic.concept(sides), hooks=["blocks.1.hook_resid_post"], null_repeats=20)  # type: ignore[arg-type]
    return found.evidence["blocks.1.hook_resid_post"]


def confounds(found: Evidence) -> list[str]:
    return [note for note in found.notes if note.startswith("confound")]


# --- through the whole extraction -----------------------------------------------------------------------------------


def test_sides_that_differ_by_a_constant_word_are_flagged_by_words_and_embeddings(model: HookedTransformer) -> None:
    found = evidence(model, system_word)
    assert found.lexical.value == found.bigram.value == found.embedding.value == 1.0
    assert found.lexical.low < 1.0
    assert found.length.value == 0.5
    assert any("bag of words" in note for note in confounds(found))
    assert any("token embedding" in note for note in confounds(found))


def test_matched_sides_are_not_flagged(model: HookedTransformer) -> None:
    found = evidence(model, matched)
    for control in CONTROLS:
        interval = getattr(found, control)
        assert interval.low <= 0.5 <= interval.high
    assert confounds(found) == []
    assert any("not distinguishable from chance" in note for note in found.notes)


def test_sides_of_different_length_are_flagged_by_length(model: HookedTransformer) -> None:
    found = evidence(model, longer)
    assert found.length.value == 1.0
    assert any("length alone" in note for note in confounds(found))


def test_the_last_token_is_shared_but_the_embedding_control_pools_all_tokens(model: HookedTransformer) -> None:
    concept = synthetic.concept(system_word)
    found = extract_directions(model, concept, hooks=["hook_embed", "blocks.3.hook_resid_post"], null_repeats=20)
    assert "hook_embed" not in found.directions  # at the last token: the template's own word on both sides
    assert np.isnan(found.evidence["hook_embed"].auroc.value)
    assert found.evidence["hook_embed"].embedding.value == 1.0
    assert found.best.hook == "blocks.3.hook_resid_post"


# --- each control ---------------------------------------------------------------------------------------------------


def test_words_of_every_turn_count_and_short_words_too() -> None:
    assert prompt_text(chat("be kind", "hello")) == "be kind\nhello"
    pairs = [ContrastPair("a cat", "no cat"), ContrastPair("a dog", "no dog")]
    counts, _ = word_counts(pairs, pairs)
    assert counts.pos.sum(1).tolist() == [2.0, 2.0]  # "a" is a word


def test_words_unseen_in_training_carry_no_weight() -> None:
    fit = [ContrastPair("red x", "blue x"), ContrastPair("red y", "blue y")]
    _, held = word_counts(fit, [ContrastPair("green x", "yellow x")])
    assert torch.equal(held.pos, held.neg)


def test_bigrams_see_the_order_that_a_bag_of_words_cannot(model: HookedTransformer) -> None:
    acts = read(model, synthetic.concept(lambda g: ("w20 w21 w22", "w22 w21 w20")))
    assert area(lexical_scores(acts, "test")) == 0.5
    assert area(bigram_scores(acts, "test")) == 1.0


@pytest.mark.parametrize(("positive", "negative", "expected"), [("+++", "---", 1.0), ("+-+", "+-+", 0.5)])
def test_prompts_without_any_word_are_compared_by_their_characters(
    positive: str, negative: str, expected: float, model: HookedTransformer
) -> None:
    acts = read(model, synthetic.concept(lambda g: (positive, negative)))
    assert area(lexical_scores(acts, "test")) == expected


def test_a_control_that_sees_no_difference_says_one_half_and_not_nan() -> None:
    blind = constant_if_blind(HeldOut(np.full(3, np.nan), np.full(3, np.nan)))
    assert area(blind) == 0.5


def test_word_control_leaves_out_the_template_as_the_direction_does(model: HookedTransformer) -> None:
    def by_template(g: torch.Generator) -> tuple[object, object]:
        """Every template has its own word for the positive side and its own for the negative one."""
        nonlocal turn
        turn += 1
        t = turn % 6
        return f"w{20 + t} {synthetic.words(g, 4, 50)}", f"w{30 + t} {synthetic.words(g, 4, 50)}"

    turn = -1
    counts = {"train": 36, "val": 0, "test": 30}
    acts = read(model, synthetic.concept(by_template, n=counts, templates=[f"t{i}" for i in range(6)]))
    assert area(lexical_scores(acts, "test", plain_scores)) > 0.95  # knowing the templates, words separate
    assert 0.25 < area(lexical_scores(acts, "test")) < 0.75
    assert 0.25 < area(embedding_scores(acts, "test")) < 0.75


def test_length_control_counts_the_tokens_the_model_reads(model: HookedTransformer) -> None:
    acts = read(model, synthetic.concept(longer))
    assert acts.length["train"].pos.unique().tolist() == [9.0 + 4]  # four words of the template
    assert area(length_scores(acts, "test")) == 1.0
