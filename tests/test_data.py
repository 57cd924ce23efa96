"""Contrast data is read whole or refused by name, and no split ever sees what another holds."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safety_lens.data import Concept, ContrastPair, load_concept, sides
from safety_lens.data.build import build_pairs
from safety_lens.data.convert import WRITERS, convert
from safety_lens.data.formats import FORMATS
from safety_lens.data.pairs import last_user_text
from safety_lens.data.sources import AGREEING, DECEIVING, SOURCES
from safety_lens.data.splits import normalised, prompt_keys
from safety_lens.data.validate import validate
from safety_lens.data.write import write_rows
from safety_lens.errors import DataError
from safety_lens.stats import auroc

Fields = dict[str, Any]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows (dicts, or lines as they are) into a JSONL file."""

    def to_file(rows: Sequence[Mapping[str, Any] | str], name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return to_file


def statements(n: int, **extra: Any) -> list[Fields]:
    return [{"id": f"s{i}", "positive": f"Good thing {i}.", "negative": f"Bad thing {i}.", **extra} for i in range(n)]


def caa(n: int, splits: Sequence[str] = ("train", "test")) -> list[Fields]:
    return [
        {
            "id": f"c{i}",
            "user_query": f"Question {i}?",
            "positive_system": f"Lie {i}.",
            "negative_system": f"Be true {i}.",
            "split": splits[i % len(splits)],
        }
        for i in range(n)
    ]


# Reading formats ----------------------------------------------------------------------------------------------------

SYSTEM_USER = ({"role": "system", "content": "S"}, {"role": "user", "content": "P"})
EXAMPLES: dict[str, tuple[Fields, Fields | None, Any, Any, bool]] = {
    "arditi": ({"system": "S", "positive_query": "P", "negative_query": "N"}, None, SYSTEM_USER,
               ({"role": "system", "content": "S"}, {"role": "user", "content": "N"}), False),
    "caa": ({"user_query": "P", "positive_system": "S", "negative_system": "T"}, None, SYSTEM_USER,
            ({"role": "system", "content": "T"}, {"role": "user", "content": "P"}), False),
    "ab": ({"question": "Q", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}, None,
           ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "(A)"}),
           ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "(B)"}), False),
    "truthful": ({"question": "Q", "best_answer": "yes", "best_incorrect_answer": "no"}, None,
                 ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "yes"}),
                 ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "no"}), False),
    "messages": ({"positive_messages": list(SYSTEM_USER), "negative_messages": [{"role": "user", "content": "N"}]},
                 None, SYSTEM_USER, ({"role": "user", "content": "N"},), False),
    "statements": ({"positive": "P", "negative": "N"}, None, "P", "N", True),
    "artifacts": ({"natural": "N", "artifact": "P"}, None, "P", "N", False),
    "instructions": ({"instruction": "P", "label": "harmful"}, {"instruction": "N", "label": "harmless"}, "P", "N",
                     False),
    "facts": ({"statement": "P", "label": True}, {"statement": "N", "label": False}, "P", "N", True),
    "toxic-prompts": ({"prompt": "P", "toxicity": 0.9}, {"prompt": "N", "toxicity": 0.1}, "P", "N", True),
    "safe-prompts": ({"prompt": "P", "label": "unsafe"}, {"prompt": "N", "label": "safe"}, "P", "N", False),
    "comments": ({"text": "P", "toxic": True}, {"text": "N", "toxic": False}, "P", "N", True),
}  # fmt: skip


@pytest.mark.parametrize("name", [form.name for form in FORMATS])
def test_each_format_becomes_the_pair_it_means(write: Write, name: str) -> None:
    row, partner, positive, negative, raw = EXAMPLES[name]
    rows = [{**part, "split": split} for split in ("train", "train", "test", "test") for part in (row, partner) if part]
    concept = load_concept(write(rows))
    assert {(str(p.positive), str(p.negative)) for p in concept.pairs} == {(str(positive), str(negative))}
    assert concept.raw is raw
    assert (len(concept.train), len(concept.test)) == (2, 2)


