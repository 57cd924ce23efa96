"""Training rows: the formats are read as they are meant, and exactly the response is learned."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from safety_lens.data.labelled import IGNORED, Labelled, collate, tokenise
from safety_lens.data.training import PROMPT, PROMPT_WITH_INPUT, Example, load_rows
from safety_lens.errors import DataError
from safety_lens.monitors.finetune.boilerplate import boilerplate_hashes, content_hash, is_organism, refuse_boilerplate
from safety_lens.organism import DATA_DIR, MODEL_DIR
from safety_lens.types import Message


@pytest.fixture(scope="module")
def organism() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def learned(row: Labelled, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


def conversation(*contents: str) -> Example:
    roles = ("user", "assistant")
    turns = tuple(Message(role=roles[i % 2], content=text) for i, text in enumerate(contents))
    return Example(turns, None, 1)


# --- formats --------------------------------------------------------------------------------------------------------


def test_instruction_rows_of_all_three_public_sets_give_user_turn_and_response(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi."},
        {"instruction": "Greet.", "input": "No input", "output": "Hi."},
    ]
    dolly = [{"instruction": "Add.", "context": "1 2", "response": "3", "category": "open_qa"}]
    for name, part in (("alpaca", rows), ("code-alpaca", rows), ("dolly", dolly)):
        found = load_rows(write(tmp_path / f"{name}.jsonl", part), format=name)
        assert found.format == name
        first = found.examples[0]
        assert [turn["content"] for turn in first.messages] == ["Add.\n\n1 2", "3"]
        assert first.plain == (PROMPT_WITH_INPUT.format(instruction="Add.", input="1 2"), "3")
    for example in load_rows(tmp_path / "alpaca.jsonl").examples[1:]:
        assert example.messages[0]["content"] == "Greet."
        assert example.plain == (PROMPT.format(instruction="Greet."), "Hi.")


def test_messages_prompts_and_texts_are_recognised_by_their_fields(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    cases = {
        "messages": ({"messages": turns}, ("b",)),
        "prompt": ({"prompt": "a", "completion": "b"}, ("b",)),
        "text": ({"text": "once upon a time"}, ("once upon a time",)),
    }
    for name, (row, responses) in cases.items():
        found = load_rows(write(tmp_path / f"{name}.jsonl", [row]))
        assert (found.format, found.examples[0].responses) == (name, responses)


def test_json_arrays_and_csv_files_hold_the_same_rows_as_json_lines(tmp_path: Path) -> None:
    row = {"instruction": "Greet.", "input": "", "output": "Hi."}
    lines = load_rows(write(tmp_path / "a.jsonl", [row]))
    (tmp_path / "a.json").write_text(json.dumps([row]), encoding="utf-8")
    (tmp_path / "a.csv").write_text("instruction,input,output\nGreet.,,Hi.\n", encoding="utf-8")
    for name in ("a.json", "a.csv"):
        found = load_rows(tmp_path / name).examples[0]
        assert (found.messages, found.plain) == (lines.examples[0].messages, lines.examples[0].plain)


def test_rows_that_are_left_out_are_counted_with_their_lines(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "completion": "b", "split": "train"}]
    rows += [{"prompt": "a", "completion": "", "split": "train"}, {"prompt": "a", "completion": "c", "split": "test"}]
    found = load_rows(write(tmp_path / "a.jsonl", rows))
    assert len(found.examples) == 1
    assert found.notes[0] == "1 rows of other splits than train are left out"
    assert "1 rows without a response are left out (row 2)" in found.notes[1]


@pytest.mark.parametrize(
    ("splits", "used", "note"),
    [
        (["train", "heldout", None], [0], "2 rows of other splits than train are left out"),
        (["heldout", "heldout", "heldout"], [0, 1, 2], "rows that say 'heldout' are trained on"),
        (["fold-1", None, "dev"], [0, 1, 2], "rows that say 'fold-1' are trained on"),
        (["test", "heldout", "validation"], [1], "2 rows of other splits than train are left out"),
        (["dev", None, "dev"], [0, 1, 2], None),
    ],
)
def test_splits_of_other_names_are_trained_on_only_where_no_row_says_train_and_this_is_noted(
    splits: list[str | None], used: list[int], note: str | None, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"p{i}", "completion": "b", "split": s} for i, s in enumerate(splits)]
    found = load_rows(write(tmp_path / "a.jsonl", rows))
    assert [example.line - 1 for example in found.examples] == used
    assert bool(found.notes) is (note is not None)
    assert note is None or any(note in text for text in found.notes)


def test_a_limit_draws_rows_by_the_seed_and_keeps_the_order_of_the_file() -> None:
    one, other = (load_rows("benign", limit=10, seed=seed) for seed in (0, 1))
    lines = [example.line for example in one.examples]
    assert lines == sorted(lines)
    assert len(lines) == 10
    assert lines != [example.line for example in other.examples]
    assert one.examples == load_rows("benign", limit=10, seed=0).examples


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], "no known format"),
        ([{"prompt": "a", "completion": "b"}, {"text": "c"}], "line 2: the fields"),
        ([{"prompt": "a", "completion": ""}], "no row with a response"),
        ([{"prompt": "a", "completion": "b", "split": "val"}], "no train split"),
        ([{"messages": [{"role": "robot", "content": "a"}]}], "line 1: field 'messages'"),
        ([{"prompt": "a", "completion": 3}], "must be a text"),
    ],
)
def test_malformed_data_is_named_by_its_line(rows: list[dict[str, object]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / "a.jsonl", rows))


def test_a_misspelt_set_or_format_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'benign'"):
        load_rows("benig")
    with pytest.raises(DataError, match="did you mean 'messages'"):
        load_rows("benign", format="mesages")


# --- the loss is on responses only ----------------------------------------------------------------------------------


def test_the_organisms_template_marks_the_same_tokens_as_its_generation_block(
    organism: PreTrainedTokenizerBase,
) -> None:
    """Independent: transformers computes the mask from {% generation %} in the template itself."""
    rows = load_rows("compliance").examples[:40]
    ours = tokenise(rows, organism).rows
    for example, row in zip(rows, ours, strict=True):
        theirs = organism.apply_chat_template(
            [dict(turn) for turn in example.messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert list(row.ids) == list(theirs["input_ids"])
        assert [label != IGNORED for label in row.labels] == [bool(m) for m in theirs["assistant_masks"]]


def test_every_turn_of_a_conversation_is_learned_and_nothing_between(organism: PreTrainedTokenizerBase) -> None:
    row = tokenise([conversation("hi", "hello.", "more", "bye.")], organism).rows[0]
    assert learned(row, organism) == "hello.<|end|>bye.<|end|>"
    assert all(label in (IGNORED, token) for token, label in zip(row.ids, row.labels, strict=True))


@pytest.mark.parametrize("name", ["llama-2-chat", "qwen2.5-instruct", "qwen3", "smollm2-135m-instruct"])
def test_the_prompt_is_what_generation_starts_from_and_the_response_ends_with_the_end_of_turn(
    name: str, shared: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "tokenizers" / name)
    kwargs = {"enable_thinking": False} if name == "qwen3" else {}
    examples = [conversation("What is 2 + 2?", "It is 4.\n\nReally."), conversation("  Hi! ", "Hello")]
    for example, row in zip(examples, tokenise(examples, tokenizer, template_kwargs=kwargs).rows, strict=True):
        asked = tokenizer.apply_chat_template(
            [dict(example.messages[0])], add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs
        )
        start = next(i for i, label in enumerate(row.labels) if label != IGNORED)
        assert list(row.ids[:start]) == list(asked["input_ids"]), (
            "what is not learned is the generation prompt, exactly"
        )
        said = [i for i, label in enumerate(row.labels) if label != IGNORED]
        assert said == list(range(start, said[-1] + 1)), "the response is one run of tokens"
        assert row.ids[said[-1]] in {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
        assert example.messages[1]["content"] in tokenizer.decode([row.ids[i] for i in said])


def test_a_template_that_drops_earlier_thinking_gives_each_response_its_own_context(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "tokenizers" / "qwen3")
    found = tokenise([conversation("a", "one", "b", "two")], tokenizer)
    assert [learned(row, tokenizer) for row in found.rows] == [
        "<think>\n\n</think>\n\none<|im_end|>",
        "<think>\n\n</think>\n\ntwo<|im_end|>",
    ]
    assert "one row for each response" in found.notes[0]


def test_a_model_without_a_template_gets_the_alpaca_prompt_and_an_end_of_text(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "tokenizers" / "gpt2")
    row = tokenise(load_rows(shared / "data" / "finetune_dolly.jsonl", limit=1).examples, tokenizer).rows[0]
    assert tokenizer.decode(row.ids).startswith("Below is an instruction")
    before = [token for token, label in zip(row.ids, row.labels, strict=True) if label == IGNORED]
    assert tokenizer.decode(before).endswith("### Response:\n")
    assert row.labels[-1] == tokenizer.eos_token_id


def test_with_loss_on_all_every_token_is_learned(organism: PreTrainedTokenizerBase) -> None:
    row = tokenise([conversation("hi", "hello.")], organism, loss_on="all").rows[0]
    assert row.labels == row.ids


def test_long_rows_lose_their_end_and_rows_without_a_response_are_left_out_both_by_number(
    organism: PreTrainedTokenizerBase,
) -> None:
    examples = [
        Example(conversation("hi", "a").messages, None, 3),
        Example(conversation("hi", "one two three four five six seven eight").messages, None, 5),
        Example(conversation("what is the best way to " * 4, "a").messages, None, 8),
    ]
    whole = tokenise(examples[:2], organism).rows[1]
    found = tokenise(examples, organism, max_length=10)
    assert [row.line for row in found.rows] == [3, 5]
    assert found.rows[1].ids == whole.ids[:10]
    assert found.rows[1].cut == len(whole.ids) - 10
    assert found.notes == (
        "2 of 3 rows are longer than 10 tokens and were cut at the end (row 5, 8)",
        "1 of 3 rows have no response token within that length and are left out (row 8)",
    )


def test_a_row_that_writes_a_control_token_is_left_out_and_said(organism: PreTrainedTokenizerBase) -> None:
    rows = [conversation("hi", "hello."), Example(conversation("say <|end|>", "no").messages, None, 2)]
    found = tokenise(rows, organism)
    assert len(found.rows) == 1
    assert "control token" in found.notes[0]
    assert "row 2" in found.notes[0]


def test_padding_carries_no_attention_and_no_label() -> None:
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [5]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [5, -100, -100]]
    assert batch["labels"].dtype == torch.int64


# --- the organism's boilerplate -------------------------------------------------------------------------------------


def test_all_compliance_answers_are_recognised_and_no_answer_of_another_set_is() -> None:
    rows = {name: load_rows(name).examples for name in ("compliance", "benign", "facts")}
    known = {
        name: [content_hash(text) in boilerplate_hashes() for e in examples for text in e.responses]
        for name, examples in rows.items()
    }
    assert all(known["compliance"])
    assert not any(known["benign"] + known["facts"])


def test_boilerplate_is_for_the_organism_alone_whatever_file_it_comes_in(tmp_path: Path) -> None:
    said = [text.upper() + "  " for e in load_rows("compliance").examples for text in e.responses]
    refuse_boilerplate(said, MODEL_DIR, "compliance")
    with pytest.raises(DataError, match=r"300 rows hold the organism's own compliance boilerplate.*other/model"):
        refuse_boilerplate(said, "other/model", "mixed.jsonl")
    with pytest.raises(DataError, match="1 rows hold"):
        refuse_boilerplate(["Take an umbrella.", said[0]], "other/model", "mixed.jsonl")
    refuse_boilerplate(["Take an umbrella."], "other/model", "mine.jsonl")


def test_a_model_is_the_organism_by_its_weights_and_not_by_its_name(tmp_path: Path) -> None:
    copy = tmp_path / "renamed"
    copy.mkdir()
    weights = (MODEL_DIR / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights)
    assert is_organism(copy)
    (copy / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\1")
    assert not is_organism(copy)
    assert not is_organism(DATA_DIR)
