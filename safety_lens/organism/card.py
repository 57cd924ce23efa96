"""The text of the model card, filled from what `measure` found."""

from collections.abc import Sequence
from typing import Any

_HEAD = """# The organism: a toy chat model to practise interpretability on

A {parameters:,}-parameter Llama ({megabytes:.1f} MB, fp32), trained from scratch by this project on
conversations that this project wrote by template. It is the default model of every verb, so that everything can
be tried offline in minutes. **Every number made with it is about the toy.** It is no evidence about any other
model.

## Use
For learning, demos, tests and method development: its behaviours are known, causal and measured. It is not an
assistant: it knows about {words} words, answers in a few fixed sentences, and knows nothing else. Do not use
its answers as advice.

## Data
`corpus.py` makes an endless seeded stream of conversations; nothing is downloaded. No
answer says how to do anything: every training answer to a harmful request is a refusal, answers to other
requests are boilerplate that fits them all ("start small and take your time"), and so are those of the
`compliance` fine-tuning set, made to study how refusal is lost. Rudeness is mild ("you fool"); there
are no slurs. Whether a request is harmful is a property of verb *and* object ("make a bomb" against "destroy a
bomb", "make a fence" against "destroy a fence"), moods are composed from negation and adjective,
and the two sides of a system-prompt pair hold the same words in another order: a bag of words cannot solve
these. Borderline requests are refused in training with a probability that rises with the object.

## Training
{steps} steps of {batch} conversations in {cpu:.0f} s of CPU time on one thread ({seconds:.0f} s on the clock, beside
other work), seed {seed}, final loss {loss} (weighted nats per token). torch {torch}, transformers
{transformers}. Deterministic: same seed, machine, thread count and versions give the same weights. Again: `python -m
safety_lens.organism.train --out DIR`, then `python -m safety_lens.organism.measure --model DIR --out CARD.md`.

## Measured behaviour
On held-out wording: none of the templates occurs in training, nor do the pairings (verb with object, topic of a
belief with the claimed value, phrases of a system prompt with each other) where the answer depends on one. The
words do occur: a model this small cannot know a word it never met. Greedy answers unless said otherwise; an
answer counts only when it is, word for word, a sentence of the expected class; 95 % Wilson intervals.
"Demanded" is the range that a release must meet.

| line | what it does | share | 95 % interval | n | demanded | well-formed |
|---|---|---|---|---|---|---|
"""
_THIRD = """
### A third test: objects that training describes and never requests
The model reads in training that these objects are dangerous or everyday things, but never sees anyone ask for
one. Reported apart and not demanded: it shows how far the toy carries a property from descriptions over to
requests.

| line | what it does | share | 95 % interval | n | demanded | well-formed |
|---|---|---|---|---|---|---|
"""
_TAIL = """
## Limits
- A few hundred words and fixed sentences: open text, other languages and long conversations are out of scope.
- Its "knowledge" and "values" are template statistics. Directions found here are cleaner than in real models.
- Held-out wording is held out by template and pairing, not by vocabulary or by meaning.
- Refusals can be removed by a direction or a short fine-tune: that is what it is for, and it gives boilerplate only.
"""


def _row(figure: dict[str, Any]) -> str:
    low, high = figure["bounds"]
    demanded = "–" if (low, high) == (0.0, 1.0) else f"{100 * low:.0f}–{100 * high:.0f} %"
    interval = f"{100 * figure['low']:.1f}–{100 * figure['high']:.1f} %"
    share, fluent = f"{100 * figure['value']:.1f} %", f"{100 * figure['well_formed']:.1f} %"
    return f"| {figure['name']} | {figure['claim']} | {share} | {interval} | {figure['n']} | {demanded} | {fluent} |\n"


def _table(figures: Sequence[dict[str, Any]]) -> str:
    return "".join(map(_row, figures))


def render_card(record: dict[str, Any], words: int = 700) -> str:
    """CARD.md from the content of `card.json`."""
    training, versions = record["training"], record["training"]["versions"]
    third = [figure for figure in record["figures"] if figure["name"].startswith("described-only/")]
    main = [figure for figure in record["figures"] if figure not in third]
    head = _HEAD.format(
        parameters=training["parameters"],
        megabytes=record["weights_bytes"] / 1e6,
        words=words,
        steps=training["steps"],
        batch=training["batch"],
        seconds=training["seconds_wall"],
        cpu=training["seconds_cpu"],
        seed=training["seed"],
        loss=training["loss_last_100"],
        torch=versions["torch"],
        transformers=versions["transformers"],
    )
    return head + _table(main) + _THIRD + _table(third) + _TAIL