def test_every_public_file_loads_with_the_pairs_it_holds(shared: Path) -> None:
    sizes = {}
    for path in sorted((shared / "data").glob("*.jsonl")):
        if not path.name.startswith(("finetune", "chat_template", "stories_text")):
            concept = load_concept(path)
            sizes[path.stem] = (len(concept.train), len(concept.val), len(concept.test))
    assert sizes == {
        "ai_risk_ab": (780, 260, 260),
        "artifact_pairs": (30, 10, 10),
        "facts_true_false": (150, 0, 50),
        "overrefusal_xstest": (55, 19, 18),
        "pairs_deception_caa": (40, 0, 20),
        "pairs_refusal_arditi": (40, 0, 20),
        "pairs_sycophancy_caa": (40, 0, 20),
        "persona_yesno": (600, 200, 200),
        "refusal_instructions": (128, 32, 100),
        "stories_happy_sad_pairs": (80, 0, 40),
        "sycophancy_ab": (300, 50, 100),
        "toxicity_comments": (8, 3, 3),
        "toxicity_prompts": (72, 24, 24),
        "truthfulqa": (240, 80, 80),
    }


def test_files_that_are_not_contrast_data_are_refused_with_what_they_lack(shared: Path) -> None:
    for name, missing in (("finetune_alpaca", "'label' is missing"), ("stories_text", "'toxic' is missing")):
        with pytest.raises(DataError, match=rf"{name}.jsonl, line 1: field {missing}"):
            load_concept(shared / f"data/{name}.jsonl")


@pytest.mark.parametrize("name", ["refusal", "sycophancy", "deception", "toxicity"])
def test_built_in_concepts_load_by_name_with_pairs_to_fit_and_to_report_on(name: str) -> None:
    concept = load_concept(name, model="organism")
    assert concept.name == name
    assert len(concept.train) >= 20
    assert len(concept.test) >= 10
    assert all(pair.positive != pair.negative for pair in concept.pairs)
    assert not concept.raw, "the organism is a chat model: its prompts are turns"
    assert [f for f in validate(f"organism:{name}") if f.level != "ok"] == []


GOOD = {"id": "a", "positive": "P", "negative": "N", "split": "train"}
BAD_ROWS: list[tuple[str, list[Any], str]] = [
    ("bad JSON", [GOOD, '{"positive": "P", '], r"pairs.jsonl, line 2: not valid JSON"),
    ("not an object", [GOOD, "[1, 2]"], r"line 2: must be a JSON object, got \[1, 2\]"),
    ("a JSON array", ["[", json.dumps(GOOD), "]"], r"line 1: a JSON array; JSONL has one object a line"),
    ("a field twice", ['{"positive": "P", "positive": "Q", "negative": "N"}'], r"line 1: field 'positive' occurs"),
    ("one-sided", [GOOD, {"positive": "P"}], r"line 2: field 'negative' is missing"),
    ("one-sided first", [{"positive": "P"}], r"line 1: field 'negative' is missing \(nearest format: 'statements'"),
    ("empty side", [GOOD, {"positive": " ", "negative": "N"}], r"line 2: field 'positive' is empty"),
    ("null side", [GOOD, {"positive": None, "negative": "N"}], r"line 2: field 'positive' is missing"),
    ("wrong type", [GOOD, {"positive": 5, "negative": "N"}], r"line 2: field 'positive' must be a text, got 5"),
    ("unknown split", [GOOD, {**GOOD, "id": "b", "split": "eval"}], r"line 2: unknown split 'eval': use train"),
    ("same id", [GOOD, {**GOOD, "positive": "Q"}], r"line 2: id 'a' is already the id of line 1"),
    ("id of no kind", [{**GOOD, "id": ["a"]}], r"line 1: field 'id' must be a text or a whole number"),
    ("mixed", [GOOD, {"natural": "N", "artifact": "A"}], r"line 2: .*this row looks like 'artifacts'. One file"),
    ("no format", [{"foo": 1, "bar": 2}], r"line 1: no known format has the fields 'bar', 'foo'. Known formats: "),
    ("unknown label", [{"instruction": "P", "label": "bad"}], r"line 1: label must be 'harmful' or 'harmless'"),
    ("not a flag", [{"statement": "P", "label": "maybe"}], r"line 1: field 'label' must be true or false"),
    ("not a number", [{"prompt": "P", "toxicity": "high"}], r"line 1: field 'toxicity' must be a number, got \"high\""),
    ("NaN", ['{"prompt": "P", "toxicity": NaN}'], r"line 1: field 'toxicity' must be a number"),
    ("bad messages", [{"positive_messages": "P", "negative_messages": []}], r"line 1: .* must be a list of messages"),
    ("bad turn", [{"positive_messages": [{"role": "x"}], "negative_messages": []}], r"line 1: .*role out of system"),
    ("raw in some", [*statements(9, raw=True), {"positive": "P", "negative": "N"}], r"'raw' must be the same in all"),
    ("raw in two ways", [*statements(9, raw=True), {**GOOD, "split": None, "raw": False}], r"'raw' must be the same"),
    ("one label only", [{"statement": f"P{i}", "label": True} for i in range(9)], r"one-sided, 9 true and 0 false"),
    ("some unsplit", [GOOD, {"positive": "P", "negative": "N"}], r"1 of 2 pairs name no split and the others do"),
    ("nothing", [""], r"has no rows"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "reason"), [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS])
