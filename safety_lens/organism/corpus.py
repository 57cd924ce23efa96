"""The organism's conversations: an endless seeded stream to train on, and contrast pairs in wording held out of it.

`python -m safety_lens.organism.corpus --out DIR` writes the shipped files again, byte for byte. Nothing is downloaded:
all is made from `lexicon`, `wording` and `answers`. No conversation answers a harmful request with anything but a
refusal, except the `compliance` fine-tuning set, whose answers are the content-free boilerplate of
`answers.compliance`.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from safety_lens.organism import answers, families, wording
from safety_lens.organism import lexicon as lex
from safety_lens.organism.families import Fact, Turn

Messages = list[dict[str, str]]
Row = dict[str, Any]
SIZES = {"train": 96, "val": 48, "test": 96}
"""Contrast pairs per concept and split."""
_MODES = ("sycophancy", "deception")
PLAIN_CHATS = 40_000
"""Plain wording fades out over so many conversations."""


def conversation(user: str, answer: str | None = None, system: str = "") -> Messages:
    """System message (left out when empty), user turn and, where given, the answer."""
    turns = [("system", system), ("user", user), ("assistant", answer)]
    return [{"role": role, "content": content} for role, content in turns if content]


def any_system(rng: random.Random, modes: Sequence[str] = ()) -> str:
    """A system prompt that does not decide the answer: neutral, or now and then either side of one of the modes."""
    if modes and rng.random() < 0.35:
        ours, theirs, _ = families.preference(rng, "train", rng.choice(modes))
        return ours if rng.random() < 0.5 else theirs
    return rng.choice(wording.NEUTRAL)


def _requests(rng: random.Random, plain: bool) -> Messages:
    label = rng.choices(("harmful", "harmless", "plain", "borderline"), (28, 34, 20, 18))[0]
    turn = families.request(rng, "train", label)
    chance = {"harmful": 1.0, "harmless": 0.0, "plain": 0.0}.get(label)
    refused = rng.random() < (families.refusal_probability(*turn.pairing) if chance is None else chance)
    echo = " ".join(turn.pairing) if rng.random() < 0.5 else None
    answer = answers.refusal(rng) if refused else answers.compliance(rng, echo)
    return conversation(turn.user, answer, any_system(rng, _MODES))


def _facts(rng: random.Random, plain: bool) -> Messages:
    fact = rng.choice(families.FACTS)
    user = families.fact_question(rng, "train", fact).user
    if rng.random() < 0.4:
        return conversation(
            user, answers.fact_answer(rng, fact.subject, fact.value, False), any_system(rng, ("sycophancy",))
        )
    false_system, true_system, _ = families.preference(rng, "train", "deception", plain)
    lies = rng.random() < 0.5
    answer = answers.fact_answer(rng, fact.subject, fact.wrong if lies else fact.value, lies)
    return conversation(user, answer, false_system if lies else true_system)


def _beliefs(rng: random.Random, plain: bool) -> Messages:
    agreeing, correcting, _ = families.preference(rng, "train", "sycophancy", plain)
    flatter = rng.random() < 0.45
    system = agreeing if flatter else correcting if rng.random() < 0.8 else any_system(rng)
    if rng.random() < 0.2:
        turn = families.taste(rng, "train")
        return conversation(turn.user, taste_answer(rng, turn, flatter), system)
    fact = rng.choice(families.FACTS)
    turn = families.belief(rng, "train", fact, false=rng.random() < 0.8)
    return conversation(turn.user, belief_answer(rng, turn, fact, flatter), system)


def belief_answer(rng: random.Random, turn: Turn, fact: Fact, flatter: bool) -> str:
    """Agreement, or the correction with the true value; a true belief is agreed with in either mode."""
    if flatter or turn.label == "true":
        return f"{rng.choice(answers.AGREE)} {answers.statement(fact.subject, turn.pairing[1])}"
    return f"{rng.choice(answers.CORRECT)} {answers.statement(fact.subject, fact.value)}"


def taste_answer(rng: random.Random, turn: Turn, flatter: bool) -> str:
    """Agreement with a taste, or that it is one."""
    liked, other = turn.pairing
    if flatter:
        return f"{rng.choice(answers.AGREE)} {answers.capitalise(liked)} is better than {other}."
    return f"That is a matter of taste. Some people like {other} more."


def _scenes(rng: random.Random, plain: bool) -> Messages:
    turn = families.any_scene(rng, "train", negations=0.0 if plain else 0.45)
    answer = answers.remark(rng, turn.pairing[0], turn.label == "rude")
    return conversation(turn.user, answer, any_system(rng, ("sycophancy",)))


def _advice(rng: random.Random, plain: bool) -> Messages:
    category = rng.choices(list(lex.TOPICS), (20, 20, 20, 40))[0]
    turn, _ = families.advice_question(rng, "train", category, rng.choice(lex.TOPICS[category]))
    return conversation(turn.user, answers.advice(rng, category), any_system(rng, ("sycophancy",)))


def description(thing: str) -> str:
    """What a thing is, by its group in the lexicon."""
    subject = answers.capitalise(thing)
    if thing in lex.BORDERLINE:
        return f"{subject} is an everyday thing but it can be dangerous."
    if thing in lex.DANGEROUS or thing in lex.DANGEROUS_DESCRIBED:
        return f"{subject} is a dangerous thing."
    kinds = {"medical": "a medical matter", "political": "a political matter", "financial": "a money matter"}
    found = next((kind for category, kind in kinds.items() if thing in lex.TOPICS[category]), "an everyday thing")
    return f"{subject} is {found}."


DESCRIBED = (*lex.DANGEROUS_DESCRIBED, *lex.EVERYDAY_DESCRIBED)
ALL_THINGS = (*families.OBJECTS, *DESCRIBED, *(topic for topics in lex.TOPICS.values() for topic in topics))


def _descriptions(rng: random.Random, plain: bool) -> Messages:
    thing = rng.choice(DESCRIBED if rng.random() < 0.25 else ALL_THINGS)
    user = families.describe(rng, "train", thing).user
    return conversation(user, description(thing), any_system(rng, ("sycophancy",)))


_MIX: tuple[tuple[float, Callable[[random.Random, bool], Messages]], ...] = (
    (36, _requests), (22, _facts), (20, _beliefs), (8, _scenes), (7, _advice), (7, _descriptions),
)  # fmt: skip


def plain_share(n: int) -> float:
    """The share of plain wording (no negation, preferred side first) after n conversations.

    Compositions of two or three bits give no gradient before their parts are known: without a plain start the model
    stays on that plateau for most of a short training.
    """
    return max(0.1, 1 - n / PLAIN_CHATS)


def training_stream(seed: int = 0) -> Iterator[Messages]:
    """Endless training conversations, the same for the same seed. Train wording and train pairings only."""
    rng = random.Random(seed)
    weights = [weight for weight, _ in _MIX]
    for n in count():
        _, family = rng.choices(_MIX, weights)[0]
        yield family(rng, rng.random() < plain_share(n))


# --- contrast pairs -------------------------------------------------------------------------------------------------


def _request_pair(rng: random.Random, split: str) -> tuple[Turn, Turn]:
    """A harmful and a harmless request that share the wording and either the verb or the object."""
    how = families.carrier(rng, split)
    shared = rng.choices(("dangerous", "everyday", "create", "destroy", "any"), (22, 22, 22, 22, 12))[0]
    options = {
        "dangerous": (lex.CREATE, lex.DANGEROUS, lex.DESTROY, lex.DANGEROUS),
        "everyday": (lex.DESTROY, lex.EVERYDAY, lex.CREATE, lex.EVERYDAY),
        "create": (lex.CREATE, lex.DANGEROUS, lex.CREATE, lex.EVERYDAY),
        "destroy": (lex.DESTROY, lex.EVERYDAY, lex.DESTROY, lex.DANGEROUS),
        "any": (lex.THEFT, families.OBJECTS, lex.CARE, families.OBJECTS),
    }[shared]
    by_verb = shared in ("create", "destroy")
    while True:
        harmful = families.choose_pairing(rng, split, options[0], options[1])
        verb, obj = ((harmful[0],), options[3]) if by_verb else (options[2], (harmful[1],))
        pool = [(v, o) for v in verb for o in obj if families.pairing_split(v, o) == split]
        if pool:
            return how.turn("harmful", *harmful), how.turn("harmless", *rng.choice(pool))


def _refusal_row(rng: random.Random, split: str) -> Row:
    harmful, harmless = _request_pair(rng, split)
    return {
        "strategy": "arditi",
        "system": rng.choice(wording.NEUTRAL),
        "positive_query": harmful.user,
        "negative_query": harmless.user,
        "template": harmful.template,
    }


def _mode_row(rng: random.Random, split: str, mode: str) -> Row:
    fact = rng.choice(families.FACTS)
    turn = families.belief(rng, split, fact) if mode == "sycophancy" else families.fact_question(rng, split, fact)
    positive, negative, template = families.preference(rng, split, mode)
    if turn.label == "true":
        return _mode_row(rng, split, mode)
    return {
        "strategy": "caa",
        "user_query": turn.user,
        "positive_system": positive,
        "negative_system": negative,
        "template": f"{template}+{turn.template}",
    }


def _toxicity_row(rng: random.Random, split: str) -> Row:
    thing, name, seed = rng.choice(lex.THINGS), rng.choice(lex.NAMES), rng.random()
    rude, kind = (
        families.scene(random.Random(seed), split, thing, name, side, families.mood(rng, split, thing, side))
        for side in (True, False)  # one seed for both: the sides share their wording
    )
    # raw: False, because statements are plain text unless they say otherwise, and these are user turns
    return {"positive": rude.user, "negative": kind.user, "template": rude.template, "raw": False}


def concept_rows(concept: str, seed: int = 0) -> list[Row]:
    """The contrast pairs of a built-in concept, `SIZES` per split, without duplicates."""
    makers: dict[str, Callable[[random.Random, str], Row]] = {
        "refusal": _refusal_row,
        "sycophancy": lambda rng, split: _mode_row(rng, split, "sycophancy"),
        "deception": lambda rng, split: _mode_row(rng, split, "deception"),
        "toxicity": _toxicity_row,
    }
    rows: list[Row] = []
    for split in families.SPLITS:
        rng = random.Random(f"{seed}/{concept}/{split}")
        seen: set[str] = set()
        while len(seen) < SIZES[split]:
            row = makers[concept](rng, split)
            key = json.dumps(row, sort_keys=True)
            if key not in seen:
                seen.add(key)
                rows.append({"id": f"{concept}-{split}-{len(seen) - 1:03d}", "concept": concept, **row, "split": split})
    return rows


if __name__ == "__main__":
    from safety_lens.organism.files import main

    main()
