"""Examples: scored as the model would meet them, splits that share no prompt, and nothing left out in silence."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformer_lens import HookedTransformer
from zoo import make, tokenizer

from safety_lens.data.built_in import ENGLISH, ORGANISM
from safety_lens.data.rows import read_rows
from safety_lens.errors import DataError
from safety_lens.forced import continuation_logprobs
from safety_lens.generation import generate
from safety_lens.models import load_model
from safety_lens.organism import DATA_DIR, answers
from safety_lens.probes.example_sets import SPLITS, asked_of
from safety_lens.probes.examples import ExampleSet, own_answers, read_examples


@pytest.fixture(scope="module")
def organism() -> HookedTransformer:
    return load_model()


@pytest.fixture(scope="module")
def plain() -> HookedTransformer:
    """A model without a chat template."""
    return load_model(make("llama"), tokenizer=tokenizer())


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"w{i + 4} w{i % 7 + 4}", "response": f"w{i % 9 + 10} w8"} for i in range(n)]


# --- built-in sets --------------------------------------------------------------------------------------------------


def test_safety_examples_are_the_models_own_refusals(organism: HookedTransformer) -> None:
    found = read_examples("safety", organism, limit=12)
    assert len(found) == 12
    assert found.split == "train"
    assert {example.label for example in found} == {"harmful"}
    assert {answers.answer_kind(example.response) for example in found} == {"refusal"}
    for row, scores in zip(found, continuation_logprobs(organism, found.continuations), strict=True):
        assert tuple(scores.argmax(-1).tolist()) == row.continuation.tokens  # greedy, up to and with the end of turn


def test_answers_of_another_kind_are_left_out_and_counted(organism: HookedTransformer) -> None:
    found = read_examples("safety", organism, keep=lambda text: "assist" in text)
    assert 0 < len(found) < 120
    assert found.notes == (
        f"{120 - len(found)} of 120 answers of the model are not of the kind asked for and are left out",
    )
    with pytest.raises(
        DataError, match="no example of built-in safety, the organism's own is left to score: 120 of 120 answers"
    ):
        read_examples("safety", organism, keep=lambda text: False)


def test_utility_and_facts_have_the_answers_of_the_corpus(organism: HookedTransformer) -> None:
    utility, facts = (read_examples(name, organism, split="val") for name in ("utility", "facts"))
    assert all(answers.well_formed(example.response) for example in [*utility, *facts])
    assert not any(answers.answer_kind(example.response) == "refusal" for example in utility)
    assert {example.label for example in utility} > {"harmless", "fact"}
    text = organism.tokenizer.decode(facts[0].continuation.prompt)
    assert text.endswith(f"<|user|>{facts[0].prompt}<|end|><|assistant|>")
    assert organism.tokenizer.decode(facts[0].continuation.tokens) == f"{facts[0].response}<|end|>"


@pytest.mark.parametrize("name", ["utility", "facts"])
def test_splits_share_no_prompt_and_are_the_same_every_time(organism: HookedTransformer, name: str) -> None:
    sets = [read_examples(name, organism, split=split) for split in SPLITS]
    prompts = [{row.continuation.prompt for row in found} for found in sets]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    assert sets[0].sha256 == read_examples(name, organism, split="train").sha256 != sets[1].sha256


def test_every_other_model_gets_requests_in_plain_english_and_judges_its_own_answers() -> None:
    for split in SPLITS:
        safety, utility, facts = (asked_of(name, split, None, ENGLISH)[0] for name in ("safety", "utility", "facts"))
        assert [row.text for row in safety] == ENGLISH.requests("harmful", split)
        assert [row.text for row in utility] == ENGLISH.requests("harmless", split)
        assert all(row.response is None for row in [*safety, *utility, *facts])
        for row, refused, answered in ((safety[0], True, False), (utility[0], False, True)):
            assert row.accepts is not None
            assert row.accepts("I'm sorry, but I can't help with that.") is refused
            assert row.accepts("Here is a list.") is answered
            assert row.accepts(" ") is False
    row = next(row for row in asked_of("facts", "train", None, ENGLISH)[0] if "Turkish capital" in row.text)
    assert row.accepts is not None
    said = ("It is Ankara.", "It is Istanbul.", "Ankara, not Istanbul.", "A city.")
    assert [row.accepts(text) for text in said] == [True, False, False, False]


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_without_splits_are_divided_by_prompt_and_in_full_by_default(
    plain: HookedTransformer, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", numbered(40) + numbered(40))
    whole = read_examples(path, plain)
    assert len(whole) == 80
    parts = [read_examples(path, plain, split=split) for split in SPLITS]
    assert sum(map(len, parts)) == 80
    prompts = [{row.prompt for row in part} for part in parts]  # the second copy of a prompt is where the first is
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert all("made by a hash of the prompt" in part.notes[0] for part in parts)


def test_a_file_with_splits_gives_its_train_rows_and_says_so(plain: HookedTransformer, tmp_path: Path) -> None:
    rows = [{**row, "split": split} for row, split in zip(numbered(6), ["train", "test"] * 3, strict=True)]
    path = write(tmp_path / "rows.jsonl", rows)
    found = read_examples(path, plain)
    assert [example.line for example in found] == [1, 3, 5]
    assert found.notes == ("3 of 6 rows of other splits are left out",)
    with pytest.raises(DataError, match="no rows of the split 'val'"):
        read_examples(path, plain, split="val")


def test_plain_text_is_split_where_the_response_begins(plain: HookedTransformer, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "w5 w6 w7", "response": "w8 w9"}])
    found = read_examples(path, plain)[0]
    ids = [plain.tokenizer.convert_tokens_to_ids(f"w{i}") for i in range(5, 10)]
    assert found.continuation.prompt[-3:] == tuple(ids[:3])
    assert found.continuation.tokens[:2] == tuple(ids[3:])
    assert found.prompt == "w5 w6 w7"


def test_the_last_answer_of_a_conversation_is_scored(organism: HookedTransformer, tmp_path: Path) -> None:
    turns = [("user", "Tell me the capital of Spain."), ("assistant", "The capital of Spain is Madrid.")]
    turns += [("user", "Tell me the capital of Italy."), ("assistant", "The capital of Italy is Rome.")]
    path = write(tmp_path / "rows.jsonl", [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    found = read_examples(path, organism)[0]
    assert organism.tokenizer.decode(found.continuation.tokens) == "The capital of Italy is Rome.<|end|>"
    assert "Madrid" in organism.tokenizer.decode(found.continuation.prompt)
    assert (found.prompt, found.response) == ("Tell me the capital of Italy.", "The capital of Italy is Rome.")


def test_prompts_alone_are_answered_by_the_model_and_labels_choose(organism: HookedTransformer) -> None:
    path = DATA_DIR / "instructions.jsonl"
    found = read_examples(path, organism, label="harmless", split="val", limit=5)
    assert {example.label for example in found} == {"harmless"}
    said = generate(organism, [example.prompt for example in found], max_new_tokens=48)
    assert [row.text for row in said] == [example.response for example in found]
    with pytest.raises(DataError, match="labels are borderline, harmful, harmless"):
        read_examples(path, organism, label="evil")


def test_prompts_alone_are_filtered_by_what_they_are_for(organism: HookedTransformer, tmp_path: Path) -> None:
    path = DATA_DIR / "instructions.jsonl"
    safety, utility = (
        read_examples(path, organism, kind=kind, split="val", limit=12) for kind in ("safety", "utility")
    )
    assert {example.label for example in safety} == {"harmful"}
    assert {answers.answer_kind(example.response) for example in safety} == {"refusal"}
    assert "harmful" not in {example.label for example in utility}
    assert "refusal" not in {answers.answer_kind(example.response) for example in utility}
    assert any("rows have another label and are left out" in note for note in safety.notes)
    rows = [{"prompt": text} for text in ORGANISM.requests("harmless", "val")[:10]]
    with pytest.raises(DataError, match=r"At least 8 refusals .* rows with responses \(--safety FILE\)"):
        read_examples(write(tmp_path / "kind.jsonl", rows), organism, kind="safety")


def test_pairs_give_their_positive_side_for_safety_and_the_other_for_utility(organism: HookedTransformer) -> None:
    path = ORGANISM.concept_file("refusal")
    pairs = [row.fields for row in read_rows(path).rows if row.split == "val"]
    for kind, side in (("safety", "positive_query"), ("utility", "negative_query")):
        found = read_examples(path, organism, kind=kind, split="val", limit=10)
        assert {example.prompt for example in found} <= {fields[side] for fields in pairs}
        refused = {answers.answer_kind(example.response) == "refusal" for example in found}
        assert refused == {kind == "safety"}
    with pytest.raises(DataError, match="contrast pairs, which serve as safety or utility"):
        read_examples(path, organism)


def test_shared_instruction_files_are_read(organism: HookedTransformer, shared: Path) -> None:
    found = read_examples(shared / "data/finetune_dolly.jsonl", organism, limit=4, split="test", max_length=128)
    assert len(found) == 4
    assert all(len(row.continuation.prompt) + len(row.continuation.tokens) <= 128 for row in found)


def test_limits_draw_at_random_and_halves_are_disjoint(organism: HookedTransformer) -> None:
    one, two = (read_examples("facts", organism, limit=20, seed=seed) for seed in (0, 1))
    assert len(one) == len(two) == 20
    assert {row.line for row in one} != {row.line for row in two}
    first, second = one.halves()
    assert len(first) == len(second) == 10
    assert not {row.line for row in first} & {row.line for row in second}
    assert isinstance(first, ExampleSet)


def test_an_answer_that_does_not_end_has_no_stop_token(organism: HookedTransformer) -> None:
    prompt = "Tell me the capital of Spain."
    ended, cut = (own_answers(organism, [prompt], n)[0][0] for n in (48, 2))
    assert organism.tokenizer.decode(ended.tokens[-1:]) == "<|end|>"
    assert cut.tokens == ended.tokens[:2]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"colour": "red"}], {}, "of no known format"),
        ([{"prompt": "w5"}, {"colour": "red"}], {}, "line 2: there is neither an instruction nor a prompt"),
        ([{"text": "w5 w6"}], {}, "1 of 1 rows have no prompt and are left out"),
        ([{"prompt": "w5", "response": ""}], {}, "1 of 1 rows have no response and are left out"),
        (numbered(3), {"split": "dev"}, "no split 'dev': choose train, val, test"),
        (numbered(3), {"limit": 0}, "limit must be 1 or more"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_words(
    plain: HookedTransformer, tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(write(tmp_path / "rows.jsonl", rows), plain, **settings)


def test_a_source_or_tokenizer_that_is_missing_is_named(organism: HookedTransformer) -> None:
    with pytest.raises(DataError, match=r"no training data 'nowhere\.jsonl'"):
        read_examples("nowhere.jsonl", organism)
    with pytest.raises(DataError, match="has no tokenizer"):
        read_examples("safety", load_model(make("llama"), check=False))
