"""Read positions: indices into the unpadded prompt, or a clear error."""

import pytest

from safety_lens.data import Encoded
from safety_lens.errors import DataError
from safety_lens.positions import (
    Positions,
    all_tokens,
    answer_letter,
    last_k,
    last_token,
    mean_last,
    mean_over,
    parse_positions,
    post_instruction,
)

# <s> sys sys | what is it | [/INST] : | ( A )
PROMPT = Encoded(
    ids=tuple(range(10, 21)), text="sys what is it [/INST]:(A)", instruction=(3, 6), answer=(8, 11), letter=9
)
BARE = Encoded(ids=(1, 2, 3), text="just words", instruction=(0, 3), answer=None)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (last_token, [10]),
        (last_k(3), [8, 9, 10]),
        (mean_last(4), [7, 8, 9, 10]),
        (mean_over("instruction"), [3, 4, 5]),
        (mean_over("answer"), [8, 9, 10]),
        (mean_over("all"), list(range(11))),
        (answer_letter, [9]),
        (post_instruction, [6, 7, 8, 9, 10]),
        (all_tokens, list(range(11))),
    ],
)
def test_each_rule_picks_its_tokens_of_the_unpadded_prompt(rule: Positions, expected: list[int]) -> None:
    assert list(rule.pick(PROMPT)) == expected


def test_only_means_are_averaged() -> None:
    assert [rule.mean for rule in (mean_last(2), mean_over("all"))] == [True, True]
    assert not any(rule.mean for rule in (last_token, last_k(2), answer_letter, post_instruction, all_tokens))


@pytest.mark.parametrize(
    "text",
    [
        "last",
        "last:3",
        "mean:4",
        "mean:instruction",
        "mean:answer",
        "mean:all",
        "answer_letter",
        "post_instruction",
        "all",
    ],
)
def test_a_rule_is_parsed_from_its_own_name(text: str) -> None:
    assert parse_positions(text).name == text


@pytest.mark.parametrize("text", ["", "first", "last:", "last:-1", "mean:x", "LAST", "mean:1.5"])
def test_other_spellings_are_refused_with_the_list(text: str) -> None:
    with pytest.raises(DataError, match=r"is not known; write last, last:K"):
        parse_positions(text)


@pytest.mark.parametrize("text", ["last:0", "mean:0"])
def test_reading_no_token_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="at least 1, got 0"):
        parse_positions(text)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (last_k(4), r"last 4 tokens, but prompt 'just words' has 3"),
        (mean_over("answer"), r"answer tokens, but prompt 'just words' has none"),
        (answer_letter, r"carries no prefilled answer"),
        (post_instruction, r"no template after the instruction"),
    ],
)
def test_a_prompt_without_the_tokens_is_named(rule: Positions, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rule.pick(BARE)


def test_an_unknown_span_is_refused_with_the_list() -> None:
    with pytest.raises(DataError, match="choose instruction, answer or all"):
        mean_over("system")
