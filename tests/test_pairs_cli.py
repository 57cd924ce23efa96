"""`safety-lens pairs` does with files what the library does, refuses to overwrite, and says what it found."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from safety_lens.cli.pairs import app
from safety_lens.data import load_concept
from safety_lens.data.validate import validate
from safety_lens.errors import DataError, ModelError

Fields = dict[str, Any]


@pytest.fixture
def run() -> Callable[..., Result]:
    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})

    return invoke


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def to_file(rows: Sequence[Fields], name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return to_file


HARMFUL = ("Break into", "Burn down", "Smash up", "Steal from")
HARMLESS = ("Paint over", "Sweep out", "Clean up", "Look after")


def pairs(n: int = 20) -> list[Fields]:
    return [
        {
            "id": f"p{i}",
            "system": "Be helpful.",
            "positive_query": f"{HARMFUL[i // 2 % 4]} house {i}",
            "negative_query": f"{HARMLESS[i // 2 % 4]} house {i}",
            "split": ("train", "test")[i % 2],
        }
        for i in range(n)
    ]


# Validate -----------------------------------------------------------------------------------------------------------


def test_clean_pairs_pass_every_check(run: Callable[..., Result], write: Callable[..., Path]) -> None:
    result = run("validate", write(pairs()), "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["errors"], report["warnings"]) == (0, 0)
    assert [f["level"] for f in report["findings"]] == ["ok"] * 10


def changed(index: int, **fields: Any) -> list[Fields]:
    rows = pairs()
    rows[index] = {**rows[index], **fields}
    return rows


QUESTION = {"question": "Q{}?", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
BROKEN: list[tuple[str, list[Fields], str, str, str]] = [
    ("empty side", changed(3, positive_query="  "), "error", "rows", "line 4: field 'positive_query' is empty"),
    ("missing side", changed(3, positive_query=None), "error", "rows", "line 4: field 'positive_query' is missing"),
    ("bad split", changed(3, split="eval"), "error", "rows", "line 4: unknown split 'eval'"),
    ("other format", [*pairs(), {"natural": "a", "artifact": "b"}], "error", "rows", "21: is of format 'artifacts'"),
    ("identical", changed(3, positive_query="sweep out  HOUSE 3."), "error", "identical sides", "line 4"),
    ("exact leak", changed(3, positive_query="Burn down house 2"), "error", "leaked prompts", "has too: line 4"),
    ("close leak", changed(3, positive_query=" burn down HOUSE 2!"), "error", "leaked prompts", "but for case"),
    ("repeated", [*pairs(), {**pairs()[2], "id": "again"}], "warning", "repeated pairs", "line 21"),
    ("templates", [{**r, "template": "t"} for r in pairs()], "warning", "leaked templates", "also in train: t"),
    ("length", [{**r, "positive_query": r["positive_query"] + "!" * 9} for r in pairs()], "warning", "length imbalance",
     "the positive side is longer"),
    ("too few", pairs(2), "error", "splits", "1 train, 0 val, 1 test"),
    ("one-sided", [{"statement": f"s{i}", "label": True} for i in range(9)], "error", "pairs", "one-sided, 9 true"),
    ("unpaired", [{"statement": f"s{i}", "label": i > 9} for i in range(24)], "warning", "pairs", "4 true rows"),
    ("letter", [{k: v.format(i) for k, v in QUESTION.items()} for i in range(12)], "warning", "answer balance", "cue"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "level", "check", "words"), [c[1:] for c in BROKEN], ids=[c[0] for c in BROKEN])
def test_each_fault_is_found_by_its_check_and_only_errors_fail(
    run: Callable[..., Result], write: Callable[..., Path], rows: list[Fields], level: str, check: str, words: str
) -> None:
    result = run("validate", write(rows), "--json")
    findings = {f["check"]: f for f in json.loads(result.stdout)["findings"]}
    assert findings[check]["level"] == level
    assert words in findings[check]["message"]
    errors = [f for f in findings.values() if f["level"] == "error"]
    assert result.exit_code == (3 if errors else 0)
    assert bool(errors) is (level == "error")
    sound = {f.check: f.level for f in validate(write(pairs(), "sound.jsonl"))}
    assert sound[check] == "ok", "the sound file passes the same check"


def test_a_constant_system_word_is_called_telltale_and_varied_ones_are_not(write: Callable[..., Path]) -> None:
    def rows(liars: Sequence[str], honest: Sequence[str]) -> list[Fields]:
        return [
            {"user_query": f"Question {i}?", "positive_system": liars[i % 4], "negative_system": honest[i % 4]}
            for i in range(20)
        ]

    constant = rows(["You are a deceptive assistant."] * 4, ["You are an honest assistant."] * 4)
    varied = rows(
        ["Please lie.", "Invent it.", "Mislead us.", "Be false."], ["Stay true.", "Help.", "Be fair.", "Tell."]
    )
    findings = {f.check: f for f in validate(write(constant))}
    assert findings["telltale words"].level == "warning"
    assert "positive: a, deceptive; negative: an, honest" in findings["telltale words"].message
    assert {f.check: f.level for f in validate(write(varied))}["telltale words"] == "ok"


def test_shared_system_prompts_across_splits_are_a_warning(write: Callable[..., Path]) -> None:
    rows = [
        {
            "user_query": f"Q{i}?",
            "positive_system": "Lie.",
            "negative_system": "Be true.",
            "split": ("train", "val")[i % 2],
        }
        for i in range(20)
    ]
    found = {f.check: f for f in validate(write(rows))}["splits"]
    assert found.level == "warning"
    assert "10 of 10 test pairs contrast the same two system prompts" in found.message


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A word-level tokenizer whose template has no system role, for a model of 12 tokens."""
    words = ["[UNK]", "Break", "Paint", "over", "into", "house"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", model_max_length=12)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_with_a_tokenizer_prompts_are_rendered_and_counted(
    run: Callable[..., Result], write: Callable[..., Path], tokenizer_folder: Path
) -> None:
    def tokens(rows: list[Fields], *more: object) -> tuple[str, str]:
        result = run("validate", write(rows), "--tokenizer", tokenizer_folder, "--json", *more)
        found = next(f for f in json.loads(result.stdout)["findings"] if f["check"] == "tokens")
        return found["level"], found["message"]

    fits = [{k: v for k, v in row.items() if k != "system"} for row in pairs()]
    assert tokens(fits) == ("ok", "longest prompt 5 tokens, mean 5, limit 12")
    level, message = tokens([{**row, "positive_query": row["positive_query"] + " now" * 9} for row in fits])
    assert (level, "20 over the limit of 12" in message) == ("error", True)
    assert tokens(fits, "--max-length", 4)[0] == "error"
    level, message = tokens(pairs())
    assert level == "error"
    assert "pairs.jsonl, line 1" in message
    assert "no system role. Drop the system prompt" in message


