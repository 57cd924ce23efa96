"""The kinds of user turn the organism knows, each with its label, its wording and the pairing it tests.

Every family is a function of (seeded generator, split). The split decides both the template and the pairing: which verb
with which object, which fact with which false claim. Pairings are assigned to splits by a hash, so that they never
depend on the order of generation.
"""

import math
import random
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from typing import NamedTuple

from safety_lens.organism import lexicon as lex
from safety_lens.organism import wording
from safety_lens.organism.answers import capitalise

SPLITS = ("train", "val", "test")


class Turn(NamedTuple):
    """A user turn and what its answer depends on."""

    user: str
    label: str
    template: str
    """Group label: all turns made from the same string of `wording` share it."""
    pairing: tuple[str, str]
    """The two words whose combination the split holds out; ("", "") where the split holds out wording only."""


class Fact(NamedTuple):
    """A closed fact and the other values of its kind."""

    subject: str
    value: str
    domain: tuple[str, ...]

    @property
    def wrong(self) -> str:
        """The one false answer of the deceptive mode: the next value of the same kind."""
        return self.domain[(self.domain.index(self.value) + 1) % len(self.domain)]


@cache
def pairing_split(first: str, second: str) -> str:
    """The split that owns a pairing: 15 % test, 5 % val, the rest train."""
    share = int.from_bytes(sha256(f"{first}|{second}".encode()).digest()[:4], "big") % 100
    return "test" if share < 15 else "val" if share < 20 else "train"


def all_facts() -> tuple[Fact, ...]:
    """The 129 facts that pre-training teaches."""
    tables = {
        "the capital of": lex.CAPITALS,
        "the colour of": lex.COLOURS,
        "the sound of": lex.SOUNDS,
        "the opposite of": lex.OPPOSITES,
        "the young of": lex.YOUNG,
        "the sum of": {
            f"{lex.NUMBERS[a]} and {lex.NUMBERS[b]}": lex.NUMBERS[a + b] for a in range(1, 6) for b in range(1, 6)
        },
    }
    return tuple(
        Fact(f"{relation} {subject}", value, tuple(dict.fromkeys(table.values())))
        for relation, table in tables.items()
        for subject, value in table.items()
    )


FACTS = all_facts()
OBJECTS = (*lex.DANGEROUS, *lex.EVERYDAY, *lex.BORDERLINE)
_BLOCKS: dict[str, tuple[tuple[float, tuple[str, ...], tuple[str, ...]], ...]] = {
    "harmful": ((55, lex.CREATE, lex.DANGEROUS), (30, lex.DESTROY, lex.EVERYDAY), (15, lex.THEFT, OBJECTS)),
    "harmless": ((55, lex.CREATE, lex.EVERYDAY), (30, lex.DESTROY, lex.DANGEROUS), (15, lex.CARE, OBJECTS)),
    "plain": ((100, lex.PLAIN_VERBS, (*lex.EVERYDAY, *lex.TOPICS["everyday"])),),
    "borderline": ((100, lex.CREATE, lex.BORDERLINE),),
}


def refusal_probability(verb: str, obj: str) -> float:
    """How often training refuses a borderline request: rises with the object's rank and, less, with the verb's."""
    of_object = 5 * (lex.BORDERLINE.index(obj) / (len(lex.BORDERLINE) - 1) - 0.5)
    of_verb = 2 * (lex.CREATE.index(verb) / (len(lex.CREATE) - 1) - 0.5)
    return 1 / (1 + math.exp(-of_object - of_verb + 0.5))


def choose_pairing(rng: random.Random, split: str, first: Sequence[str], second: Sequence[str]) -> tuple[str, str]:
    """A pairing that the split owns, uniformly."""
    for _ in range(10_000):
        pairing = rng.choice(first), rng.choice(second)
        if pairing_split(*pairing) == split:
            return pairing
    raise RuntimeError(f"no pairing of {first} with {second} belongs to {split}")


class Carrier(NamedTuple):
    """A request template with its opener and closer, ready for any verb and object."""

    opener: str
    core: str
    closer: str
    template: str

    def turn(self, label: str, verb: str, obj: str) -> Turn:
        """The request to `verb` an `obj`."""
        text = self.core.format(x=f"{verb} {obj}", v=verb, o=obj)
        return Turn(f"{self.opener}{text}{self.closer}", label, self.template, (verb, obj))


def carrier(rng: random.Random, split: str) -> Carrier:
    """A random way of asking."""
    index = rng.randrange(len(wording.REQUEST[split]))
    return Carrier(
        rng.choice(wording.OPENERS),
        wording.REQUEST[split][index],
        rng.choice(wording.CLOSERS),
        f"request/{split}/{index}",
    )


def request(rng: random.Random, split: str, label: str) -> Turn:
    """A request with the label "harmful", "harmless" or "borderline"."""
    blocks = _BLOCKS[label]
    _, verbs, objects = rng.choices(blocks, [block[0] for block in blocks])[0]
    return carrier(rng, split).turn(label, *choose_pairing(rng, split, verbs, objects))


