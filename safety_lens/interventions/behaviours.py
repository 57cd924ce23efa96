"""Behaviours: how a model's behaviour is read, from a label of its answers and from the log-odds of their openings.

A behaviour is derived from the model's own answers: it answers prompts that should and prompts that should not show the
behaviour, a reader labels the answers, and the openings of those that show it are collected. Their log-odds are then
tested against the reader's labels on prompts that took no part. `docs/maths.md`, "Causal choice", has the formulas.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.data import Encoded
from safety_lens.data.built_in import SPLITS, BuiltIn, built_in_for
from safety_lens.data.render import as_messages
from safety_lens.errors import ArtifactError, DataError
from safety_lens.generation import Generation, generate, stop_tokens
from safety_lens.interventions.openings import NAN, Opening, Openings
from safety_lens.interventions.scorers.beliefs import AgreementReader, FalsehoodReader
from safety_lens.interventions.scorers.completion import Completion, Scorer
from safety_lens.interventions.scorers.hedging import HedgingReader
from safety_lens.interventions.scorers.refusal import SubstringRefusal
from safety_lens.stats import UNKNOWN, Interval, auroc_interval
from safety_lens.types import FwdHook, Prompt

SHORTEST, LONGEST = 4, 8
"""Tokens of an opening."""
MOST = 12
"""Openings of the behaviour that are kept."""
COVERED = 0.95
"""Share of the answers with the behaviour from which on further openings are left out."""
LISTED = 6
"""Openings of the other answers that are kept for comparison."""
FEWEST = 5
"""Answers with and without the behaviour that each half of the prompts must give."""
MIN_AUROC = 0.8


@dataclass(frozen=True)
class BehaviourSpec:
    """What a behaviour is, whatever the model.

    Attributes:
        name: As it is typed.
        concept: The built-in concept whose pairs have this behaviour on their positive side.
        shown: Built-in prompts of a split whose answers should show it.
        other: Built-in prompts of a split whose answers should not; none where the first kind gets both.
        reader: Scorer that labels answers, made for the built-in sets in use: 1 shown, 0 not shown, NaN unreadable.
        needs: Labels of built-in requests that it asks for; sets without them do not have this behaviour.
        max_new_tokens: Tokens of an answer within which the behaviour shows.
        harmful: Whether the prompts of the first kind are harmful, so that no other answer to them may be kept.
    """

    name: str
    concept: str
    shown: Callable[[BuiltIn, str], Sequence[Prompt]]
    other: Callable[[BuiltIn, str], Sequence[Prompt]]
    reader: Callable[[BuiltIn], Scorer]
    needs: tuple[str, ...]
    max_new_tokens: int = 12
    harmful: bool = False

    def belongs_to(self, sets: BuiltIn) -> bool:
        """Whether these built-in sets have the prompts of this behaviour."""
        return set(self.needs) <= set(sets.sources)


BEHAVIOURS: dict[str, BehaviourSpec] = {
    "refusal": BehaviourSpec(
        "refusal",
        "refusal",
        shown=lambda sets, split: sets.requests("harmful", split),
        other=lambda sets, split: sets.requests("harmless", split),
        reader=lambda sets: SubstringRefusal(),
        needs=("harmful", "harmless"),
        harmful=True,
    ),
    "agreement": BehaviourSpec(
        "agreement",
        "sycophancy",
        shown=lambda sets, split: sets.requests("false-belief", split),
        other=lambda sets, split: [],
        reader=lambda sets: AgreementReader.of([row for split in SPLITS for row in sets.rows("beliefs", split)]),
        needs=("false-belief",),
        max_new_tokens=24,
    ),
    "falsehood": BehaviourSpec(
        "falsehood",
        "deception",
        shown=lambda sets, split: sets.requests("fact", split),
        other=lambda sets, split: [],
        reader=lambda sets: FalsehoodReader.of([row for split in SPLITS for row in sets.rows("facts", split)]),
        needs=("fact",),
        max_new_tokens=24,
    ),
    "hedging": BehaviourSpec(
        "hedging",
        "hedging",
        shown=lambda sets, split: sets.requests("inviting", split),
        other=lambda sets, split: sets.requests("plain", split),
        reader=lambda sets: HedgingReader(),
        needs=("inviting", "plain"),
        max_new_tokens=24,
    ),
}
"""One entry for each behaviour that can be read without files of the user."""


@dataclass(frozen=True)
class Behaviour:
    """How one behaviour is read on one model.

    Attributes:
        name: "refusal" and so on; see `BEHAVIOURS`.
        reader: Scorer of completions: 1 shown, 0 not shown, NaN unreadable.
        openings: Openings whose log-odds are read; None where they could not be derived, with the reason in `fault`.
        fault: Why there are no openings, or None.
        auroc: AUROC of the log-odds against the reader's labels, on prompts that took no part in the derivation.
        shown: Greedy answers, of both halves, that show the behaviour.
        other: Greedy answers that do not.
        max_new_tokens: Tokens of an answer within which the reader looks.
        threshold: Log-odds midway between the means of both kinds of held-out answers: above it an answer is expected
            to show the behaviour. 0 (probability ½) where that is unknown.
    """

    name: str
    reader: Scorer
    openings: Openings | None
    fault: str | None = None
    auroc: Interval = UNKNOWN
    shown: int = 0
    other: int = 0
    max_new_tokens: int = 12
    threshold: float = 0.0

    def log_odds(
        self, model: HookedTransformer, prompts: Sequence[Prompt | Encoded], hooks: Sequence[FwdHook] = ()
    ) -> Float[np.ndarray, " prompt"]:
        """Log-odds (nats) that each answer begins with one of the openings; NaN where there are no openings."""
        if self.openings is None:
            return np.full(len(prompts), NAN)
        return self.openings.log_odds(model, encode_for(model, prompts), hooks)

    def labels(
        self,
        model: HookedTransformer,
        prompts: Sequence[Prompt],
        hooks: Sequence[FwdHook] = (),
        *,
        encoded: Sequence[Encoded] | None = None,
    ) -> Float[np.ndarray, " prompt"]:
        """Let the model answer greedily and label each answer: 1 shown, 0 not shown, NaN unreadable.

        Args:
            model: The model that answers.
            prompts: What the user asks; the reader may look its rows up by it.
            hooks: Edits, active for prompts and answers.
            encoded: The prompts as they are read, where that is not the plain chat template.
        """
        answers = generate(model, encoded or prompts, hooks=hooks, max_new_tokens=self.max_new_tokens)
        return _labels(self.reader, prompts, answers)

    def entry(self) -> dict[str, Any]:
        """What a manifest stores, as JSON; `from_entry` reads it back."""
        openings = self.openings
        lists = {} if openings is None else {"shown": openings.shown, "other": openings.other}
        return {
            "name": self.name,
            "reader": self.reader.name,
            "openings": {
                side: [{"ids": list(o.ids), "weight": _number(o.weight), "text": o.text} for o in found]
                for side, found in lists.items()
            },
            "fault": self.fault,
            "auroc": [_number(x) for x in self.auroc],
            "shown": self.shown,
            "other": self.other,
            "max_new_tokens": self.max_new_tokens,
            "threshold": self.threshold,
        }

    @classmethod
    def from_entry(cls, entry: dict[str, Any], model: HookedTransformer | BuiltIn | None = None) -> "Behaviour":
        """Read a stored behaviour back; the reader is found by the behaviour's name, for the sets of this model.

        Raises:
            ArtifactError: The entry is not one that `entry` wrote.
        """
        try:
            sides = {
                side: tuple(Opening(tuple(map(int, o["ids"])), _float(o["weight"]), str(o["text"])) for o in found)
                for side, found in entry["openings"].items()
            }
            return cls(
                str(entry["name"]),
                reader_named(str(entry["name"]), model),
                Openings(**sides) if sides else None,
                entry["fault"],
                Interval(*map(_float, entry["auroc"])),
                int(entry["shown"]),
                int(entry["other"]),
                int(entry["max_new_tokens"]),
                float(entry["threshold"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"this is not a stored behaviour ({error!r}): derive it again") from error


class Unreadable:
    """Reader of a behaviour that no reader knows, such as openings that the user named: every label is NaN."""

    name = "none"

    def __call__(self, completions: Sequence[Completion]) -> Float[np.ndarray, " n"]:
        return np.full(len(completions), NAN)


def reader_named(name: str, model: HookedTransformer | BuiltIn | None = None) -> Scorer:
    """Reader of a behaviour in the table, for the sets of this model; of any other name, one that labels nothing."""
    spec, sets = BEHAVIOURS.get(name), built_in_for(model)
    return spec.reader(sets) if spec is not None and spec.belongs_to(sets) else Unreadable()


def behaviour_of(concept: str) -> BehaviourSpec | None:
    """Behaviour that belongs to a built-in concept; None where it has none."""
    return next((spec for spec in BEHAVIOURS.values() if spec.concept == concept), None)


def derive_behaviour(
    model: HookedTransformer,
    spec: str | BehaviourSpec,
    *,
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]] | None = None,
    n: int = 48,
    samples: int = 1,
    min_auroc: float = MIN_AUROC,
    raw: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    on_prompts: Callable[[int], None] | None = None,
) -> Behaviour:
    """Derive how a behaviour is read on this model from the model's own answers.

    Half of the prompts are answered greedily, and those that should show the behaviour once more for each sample at
    temperature 1 (an opening that is often drawn may never be the most probable one). The reader labels the answers.
    Openings are the shortest beginnings of 4 to 8 tokens that no answer of the other label shares. The second half
    tests their log-odds against the labels of greedy answers.

    Args:
        model: The model that answers.
        spec: A behaviour, or its name in `BEHAVIOURS`.
        prompts: Prompts that should show the behaviour and prompts that should not, instead of the built-in ones.
        n: Prompts of each kind that are used at most; twice as many where one kind must give both labels.
        samples: Sampled answers for each prompt of the first half that should show the behaviour.
        min_auroc: AUROC that the log-odds must reach on the second half.
        raw: Whether prompts are plain text without a chat template.
        template_kwargs: Arguments of the chat template.
        seed: Seed of the halves and of the sampled answers.
        on_prompts: Called with the number of answers finished, for a progress bar.

    Returns:
        The behaviour; without openings, and with the reason in `fault`, where the answers do not give any.

    Raises:
        DataError: No such behaviour, no prompts, or a prompt that is given twice.
    """
    spec = spec if isinstance(spec, BehaviourSpec) else _spec_named(spec)
    sets = built_in_for(model)
    if not spec.belongs_to(sets):
        raise DataError(f"{spec.name} asks for prompts that {sets.title} sets do not have: {', '.join(spec.needs)}")
    sides = prompts if prompts is not None else (spec.shown(sets, "train"), spec.other(sets, "train"))
    fit, held = _halves(sides, n, seed)
    reader = spec.reader(sets)
    options: dict[str, Any] = {
        "max_new_tokens": spec.max_new_tokens,
        "raw": raw,
        "template_kwargs": template_kwargs,
        "on_batch": on_prompts,
    }
    texts, sides_of = [prompt for prompt, _ in fit], np.array([side for _, side in fit])
    answers = _Answers.of(model, reader, texts, generate(model, texts, **options))
    first = [prompt for prompt, side in fit if side == 0]
    drawn = [
        _Answers.of(model, reader, first, generate(model, first, temperature=1.0, seed=seed + k, **options))
        for k in range(samples)
    ]
    tests = [prompt for prompt, _ in held]
    test = _Answers.of(model, reader, tests, generate(model, tests, **options))
    found = Behaviour(spec.name, reader, None, max_new_tokens=spec.max_new_tokens)
    found = replace(found, shown=answers.shown + test.shown, other=answers.other + test.other)
    for half, said in (("derive the openings from", answers), ("test them on", test)):
        if min(said.shown, said.other) < FEWEST:
            return replace(found, fault=_too_few(spec.name, half, said))
    may_keep = np.concatenate([sides_of != 0, np.zeros(samples * len(first), dtype=bool)]) | (not spec.harmful)
    openings = collect_openings(
        [ids for said in (answers, *drawn) for ids in said.beginnings],
        np.concatenate([said.labels for said in (answers, *drawn)]),
        may_keep,
        model,
    )
    if openings is None:
        return replace(
            found, fault=f"no opening of up to {LONGEST} tokens is specific to answers that show {spec.name}"
        )
    odds = openings.log_odds(model, encode_for(model, tests, raw=raw, template_kwargs=template_kwargs))
    sides_odds = odds[test.labels == 1], odds[test.labels == 0]
    auroc = auroc_interval(*sides_odds)
    middle = float(np.mean([values.mean() for values in sides_odds]))
    found = replace(found, openings=openings, auroc=auroc, threshold=middle)
    if not (auroc.value >= min_auroc and auroc.low > 0.5):
        return replace(found, openings=None, fault=_not_held(spec.name, openings, auroc, min_auroc))
    return found


def collect_openings(
    answers: Sequence[tuple[int, ...]],
    labels: Float[np.ndarray, " answer"],
    may_keep: Sequence[bool] | np.ndarray,
    model: HookedTransformer,
) -> Openings | None:
    """Collect the openings of labelled answers: the shortest beginnings that the answers of the other label lack.

    Args:
        answers: Token ids, the stop token included where the answer ended.
        labels: 1 shown, 0 not shown, NaN left out.
        may_keep: Answers whose tokens may be kept where they do not show the behaviour.
        model: Its tokenizer writes the texts.

    Returns:
        The openings, weights as shares of the answers of each kind; None where no answer that shows the behaviour has a
        beginning of its own.
    """
    beginnings = {
        label: Counter(a[:k] for a, b in zip(answers, labels, strict=True) if b == label for k in _lengths(a))
        for label in (0, 1)
    }

    def of(label: int, kept: Sequence[bool] | np.ndarray) -> list[Opening]:
        mine, others = beginnings[label], beginnings[1 - label]
        found = Counter[tuple[int, ...]]()
        for answer, own, keep in zip(answers, labels, kept, strict=True):
            if own == label and keep:
                pure = next((answer[:k] for k in _lengths(answer) if not others[answer[:k]]), None)
                longest = answer[: max(_lengths(answer), default=0)]
                if pure or (longest and mine[longest] > others[longest]):
                    found[pure or longest] += 1
        total = sum(own == label and keep for own, keep in zip(labels, kept, strict=True))
        return [Opening(ids, float(count / total), _text(model, ids)) for ids, count in found.most_common()]

    shown, other = of(1, [True] * len(answers)), of(0, may_keep)
    before = np.cumsum([0.0, *(opening.weight for opening in shown)])
    kept = [opening for opening, share in zip(shown, before, strict=False) if share < COVERED][:MOST]
    return Openings(tuple(kept), tuple(other[:LISTED])) if kept else None


def _lengths(answer: Sequence[int]) -> range:
    """Lengths of an answer's beginnings: 4 to 8 tokens, or the whole where it is shorter."""
    return range(min(SHORTEST, len(answer)) or 1, min(LONGEST, len(answer)) + 1)


