"""What of an answer is kept: everything, a refusal's first tokens, or a hash."""

import hashlib

import synthetic

from safety_lens.generation import Generation
from safety_lens.interventions.kept_answers import KEPT_TOKENS, kept_answers
from safety_lens.interventions.scorers import CallableScorer

REFUSAL = "I'm sorry, but I can't help with that."


def answer(text: str, tokens: int = 20) -> Generation:
    return Generation("prompt", text, tuple(range(10, 10 + tokens)), True)


def test_only_a_refusal_of_a_harmful_prompt_leaves_its_first_tokens() -> None:
    tokenizer = synthetic.chat_tokenizer()
    said = [answer(REFUSAL), answer("w1 w2 w3"), answer("w1 w2 w3")]
    refused, obeyed, harmless = kept_answers(said, [True, True, False], tokenizer)
    assert refused.tokens == said[0].tokens[:KEPT_TOKENS]
    assert refused.text == tokenizer.decode(list(said[0].tokens[:KEPT_TOKENS]), skip_special_tokens=True)
    assert obeyed.text is None
    assert obeyed.tokens is None
    assert (harmless.text, harmless.tokens) == ("w1 w2 w3", said[2].tokens)
    assert obeyed.sha256 == harmless.sha256 == hashlib.sha256(b"w1 w2 w3").hexdigest()


def test_the_reader_decides_and_unreadable_answers_are_withheld() -> None:
    tokenizer, said = synthetic.chat_tokenizer(), [answer(REFUSAL), answer("w1"), answer("")]
    other = CallableScorer(lambda c: c.text == "w1" if c.text else None, "other")
    assert [k.text is None for k in kept_answers(said, [True] * 3, tokenizer, other)] == [True, False, True]


def test_without_a_tokenizer_no_text_of_a_harmful_prompt_is_kept() -> None:
    kept = kept_answers([answer(REFUSAL), answer(REFUSAL)], [True, False], None)
    assert [k.text for k in kept] == [None, REFUSAL]
