"""Behaviours by what is typed at a command line, and the one that belongs to a concept."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.data import Concept
from safety_lens.data.built_in import SPLITS, built_in_for
from safety_lens.errors import DataError
from safety_lens.interventions.behaviours import (
    BEHAVIOURS,
    Behaviour,
    BehaviourSpec,
    Unreadable,
    asked,
    behaviour_of,
    derive_behaviour,
    reader_named,
)
from safety_lens.interventions.openings import Opening, Openings
from safety_lens.interventions.scorers.completion import Completion
from safety_lens.interventions.scorers.named import prepared_scorers

SIDES = "sides"
FORMS = (
    f"{', '.join(BEHAVIOURS)}, {SIDES} (answers to the positive side of the pairs), tokens:I,Sorry, a JSON file of"
    " openings or an artifact that stores a behaviour, or a scorer of answers such as regex:PATTERN"
)
"""What can be typed."""


class SideReader:
    """Reader that labels an answer by its prompt: 1 for prompts of the positive side of the pairs, else 0."""

    name = SIDES

    def __init__(self, positive: Sequence[str]) -> None:
        """Remember the positive prompts, as the text of their last user turn."""
        self._positive = frozenset(positive)

    def __call__(self, completions: Sequence[Completion]) -> Float[np.ndarray, " n"]:
        return np.array([float(c.prompt in self._positive) for c in completions], dtype=float)


def check_behaviour(text: str) -> None:
    """Refuse what names no behaviour, before a model is loaded.

    Raises:
        DataError: No such behaviour, file or scorer.
    """
    if text in (*BEHAVIOURS, SIDES) or text.partition(":")[0] == "tokens":
        return
    if Path(text).expanduser().exists():
        _stored(Path(text).expanduser())
        return
    try:
        prepared_scorers([text])
    except DataError as error:
        raise DataError(f"--behaviour {text!r}: {error}; choose {FORMS}") from error


def behaviour_named(
    text: str | None, model: HookedTransformer, concept: Concept, *, seed: int = 0, **reading: Any
) -> Behaviour:
    """Find or derive the behaviour that a text names, for this model and concept.

    Args:
        text: See `FORMS`; None takes the behaviour that belongs to the concept, and answers to the sides of its pairs
            where it has none.
        model: The model that is read.
        concept: The concept whose directions are to be chosen.
        seed: Seed of the derivation.
        reading: `template_kwargs` of the prompts.

    Raises:
        DataError: No such behaviour.
    """
    if text is None:
        spec = behaviour_of(concept.name)
        readable = spec is not None and spec.belongs_to(built_in_for(model)) and not concept.raw
        text = spec.name if spec is not None and readable else SIDES
    if text in BEHAVIOURS:
        return derive_behaviour(model, text, seed=seed, **reading)
    if text.startswith("tokens:"):
        return Behaviour(text, Unreadable(), _openings_of(text.removeprefix("tokens:").split(","), model))
    if text != SIDES and Path(text).expanduser().exists():
        return _stored(Path(text).expanduser())(model)
    positive, negative = ([getattr(pair, side) for pair in concept.train] for side in ("positive", "negative"))
    if text == SIDES:
        everything = (pair for split in SPLITS for pair in getattr(concept, split))
        reader: Any = SideReader([asked(pair.positive) for pair in everything])
    else:
        reader = prepared_scorers([text])(model)[0]
    spec = BehaviourSpec(
        text, concept.name, lambda sets, split: [], lambda sets, split: [], lambda sets: reader, needs=(), harmful=True
    )
    firsts = {json.dumps(prompt): prompt for prompt in positive}  # pairs may share a prompt: it must stand in one half
    others = {json.dumps(prompt): prompt for prompt in negative}
    prompts = (list(firsts.values()), [prompt for key, prompt in others.items() if key not in firsts])
    return derive_behaviour(model, spec, prompts=prompts, seed=seed, raw=concept.raw, **reading)


def _openings_of(words: Sequence[str], model: HookedTransformer) -> Openings:
    """Openings that begin with these words, each with and without a space before it."""
    if model.tokenizer is None or not all(word.strip() for word in words):
        raise DataError(f"the openings {list(words)!r} need a tokenizer, and a word in every place")
    found = []
    for word in words:
        for form in dict.fromkeys((word, f" {word}")):
            ids = tuple(model.tokenizer.encode(form, add_special_tokens=False))
            if ids and model.tokenizer.unk_token_id not in ids:
                found.append(Opening(ids, text=form))
    if not found:
        raise DataError(f"none of the words {list(words)!r} is in this model's vocabulary")
    return Openings(tuple(found))


def _stored(path: Path) -> Callable[[HookedTransformer], Behaviour]:
    """Behaviour in an artifact, or openings in a JSON file: a list of texts, or an object with "name" and "shown"."""
    file = path / "manifest.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: no behaviour can be read from it ({error})") from error
    if isinstance(found, dict) and "chosen" in found:
        entries = [chosen["behaviour"] for chosen in found["chosen"].values() if chosen and chosen.get("behaviour")]
        if not entries:
            raise DataError(f"{path} stores no behaviour: extract it with --select causal")
        return partial(Behaviour.from_entry, entries[0])
    texts = found.get("shown") if isinstance(found, dict) else found
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f'{path}: expected a list of openings, or an object with "shown": ["I\'m sorry", …]')
    name = str(found.get("name", path.stem)) if isinstance(found, dict) else path.stem
    return lambda model: Behaviour(name, reader_named(name, model), _openings_of(texts, model))