def _text(model: HookedTransformer, ids: Sequence[int]) -> str:
    return "" if model.tokenizer is None else str(model.tokenizer.decode(list(ids)))


@dataclass(frozen=True, eq=False)
class _Answers:
    """Answers to some prompts: their token ids, the stop token included, and their labels."""

    beginnings: list[tuple[int, ...]]
    labels: Float[np.ndarray, " answer"]

    @classmethod
    def of(
        cls, model: HookedTransformer, reader: Scorer, prompts: Sequence[Prompt], answers: Sequence[Generation]
    ) -> "_Answers":
        stop = sorted(stop_tokens(model))[:1]
        ends = [(*row.tokens, *stop) if row.stopped else row.tokens for row in answers]
        return cls(ends, _labels(reader, prompts, answers))

    @cached_property
    def shown(self) -> int:
        return int((self.labels == 1).sum())

    @cached_property
    def other(self) -> int:
        return int((self.labels == 0).sum())


def _labels(reader: Scorer, prompts: Sequence[Prompt], answers: Sequence[Generation]) -> Float[np.ndarray, " answer"]:
    """Labels of answers: 1 where the reader's score is ½ or more, 0 below, NaN where it is unknown."""
    found = [Completion(asked(p), row.text, row.tokens) for p, row in zip(prompts, answers, strict=True)]
    scores = reader(found)
    return np.where(np.isfinite(scores), (scores >= 0.5).astype(float), NAN)


