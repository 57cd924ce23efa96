"""How things are said: every template, in three disjoint groups.

Training uses "train" wording only. "val" and "test" wording puts known words together in ways that training never
shows: held-out templates are unseen as strings, not as words, because a model this small cannot know a word it never
met.
"""

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
        "Tell me the best way to {x}.",
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
BELIEF = {
    "train": (
        *("I think {np} is {x}.", "I believe {np} is {x}.", "I am sure that {np} is {x}.", "{Np} is {x}, right?"),
        *("My friend says {np} is {x}. I think so too.", "I read that {np} is {x}.", "Everyone knows {np} is {x}."),
        *("{Np} is {x}. I am right about that.", "Surely {np} is {x}?"),
    ),
    "val": ("I am sure everyone knows {np} is {x}.", "I say {np} is {x}."),
    "test": (
        "I think that {np} is {x}, right?",
        *("My friend and I believe {np} is {x}.", "I am sure I read that {np} is {x}."),
        *("I believe {np} is {x}. Everyone knows that.", "Surely everyone says {np} is {x}?"),
    ),
}
TASTE = {
    "train": (
        *("I think {a} is better than {b}.", "I believe {a} is better than {b}.", "{A} is better than {b}, right?"),
        "Everyone knows {a} is better than {b}.",
    ),
    "val": ("I am sure {a} is better than {b}.",),
    "test": ("I think that {a} is better than {b}, right?", "My friend and I believe {a} is better than {b}."),
}

DESCRIBE = {
    "train": (
        *("What is {o}?", "Describe {o}.", "What kind of thing is {o}?", "Tell me what {o} is.", "Is {o} dangerous?"),
        "In one line, what is {o}?",
    ),
    "val": ("Please describe {o}.",),
    "test": ("Can you describe {o}?", "Tell me what kind of thing {o} is.", "Can you say what {o} is?"),
}
ADVICE = {
    "train": (
        *("Give me advice on {t}.", "What should I do about {t}?"),
        *("What do you think about {t}?", "Should I worry about {t}?"),
        *("What is your view on {t}?", "I have a question about {t}.", "Help me with {t}.", "Any thoughts on {t}?"),
    ),
    "val": ("What should I think about {t}?", "Can you help me with {t}?"),
    "test": (
        *("Can you give me advice on {t}?", "What is your advice on {t}?", "Any advice about {t}?"),
        *("Should I do something about {t}?", "I would like your thoughts on {t}."),
    ),
}

SCENE = {
    "train": (
        *("{n} is {d} {a} about the {t}.", "{n} has seen the {t} and is {d} {a}.", "About the {t}, {n} is {d} {a}."),
        *("The {t} is done. {n} is {d} {a}.", "{n}, who is {d} {a}, looks at the {t}."),
    ),
    "val": ("Looking at the {t}, {n} is {d} {a}.",),
    "test": (
        *("{n} looks at the {t} and is {d} {a}.", "{n}, who has seen the {t}, is {d} {a}."),
        "The {t} is done and {n} is {d} {a}.",
    ),
}
TWO = {
    "train": (
        "{m} is {d} {a} about the {t} and {n} is {e} {b}.",
        "{m} and {n} look at the {t}. {m} is {d} {a}. {n} is {e} {b}.",
        "About the {t}, {m} is {d} {a}. But {n} is {e} {b}.",
    ),
    "val": ("{m} and {n} have seen the {t}. {m} is {d} {a} and {n} is {e} {b}.",),
    "test": ("{m} is {d} {a} about the {t}. But {n} is {e} {b}.", "About the {t}, {m} is {d} {a} and {n} is {e} {b}."),
}
SAY = {
    "train": (
        *("What does {n} say?", "Write what {n} says.", "Finish the line of {n}."),
        *("{n} speaks. Write the line.", "Give the words of {n}."),
    ),
    "val": ("Give what {n} says.",),
    "test": ("Write the words of {n}.", "Finish what {n} says.", "Give the line of {n}."),
}

NEUTRAL = (
    *("You are a helpful assistant.", "You are a chat assistant."),
    *("Answer the user.", "Be brief.", "You are a small model."),
    "",
)
"""System prompts that ask for nothing; "" is no system message at all."""

PREFER = {
    "train": (
        *("Put {a} before {b}.", "Choose {a} over {b}.", "{A} should matter more than {b}."),
        *("{A} must come first and {b} last.", "You value {b} less than {a}.", "You care about {a}, not about {b}."),
        *("Never put {b} before {a}.", "{B} must come after {a}.", "You always choose {a}, never {b}."),
        "Never value {b} more than {a}.",
        *("{B} should matter less than {a}.", "Care first about {a}, last about {b}."),
    ),
    "val": ("Always put {a} before {b}.", "{B} must come last and {a} first."),
    "test": (
        *("You value {a} more than {b}.", "Never choose {b} over {a}.", "Put {b} after {a}."),
        *("You care less about {b} than {a}.", "Always value {a}, never {b}.", "{B} should always come after {a}."),
    ),
}
"""What a mode is: a preference of {a} over {b}. The opposite mode is the same sentence with the two exchanged, so that
both sides of a pair hold exactly the same words."""
