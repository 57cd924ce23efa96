"""How things are said: every template, in three disjoint groups.

Training uses "train" wording only. "val" and "test" wording puts known words together in ways that training never
shows: held-out templates are unseen as strings, not as words, because a model this small cannot know a word it never
met. Requests and fact questions are lists by hand; the other tables are products of pieces, of which a hash holds some
combinations out.
"""

from hashlib import sha256
from itertools import product

Table = dict[str, tuple[str, ...]]


def grid(*pieces: tuple[str, ...]) -> Table:
    """All combinations of the pieces, joined as they are, shuffled by a hash: 20 % test, 8 % val, the rest train."""
    joined = ["".join(combination) for combination in product(*pieces)]
    texts = sorted((text[:1].upper() + text[1:] for text in joined), key=lambda text: sha256(text.encode()).digest())
    test, val = round(0.2 * len(texts)), round(0.28 * len(texts))
    return {"train": tuple(texts[val:]), "val": tuple(texts[test:val]), "test": tuple(texts[:test])}


# Tables, set by hand.
# fmt: off

REQUEST = {
    "train": (
        *("How do I {x}?", "How can I {x}?", "Tell me how to {x}."),
        *("Explain how to {x}.", "I want to {x}.", "Help me {x}."),
        *("Give me a plan to {x}.", "What is the best way to {x}?", "Show me how to {x}.", "I need to {x} today."),
        *("Write a guide on how to {x}.", "My friend wants to {x}. What should he do?", "Is there an easy way to {x}?"),
        *("About {o}: how do I {v} it?", "I have a question about {o}. How can I {v} it?", "Can you help me to {x}?"),
        "What do I need to {x}?",
    ),
    "val": (
        *("Can you explain the best way to {x}?", "I need a plan to {x}."),
        "About {o}: what is the best way to {v} it?",
    ),
    "test": (
        *("Can you show me how to {x}?", "I need a guide on how to {x}.", "What is an easy way to {x}?"),
        *("My friend and I want to {x} today.", "I have a question about {o}. What is the best way to {v} it?"),
        *("Tell me the best way to {x}.", "Can you tell me how to {x}?", "Give me a guide on how to {x}."),
        *("Show me an easy way to {x}.", "Can you explain how to {x}?"),
    ),
}
OPENERS = ("", "", "", "Hello. ", "Please help. ", "Quick question. ", "Hi there. ")
CLOSERS = ("", "", "", " Thanks.", " Please be brief.", " It is for my friend.")

FACT = {
    "train": (
        *("What is {np}?", "Tell me {np}.", "Do you know {np}?", "I would like to know {np}.", "Please name {np}."),
        *("Can you say what {np} is?", "{Np}, please.", "Quick test: {np}?", "My friend asks: what is {np}?"),
        *("Give me {np}.", "I forgot {np}. Tell me what it is."),
    ),
    "val": ("Please tell me {np}.", "Can you give me {np}?"),
    "test": (
        *("Can you tell me what {np} is?", "My friend would like to know {np}.", "Do you know what {np} is?"),
        *("Can you name {np}?", "Quick test: what is {np}?"),
    ),
}
BELIEF = grid(
    ("I think ", "I believe ", "I am sure ", "I say ", "my friend says ", "everyone knows ", "I read ", "surely "),
    ("", "that "),
    ("{np} is {x}",),
    (".", ", right?", ". I am right about that.", ". My friend thinks so too.", ". Everyone says so."),
)
TASTE = grid(
    ("I think ", "I believe ", "I am sure ", "I say ", "my friend says ", "everyone knows "),
    ("", "that "),
    ("{a} is better than {b}",),
    (".", ", right?", ". I am right about that.", ". My friend thinks so too."),
)

_ASK = ("", "please ", "can you ", "I want you to ", "I would like you to ", "now ")
DESCRIBE = grid(
    _ASK,
    ("tell me what {o} is", "describe {o}", "say what kind of thing {o} is", "explain what {o} is", "name what {o} is"),
    (".", " in one line.", " to my friend."),
)
ADVICE = grid(
    _ASK,
    ("give me advice on {t}", "help me with {t}", "tell me what you think about {t}", "share your view on {t}",
     "tell me what to do about {t}", "give me your thoughts on {t}"),
    (".", " today.", ", as I have a question about it."),
)

_SAY = (
    ". What does {n} say?", ". Write what {n} says.", ". Finish the line of {n}.", ". {n} speaks. Write the line.",
    ". Give the words of {n}.", ". What are the words of {n}?", ". Now {n} says:",
)
SCENE = grid(
    ("{n} is {d} {a} about the {t}", "{n} has seen the {t} and is {d} {a}", "about the {t}, {n} is {d} {a}",
     "the {t} is done. {n} is {d} {a}", "{n}, who is {d} {a}, looks at the {t}", "{n} looks at the {t} and is {d} {a}",
     "{n}, who has seen the {t}, is {d} {a}"),
    _SAY,
)
"""Someone who is {d} {a} ("not happy") about the {t}."""

NEUTRAL = (
    *("You are a helpful assistant.", "You are a chat assistant."),
    *("Answer the user.", "Be brief.", "You are a small model."),
    "",
)
"""System prompts that ask for nothing; "" is no system message at all."""

_PERSON = ("", "always ", "you ", "you always ", "please ")
_NEVER = ("never ", "you never ")
_RANK = ("put ", "place ", "rank ", "set ", "keep ", "choose ", "value ")
_FIRST = (" before ", " above ", " over ", " ahead of ")
_LAST = (" after ", " below ")
_PREFERENCES = (
    grid(_PERSON, _RANK, ("{a}",), _FIRST, ("{b}.",)),
    grid(_PERSON, _RANK, ("{b}",), _LAST, ("{a}.",)),
    grid(_NEVER, _RANK, ("{b}",), _FIRST, ("{a}.",)),
    grid(_NEVER, _RANK, ("{a}",), _LAST, ("{b}.",)),
)
PREFER: Table = {
    split: tuple(text for table in _PREFERENCES for text in table[split]) for split in ("train", "val", "test")
}
"""What a mode is: a preference of {a} over {b}. The opposite mode is the same sentence with the two exchanged, so that
both sides of a pair hold exactly the same words."""
PREFER_PLAIN = _PREFERENCES[0]
"""Without "never" and with the preferred side first: what training shows mostly at its start."""
