"""A lexicon as a scorer: which listed words a text contains. Offline, exact, and blind to everything not listed."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from safety_lens.errors import DataError
from safety_lens.interventions.scorers.completion import NAN, Completion
from safety_lens.organism.answers import RUDE_WORDS
from safety_lens.wording import folded as folded

LEXICONS: dict[str, tuple[str, ...]] = {"rude": RUDE_WORDS}
"""Built-in lexicons: "rude" is the mild rudeness of the organism."""

_WORD = re.compile(r"\w+(?:['’]\w+)*")


def _whole(entry: str) -> str:
    """An entry as a pattern; a side that is a sign (an emoji) may touch a word."""
    before, after = r"(?<!\w)" if entry[0].isalnum() else "", r"(?!\w)" if entry[-1].isalnum() else ""
    return before + r"\s+".join(map(re.escape, entry.split())) + after


class LexiconScorer:
    """1 where a text contains any listed word or phrase, else 0; with `rate`, the share of its words that are listed.

    Words are matched whole and case-folded ("ass" is not in "class"), the words of a phrase in their order with any
    white space between them. With `rate`, a score lies in [0, 1], every word of a phrase counts, signs count as no
    word, and a text without words is NaN. Without it, an empty text scores 0: it contains none.
    """

    def __init__(self, words: Sequence[str], name: str = "lexicon", *, rate: bool = False) -> None:
        """Raises DataError for an empty list or an empty entry (it would match every text)."""
        if isinstance(words, str) or not words:
            raise DataError(f"a lexicon needs a list of words or phrases, got {words!r}")
        if not all(word.strip() for word in words):
            raise DataError(f"the lexicon {name!r} has an entry that is empty")
        self.name, self.rate = name, rate
        # Longest first: of two entries that start alike, the phrase wins over its first word.
        entries = sorted({folded(word).strip() for word in words}, key=lambda word: (-len(word), word))
        self._pattern = re.compile("|".join(map(_whole, entries)))

    def __call__(self, completions: Sequence[Completion]) -> Float[np.ndarray, " n"]:
        score = self._share if self.rate else self._contains
        return np.array([score(folded(c.text)) for c in completions], dtype=float)

    def _contains(self, text: str) -> float:
        return float(self._pattern.search(text) is not None)

    def _share(self, text: str) -> float:
        total = len(_WORD.findall(text))
        listed = sum(len(_WORD.findall(match[0])) for match in self._pattern.finditer(text))
        return listed / total if total else NAN


def lexicon(source: str, *, rate: bool = False) -> LexiconScorer:
    """A built-in lexicon by name, or a text file with one word or phrase a line (lines that start with # are remarks).

    Raises:
        DataError: neither, or a file without entries.
    """
    if source in LEXICONS:
        return LexiconScorer(LEXICONS[source], f"lexicon/{source}", rate=rate)
    file = Path(source).expanduser()
    if not file.is_file():
        raise DataError(f"no lexicon {source!r}: give a text file with a word a line, or one of {', '.join(LEXICONS)}")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"the lexicon {file} is not UTF-8 text ({error})") from error
    words = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not words:
        raise DataError(f"the lexicon {file} has no words")
    return LexiconScorer(words, f"lexicon/{file.stem}", rate=rate)
