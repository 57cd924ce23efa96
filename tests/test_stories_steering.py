"""Steering a small Llama that was trained on stories, judged on openings that no choice was made on.

A hash splits the openings. The selection half chooses among declared candidates by a declared rule (`choose`); the test
half only reports what was chosen. It was scored once before, for an earlier choice (all hooks together) whose random
directions were too weak a match (see `turned`); no score of it decided anything.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from scipy.stats import special_ortho_group
from transformer_lens import HookedTransformer

from safety_lens.data import Concept, load_concept
from safety_lens.generation import generate
from safety_lens.interventions.rows import by_row
from safety_lens.interventions.scorers import Completion, LexiconScorer
from safety_lens.interventions.side_effects import benign_rows
from safety_lens.interventions.steering import steer
from safety_lens.interventions.strength import mean_kl, residual_norm
from safety_lens.interventions.sweeping.engine import sweep
from safety_lens.interventions.sweeping.plan import Controls, Decoding
from safety_lens.log import Measurement
from safety_lens.models import hooks_at, load_model
from safety_lens.paired import DISTRUST
from safety_lens.positions import parse_positions
from safety_lens.probes.directions import Direction
from safety_lens.probes.estimators import estimator
from safety_lens.probes.evaluate import fit_direction
from safety_lens.probes.reading import read_concepts
from safety_lens.types import FwdHook

HAPPY = (
    "happy", "happily", "happier", "happiness", "glad", "gladly", "smile", "smiles", "smiled", "smiling", "laugh",
    "laughs", "laughed", "laughing", "laughter", "giggle", "giggled", "fun", "love", "loves", "loved", "joy",
    "joyful", "excited", "proud", "proudly", "hug", "hugs", "hugged", "hugging", "yummy", "delicious", "cheer",
    "cheered", "enjoy", "enjoyed", "wonderful", "amazing",
)  # fmt: skip
SAD = (
    "sad", "sadly", "sadness", "unhappy", "cry", "cries", "cried", "crying", "tear", "tears", "angry", "angrily",
    "mad", "scared", "scary", "afraid", "frightened", "upset", "hurt", "pain", "lost", "sorry", "alone", "lonely",
    "worried", "worry", "sick", "broke", "broken", "bad", "mean", "frown", "frowned",
)  # fmt: skip
"""The plain words in which stories for small children say that someone feels well or badly, with their forms: listed
before any steered text was read, and not changed since."""

WORDS = 14
HELD_TEMPLATES = 3
POSITIONS = ("mean:all", "mean:3", "last")
METHODS = ("dim", "whitened", "logistic")
EVERYWHERE = "all hooks together"
SCOPES = ("all", "answer")
COEFFS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
"""In RMS lengths of the activations at each hook."""
MAX_KL = 0.5
FINALISTS = 6
RANDOM = 20
SAID: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.8}


class Mood:
    """Share of happy words minus share of sad words, in percent."""

    name = "mood"

    def __init__(self) -> None:
        self.happy, self.sad = (LexiconScorer(words, rate=True) for words in (HAPPY, SAD))

    def __call__(self, completions: Sequence[Completion]) -> Float[np.ndarray, " n"]:
        mood: Float[np.ndarray, " n"] = 100 * (self.happy(completions) - self.sad(completions))
        return mood


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def openings(shared: Path, half: str) -> list[str]:
    """The first words of the stories that a hash puts into the "selection" or the "test" half."""
    rows = [json.loads(line) for line in (shared / "data/stories_text.jsonl").read_text(encoding="utf-8").splitlines()]
    found = dict.fromkeys(" ".join(row["text"].split()[:WORDS]) for row in rows)
    return [text for text in found if digest(text)[0] % 2 == (half == "test")]


def stories(shared: Path) -> Concept:
    """The pairs, in which whole templates are kept from the fit."""
    concept = load_concept(shared / "data/stories_happy_sad_pairs.jsonl", raw=True)
    held = sorted({str(pair.template) for pair in concept.pairs}, key=digest)[:HELD_TEMPLATES]
    fitted = tuple(pair for pair in concept.train if pair.template not in held)
    return replace(concept, train=fitted, test=tuple(pair for pair in concept.pairs if pair.template in held))


@dataclass(frozen=True)
class Candidate:
    """Where and how a direction is read, and where it is added."""

    positions: str
    method: str
    hook: str
    scope: str


def directions(model: HookedTransformer, concept: Concept, positions: str) -> dict[tuple[str, str], Direction]:
    """(method, hook) → direction."""
    hooks = hooks_at(model)
    sides = read_concepts(model, [concept], hooks, positions=parse_positions(positions))[0].sides["train"]
    found = {(m, h): fit_direction(estimator(m), sides[h]) for m in METHODS for h in hooks}
    return {(m, h): Direction(concept.name, h, v, m) for (m, h), v in found.items() if v is not None}


def candidates(model: HookedTransformer, concept: Concept) -> Iterator[tuple[Candidate, list[Direction]]]:
    """Everything that may be chosen, with the directions that it adds."""
    hooks = hooks_at(model)
    for positions in POSITIONS:
        found = directions(model, concept, positions)
        for method in METHODS:
            for hook in (*hooks, EVERYWHERE):
                parts = [found[method, h] for h in (hooks if hook == EVERYWHERE else [hook])]
                # what the last block adds to a prompt's other tokens is read by nothing
                for scope in SCOPES[:1] if hook == hooks[-1] else SCOPES:
                    yield Candidate(positions, method, hook, scope), parts


@dataclass(frozen=True)
class Added:
    """A candidate with its directions and the coefficient that it is given."""

    candidate: Candidate
    parts: Sequence[Direction]
    coeff: float


class Openings:
    """The openings of one half, steered and scored."""

    def __init__(self, model: HookedTransformer, asked: list[str]) -> None:
        self.model, self.asked = model, asked
        self.unit = {hook: residual_norm(model, asked, hook) for hook in hooks_at(model)}
        self.written = benign_rows(model, asked[:12], raw=True)

    def edit(self, parts: Sequence[Direction], coeff: float, scope: str) -> list[FwdHook]:
        return [hook for p in parts for hook in steer(p, coeff, scope=scope, units=self.unit[p.hook])]

    def strongest(self, parts: Sequence[Direction], scope: str) -> float:
        """The largest coefficient that costs no more than `MAX_KL`, with either sign."""
        for coeff in reversed(COEFFS):
            if max(mean_kl(self.model, self.written, [self.edit(parts, s, scope) for s in (coeff, -coeff)])) <= MAX_KL:
                return coeff
        return 0.0

    def slopes(self, arms: Sequence[Added]) -> Float[np.ndarray, "arm prompt"]:
        """Mood per unit of coefficient, from as much added as taken away; NaN where an answer has no word."""
        edits = [self.edit(a.parts, sign * a.coeff, a.candidate.scope) for a in arms for sign in (1, -1)]
        asked = list(range(len(self.asked)))
        said = generate(
            self.model,
            self.asked * len(edits),
            hooks=by_row(self.model, [edit for edit in edits for _ in asked]),
            streams=[(0, n) for _ in edits for n in asked],
            raw=True,
            **SAID,
        )
        mood = Mood()([Completion(str(g.prompt), g.text, g.tokens) for g in said]).reshape(len(arms), 2, len(asked))
        up, down = mood[:, 0], mood[:, 1]
        slope: Float[np.ndarray, "arm prompt"] = (up - down) / (2 * np.array([[a.coeff] for a in arms]))
        return slope


def by_place(
    found: Iterable[tuple[Candidate, list[Direction]]],
) -> list[list[tuple[Candidate, list[Direction]]]]:
    """Candidates that act at one place together: they share the forwards of a call."""
    places: dict[tuple[str, str], list[tuple[Candidate, list[Direction]]]] = {}
    for candidate, parts in found:
        places.setdefault((candidate.hook, candidate.scope), []).append((candidate, parts))
    return list(places.values())


def turned(parts: Sequence[Direction], number: int) -> list[Direction]:
    """The directions after one random rotation: as long as they are, and at the same angles to each other.

    Directions drawn alone for every hook would be no match for a set that is added at all hooks: pushes that do not
    agree cancel, and cost less than half of the KL.
    """
    stream = np.random.default_rng(number)
    rotation = torch.from_numpy(special_ortho_group.rvs(len(parts[0].vector), random_state=stream))
    return [replace(p, vector=(rotation @ p.vector.double()).to(p.vector)) for p in parts]


def choose(selection: Openings, concept: Concept) -> list[tuple[float, Added]]:
    """The finalists with their |slope| in spreads of random directions, steepest first: the first is the choice.

    Every candidate gets the largest coefficient of the grid that stays within the limit on KL. The finalists are the
    candidates with the largest |slope| in standard errors over openings; only they are held against random directions,
    at the same hooks, coefficient, scope and seed. Spread: the root mean square of their slopes.
    """
    rated = []
    for places in by_place(candidates(selection.model, concept)):
        arms = [Added(c, parts, selection.strongest(parts, c.scope)) for c, parts in places]
        arms = [arm for arm in arms if arm.coeff]
        if arms:
            found = selection.slopes(arms)
            rated += list(zip(np.abs(np.nanmean(found, 1)) / np.nanstd(found, 1), arms, strict=True))
    finalists = [arm for _, arm in sorted(rated, key=lambda r: -r[0])[:FINALISTS]]
    out = []
    for arm in finalists:
        drawn = [replace(arm, parts=turned(arm.parts, number)) for number in range(RANDOM)]
        own, *random = np.nanmean(selection.slopes([arm, *drawn]), 1)
        out.append((float(abs(own) / np.sqrt(np.square(random).mean())), arm))
    return sorted(out, key=lambda r: -r[0])


CHOSEN = Candidate("last", "logistic", "blocks.4.hook_resid_post", "all")
COEFF = 0.4
SEEDS = (0, 1, 2, 3)
CONTROLS = 50


@pytest.mark.slow
def test_the_selection_openings_choose_what_is_reported(shared: Path) -> None:
    model = load_model(shared / "models/stories260K-hf")
    selection = Openings(model, openings(shared, "selection"))
    assert not set(selection.asked) & set(openings(shared, "test"))
    (ratio, best), *others = choose(selection, stories(shared))
    assert (best.candidate, best.coeff) == (CHOSEN, COEFF)
    assert ratio > 3
    assert len(others) == FINALISTS - 1


@pytest.mark.slow
def test_happy_steering_moves_unseen_stories_both_ways_and_no_random_direction_is_as_steep(shared: Path) -> None:
    model, concept = load_model(shared / "models/stories260K-hf"), stories(shared)
    asked = openings(shared, "test")
    result = sweep(
        model,
        directions(model, concept, CHOSEN.positions)[CHOSEN.method, CHOSEN.hook],
        asked,
        scorers=[Mood()],
        coeffs=(-COEFF, COEFF),
        units="rms",
        scope=CHOSEN.scope,
        seeds=SEEDS,
        decoding=Decoding(**SAID, raw=True),
        controls=Controls(CONTROLS, seeds=None),
        trained_on=[side for pair in concept.train for side in (pair.positive, pair.negative)],
        benign=asked,
    )

    def one(metric: str, coeff: float | None = None) -> Measurement:
        (row,) = [
            r for r in result.measurements if (r.metric, r.coeff) == (metric, coeff) and r.split in ("test", "benign")
        ]
        return row

    assert {seeds for arm in result.plan.arms for seeds in [result.plan.seeds_of(arm)]} == {SEEDS}
    for coeff in (-COEFF, COEFF):
        effect, random = one("mood/effect", coeff), one("mood/random", coeff)
        assert effect.n == len(asked)
        assert min(np.sign(coeff) * effect.low, np.sign(coeff) * effect.high) > 0  # clear of 0, on the right side
        assert one("mood/p_all", coeff).value < 0.05
        assert random.n == CONTROLS
        assert random.low < 0 < random.high
        assert one("mood/random_mean", coeff).low < 0 < one("mood/random_mean", coeff).high
        assert one("mood/effect_fluent", coeff).value == pytest.approx(effect.value, rel=0.2)
        assert 0 < one("benign_kl", coeff).value <= MAX_KL
    assert one("mood/effect", COEFF).value > one("mood/random", COEFF).high
    # down alone, it goes no further than many random directions: what none of them has is the slope over both signs
    assert one("mood/random", -COEFF).low < one("mood/effect", -COEFF).value
    slope, random = one("mood/slope"), one("mood/slope_random")
    assert random.low < 0 < random.high < slope.low
    assert one("mood/p_slope").value == pytest.approx(1 / (1 + CONTROLS))  # none is as steep
    assert one("mood/anti_steerable").high < DISTRUST
