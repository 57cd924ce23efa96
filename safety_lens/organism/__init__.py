"""The organism: the small chat model that this project trains itself and ships as the default of every verb.

`lexicon` holds the words, `answers` the sentences it may say and how to tell them apart, `corpus` the conversations and
the held-out sets, `train` and `measure` make the weights and the model card. Nothing here imports torch.
"""

from pathlib import Path

from safety_lens.errors import DataError

HERE = Path(__file__).resolve().parent
MODEL_DIR: Path = HERE / "model"
"""The shipped weights, tokenizer and chat template: readable with `AutoModelForCausalLM.from_pretrained`."""

DATA_DIR: Path = HERE / "data"
"""The shipped JSONL files: contrast pairs, labelled instructions, facts, artifact pairs and fine-tuning sets."""

CONCEPTS: tuple[str, ...] = ("refusal", "sycophancy", "deception", "toxicity")
"""The built-in concepts, each a file of contrast pairs."""


def concept_file(name: str) -> Path:
    """The contrast pairs of a built-in concept.

    Raises:
        DataError: `name` is not one of `CONCEPTS`.
    """
    if name not in CONCEPTS:
        raise DataError(f"there is no built-in concept {name!r}; the built-in ones are {', '.join(CONCEPTS)}")
    return DATA_DIR / f"{name}.jsonl"