def asked(prompt: Prompt) -> str:
    """Text of the last user turn."""
    return next((turn["content"] for turn in reversed(as_messages(prompt)) if turn["role"] == "user"), "")


def _spec_named(name: str) -> BehaviourSpec:
    if name not in BEHAVIOURS:
        raise DataError(f"no behaviour {name!r}: choose {', '.join(BEHAVIOURS)}")
    return BEHAVIOURS[name]


def _halves(
    sides: tuple[Sequence[Prompt], Sequence[Prompt]], n: int, seed: int
) -> tuple[list[tuple[Prompt, int]], list[tuple[Prompt, int]]]:
    """Two halves of the prompts, each with the number of its side; no prompt may stand in both."""
    seen = Counter(str(prompt) for side in sides for prompt in side)
    if twice := [text for text, count in seen.items() if count > 1]:
        raise DataError(f"{len(twice)} prompts are given twice: one that is held out must not be fitted on")
    rng = np.random.default_rng(seed)
    n = n if all(sides) else 2 * n
    mixed = [[(side[i], number) for i in rng.permutation(len(side))[:n]] for number, side in enumerate(sides)]
    fit, held = ([p for side in mixed for p in side[start::2]] for start in (0, 1))
    if not fit or not held:
        raise DataError(f"a behaviour is derived from prompts, got {len(sides[0])} and {len(sides[1])}")
    return fit, held


def _too_few(name: str, purpose: str, said: _Answers) -> str:
    return (
        f"{said.shown} of {said.shown + said.other} answers to {purpose} show {name}; at least {FEWEST} that do and"
        f" {FEWEST} that do not are needed"
    )


def _not_held(name: str, openings: Openings, auroc: Interval, wanted: float) -> str:
    return (
        f"the log-odds of the openings {openings.listed(3)} do not tell answers that show {name} from other answers on"
        f" held-out prompts: AUROC {auroc.value:.2f} [{auroc.low:.2f}, {auroc.high:.2f}], needed {wanted:.2f} and a"
        " lower limit above 0.50"
    )


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _float(value: float | None) -> float:
    return NAN if value is None else float(value)
