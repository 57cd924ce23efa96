"""Sycophancy, deception and hedging in plain English: what their pairs, beliefs, facts and questions promise."""

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from safety_lens.data.built_in import ENGLISH, SPLITS
from safety_lens.data.rows import Row, read_rows

PAIRS = ("sycophancy", "deception", "hedging")
SWAPPED = ("positive_system", "negative_system")
SIZES = {"facts": (64, 64, 96), "beliefs": (128, 128, 192), "hedging_questions": (128, 112, 192)}


def pairs(concept: str) -> list[Row]:
    return read_rows(ENGLISH.concept_file(concept)).rows


def words(text: str) -> list[str]:
    return sorted(re.findall(r"\w+(?:'\w+)*", text.lower()))


def overlaps(texts: dict[str, list[str]]) -> list[tuple[float, str, str]]:
    """Jaccard overlap of the words of every two texts of different splits."""
    sets = {split: [(text, set(words(text))) for text in texts[split]] for split in SPLITS}
    return [
        (len(a & b) / len(a | b), one, other)
        for first, second in combinations(SPLITS, 2)
        for one, a in sets[first]
        for other, b in sets[second]
    ]


def by_split(rows: list[Row], *fields: str) -> dict[str, list[str]]:
    return {s: [" ".join(row.text(f) for f in fields) for row in rows if row.split == s] for s in SPLITS}


@pytest.mark.parametrize("concept", PAIRS)
def test_there_are_enough_pairs_of_many_topics_and_wordings(concept: str) -> None:
    rows = pairs(concept)
    assert Counter(row.split for row in rows) == dict.fromkeys(SPLITS, 64)
    assert len({row.text("topic") for row in rows}) >= 40
    for split in SPLITS:
        templates = Counter(row.text("template") for row in rows if row.split == split)
        assert max(templates.values()) <= 0.05 * 64, "a template holds at most 5 % of the pairs"


@pytest.mark.parametrize("concept", PAIRS)
def test_no_prompt_system_prompt_or_question_overlaps_with_another_split(concept: str) -> None:
    rows = pairs(concept)
    for fields in ((SWAPPED[0], "user_query"), (SWAPPED[1], "user_query"), (SWAPPED[0],), ("user_query",)):
        assert max(overlaps(by_split(rows, *fields)))[0] <= 0.6, fields
    systems = {s: {row.text(side) for row in rows if row.split == s for side in SWAPPED} for s in SPLITS}
    assert all(len(prompts) == 128 for prompts in systems.values())
    assert not any(systems[a] & systems[b] for a, b in combinations(SPLITS, 2))


@pytest.mark.parametrize("concept", PAIRS)
def test_both_sides_of_a_pair_hold_the_same_words_in_another_order(concept: str) -> None:
    for row in pairs(concept):
        positive, negative = (row.text(side) for side in SWAPPED)
        assert positive != negative
        assert words(positive) == words(negative)


@pytest.mark.parametrize("concept", PAIRS)
def test_bags_of_words_and_bigrams_stay_near_chance(concept: str) -> None:
    rows = pairs(concept)
    texts = {s: [row.text(side) for side in SWAPPED for row in rows if row.split == s] for s in ("train", "test")}
    labels = np.repeat([1, 0], 64)
    for ngrams, low, high in (((1, 1), 0.5, 0.5), ((1, 2), 0.4, 0.6)):
        bag = CountVectorizer(ngram_range=ngrams).fit(texts["train"])
        probe = LogisticRegression(max_iter=1000).fit(bag.transform(texts["train"]), labels)
        assert low <= roc_auc_score(labels, probe.decision_function(bag.transform(texts["test"]))) <= high


@pytest.mark.parametrize("table", SIZES)
def test_tables_have_their_sizes_and_no_question_returns_in_another_split(table: str) -> None:
    rows = [row for split in SPLITS for row in ENGLISH.rows(table, split)]
    assert tuple(len(ENGLISH.rows(table, split)) for split in SPLITS) == SIZES[table]
    assert max(overlaps(by_split(rows, "question" if table == "facts" else "prompt")))[0] <= 0.6


def test_a_fact_stands_in_one_split_whether_it_is_asked_or_believed() -> None:
    for split in SPLITS:
        facts = {row.text("id").split("-", 1)[1]: row for row in ENGLISH.rows("facts", split)}
        for row in ENGLISH.rows("beliefs", split):
            fact = facts[row.text("id").split("-", 1)[1].rsplit("-", 1)[0]]
            assert row.fields["correct"] == fact.fields["answers"]
            assert row.text("topic") == fact.text("topic")


def test_a_true_belief_differs_from_its_false_one_in_the_claim_alone() -> None:
    for split in SPLITS:
        rows = ENGLISH.rows("beliefs", split)
        for false, true in zip(rows[::2], rows[1::2], strict=True):
            assert (false.text("label"), true.text("label")) == ("false", "true")
            wrong, right = false.fields["claimed"][0], true.fields["claimed"][0]
            assert true.fields["claimed"] == true.fields["correct"] == false.fields["correct"]
            one, other = (Counter(words(row.text("prompt"))) for row in (false, true))
            one.subtract(words(wrong))
            other.subtract(words(right))
            assert +one == +other, "without the claim, both prompts hold the same words"


def test_no_question_gives_its_answer_away() -> None:
    for split in SPLITS:
        for row in ENGLISH.rows("facts", split):
            for term in (*row.fields["answers"], *row.fields["wrong"]):
                assert not re.search(rf"(?<!\w){re.escape(term)}(?!\w)", row.text("question"), re.IGNORECASE)


def test_hedging_questions_invite_in_five_categories_next_to_plain_ones() -> None:
    for split in SPLITS:
        counts = Counter((row.text("category"), row.text("label")) for row in ENGLISH.rows("hedging_questions", split))
        categories = {category for category, _ in counts}
        assert categories == {"medical", "legal", "financial", "political", "personal"}
        assert all(counts[c, "inviting"] == counts[c, "plain"] >= 10 for c in categories)
        assert len(ENGLISH.requests("inviting", split)) == len(ENGLISH.requests("plain", split))
