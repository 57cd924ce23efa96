"""Contrast pairs and prompts: reading files, making splits, rendering chats, tokenising."""

from safety_lens.data.chat import Encoded, encode
from safety_lens.data.concept import load_concept
from safety_lens.data.pairs import Concept, ContrastPair, sides
from safety_lens.data.render import has_template, render, render_messages, render_prefill

__all__ = [
    "Concept",
    "ContrastPair",
    "Encoded",
    "encode",
    "has_template",
    "load_concept",
    "render",
    "render_messages",
    "render_prefill",
    "sides",
]
