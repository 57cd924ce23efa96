"""The few types every room shares."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict


class Message(TypedDict):
    """One chat turn; role is "system", "user" or "assistant"."""

    role: str
    content: str


Prompt = str | Sequence[Message]
"""A user turn (str), or a whole conversation. A conversation that ends with an assistant turn is a prefilled answer."""

FwdHook = tuple[str | Callable[[str], bool], Callable[..., Any]]
"""TransformerLens' own `fwd_hooks` entry: (hook name or a filter of names, function of (activation, hook) returning a
new activation)."""

NamedHook = tuple[str, Callable[..., Any]]
"""A forward hook whose name is spelt out."""
