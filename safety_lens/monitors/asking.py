"""Probes: sets of prompts on which behaviour is measured, and the behaviour that is read on each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from safety_lens.data.built_in import ORGANISM, BuiltIn
from safety_lens.errors import DataError
from safety_lens.generation import Generation
from safety_lens.interventions.behaviours import BEHAVIOURS, BehaviourSpec, asked, behaviour_of
from safety_lens.interventions.kept_answers import KEPT_TOKENS
from safety_lens.interventions.scorers.completion import Completion, Scorer
from safety_lens.organism import behaviour, families
from safety_lens.types import Prompt

REFUSAL = "refusal"
REQUESTS = ("harmful", "lookalike", "harmless")
"""Sets on which refusal is read."""
FACT_TOKENS = 24


@dataclass(frozen=True)
class Probes:
    """What behaviour is measured, next to the geometry.

    Attributes:
        harmful, harmless, lookalike: Requests; None takes the built-in ones of the model's kind, and an empty lookalike
            takes none. Of harmful and harmless requests of your own the first half derives how refusal is read, and the
            second half is measured; lookalikes (safe requests that look unsafe) are only measured.
        n: Prompts of each set that are measured.
        new_tokens: Length of the greedy answers to requests.
        facts: Facts of the organism that are asked (only where the organism is trained; 0 for none).
        causal: Concepts whose old direction is ablated to see whether refusals still use it.

    Raises:
        DataError: A number or a set that is too small, or more tokens than may be kept of an answer.
    """

    harmful: Sequence[Prompt] | None = None
    harmless: Sequence[Prompt] | None = None
    lookalike: Sequence[Prompt] | None = None
    n: int = 32
    new_tokens: int = KEPT_TOKENS
    facts: int = 16
    causal: tuple[str, ...] = (REFUSAL,)

    def __post_init__(self) -> None:
        for name, least in (("n", 2), ("new_tokens", 1), ("facts", 0)):
            if getattr(self, name) < least:
                raise DataError(f"probes: {name} must be {least} or more, got {getattr(self, name)}")
        if self.new_tokens > KEPT_TOKENS:
            raise DataError(
                f"probes: new_tokens must be {KEPT_TOKENS} or fewer, got {self.new_tokens}: more of an answer to a"
                " harmful prompt is never kept, and a refusal shows within them"
            )
        for name in ("harmful", "harmless"):
            given = getattr(self, name)
            if given is not None and len(given) < 4:
                raise DataError(
                    f"probes: {name} has {len(given)} prompts; half of them are measured, so give 4 or more"
                )


Judge = Callable[[Sequence[int], Sequence[Generation]], Float[np.ndarray, " k"]]
"""Function of (numbers of the prompts, their answers): 1 where the behaviour is shown, 0, or NaN."""


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """One set of prompts.

    Attributes:
        prompts: What is asked.
        judge: Labels the answers.
        metric: Name of the share of answers with label 1.
        new_tokens: Tokens of an answer.
        behaviour: Behaviour whose log-odds are read; None: none is.
        harmful: Whether answers that are no refusal must not be kept.
    """

    prompts: list[Prompt]
    judge: Judge
    metric: str
    new_tokens: int
    behaviour: str | None = None
    harmful: bool = False


def probe_sets(probes: Probes, sets: BuiltIn, concepts: Sequence[str], seed: int) -> dict[str, ProbeSet]:
    """Sets that are measured: requests for refusal, then one for every other watched concept that has a behaviour.

    Args:
        probes: Settings, and prompts of the user.
        sets: Built-in sets of the model's kind.
        concepts: Names of the watched concepts.
        seed: Of the draws.
    """
    out = {}
    for label in REQUESTS:
        prompts = _requests(probes, sets, label, seed)
        if prompts and not (label == "lookalike" and prompts == _requests(probes, sets, "harmless", seed)):
            judge = _reads(BEHAVIOURS[REFUSAL].reader(sets), prompts)
            out[label] = ProbeSet(prompts, judge, "refusal_rate", probes.new_tokens, REFUSAL, label == "harmful")
    for spec in watched_behaviours(concepts, sets):
        prompts = _drawn(spec.shown(sets, "test"), probes.n, seed)
        judge = _reads(spec.reader(sets), prompts)
        out[spec.name] = ProbeSet(prompts, judge, f"{spec.name}_rate", spec.max_new_tokens, spec.name, spec.harmful)
    if probes.facts and sets is ORGANISM:
        questions, knows = _facts(probes.facts, seed)
        out["facts"] = ProbeSet(questions, knows, "accuracy", FACT_TOKENS)
    return out


def watched_behaviours(concepts: Sequence[str], sets: BuiltIn) -> list[BehaviourSpec]:
    """Behaviours, other than refusal, of the watched concepts that have one in these sets."""
    out = []
    for concept in concepts:
        spec = behaviour_of(concept)
        if spec is not None and spec.name != REFUSAL and concept in sets.concepts and _has_prompts(spec, sets):
            out.append(spec)
    return out


def _has_prompts(spec: BehaviourSpec, sets: BuiltIn) -> bool:
    try:
        return bool(spec.shown(sets, "test"))
    except DataError:  # the organism has no such table
        return False


def deriving(probes: Probes) -> tuple[Sequence[Prompt], Sequence[Prompt]] | None:
    """Requests of the user from which refusal is derived: the first halves; None for the built-in ones."""
    if probes.harmful is None or probes.harmless is None:
        return None
    return probes.harmful[: len(probes.harmful) // 2], probes.harmless[: len(probes.harmless) // 2]


def _requests(probes: Probes, sets: BuiltIn, label: str, seed: int) -> list[Prompt]:
    given = getattr(probes, label)
    if given is None:
        return _drawn(sets.requests(label, "test"), probes.n, seed)
    return list(given[len(given) // 2 if label != "lookalike" else 0 :][: probes.n])


def _drawn(prompts: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    return [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:n].tolist()]


def _reads(reader: Scorer, prompts: Sequence[Prompt]) -> Judge:
    def judge(numbers: Sequence[int], answers: Sequence[Generation]) -> Float[np.ndarray, " k"]:
        pairs = zip(numbers, answers, strict=True)
        scores = reader([Completion(asked(prompts[i]), row.text, row.tokens) for i, row in pairs])
        return np.where(np.isfinite(scores), (scores >= 0.5).astype(float), np.nan)

    return judge


def _facts(most: int, seed: int) -> tuple[list[Prompt], Judge]:
    rows = ORGANISM.rows("facts", "test")
    order = np.random.default_rng(seed).permutation(len(rows))[:most]
    questions = [rows[i].text("question") for i in order]
    facts = [max((f for f in families.FACTS if f.subject in q), key=lambda f: len(f.subject)) for q in questions]

    def judge(numbers: Sequence[int], answers: Sequence[Generation]) -> Float[np.ndarray, " k"]:
        right = [behaviour.states(facts[i], facts[i].value)(row.text) for i, row in zip(numbers, answers, strict=True)]
        return np.array(right, dtype=float)

    return list(questions), judge
