"""Answers to the same prompts without and with an edit, and the paired change of their scores."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest
from transformer_lens import HookedTransformer

from safety_lens.bootstrap import mean_interval
from safety_lens.data.pairs import last_user_text
from safety_lens.errors import DataError
from safety_lens.generation import Generation, generate
from safety_lens.interventions.fluency import degenerate
from safety_lens.interventions.kept_answers import kept_answers
from safety_lens.interventions.scorers.completion import Completion, Scorer, first_reader
from safety_lens.interventions.steering import applied
from safety_lens.interventions.sweeping.plan import Decoding
from safety_lens.log import Measurement
from safety_lens.paired import paired_effect, sign_flip
from safety_lens.stats import UNKNOWN, Interval, wilson
from safety_lens.types import FwdHook, Prompt

SIDES = ("without", "with")
ALL = "all"
"""Split of the rows that count every prompt."""


@dataclass(frozen=True, eq=False)
class AnswerPairs:
    """Answers to the same prompts, drawn with the same random numbers.

    answers: by side ("without", "with"). scores: by scorer and side, one number per prompt; "degenerate" is always
    there. labels: of the prompts, None where there is none. harmful: whether a prompt is a harmful one.
    """

    prompts: tuple[Prompt, ...]
    labels: tuple[str | None, ...]
    harmful: tuple[bool, ...]
    answers: dict[str, list[Generation]]
    scores: dict[str, dict[str, Float[np.ndarray, " prompt"]]]

    def rows(self, tokenizer: Any) -> list[dict[str, Any]]:
        """One JSON object per prompt: both answers as they may be kept (`kept_answers`), hashes and scores."""
        kept = {side: kept_answers(self.answers[side], self.harmful, tokenizer) for side in SIDES}
        return [
            {
                "prompt": last_user_text(prompt),
                "label": self.labels[i],
                **{side: kept[side][i].text for side in SIDES},
                "sha256": {side: kept[side][i].sha256 for side in SIDES},
                "scores": {
                    name: {side: _or_none(values[side][i]) for side in SIDES} for name, values in self.scores.items()
                },
            }
            for i, prompt in enumerate(self.prompts)
        ]

    def groups(self) -> dict[str, np.ndarray]:
        """Masks of all prompts and, where there are several labels, of those of each label."""
        names = [label for label in dict.fromkeys(self.labels) if label is not None]
        groups = {ALL: np.ones(len(self.prompts), dtype=bool)}
        if len(names) > 1 or None in self.labels:
            groups |= {name: np.array([label == name for label in self.labels]) for name in names}
        return groups

    def measurements(self, subject: str, *, seed: int = 0, **place: Any) -> list[Measurement]:
        """Rows of every scorer and group: level without and with the edit, paired change, two-sided p.

        Metrics are `SCORER/without`, `SCORER/with`, `SCORER/change` and `SCORER/p`; the split is "all" or a label. A
        score of 0 or 1 gets Wilson's interval, another a bootstrap over prompts. Prompts that a scorer could not read
        on either side are left out on both. p: McNemar's exact test for scores of 0 and 1, else sign flips.
        """
        rows = []
        for name, sides in self.scores.items():
            for group, mask in self.groups().items():
                both = np.isfinite(sides["without"]) & np.isfinite(sides["with"]) & mask
                plain, edited = sides["without"][both], sides["with"][both]
                numbers = {
                    "without": level(plain, seed),
                    "with": level(edited, seed),
                    "change": paired_effect(plain[:, None], edited[:, None], seed=seed),
                    "p": UNKNOWN._replace(value=_p_of(edited - plain, seed)),
                }
                unread = int(mask.sum() - both.sum())
                note = f"{unread} of {mask.sum()} prompts have an answer that could not be read" if unread else None
                for what, interval in numbers.items():
                    more = {"n": int(both.sum()), "split": group, "note": note, "seed": seed, **place}
                    rows.append(Measurement(subject, f"{name}/{what}", *interval, **more))
        return rows


def _p_of(change: Float[np.ndarray, " prompt"], seed: int) -> float:
    """Two-sided p that the change is centred on 0."""
    if not len(change):
        return float("nan")
    if np.isin(change, (-1.0, 0.0, 1.0)).all():
        moved = int((change != 0).sum())
        return float(binomtest(int((change > 0).sum()), moved).pvalue) if moved else 1.0
    return float(sign_flip(change[None], seed=seed).p[0])


def level(scores: Float[np.ndarray, " prompt"], seed: int = 0) -> Interval:
    """Mean score: a share with Wilson's interval where all scores are 0 or 1, else with a bootstrap over prompts."""
    if len(scores) and np.isin(scores, (0.0, 1.0)).all():
        return wilson(int(scores.sum()), len(scores))
    return mean_interval(scores, seed=seed)


def answer_pairs(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    hooks: Sequence[FwdHook],
    *,
    scorers: Sequence[Scorer] = (),
    labels: Sequence[str | None] | None = None,
    harmful: Sequence[bool] | None = None,
    decoding: Decoding | None = None,
    seed: int = 0,
) -> AnswerPairs:
    """Answer every prompt without and with an edit, and score both.

    Args:
        hooks: the edit, as `steer` or `ablate` make it.
        labels: of the prompts; several labels are also reported by themselves.
        harmful: which prompts are harmful; by default those labelled "harmful".

    Raises:
        DataError: two scorers of one name, or what `generate` and the scorers raise.
    """
    names = [scorer.name for scorer in scorers]
    if len({*names, "degenerate"}) <= len(names):
        raise DataError(f"scorers need different names, and none of them 'degenerate': got {', '.join(names)}")
    settings = {**asdict(decoding or Decoding()), "seed": seed, "read_first": first_reader(scorers)}
    answers = {"without": generate(model, prompts, **settings)}
    with applied(model, hooks):
        answers["with"] = generate(model, prompts, **settings)
    scores: dict[str, dict[str, Float[np.ndarray, " prompt"]]] = {name: {} for name in (*names, "degenerate")}
    for side, written in answers.items():
        texts = [
            Completion(last_user_text(p), g.text, g.tokens, g.first) for p, g in zip(prompts, written, strict=True)
        ]
        for scorer in scorers:
            scores[scorer.name][side] = np.asarray(scorer(texts), dtype=float)
        scores["degenerate"][side] = degenerate(texts).astype(float)
    known = tuple(labels) if labels is not None else (None,) * len(prompts)
    unsafe = tuple(harmful) if harmful is not None else tuple(label == "harmful" for label in known)
    return AnswerPairs(tuple(prompts), known, unsafe, answers, scores)


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