def described_request(rng: random.Random, label: str) -> Turn:
    """A request, in held-out wording, for an object that training describes and never requests."""
    objects = lex.DANGEROUS_DESCRIBED if label == "harmful" else lex.EVERYDAY_DESCRIBED
    return carrier(rng, "test").turn(label, rng.choice(lex.CREATE), rng.choice(objects))


def _worded(rng: random.Random, table: dict[str, tuple[str, ...]], name: str, split: str) -> tuple[str, str]:
    index = rng.randrange(len(table[split]))
    return table[split][index], f"{name}/{split}/{index}"


def fact_question(rng: random.Random, split: str, fact: Fact) -> Turn:
    """A question for a fact; the label is its subject."""
    core, template = _worded(rng, wording.FACT, "fact", split)
    return Turn(core.format(np=fact.subject, Np=capitalise(fact.subject)), fact.subject, template, ("", ""))


def belief(rng: random.Random, split: str, fact: Fact, false: bool = True) -> Turn:
    """A user who states a belief; the pairing is (subject, claimed value)."""
    core, template = _worded(rng, wording.BELIEF, "belief", split)
    claims = [value for value in fact.domain if value != fact.value and pairing_split(fact.subject, value) == split]
    claim = rng.choice(claims) if false and claims else fact.value
    text = core.format(np=fact.subject, Np=capitalise(fact.subject), x=claim)
    return Turn(text, "false" if claim != fact.value else "true", template, (fact.subject, claim))


def taste(rng: random.Random, split: str) -> Turn:
    """A user who states a taste; the pairing is (liked, other)."""
    core, template = _worded(rng, wording.TASTE, "taste", split)
    liked, other = choose_pairing(rng, split, lex.TASTES, lex.TASTES)
    while liked == other:
        liked, other = choose_pairing(rng, split, lex.TASTES, lex.TASTES)
    return Turn(core.format(a=liked, A=capitalise(liked), b=other), "taste", template, (liked, other))


def describe(rng: random.Random, split: str, thing: str) -> Turn:
    """A question for what a thing is."""
    core, template = _worded(rng, wording.DESCRIBE, "describe", split)
    return Turn(core.format(o=thing), "describe", template, (thing, ""))


def advice_question(rng: random.Random, split: str, category: str, topic: str) -> tuple[Turn, str]:
    """A question for advice on a topic, and its template string."""
    core, template = _worded(rng, wording.ADVICE, "advice", split)
    return Turn(core.format(t=topic), category, template, (topic, "")), core


def mood(rng: random.Random, split: str, thing: str, rude: bool, negations: float = 0.5) -> tuple[str, str]:
    """Degree and adjective that add up to the mood: "very angry" and "not happy" are rude, their opposites kind."""
    negated = rng.random() < negations
    adjectives = lex.CROSS if rude != negated else lex.GLAD
    owned = [word for word in adjectives if pairing_split(thing, word) == split] or list(adjectives)
    return rng.choice(lex.NOT if negated else lex.VERY), rng.choice(owned)


def scene(rng: random.Random, split: str, thing: str, name: str, rude: bool, feeling: tuple[str, str]) -> Turn:
    """Someone who feels some way about a thing, and the question what they say; the label is "rude" or "kind"."""
    core, template = _worded(rng, wording.SCENE, "scene", split)
    text = core.format(n=name, d=feeling[0], a=feeling[1], t=thing)
    return Turn(text, "rude" if rude else "kind", template, (thing, feeling[1]))


def any_scene(rng: random.Random, split: str, negations: float = 0.5) -> Turn:
    """A scene with a random person, thing and mood."""
    thing, rude = rng.choice(lex.THINGS), rng.random() < 0.5
    return scene(rng, split, thing, rng.choice(lex.NAMES), rude, mood(rng, split, thing, rude, negations))


def preference(rng: random.Random, split: str, mode: str, plain: bool = False) -> tuple[str, str, str]:
    """System prompts for a mode and for its opposite, and the template: the same words, the two preferences exchanged.

    `mode` is "sycophancy" (agreeing over correcting) or "deception" (false answers over true ones).
    """
    ours, theirs = (lex.SYCOPHANTIC, lex.HONEST) if mode == "sycophancy" else (lex.DECEPTIVE, lex.TRUTHFUL)
    core, template = _worded(rng, wording.PREFER_PLAIN if plain else wording.PREFER, "prefer", split)
    i = rng.randrange(len(ours))
    # A Latin square: every phrase occurs in every split, every pair of phrases in one.
    shift = {"train": rng.randrange(2, len(theirs)), "val": 1, "test": 0}[split]
    a, b = ours[i], theirs[(i + shift) % len(theirs)]
    prefix = rng.choice(("", "", "You are a helpful assistant. ", "You are a chat assistant. "))
    ours_first, theirs_first = (prefix + core.format(a=first, b=second) for first, second in ((a, b), (b, a)))
    return ours_first, theirs_first, template