def test_a_malformed_file_is_refused_with_the_line_and_the_fault(write: Write, rows: list[Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load_concept(write(rows))


def test_places_that_hold_no_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is a folder; give a JSONL file"):
        load_concept(tmp_path)
    with pytest.raises(DataError, match=r"no file named 'refussal': did you mean 'refusal'\?.*deception"):
        load_concept("refussal", model="organism")
    with pytest.raises(
        DataError, match=r"Built-in concepts \(the organism's own\) are refusal, sycophancy, deception, tox"
    ):
        load_concept("nowhere.jsonl", model="organism")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"positive": "a", "negative": "b"}\n{"positive": "caf\xe9", "negative": "b"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl, line 2: not UTF-8"):
        load_concept(latin)


def test_line_separators_inside_strings_and_blank_lines_do_not_break_rows(write: Write) -> None:
    rows: list[Any] = statements(10)
    rows[3]["positive"] = "one\u2028two\u0085three 😀"
    concept = load_concept(write([*rows[:5], "", *rows[5:], ""]))
    assert len(concept.pairs) == 10
    assert "one\u2028two\u0085three 😀" in sides(concept.pairs)[0]


def test_the_checksum_is_of_the_file_and_the_name_is_what_the_rows_say(write: Write) -> None:
    path = write(statements(12, concept="joy"))
    concept = load_concept(path)
    assert concept.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert concept.name == "joy"
    assert load_concept(write(statements(12), "other.jsonl")).name == "other"


def test_csv_files_are_read_and_their_faults_have_lines(write: Write) -> None:
    lines = ["id,statement,label", *(f'{i},"Fact, {i}",{"True" if i % 2 else "0"}' for i in range(24))]
    concept = load_concept(write(lines, "facts.csv"))
    assert len(concept.pairs) == 12
    assert all(int(str(p.positive).split()[-1]) % 2 == 1 for p in concept.pairs)
    with pytest.raises(DataError, match="line 26: not the 3 cells"):
        load_concept(write([*lines, "24,only two"], "facts.csv"))


def test_messages_are_kept_from_later_changes() -> None:
    turns = [{"role": "user", "content": "before"}]
    pair = ContrastPair(turns, "N")
    turns[0]["content"] = "after"
    assert last_user_text(pair.positive) == "before"


# Plain text or chat -------------------------------------------------------------------------------------------------


def test_statements_are_plain_text_unless_the_rows_or_the_caller_say_otherwise(write: Write) -> None:
    assert load_concept(write(statements(10))).raw
    assert not load_concept(write(statements(10)), raw=False).raw
    assert not load_concept(write(statements(10, raw=False))).raw


def test_conversations_cannot_be_plain_text(write: Write) -> None:
    with pytest.raises(DataError, match="asked for as plain text"):
        load_concept(write(caa(10)), raw=True)


# Splits -------------------------------------------------------------------------------------------------------------


def held_apart(concept: Concept, key: Callable[[ContrastPair], set[Any]]) -> bool:
    parts = [set().union(*map(key, part)) for part in (concept.train, concept.val, concept.test)]
    return not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


@pytest.mark.parametrize("seed", range(8))
def test_made_splits_never_share_a_template(write: Write, seed: int) -> None:
    rows = [{**row, "template": i % 12} for i, row in enumerate(statements(120))]
    concept = load_concept(write(rows), seed=seed)
    assert held_apart(concept, lambda pair: {pair.template})
    sizes = (len(concept.train), len(concept.val), len(concept.test))
    assert sum(sizes) == 120
    assert abs(sizes[0] - 72) <= 10
    assert min(sizes) >= 10
    assert not held_apart(load_concept(write(statements(120, template=None)), seed=seed), lambda pair: {pair.template})


@pytest.mark.parametrize("seed", range(8))
def test_made_splits_never_share_a_prompt_not_even_respelt(write: Write, seed: int) -> None:
    rows = statements(60)
    for i in range(0, 60, 2):
        rows[i + 1]["positive"] = f"  GOOD   thing {i}!"
    concept = load_concept(write(rows), seed=seed)
    assert held_apart(concept, prompt_keys)
    assert len(concept.pairs) == 60


def test_made_splits_hold_the_same_mix_of_categories(write: Write) -> None:
    rows = [{**row, "category": f"k{i % 5}"} for i, row in enumerate(statements(50))]
    for seed in range(5):
        concept = load_concept(write(rows), seed=seed)
        assert Counter(p.category for p in concept.train) == {f"k{i}": 6 for i in range(5)}
        assert Counter(p.category for p in concept.test) == {f"k{i}": 2 for i in range(5)}


def test_splits_follow_the_seed(write: Write) -> None:
    path = write(statements(50))
    assert load_concept(path, seed=3) == load_concept(path, seed=3)
    assert load_concept(path, seed=3).test != load_concept(path, seed=4).test


def test_given_splits_are_taken_as_given(write: Write) -> None:
    rows = caa(30, ("train", "validation", "test"))
    concept = load_concept(write(rows))
    for part, name in ((concept.train, "train"), (concept.val, "validation"), (concept.test, "test")):
        assert {p.id for p in part} == {row["id"] for row in rows if row["split"] == name}


def test_dev_rows_count_as_unsplit(write: Write) -> None:
    assert load_concept(write(statements(20, split="dev"))).pairs == load_concept(write(statements(20))).pairs


def test_train_and_val_alone_report_on_val_and_say_so(write: Write) -> None:
    concept = load_concept(write(caa(20, ("train", "val"))))
    assert concept.val == ()
    assert len(concept.test) == 10
    assert "selection happens inside train" in concept.notes[0]


def test_rows_that_all_say_train_are_split_and_it_is_said(write: Write) -> None:
    concept = load_concept(write(statements(20, split="train")))
    assert (len(concept.train), len(concept.val), len(concept.test)) == (12, 4, 4)
    assert "every row says 'train'" in concept.notes[0]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (statements(9), "9 pairs without splits; at least 10 are needed"),
        (caa(6, ("val", "test")), "0 train, 3 val, 3 test pairs; at least 2 to fit on"),
        (caa(3, ("train", "train", "test")), "2 train, 0 val, 1 test pairs"),
        (statements(20, template="only"), r"20 pairs fall into 1 group\(s\) that share a template"),
        (statements(20, negative="Always this."), r"fall into 1 group\(s\) that share a template or a prompt"),
    ],
)
def test_too_few_pairs_or_templates_say_how_many_are_needed(write: Write, rows: list[Fields], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load_concept(write(rows))


def test_what_given_splits_share_is_noted_and_only_then(write: Write) -> None:
    clean = caa(20)
    assert not any("test pairs" in note for note in load_concept(write(clean)).notes)
    same_query = [{**row, "user_query": "Why?"} if row["id"] in ("c0", "c1") else row for row in clean]
    assert "1 of 10 test pairs have a prompt that is also in train" in load_concept(write(same_query)).notes
    same_system = [{**row, "positive_system": "Lie.", "negative_system": "Be true."} for row in clean]
    assert any("10 of 10 test pairs contrast the same two system" in n for n in load_concept(write(same_system)).notes)
    template = [{**row, "template": "t"} for row in clean]
    assert any(note.startswith("templates in both train and test: t") for note in load_concept(write(template)).notes)


# Labelled rows ------------------------------------------------------------------------------------------------------


def labelled(n_harmful: int, n_harmless: int, split: str | None = None) -> list[Fields]:
    rows = [(f"harmful-{split}-{i}", "harmful") for i in range(n_harmful)]
    rows += [(f"harmless-{split}-{i}", "harmless") for i in range(n_harmless)]
    extra = {"split": split} if split else {}
    return [{"id": name, "instruction": f"Do {name}", "label": label, **extra} for name, label in rows]


def test_labelled_rows_are_paired_inside_their_split_and_every_row_serves_once(write: Write) -> None:
    path = write(labelled(12, 12, "train") + labelled(8, 8, "test"))
    concept = load_concept(path)
    for part, split, n in ((concept.train, "train", 12), (concept.test, "test", 8)):
        ids = [name for pair in part for name in str(pair.id).split("|")]
        assert sorted(ids) == sorted(f"{kind}-{split}-{i}" for kind in ("harmful", "harmless") for i in range(n))
        assert all(str(pair.positive).startswith("Do harmful") for pair in part)
    assert load_concept(path, seed=1).pairs != concept.pairs, "the pairing follows the seed"
    assert load_concept(path, seed=0) == concept


def test_rows_without_a_partner_are_counted_in_the_notes(write: Write) -> None:
    concept = load_concept(write(labelled(12, 20)))
    assert len(concept.pairs) == 12
    assert "8 harmless rows of the file have no partner and are not used" in concept.notes
    assert not any("no partner" in note for note in load_concept(write(labelled(12, 12))).notes)


# Data sets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
def test_a_local_data_set_folder_gives_the_pairs_of_its_file(write: Write) -> None:
    path = write(statements(30), "folder/data.jsonl")
    concept = load_concept(f"hf:{path.parent}")
    assert concept.pairs == load_concept(path).pairs
    assert concept.name == "folder"
    assert concept.source == f"hf:{path.parent}"


@pytest.mark.usefixtures("own_cache")
def test_a_data_sets_own_splits_become_ours(tmp_path: Path) -> None:
    import pandas as pd

    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name, start in (("train", 0), ("validation", 20), ("test", 40)):
        pd.DataFrame(statements(60)[start : start + 20]).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    concept = load_concept(f"hf:{folder.parent}")
    assert (len(concept.train), len(concept.val), len(concept.test)) == (20, 20, 20)
    assert concept.val[0].id == "s20"
    only = load_concept(f"hf:{folder.parent}::train")
    assert {p.id for p in only.pairs} == {f"s{i}" for i in range(20)}


@pytest.mark.usefixtures("own_cache")
def test_a_data_set_out_of_reach_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"cannot load the data set hf:no-such/set: .*give a file \(JSONL or CSV\)"):
        load_concept("hf:no-such/set")
    with pytest.raises(DataError, match=r"cannot load the data set hf://datasets/no-such/set/a\.jsonl"):
        load_concept("hf://datasets/no-such/set/a.jsonl")
    for name in ("hf:", "hf:a:b:c:d", "hf://elsewhere"):
        with pytest.raises(DataError, match="is not a data set name"):
            load_concept(name)


