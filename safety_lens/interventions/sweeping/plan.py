"""Plan of a sweep, known before it starts: arms (sites × coefficients and their controls) × prompts × seeds."""

from collections import Counter
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

KINDS = ("baseline", "system", "steer", "random", "shuffled")
TITLES = {
    "baseline": "unsteered",
    "system": "with the system prompt",
    "steer": "steered",
    "random": "of random directions",
    "shuffled": "of refits on shuffled labels",
}
"""Kinds of arms for a reader."""
SPLITS = ("selection", "test")
LEAST_CONTROLS, LEAST_SELECTION = 20, 12
"""Random directions and selection prompts below which a remark is made."""
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
    """Directions that should do nothing, on the same prompts.

    random: how many random directions per site, each as long as the direction and orthogonal to it. coeffs: the
    coefficients they run at, None for all of the grid. seeds: how many of the sampling seeds they run with, None for
    all. draw: which random directions.
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
    a unit is the part's own length. shuffled: the parts refitted on shuffled labels, once per control.
    """

    subject: str
    name: str
    parts: tuple[Direction, ...]
    units: tuple[float, ...] | None = None
    shuffled: tuple[tuple[Direction, ...], ...] = ()


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
    """Everything that decides what a sweep writes. `chunk_rows`: rows that are generated, scored and stored at once."""

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
    chunk_rows: int

    @property
    def arms(self) -> list[Arm]:
        """Baseline first; the arms of one site are neighbours, so that few hooks are active at a time."""
        out = [Arm("baseline")] + ([Arm("system")] if self.system else [])
        at = [c for c in self.coeffs if c != 0 and (self.controls.coeffs is None or c in self.controls.coeffs)]
        for number, site in enumerate(self.sites):
            out += [Arm("steer", number, c) for c in self.coeffs if c != 0]
            out += [Arm("random", number, c, k) for k in range(self.controls.random) for c in at]
            out += [Arm("shuffled", number, c, k) for k in range(len(site.shuffled)) for c in at]
        return out

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        return self.seeds[: self.controls.seeds] if arm.kind in ("random", "shuffled") else self.seeds

    @property
    def chunks(self) -> list[list[Cell]]:
        """The work in order, in the portions that are done or not done as a whole."""
        cells = [Cell(a, p, s) for a in self.arms for s in self.seeds_of(a) for p in range(len(self.prompts))]
        return [cells[i : i + self.chunk_rows] for i in range(0, len(cells), self.chunk_rows)]

    def describe(self) -> str:
        """Number of answers by kind of arm, and their length, in one line."""
        counts = Counter(dict.fromkeys(KINDS, 0))
        for arm in self.arms:
            counts[arm.kind] += len(self.prompts) * len(self.seeds_of(arm))
        parts = [f"{n:,} {TITLES[kind]}" for kind, n in counts.items() if n]
        what = f"{counts.total():,} answers of up to {self.decoding.max_new_tokens} tokens: {', '.join(parts)}"
        cells = len(self.sites) * sum(c != 0 for c in self.coeffs)
        sites = f"{len(self.prompts)} prompts, {len(self.sites)} sites, {cells} cells"
        cost = f"; then the KL of {cells} cells on {len(self.benign)} benign prompts" if self.benign else ""
        return f"{what} ({sites}){cost}"

    def remarks(self) -> list[str]:
        """Remarks on what so few controls and selection prompts can show."""
        out = []
        n, cells = self.controls.random, len(self.sites) * sum(c != 0 for c in self.coeffs)
        if n < LEAST_CONTROLS:
            least = f"p of a cell against them is {1 / (n + 1):.2g} at least, and " if n else ""
            out.append(f"{n} random directions: {least}their range says little; use {LEAST_CONTROLS} or more")
        chosen = sum(p.split == "selection" for p in self.prompts)
        if 0 < chosen < LEAST_SELECTION:
            out.append(
                f"{chosen} selection prompts choose among {cells} cells: with fewer than {LEAST_SELECTION} the choice"
                " is mostly noise"
            )
        return out

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
            "chunk_rows": self.chunk_rows,
        }


def as_json(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
