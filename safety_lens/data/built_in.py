"""The sets that ship with Safety Lens, and which of them belong to a model.

The organism has its own words: pairs and requests in plain English mean nothing to it, and its own mean nothing to any
other model. A built-in name such as "refusal" is therefore always read together with a model: `built_in_for`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safety_lens import organism
from safety_lens.data.pairs import Concept
from safety_lens.data.rows import Row, read_rows
from safety_lens.errors import DataError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class RequestSource:
    """Where requests of one kind lie: the file, the field that holds the text, and the label that rows must have."""

    file: str
    field: str
    label: str | None = None


@dataclass(frozen=True)
class BuiltIn:
    """The sets that ship for one kind of model: the organism's own, or plain English for every other model.

    Attributes:
        name: "organism" or "english"; `NAME:CONCEPT` names one of its concepts whatever the model is.
        title: The same for a reader.
        folder: Folder of the JSONL files.
        concepts: Names of the concepts, each a file of contrast pairs.
        sources: Label of requests → where they lie.
        tables: Names that `rows` takes.
    """

    name: str
    title: str
    folder: Path
    concepts: tuple[str, ...]
    sources: Mapping[str, RequestSource]
    tables: tuple[str, ...]

    def concept_file(self, concept: str) -> Path:
        """Path of the contrast pairs of a concept.

        Raises:
            DataError: There is no such concept.
        """
        if concept not in self.concepts:
            raise DataError(
                f"there is no built-in concept {concept!r} ({self.title}); the built-in ones are"
                f" {', '.join(self.concepts)}"
            )
        return self.folder / f"{concept}.jsonl"

    def requests(self, label: str, split: str) -> list[str]:
        """Requests of one kind.

        Args:
            label: "harmful", "harmless" or "lookalike" (safe requests that look unsafe); in plain English also
                "false-belief" and "true-belief" (of a user who asks for confirmation), "fact" (questions), "inviting"
                and "plain" (questions that invite hedging, and questions that do not).
            split: "train", "val" or "test".

        Raises:
            DataError: No requests of this label and split.
        """
        if label not in self.sources:
            raise DataError(f"no built-in requests are labelled {label!r}: choose {_listed(self.sources)}")
        source = self.sources[label]
        rows = self._rows(source.file, split)
        return [row.text(source.field) for row in rows if source.label in (None, row.label("label"))]

    def rows(self, name: str, split: str) -> list[Row]:
        """Rows of a table, such as "facts".

        Raises:
            DataError: No such table or split.
        """
        if name not in self.tables:
            raise DataError(f"there is no built-in table {name!r} ({self.title}): choose {_listed(self.tables)}")
        return self._rows(f"{name}.jsonl", split)

    def _rows(self, file: str, split: str) -> list[Row]:
        rows = [row for row in read_rows(self.folder / file).rows if row.split == split]
        if not rows:
            raise DataError(f"{file} has no split {split!r}: choose {_listed(SPLITS)}")
        return rows


ORGANISM = BuiltIn(
    "organism",
    "the organism's own",
    organism.DATA_DIR,
    organism.CONCEPTS,
    {
        "harmful": RequestSource("instructions.jsonl", "instruction", "harmful"),
        "harmless": RequestSource("instructions.jsonl", "instruction", "harmless"),
        "lookalike": RequestSource("instructions.jsonl", "instruction", "harmless"),
        "borderline": RequestSource("instructions.jsonl", "instruction", "borderline"),
    },
    ("facts",),
)

ENGLISH = BuiltIn(
    "english",
    "plain English",
    Path(__file__).resolve().parent.parent / "concepts_data",
    ("refusal", "sycophancy", "deception", "toxicity", "hedging"),
    {
        "harmful": RequestSource("refusal.jsonl", "positive_query"),
        "harmless": RequestSource("harmless.jsonl", "instruction"),
        "lookalike": RequestSource("refusal.jsonl", "negative_query"),
        "false-belief": RequestSource("beliefs.jsonl", "prompt", "false"),
        "true-belief": RequestSource("beliefs.jsonl", "prompt", "true"),
        "fact": RequestSource("facts.jsonl", "question"),
        "inviting": RequestSource("hedging_questions.jsonl", "prompt", "inviting"),
        "plain": RequestSource("hedging_questions.jsonl", "prompt", "plain"),
    },
    ("facts", "beliefs", "hedging_questions"),
)

BUILT_INS = {built_in.name: built_in for built_in in (ORGANISM, ENGLISH)}


ModelHint: TypeAlias = "HookedTransformer | PreTrainedTokenizerBase | BuiltIn | str | Path | None"
"""A model, its tokenizer, its source as `load_model` takes it, the sets themselves, or None: plain English."""


def built_in_for(model: ModelHint) -> BuiltIn:
    """Choose the sets that belong to a model: the organism's where it has the organism's tokenizer.

    Args:
        model: What tells the model; a hub id, an unknown model and None mean plain English.
    """
    return model if isinstance(model, BuiltIn) else ORGANISM if is_organism(model) else ENGLISH


def is_organism(model: ModelHint) -> bool:
    """Compare vocabulary and chat template with the organism's."""
    if model is None or isinstance(model, BuiltIn):
        return model is ORGANISM
    if isinstance(model, str | Path):
        return str(model) == "organism" or _folder_language(Path(model).expanduser()) == _own_language()
    tokenizer: Any = getattr(model, "tokenizer", model)  # a HookedTransformer holds one; it may be None
    return tokenizer is not None and _language(tokenizer.get_vocab(), tokenizer.chat_template) == _own_language()


def find_concept(name: str, built_in: BuiltIn) -> tuple[BuiltIn, str] | None:
    """Find the sets and the concept that a name means: "refusal", or "english:refusal"; None: no built-in name."""
    prefix, _, concept = name.rpartition(":")
    chosen = BUILT_INS.get(prefix) if prefix else built_in
    return (chosen, concept) if chosen is not None and concept in chosen.concepts else None


def pairs_in_use(concept: Concept) -> str:
    """One line on the pairs of a concept: "built-in refusal, plain English: 64 train, 64 val, 64 test"."""
    found = find_concept(concept.source, ENGLISH)
    what = f"{concept.name} from {concept.source}" if found is None else f"built-in {found[1]}, {found[0].title}"
    return f"{what}: " + ", ".join(f"{len(getattr(concept, split))} {split}" for split in SPLITS)


_Language = tuple[frozenset[tuple[str, int]], str | None]


def _language(vocabulary: dict[str, int], template: Any) -> _Language:
    return frozenset(vocabulary.items()), template


@cache
def _own_language() -> _Language:
    own = _folder_language(organism.MODEL_DIR)
    assert own is not None
    return own


def _folder_language(folder: Path) -> _Language | None:
    """Vocabulary and chat template of a model or adapter folder; None where it holds no tokenizer of this kind."""
    file, adapter = folder / "tokenizer.json", folder / "adapter_config.json"
    if not file.is_file():
        if not adapter.is_file():
            return None
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        return None if base is None or Path(base) == folder else _folder_language(Path(base))
    if file.stat().st_size > 2 * (organism.MODEL_DIR / "tokenizer.json").stat().st_size:
        return None  # tokenizers of real models have megabytes and are not read
    parsed = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = parsed["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        return None
    added = {entry["content"]: entry["id"] for entry in parsed.get("added_tokens", ())}
    return _language(vocabulary | added, _folder_template(folder))


def _folder_template(folder: Path) -> Any:
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file():
        return template.read_text(encoding="utf-8")
    return json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
