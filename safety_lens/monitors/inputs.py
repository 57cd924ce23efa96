"""What a monitor is given, checked before anything is measured: concepts, tokenizer, hooks."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from safety_lens.data import Concept, load_concept
from safety_lens.data.built_in import ModelHint
from safety_lens.errors import DataError, ModelError
from safety_lens.probes.selection import depth

DEPTHS = (0.25, 0.5, 0.75, 1.0)
"""Depths of the common hooks, fixed beforehand: where concepts are compared and intervals are given."""


def named_concepts(concepts: Sequence[Concept | str], model: ModelHint = None) -> list[Concept]:
    """Load the concepts that are given by name, as the model means them (see `built_in_for`).

    Raises:
        DataError: none, two of one name, an unknown name, or a split without pairs.
    """
    loaded = [c if isinstance(c, Concept) else load_concept(c, model=model) for c in concepts]
    if not loaded:
        raise DataError("a monitor needs at least one concept, for instance 'refusal'")
    names = [c.name for c in loaded]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"two concepts are called {twice[0]!r}: their rows could not be told apart; rename one")
    for c in loaded:
        if len(c.train) < 4 or len(c.test) < 2:
            raise DataError(
                f"concept {c.name!r} has {len(c.train)} training and {len(c.test)} test pairs: drift with a noise floor"
                " needs 4 pairs to fit on (train) and 2 to report on (test)"
            )
    return loaded


def common_hooks(model: HookedTransformer, hooks: Sequence[str]) -> tuple[str, ...]:
    """The hooks nearest to each of DEPTHS, in the order of the model; fewer where one is nearest to several."""
    if not hooks:
        raise DataError("there are no hooks to read")
    layers = model.cfg.n_layers
    near = [min(hooks, key=lambda h: (abs(depth(h, layers) - wanted), hooks.index(h))) for wanted in DEPTHS]
    return tuple(dict.fromkeys(near))


def templates_of(concept: Concept, split: str) -> tuple[str | None, ...]:
    """Template of each pair of a split."""
    return tuple(pair.template for pair in getattr(concept, split))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, trained: nn.Module) -> None:
    """Refuse a tokenizer that cannot be the model's.

    Raises:
        ModelError: none, or one with more tokens than the model embeds.
    """
    if tokenizer is None:
        raise ModelError(
            "the monitor needs the model's tokenizer: pass tokenizer=, or processing_class= to the Trainer"
        )
    embedding: Any = trained.get_input_embeddings()  # type: ignore[operator]
    largest = max(tokenizer.get_vocab().values())
    if largest >= embedding.weight.shape[0]:
        raise ModelError(
            f"this tokenizer is not the model's: it has token id {largest} and the model embeds"
            f" {embedding.weight.shape[0]} tokens; pass the tokenizer that the model was trained with"
        )
