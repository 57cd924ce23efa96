"""Is it still text? Measures of degeneration, without which a score of broken output looks like an effect.

A toxicity scorer rewards or punishes a repetition loop arbitrarily: effects are reported on all completions, and again
on those that are not degenerate. Sources: Li et al. 2016, arXiv:1510.03055 (distinct-n); Radford et al. 2022,
arXiv:2212.04356, section 4.5 (compression ratio and its threshold 2.4); Holtzman et al. 2020, arXiv:1904.09751 (loops).
"""

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.bootstrap import mean_interval, ratio_interval
from safety_lens.data import Encoded
from safety_lens.forced import Continuation, continuation_logprobs
from safety_lens.interventions.scorers.completion import NAN, Completion
from safety_lens.log import Measurement
from safety_lens.stats import Interval, wilson
from safety_lens.types import Prompt

MAX_COMPRESSION = 2.4
MIN_DISTINCT_2, DISTINCT_WORDS = 0.3, 16
LOOP_REPEATS, LOOP_WORDS, LONGEST_UNIT = 3, 8, 32
"""A text is degenerate where it is empty, compresses better than 2.4 to 1, has fewer than 30 % distinct word pairs
among 16 or more words, or says one run of up to 32 words three or more times on end, over 8 or more words in all."""

PART = 8
"""Completions whose next-token distributions are held at once."""
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


class Fluency(NamedTuple):
    """Measures of one text.

    empty: nothing but white space. distinct_2: distinct word pairs / word pairs in (0, 1], NaN below two words.
    compression_ratio: UTF-8 bytes / zlib's bytes, NaN for an empty text; below 1 for short ones. longest_repeat: how
    many words the longest run covers that is said twice or more on end (0: none). loops: whether it is a loop.
    """

    empty: bool
    distinct_2: float
    compression_ratio: float
    longest_repeat: int
    loops: bool
    words: int

    @property
    def degenerate(self) -> bool:
        """Whether any documented threshold is crossed."""
        poor = self.words >= DISTINCT_WORDS and self.distinct_2 < MIN_DISTINCT_2
        return self.empty or self.loops or poor or self.compression_ratio > MAX_COMPRESSION


def fluency(text: str) -> Fluency:
    """Measure one text; punctuation marks count as words, case does not."""
    words = _WORD.findall(text.casefold())
    pairs = list(pairwise(words))
    distinct = len(set(pairs)) / len(pairs) if pairs else NAN
    raw = text.strip().encode()
    ratio = len(raw) / len(zlib.compress(raw, 9)) if raw else NAN
    longest, loops = _repeats(words)
    return Fluency(not raw, distinct, ratio, longest, loops, len(words))


def _repeats(words: Sequence[str]) -> tuple[int, bool]:
    """Words covered by the longest immediate repetition, and whether any is a loop."""
    ids = np.unique(np.asarray(words, dtype=object).astype(str), return_inverse=True)[1] if words else np.zeros(0, int)
    longest, loops = 0, False
    for unit in range(1, min(LONGEST_UNIT, len(ids) // 2) + 1):
        same = _longest_run(ids[unit:] == ids[:-unit])
        if same >= unit:  # a run of k equal to what stood `unit` before: k + unit words of period `unit`
            covered = same + unit
            longest = max(longest, covered)
            loops = loops or (covered >= LOOP_REPEATS * unit and covered >= LOOP_WORDS)
    return longest, loops


def _longest_run(flags: Bool[np.ndarray, " n"]) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def degenerate(completions: Sequence[Completion]) -> Bool[np.ndarray, " n"]:
    """Which completions are broken output."""
    return np.array([fluency(c.text).degenerate for c in completions], dtype=bool)


def fluency_rows(completions: Sequence[Completion], subject: str) -> list[Measurement]:
    """Shares of empty, looping and degenerate completions (Wilson), mean distinct-2 and compression (bootstrap)."""
    found = [fluency(c.text) for c in completions]
    n = len(found)
    shares = {
        "empty": sum(f.empty for f in found),
        "loops": sum(f.loops for f in found),
        "degenerate": sum(f.degenerate for f in found),
    }
    rows = [Measurement(subject, name, *wilson(k, n), n=n) for name, k in shares.items()]
    for name in ("distinct_2", "compression_ratio"):
        values = np.array([getattr(f, name) for f in found], dtype=float)
        rows.append(Measurement(subject, name, *mean_interval(values), n=int(np.isfinite(values).sum())))
    return rows


def continuation_nll(model: HookedTransformer, rows: Sequence[Continuation]) -> list[Float[np.ndarray, " _"]]:
    """−log P of every token of each continuation under the model without any edit, nats, float64.

    Raises:
        DataError: an empty continuation, or one that exceeds the context.
    """
    out = []
    for start in range(0, len(rows), PART):
        part = rows[start : start + PART]
        for row, logs in zip(part, continuation_logprobs(model, part), strict=True):
            out.append(-logs[np.arange(len(row.tokens)), list(row.tokens)].double().numpy())
    return out


def completion_nll(
    model: HookedTransformer,
    prompts: Sequence[Prompt | Encoded],
    completions: Sequence[Completion],
    *,
    raw: bool = False,
    template_kwargs: dict[str, Any] | None = None,
) -> Float[np.ndarray, " n"]:
    """Mean −log P per token of each completion behind its prompt, under the unedited model, nats; NaN for an empty one.

    prompts: as they were given to `generate`, one per completion, with the same `raw` and `template_kwargs`.
    """
    encoded = encode_for(model, prompts, raw=raw, template_kwargs=template_kwargs)
    pairs = list(zip(encoded, completions, strict=True))
    written = [i for i, (_, c) in enumerate(pairs) if c.tokens]
    rows = [Continuation(tuple(pairs[i][0].ids), pairs[i][1].tokens) for i in written]
    out = np.full(len(pairs), NAN)
    out[written] = [float(x.mean()) for x in continuation_nll(model, rows)]
    return out


def perplexity(model: HookedTransformer, rows: Sequence[Continuation], *, seed: int = 0) -> Interval:
    """exp of the mean −log P per token under the unedited model, with a bootstrap over rows (one a prompt).

    High for text the model would not write; low also for loops, which it finds easy: read it beside `degenerate`.
    """
    nll = continuation_nll(model, rows)
    found = ratio_interval(np.array([x.sum() for x in nll]), np.array([float(len(x)) for x in nll]), seed=seed)
    return Interval(*(float(np.exp(x)) for x in found))
