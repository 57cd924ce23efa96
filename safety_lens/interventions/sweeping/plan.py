"""Plan of a sweep, known before it starts: arms (sites × coefficients and their controls) × prompts × seeds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from safety_lens.interventions.scopes import Scope
from safety_lens.probes.directions import Direction
from safety_lens.probes.extract import DirectionSet
from safety_lens.sampling import Sampling
from safety_lens.types import Prompt

COEFFS: dict[str, tuple[float, ...]] = {
    "raw": (-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0),
    "rms": (-0.8, -0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.8),
}
"""Coefficients where none are given: times the direction's own length, or times the RMS length of activations."""

CONTROLS = ("random", "shuffled")
"""Kinds of arms that should do nothing."""
SPLITS = ("selection", "test")
CONTROL_PROMPTS = 8
"""Test prompts that controls run on in a search from coarse to fine, evenly spaced."""
Directions = Direction | DirectionSet | Sequence[Direction | DirectionSet]


@dataclass(frozen=True)
class SweepPrompt:
    """A prompt and its role.

    split: "selection" prompts choose hook and coefficient, "test" prompts report. harmful: of its answers
    only what `kept_answers` allows is kept. label: a subset that is also reported by itself ("challenging"), None for
    none.
    """

    prompt: Prompt
    split: Literal["selection", "test"] = "test"
    harmful: bool = False
    label: str | None = None


@dataclass(frozen=True)
class Controls:
    """Directions that should do nothing, on the same test prompts.

    random: how many random directions per site, each as long as the direction and orthogonal to it. coeffs: the
    coefficients they run at, None for all of the grid (in a coarse search for the chosen one alone). seeds:
    how many of the sampling seeds they run with, None for all. draw: which random directions.
    """

    random: int = 20
    coeffs: tuple[float, ...] | None = None
    seeds: int | None = 1
    draw: int = 0


@dataclass(frozen=True)
class Decoding:
    """How answers are written; see `generate`."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    raw: bool = False

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_p, self.top_k, self.repetition_penalty)


@dataclass(frozen=True, eq=False)
class Site:
    """Where one direction acts: at its own hook, or the directions of a set at all of theirs together.

    parts: what the coefficient multiplies, each at its own hook. unit: length of one unit for each part, or None where
    a unit is the part's own length. shuffled: the parts refitted on shuffled labels, once per control. favoured:
    whether extraction chose this hook: one of those that a search begins with.
    """

    subject: str
    name: str
    parts: tuple[Direction, ...]
    units: tuple[float, ...] | None = None
    shuffled: tuple[tuple[Direction, ...], ...] = ()
    favoured: bool = False


@dataclass(frozen=True)
class Arm:
    """One condition: every prompt and seed is run under it. number: which of the control directions."""

    kind: str
    site: int = -1
    coeff: float = 0.0
    number: int = 0

    @property
    def key(self) -> str:
        return self.kind if self.site < 0 else f"{self.kind}/{self.site}/{self.coeff:g}/{self.number}"


@dataclass(frozen=True)
class Cell:
    """One row of work: an arm, the number of a prompt, a sampling seed."""

    arm: Arm
    prompt: int
    seed: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that decides what a sweep writes.

    search: "grid" runs every cell on every prompt; "coarse" searches with the selection prompts from coarse to fine and
    runs the test prompts at the chosen site alone.
    """

    sites: tuple[Site, ...]
    coeffs: tuple[float, ...]
    prompts: tuple[SweepPrompt, ...]
    seeds: tuple[int, ...]
    decoding: Decoding
    controls: Controls
    scope: Scope
    units: str
    edit: str
    system: str | None
    scorers: tuple[str, ...]
    benign: tuple[Prompt, ...]
    goal: str
    max_kl: float | None
    n_layers: int
    search: str

    @property
    def unsteered(self) -> list[Arm]:
        """The arms without an edit."""
        return [Arm("baseline")] + ([Arm("system")] if self.system else [])

    @property
    def arms(self) -> list[Arm]:
        """Every arm of the grid, baseline first; those of a site are neighbours, so that few hooks act at a time."""
        out = self.unsteered
        at = [c for c in self.coeffs if c != 0 and (self.controls.coeffs is None or c in self.controls.coeffs)]
        for number in range(len(self.sites)):
            out += [Arm("steer", number, c) for c in self.coeffs if c != 0]
            out += self.controls_at(number, at)
        return out

    def controls_at(self, site: int, coeffs: Sequence[float]) -> list[Arm]:
        """The control arms of one site at these coefficients."""
        many = {"random": self.controls.random, "shuffled": len(self.sites[site].shuffled)}
        return [Arm(kind, site, c, k) for kind, n in many.items() for k in range(n) for c in coeffs]

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        return self.seeds[: self.controls.seeds] if arm.kind in CONTROLS else self.seeds

    def prompts_of(self, arm: Arm, splits: Sequence[str] = SPLITS) -> list[int]:
        """Numbers of the prompts that an arm runs on, among those of these roles. Controls take test prompts alone."""
        if arm.kind not in CONTROLS:
            return [i for i, p in enumerate(self.prompts) if p.split in splits]
        test = [i for i, p in enumerate(self.prompts) if p.split == "test"]
        few = len(test) if self.search == "grid" else min(len(test), CONTROL_PROMPTS)
        return [test[k * len(test) // few] for k in range(few)]

    def cells(self, arms: Sequence[Arm], splits: Sequence[str] = SPLITS) -> list[Cell]:
        """The rows of work of some arms, in the order in which they are run."""
        return [Cell(a, p, s) for a in arms for s in self.seeds_of(a) for p in self.prompts_of(a, splits)]

    def to_json(self) -> dict[str, Any]:
        """The plan as it is stored and compared; vectors are stored beside it."""
        return {
            "sites": [
                {"subject": s.subject, "name": s.name, "hooks": [d.hook for d in s.parts], "shuffled": len(s.shuffled)}
                for s in self.sites
            ],
            "coeffs": list(self.coeffs),
            "prompts": [{**asdict(p), "prompt": as_json(p.prompt)} for p in self.prompts],
            "seeds": list(self.seeds),
            "decoding": asdict(self.decoding),
            "controls": {
                **asdict(self.controls),
                "coeffs": None if self.controls.coeffs is None else list(self.controls.coeffs),
            },
            "scope": self.scope.name,
            "units": self.units,
            "edit": self.edit,
            "system": self.system,
            "scorers": list(self.scorers),
            "benign": [as_json(prompt) for prompt in self.benign],
            "goal": self.goal,
            "max_kl": self.max_kl,
            "search": self.search,
        }


def as_json(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