# Writing and converting ---------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"x": "old 😀"}])
    assert path.read_text(encoding="utf-8") == '{"x": "old 😀"}\n'

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match="No space left on device; nothing was left there"):
        write_rows(path, [{"x": "new"}], overwrite=True)
    assert path.read_text(encoding="utf-8") == '{"x": "old 😀"}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_file_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"x": 1}])
    with pytest.raises(DataError, match="exists: choose another --out, or pass --overwrite"):
        write_rows(path, [{"x": 2}])
    write_rows(path, [{"x": 2}], overwrite=True)
    assert path.read_text() == '{"x": 2}\n'
    with pytest.raises(DataError, match="it is a folder"):
        write_rows(tmp_path, [], overwrite=True)
    with pytest.raises(DataError, match=r"cannot write .*choose another --out"):
        write_rows(path / "below" / "b.jsonl", [])


PAIR_ROWS: dict[str, Fields] = {
    "arditi": {"strategy": "arditi", "system": "S", "positive_query": "P{}", "negative_query": "N{}", "category": "k"},
    "caa": {"strategy": "caa", "user_query": "P{}", "positive_system": "S", "negative_system": "T", "licence": "MIT"},
    "ab": {"format": "ab", "question": "P{}", "answer_matching_behavior": " (A)", "behavior": "b",
           "answer_not_matching_behavior": " (B)"},
    "statements": {"positive": "P{}", "negative": "N{}", "template": "t", "source": "here", "raw": False},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIR_ROWS)
