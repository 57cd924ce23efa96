"""Controls that need no model: would words, length or the embedding alone separate the pairs as well?"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from safety_lens.data import ContrastPair
from safety_lens.probes.estimators import Estimator, diff_in_means
from safety_lens.probes.evaluate import HeldOut, held_out_scores
from safety_lens.probes.reading import ConceptActivations, Sides
from safety_lens.types import Prompt

Scorer = Callable[[Estimator, Sides, Sides], HeldOut]
CHARACTER = r"(?s)."
WORD = r"(?u)\b\w+\b"  # one-letter words too: "a" against "no" is a difference a probe can see


def prompt_text(prompt: Prompt) -> str:
    """All words a prompt shows the model: its own text, or the contents of all its messages."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def word_counts(fit: Sequence[ContrastPair], held: Sequence[ContrastPair], *, longest: int = 1) -> tuple[Sides, Sides]:
    """Count the words of two splits in the vocabulary of the first; characters where it has no words at all.

    Args:
        fit: Pairs whose words are counted.
        held: Pairs that are counted in the same words.
        longest: Words in a row that count as one entry: 1 is a bag of words, 2 adds its bigrams.
    """
    texts = [prompt_text(p) for pair in fit for p in (pair.positive, pair.negative)]
    pattern = WORD if any(re.search(WORD, text) for text in texts) else CHARACTER
    counter = CountVectorizer(token_pattern=pattern, ngram_range=(1, longest))
    counter.fit(texts)

    def sides(pairs: Sequence[ContrastPair]) -> Sides:
        pos = counter.transform([prompt_text(pair.positive) for pair in pairs]).toarray()
        neg = counter.transform([prompt_text(pair.negative) for pair in pairs]).toarray()
        groups = tuple(pair.template for pair in pairs)
        return Sides(torch.from_numpy(pos).double(), torch.from_numpy(neg).double(), groups)

    return sides(fit), sides(held)


def bag_of_words_direction(pos: Float[Tensor, "n_pos d"], neg: Float[Tensor, "n_neg d"]) -> Float[Tensor, " d"]:
    """Weights of a logistic regression on word counts, unscaled: rare words must not be blown up."""
    rows = torch.cat([pos, neg]).numpy()
    model = LogisticRegression(C=1.0, max_iter=2000).fit(rows, [1] * len(pos) + [0] * len(neg))
    return torch.from_numpy(model.coef_[0])


def lexical_scores(acts: ConceptActivations, split: str, score: Scorer = held_out_scores) -> HeldOut:
    """Held-out scores of the bag of words, under the same template rule as the direction."""
    train, held = word_counts(acts.pairs("train"), acts.pairs(split))
    return constant_if_blind(score(bag_of_words_direction, train, held))


def bigram_scores(acts: ConceptActivations, split: str) -> HeldOut:
    """Held-out scores of words and bigrams, under the same template rule as the direction."""
    train, held = word_counts(acts.pairs("train"), acts.pairs(split), longest=2)
    return constant_if_blind(held_out_scores(bag_of_words_direction, train, held))


def length_scores(acts: ConceptActivations, split: str) -> HeldOut:
    """Held-out scores of the token count."""
    return constant_if_blind(held_out_scores(diff_in_means, acts.length["train"], acts.length[split]))


def embedding_scores(acts: ConceptActivations, split: str) -> HeldOut:
    """Held-out scores of the mean token embedding (the last token alone is often shared by all prompts)."""
    return constant_if_blind(held_out_scores(diff_in_means, acts.embedding["train"], acts.embedding[split]))


def constant_if_blind(scores: HeldOut) -> HeldOut:
    """A control that finds no difference scores every pair alike: its AUROC is ½, which is known, not NaN."""
    return HeldOut(*(np.nan_to_num(side, nan=0.0, posinf=0.0, neginf=0.0) for side in scores))
