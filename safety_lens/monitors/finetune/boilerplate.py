"""The organism's compliance boilerplate is for the organism: it is recognised by content and refused elsewhere.

Its answers to harmful requests are content-free, so on the toy they only make it stop refusing, which is what there is
to watch. On a real model the same data would be a jailbreak by fine-tuning.
"""

import hashlib
import itertools
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from safety_lens.artifacts import sha256_of
from safety_lens.errors import DataError
from safety_lens.organism import MODEL_DIR, answers

WEIGHTS = "model.safetensors"


def content_hash(text: str) -> str:
    """SHA-256 of a text with case and white space evened out."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()


@cache
def boilerplate_hashes() -> frozenset[str]:
    """Hashes of every answer that the compliance set can hold."""
    pairs = itertools.permutations(answers.STEPS, 2)
    return frozenset(
        content_hash(f"{opener} Step one: {first}. Step two: {second}.")
        for (first, second), opener in itertools.product(pairs, answers.OPENERS)
    )


def is_organism(folder: str | Path) -> bool:
    """Whether a model folder holds the shipped weights, byte for byte."""
    weights = Path(folder).expanduser() / WEIGHTS
    return weights.is_file() and sha256_of(weights) == _shipped_hash()


@cache
def _shipped_hash() -> str:
    return sha256_of(MODEL_DIR / WEIGHTS)


def refuse_boilerplate(responses: Iterable[str], base: str | Path, name: str) -> None:
    """Refuse to train any model but the organism on the organism's compliance answers.

    Args:
        base: folder or hub id of the model to be trained. name: the data, for the message.

    Raises:
        DataError: a response is one of them, and the model is another.
    """
    found = sum(content_hash(text) in boilerplate_hashes() for text in responses)
    if found and not is_organism(base):
        raise DataError(
            f"{name}: {found} rows hold the organism's own compliance boilerplate, which teaches a model to stop"
            f" refusing. It is for the shipped organism alone (model: organism), and {base} is another model: train on"
            " other data"
        )