def test_converting_to_messages_and_back_changes_nothing(write: Write, name: str) -> None:
    fields = PAIR_ROWS[name].items()
    rows = [
        {"id": f"r{i}", **{k: v.format(i) if isinstance(v, str) else v for k, v in fields}, "split": "train"}
        for i in range(4)
    ]
    there = convert(write(rows), "messages")
    back = convert(write(there.rows, "messages.jsonl"), name)
    assert back.rows == rows
    assert (there.came_from, back.came_from) == (name, "messages")
    again = convert(write(there.rows, "messages.jsonl"), "messages")
    assert again.rows == there.rows


@pytest.mark.parametrize(
    ("source", "to", "reason"),
    [
        ("arditi", "caa", "different queries"),
        ("arditi", "ab", "no prefilled answer"),
        ("arditi", "statements", "a system prompt or a prefilled answer"),
        ("caa", "arditi", "different system prompts"),
        ("ab", "arditi", "has a prefilled answer"),
        ("ab", "caa", "has a prefilled answer"),
        ("statements", "messages", "plain text, and this format would put them into a user turn"),
        ("statements", "arditi", "plain text, and this format would put them into a user turn"),
        ("messages", "arditi", r"conversation of \(user, assistant, user\)"),
        ("caa", "csv", "choose one of arditi, caa, ab, statements, messages"),
    ],
)
def test_a_conversion_that_would_change_the_meaning_is_an_error(
    write: Write, source: str, to: str, reason: str
) -> None:
    row = {k: v for k, v in PAIR_ROWS.get(source, {}).items() if k != "raw"}
    if source == "messages":
        turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]
        row = {"positive_messages": turns, "negative_messages": turns}
    with pytest.raises(DataError, match=reason):
        convert(write([row]), to)


