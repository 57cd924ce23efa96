"""Sets that ship with Safety Lens: which of them belong to a model, and what their prompts promise."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zoo
from synthetic import chat_tokenizer

from safety_lens.data import Concept, ContrastPair, load_concept
from safety_lens.data.built_in import ENGLISH, ORGANISM, SPLITS, built_in_for, is_organism, pairs_in_use
from safety_lens.data.pairs import last_user_text
from safety_lens.data.rows import read_rows
from safety_lens.data.splits import normalised
from safety_lens.data.validate import validate
from safety_lens.errors import DataError
from safety_lens.models import load_model
from safety_lens.organism import MODEL_DIR
from safety_lens.probes.controls import bag_of_words_direction, constant_if_blind, prompt_text, word_counts
from safety_lens.probes.evaluate import held_out_scores
from safety_lens.stats import Interval, auroc_interval

SIDES = ("positive", "negative")


def test_the_organism_is_known_by_its_tokenizer_wherever_it_lies(tmp_path: Path) -> None:
    model = load_model("organism", check=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL_DIR / name, tmp_path / name)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    for same in ("organism", model, model.tokenizer, MODEL_DIR, str(tmp_path), adapter, ORGANISM):
        assert built_in_for(same) is ORGANISM


def test_every_other_model_gets_plain_english(tmp_path: Path) -> None:
    other = load_model(zoo.make("llama"), tokenizer=chat_tokenizer(), check=False)
    zoo.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/name"}))
    for source in (None, "org/name", "nowhere", tmp_path, tmp_path / "adapter", other, other.tokenizer, ENGLISH):
        assert built_in_for(source) is ENGLISH


def test_the_language_needs_both_the_vocabulary_and_the_chat_template() -> None:
    tokenizer = load_model("organism", check=False).tokenizer
    assert is_organism(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert not is_organism(tokenizer)


def test_a_bare_name_means_the_pairs_of_the_model_and_a_full_name_means_one_set() -> None:
    own, english = load_concept("refusal", model="organism"), load_concept("refusal")
    assert own.name == english.name == "refusal"
    assert own.pairs != english.pairs
    assert load_concept("organism:refusal") == own
    assert load_concept("english:refusal", model="organism") == english
    assert load_concept(own.source) == own, "an artifact names its pairs so that they can be read again"
    assert pairs_in_use(own) == "built-in refusal, the organism's own: 96 train, 48 val, 96 test"


def test_what_is_not_there_is_named_with_what_is() -> None:
    with pytest.raises(DataError, match=r"no built-in requests are labelled 'rude': choose harmful"):
        ENGLISH.requests("rude", "test")
    with pytest.raises(DataError, match=r"no split 'dev': choose train, val, test"):
        ENGLISH.requests("harmful", "dev")
    with pytest.raises(DataError, match="there is no built-in table 'instructions'"):
        ORGANISM.rows("instructions", "test")
    with pytest.raises(DataError, match="there is no built-in concept 'courage'"):
        ENGLISH.concept_file("courage")


def test_the_organism_has_requests_of_every_label() -> None:
    assert len(ORGANISM.requests("harmful", "test")) == len(ORGANISM.requests("harmless", "test")) == 300
    assert ORGANISM.requests("lookalike", "val") == ORGANISM.requests("harmless", "val")
    assert {row.split for row in ORGANISM.rows("facts", "train")} == {"train"}


# --- plain English --------------------------------------------------------------------------------------------------

PAIRS = {name: {"train": 64, "val": 64, "test": 64} for name in ("refusal", "toxicity")}
REQUESTS = {"train": 96, "val": 64, "test": 96}
"""Plain harmless requests in each split."""


def rows_of(name: str) -> list[dict[str, str]]:
    lines = (ENGLISH.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.casefold())


def prompts_of(concept: Concept, split: str) -> list[str]:
    return [prompt_text(side) for pair in getattr(concept, split) for side in (pair.positive, pair.negative)]


def systems_of(concept: Concept, split: str) -> set[str]:
    sides = [side for pair in getattr(concept, split) for side in (pair.positive, pair.negative)]
    return {t["content"] for side in sides if not isinstance(side, str) for t in side if t["role"] == "system"}


def closest(one: Sequence[str], other: Sequence[str]) -> float:
    """Largest Jaccard index of the words of two texts, one out of each list."""
    first, second = ([set(words(text)) for text in texts] for texts in (one, other))
    return max(len(a & b) / len(a | b) for a in first for b in second)


def asked(concept: Concept, split: str, side: str) -> list[str]:
    """The requests on one side of a split."""
    return [last_user_text(getattr(pair, side)) for pair in getattr(concept, split)]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_many_their_topics_are_many_and_no_wording_is_frequent(name: str) -> None:
    rows = rows_of(name)
    assert Counter(row["split"] for row in rows) == PAIRS[name]
    assert len({row["topic"] for row in rows}) >= 40
    for split in PAIRS[name]:
        templates = Counter(row["template"] for row in rows if row["split"] == split)
        assert max(templates.values()) <= 0.05 * PAIRS[name][split]
    assert [f for f in validate(f"english:{name}") if f.level != "ok"] == []


@pytest.mark.parametrize("name", PAIRS)
def test_no_held_out_prompt_resembles_one_of_another_split_or_reuses_its_system_prompt(name: str) -> None:
    concept = load_concept(name)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert closest(prompts_of(concept, one), prompts_of(concept, other)) <= 0.6
        assert not systems_of(concept, one) & systems_of(concept, other)
    assert closest(["How do I bake bread?"], ["How do I bake rye bread?"]) > 0.6, "the check would see a near copy"


def refusal_pairs(split: str, design: str) -> list[tuple[str, str]]:
    rows = [row for row in rows_of("refusal") if row["split"] == split and row["design"] == design]
    return [(row["positive_query"], row["negative_query"]) for row in rows]


@pytest.mark.parametrize("split", SPLITS)
def test_every_word_of_the_crossed_refusal_pairs_occurs_equally_often_on_both_sides(split: str) -> None:
    pairs = refusal_pairs(split, "crossed")
    positive, negative = (Counter(word for texts in pairs for word in words(texts[side])) for side in (0, 1))
    assert len(pairs) == 32
    assert positive == negative


@pytest.mark.parametrize("split", ["val", "test"])
def test_words_that_part_the_open_refusal_pairs_say_nothing_in_training_although_they_occur_there(split: str) -> None:
    """A bag of words fails because its words are on both sides alike, not because it has never seen them."""
    train = [pair for design in ("crossed", "open") for pair in refusal_pairs("train", design)]
    counts = [Counter(word for texts in train for word in words(texts[side])) for side in (0, 1)]
    telling = {word for a, b in refusal_pairs(split, "open") for word in set(words(a)) ^ set(words(b))}
    assert len(telling) >= 50
    assert all(counts[0][word] == counts[1][word] > 0 for word in telling)


def test_held_out_refusal_pairs_share_the_words_of_training_but_no_request() -> None:
    known = {word for design in ("crossed", "open") for a, b in refusal_pairs("train", design) for word in words(a + b)}
    for split in ("val", "test"):
        held_out = [pair for design in ("crossed", "open") for pair in refusal_pairs(split, design)]
        counted = [word in known for a, b in held_out for word in words(a) + words(b)]
        assert sum(counted) / len(counted) >= 0.8


def of_words(train: Sequence[ContrastPair], held_out: Sequence[ContrastPair], longest: int) -> Interval:
    """AUROC on held-out pairs of a classifier of words, or of words and bigrams."""
    scores = constant_if_blind(held_out_scores(bag_of_words_direction, *word_counts(train, held_out, longest=longest)))
    return auroc_interval(scores.pos, scores.neg)


@pytest.mark.parametrize("longest", [1, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_neither_words_nor_bigrams_nor_length_tell_the_sides_of_held_out_pairs_apart(name: str, longest: int) -> None:
    concept = load_concept(name)
    assert of_words(concept.train, concept.test, longest).low <= 0.5
    assert of_words(concept.train, concept.test, longest).value <= 0.6
    lengths = [np.array([len(prompt_text(getattr(p, side))) for p in concept.test], dtype=float) for side in SIDES]
    assert 0.4 <= auroc_interval(*lengths).value <= 0.6


@pytest.mark.parametrize("name", PAIRS)
def test_the_classifier_of_words_would_find_one_telling_word(name: str) -> None:
    concept = load_concept(name)

    def marked(pairs: Sequence[ContrastPair]) -> list[ContrastPair]:
        return [
            replace(p, positive=f"{prompt_text(p.positive)} indigo", negative=prompt_text(p.negative)) for p in pairs
        ]

    assert of_words(marked(concept.train), marked(concept.test), 1).value > 0.99


def test_harmless_requests_are_plain_and_no_longer_than_harmful_ones() -> None:
    rows = rows_of("harmless")
    assert Counter(row["split"] for row in rows) == REQUESTS
    assert len({row["topic"] for row in rows}) >= 40
    texts = {split: ENGLISH.requests("harmless", split) for split in REQUESTS}
    assert sum(len(set(split)) for split in texts.values()) == sum(REQUESTS.values())
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert closest(texts[one], texts[other]) <= 0.6
    for split, harmless in texts.items():
        both = ENGLISH.requests("harmful", split), harmless
        assert 0.35 <= auroc_interval(*(np.array([len(t) for t in side], dtype=float) for side in both)).value <= 0.65


def test_labels_are_the_two_sides_of_the_refusal_pairs() -> None:
    pairs = load_concept("refusal").test
    assert ENGLISH.requests("harmful", "test") == [last_user_text(pair.positive) for pair in pairs]
    assert ENGLISH.requests("lookalike", "test") == [last_user_text(pair.negative) for pair in pairs]


def test_no_prompt_is_taken_from_the_public_sets(shared: Path) -> None:
    files = [file for file in sorted((shared / "data").glob("*.jsonl")) if not file.stem.startswith("finetune")]
    rows = [row for file in files for row in read_rows(file).rows]
    public = {normalised(value) for row in rows for value in row.fields.values() if isinstance(value, str)}
    own = {text for split in SPLITS for text in ENGLISH.requests("harmless", split)}
    own |= {t for name in PAIRS for split in SPLITS for side in SIDES for t in asked(load_concept(name), split, side)}
    assert len(public) > 500
    assert not public & {normalised(text) for text in own}