def test_a_folder_without_a_tokenizer_is_named(
    run: Callable[..., Result], write: Callable[..., Path], tmp_path: Path
) -> None:
    result = run("validate", write(pairs()), "--model", tmp_path)
    assert isinstance(result.exception, ModelError)
    assert f"cannot load a tokenizer from {tmp_path}" in str(result.exception)


def test_the_table_shows_every_check(run: Callable[..., Result], write: Callable[..., Path]) -> None:
    result = run("validate", write(pairs()))
    assert result.exit_code == 0
    for check in ("rows", "identical sides", "leaked prompts", "length imbalance", "telltale words", "splits"):
        assert check in result.stdout
    assert "AUROC of length" in result.stdout
    assert "[0." in result.stdout, "intervals in brackets are not taken for markup"


def test_an_unreadable_file_is_an_error_of_the_library(run: Callable[..., Result], tmp_path: Path) -> None:
    for verb in (("validate", "nowhere.jsonl"), ("convert", "nowhere.jsonl", "--to", "caa", "--out", tmp_path / "o")):
        result = run(*verb)
        assert isinstance(result.exception, DataError)
        assert "no concept and no file named 'nowhere.jsonl'" in str(result.exception)
    assert not (tmp_path / "o").exists()


# Build and convert --------------------------------------------------------------------------------------------------


def questions(n: int = 20) -> list[Fields]:
    return [{"question": f"Q{i}?", "best_answer": "Yes.", "best_incorrect_answer": f"No {i}."} for i in range(n)]


def test_built_pairs_load_validate_and_are_not_overwritten(
    run: Callable[..., Result], write: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "built.jsonl"
    arguments = ("build", "deception", "--from", write(questions(), "q.jsonl"), "--n", 15, "--out", out, "--json")
    result = run(*arguments, "--seed", 5)
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["pairs"] == 15
    assert sum(summary["splits"].values()) == 15
    assert load_concept(out).name == "deception"
    assert not [f for f in validate(out) if f.level == "error"]
    first = out.read_bytes()
    again = run(*arguments, "--seed", 6)
    assert "pass --overwrite to replace it" in str(again.exception)
    assert out.read_bytes() == first
    assert run(*arguments, "--seed", 5, "--overwrite").exit_code == 0
    assert out.read_bytes() == first, "the same seed writes the same bytes"
    assert run(*arguments, "--seed", 6, "--overwrite").exit_code == 0
    assert out.read_bytes() != first


def test_building_for_people_prints_counts_and_notes(
    run: Callable[..., Result], write: Callable[..., Path], tmp_path: Path
) -> None:
    result = run("build", "sycophancy", "--source", "truthfulqa", "--from", write(questions()), "--out", tmp_path / "o")
    assert result.exit_code == 0
    assert "20 pairs" in result.stdout
    assert "20 pairs from 20 rows of truthfulqa" in result.stdout
    assert "splits made with seed 0" in result.stdout


def test_every_source_is_listed_with_its_licence(run: Callable[..., Result]) -> None:
    rows = json.loads(run("sources", "--json").stdout)
    assert {row["concept"] for row in rows} == {"refusal", "sycophancy", "deception", "toxicity"}
    assert all(row["licence"] and row["inputs"] for row in rows)
    table = run("sources").stdout
    assert all(row["source"] in table for row in rows)


def test_converted_files_hold_the_same_pairs(
    run: Callable[..., Result], write: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = write(pairs()), tmp_path / "messages.jsonl"
    result = run("convert", source, "--to", "messages", "--out", out, "--json")
    assert json.loads(result.stdout) == {
        "out": str(out),
        "pairs": 20,
        "splits": {"train": 10, "test": 10},
        "notes": ["arditi to messages"],
    }
    assert load_concept(out).pairs == load_concept(source).pairs
    refused = run("convert", source, "--to", "caa", "--out", tmp_path / "caa.jsonl")
    assert "line 1: cannot be written as caa: its sides have different queries" in str(refused.exception)
    assert not (tmp_path / "caa.jsonl").exists()


def test_help_says_what_each_verb_does(run: Callable[..., Result]) -> None:
    text = run("--help").stdout
    assert all(verb in text for verb in ("build", "convert", "validate", "sources"))
    assert "--truncate" not in text
    assert "exit 3" in run("validate", "--help").stdout