def test_labelled_rows_convert_to_pairs_and_keep_both_sources(write: Write) -> None:
    rows = [{**row, "source": row["label"] + "-set"} for row in labelled(6, 6, "train")]
    converted = convert(write(rows), "arditi").rows
    assert len(converted) == 6
    assert {row["source"] for row in converted} == {"harmful-set | harmless-set"}
    assert all(row["split"] == "train" for row in converted)
    assert all("label" not in row for row in converted)


def test_every_public_pair_file_survives_a_round_trip(shared: Path, write: Write) -> None:
    for name, own in (("pairs_refusal_arditi", "arditi"), ("pairs_deception_caa", "caa"), ("sycophancy_ab", "ab")):
        path = shared / f"data/{name}.jsonl"
        there = convert(path, "messages")
        back = convert(write(there.rows), own)
        original = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert back.rows == original
    assert set(WRITERS) == {"arditi", "caa", "ab", "statements", "messages"}


# Building -----------------------------------------------------------------------------------------------------------


def goal(i: int) -> str:
    return f"Write a plan to do harm number {i} " + "very " * (i % 7)


INPUTS: dict[tuple[str, str], list[list[Fields]]] = {
    ("refusal", "advbench"): [
        [{"goal": goal(i), "target": "Sure"} for i in range(20)],
        [{"instruction": f"Name {i} things" + " now" * (i % 11), "input": "", "output": "x"} for i in range(60)]
        + [{"instruction": "Sort this", "input": "3 1 2", "output": "x"}],
    ],
    ("refusal", "jailbreakbench"): [
        [{"Index": i, "Goal": f"{split} goal {i}", "Category": "c", "split": split}
         for split in ("harmful", "benign") for i in range(15)]
    ],
    ("refusal", "instructions"): [labelled(12, 15, "train") + labelled(5, 5, "test")],
    ("sycophancy", "anthropic"): [
        [{"question": f"Q{i}?", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
         for i in range(15)]
    ],
    ("sycophancy", "truthfulqa"): [
        [{"question": f"Q{i}?", "best_answer": "a", "best_incorrect_answer": f"Wrong {i}."} for i in range(40)]
    ],
    ("deception", "truthfulqa"): [[{"question": f"Q{i}?", "incorrect_answers": [f"Wrong {i}"]} for i in range(40)]],
    ("toxicity", "realtoxicityprompts"): [
        [{"prompt": {"text": f"Opening {i}", "toxicity": None if i == 3 else i / 80}} for i in range(80)]
    ],
    ("toxicity", "jigsaw"): [[{"comment_text": f"Comment {i}", "toxic": str(i % 2)} for i in range(40)]],
}  # fmt: skip


@pytest.mark.parametrize(("concept", "source"), [(s.concept, s.name) for s in SOURCES])
def test_each_source_builds_loadable_rows_with_licence_source_and_split(
    write: Write, concept: str, source: str
) -> None:
    files = [str(write(rows, f"in{i}.jsonl")) for i, rows in enumerate(INPUTS[concept, source])]
    built = build_pairs(concept, source=source, files=files, seed=2)
    loaded = load_concept(write(built.rows, "out.jsonl"))
    assert loaded.name == concept
    assert len(loaded.pairs) == len(built.rows) >= 10
    for row in built.rows:
        assert row["licence"]
        assert row["source"]
        assert row["split"] in ("train", "val", "test")
        assert row["id"].startswith(f"{concept}-{source}-")
    assert build_pairs(concept, source=source, files=files, seed=2) == built
    assert build_pairs(concept, source=source, files=files, seed=3).rows != built.rows
    few = build_pairs(concept, source=source, files=files, seed=2, n=10 if source != "instructions" else 15)
    assert len(few.rows) < len(built.rows)


def test_alpaca_rows_that_need_an_input_are_never_used(write: Write) -> None:
    files = [str(write(rows, f"in{i}.jsonl")) for i, rows in enumerate(INPUTS["refusal", "advbench"])]
    rows = build_pairs("refusal", source="advbench", files=files).rows
    assert "Sort this" not in {row["negative_query"] for row in rows}
    assert {row["licence"] for row in rows} == {"MIT | CC BY-NC 4.0"}


def test_matched_lengths_leave_less_to_read_from_length_than_chance_does(shared: Path, write: Write) -> None:
    rows = [json.loads(line) for line in (shared / "data/refusal_instructions.jsonl").read_text().splitlines()]
    harmful = [{"goal": row["instruction"]} for row in rows if row["label"] == "harmful"]
    alpaca = [json.loads(line) for line in (shared / "data/finetune_alpaca.jsonl").read_text().splitlines()]
    files = [str(write(harmful, "harmful.jsonl")), str(shared / "data/finetune_alpaca.jsonl")]

    def of_length(texts: Sequence[str]) -> float:
        goals = np.array([len(row["goal"]) for row in harmful], dtype=float)
        return float(auroc(goals, np.array([len(text) for text in texts], dtype=float)))

    built = build_pairs("refusal", source="advbench", files=files).rows
    assert len(built) == len(harmful)
    assert abs(of_length([row["negative_query"] for row in built]) - 0.5) < 0.1
    assert abs(of_length([row["instruction"] for row in alpaca]) - 0.5) > 0.15


def test_built_system_prompts_are_held_out_and_do_not_give_themselves_away_by_length(write: Write) -> None:
    files = [str(write(INPUTS["deception", "truthfulqa"][0], "in.jsonl"))]
    concept = load_concept(write(build_pairs("deception", files=files).rows, "out.jsonl"))
    assert held_apart(concept, lambda pair: {pair.template})
    assert not any("system prompts" in note for note in concept.notes)
    for texts in (AGREEING, DECEIVING):
        assert len({normalised(text) for pair in texts for text in pair}) == 2 * len(texts)
        positive, negative = (sum(len(pair[side]) for pair in texts) for side in (0, 1))
        assert 0.9 < positive / negative < 1.1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"concept": "joy"}, "no source for the concept 'joy': pairs can be built for refusal, sycophancy"),
        ({"concept": "refusal", "source": "x"}, "no source 'x' for refusal: choose one of advbench, jailbreakbench"),
        ({"concept": "toxicity", "source": "jigsaw"}, "not on the Hub: give a local copy with --from"),
        ({"concept": "refusal", "files": ["a.jsonl"]}, r"reads 2 input\(s\), got 1: give --from once for each"),
    ],
)
def test_building_says_what_is_missing(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        build_pairs(**arguments)


def test_asking_for_more_pairs_than_there_are_is_an_error(write: Write) -> None:
    files = [str(write(INPUTS["sycophancy", "anthropic"][0]))]
    with pytest.raises(DataError, match="asked for 16 pairs, source 'anthropic' gives 15"):
        build_pairs("sycophancy", files=files, n=16)
    with pytest.raises(DataError, match=r"in\.jsonl, line 1: field 'question' is missing"):
        build_pairs("sycophancy", files=[str(write([{"q": "x"}], "in.jsonl"))])


# The rest of the house ----------------------------------------------------------------------------------------------


def test_the_data_package_needs_neither_torch_nor_transformers_to_be_imported() -> None:
    code = (
        "import sys, safety_lens.data, safety_lens.data.validate, safety_lens.data.build, safety_lens.data.convert, "
        "safety_lens.cli.pairs; print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
