"""A sweep in the making: identity first, then step by step portions of answers and what the edits cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.artifacts import seal
from safety_lens.data import Encoded
from safety_lens.data.pairs import last_user_text
from safety_lens.errors import ModelError
from safety_lens.forced import Continuation
from safety_lens.generation import Generation, generate
from safety_lens.interventions.fluency import degenerate
from safety_lens.interventions.kept_answers import kept_answers
from safety_lens.interventions.rows import by_row
from safety_lens.interventions.scopes import Scope
from safety_lens.interventions.scorers.completion import Completion, Scorer, first_reader
from safety_lens.interventions.side_effects import benign_kl, benign_rows
from safety_lens.interventions.steering import check_widths
from safety_lens.interventions.sweeping import search
from safety_lens.interventions.sweeping.choice import Grid, floor_note
from safety_lens.interventions.sweeping.controls import random_set
from safety_lens.interventions.sweeping.plan import Arm, Cell, Plan
from safety_lens.interventions.sweeping.store import KIND, OURS, TABLE, Opened, Record
from safety_lens.interventions.sweeping.table import summarise, table_csv
from safety_lens.log import Measurement
from safety_lens.models import named_hooks
from safety_lens.probes.directions import Direction
from safety_lens.types import FwdHook, Prompt

IDENTITY_PROMPTS, IDENTITY_ROWS = 8, 32
"""Prompts of the identity check at each site; fewer, and 2 at least, where all sites together came to more rows."""
PORTION_ROWS = (64, 32, 16, 8)
PORTION_WORK = 6e11
"""Additions and multiplications that a portion may come to on a CPU: 10 to 20 seconds of two cores."""
SLOW = 20.0
"""Seconds after which a portion was too large: those that follow are half as long."""
TIMED_BENIGN = 4
"""Benign prompts that the time of a KL is predicted from."""
Edit = Callable[[Direction, float, Scope, float | None], Sequence[FwdHook]]
"""A direction, a coefficient, a token scope and the length of a unit (None: the direction's own) → forward hooks."""


@dataclass(frozen=True, eq=False)
class SweepResult:
    """What a sweep found. measurements: every number; records: one per answer, as stored; folder: None in memory."""

    plan: Plan
    measurements: tuple[Measurement, ...]
    records: tuple[Record, ...]
    folder: Path | None

    @property
    def table(self) -> str:
        """One CSV line per scorer, site and coefficient, of the test prompts."""
        return table_csv(self.measurements, self.plan.scorers)

    @property
    def chosen(self) -> Measurement | None:
        """The cell that the selection prompts chose for the first direction; None without selection prompts."""
        return next((row for row in self.measurements if row.metric == "chosen"), None)


@dataclass(frozen=True)
class Estimate:
    """Predicted size and duration of a sweep.

    Attributes:
        answers: Answers that are left, at most.
        tokens: Length of an answer, at most.
        seconds: Predicted duration, benign KL included.
        timed: Answers that were generated to find out.
    """

    answers: int
    tokens: int
    seconds: float
    timed: int


class Running:
    """A sweep in the making."""

    def __init__(
        self, model: HookedTransformer, plan: Plan, scorers: Sequence[Scorer], edit: Edit, opened: Opened
    ) -> None:
        self.model, self.plan, self.scorers, self.edit, self.opened = model, plan, scorers, edit, opened
        self.encoded = self._encode([p.prompt for p in plan.prompts])
        system = plan.system
        self.asked = [] if system is None else self._encode([with_system(p.prompt, system) for p in plan.prompts])

    def _encode(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        return list(encode_for(self.model, list(prompts), raw=self.plan.decoding.raw))

    def hooks(self, arm: Arm) -> list[FwdHook]:
        """The intervention of one arm."""
        if arm.site < 0:
            return []
        site = self.plan.sites[arm.site]
        parts = site.parts
        if arm.kind == "random":
            parts = random_set(parts, arm.number, self.plan.controls.draw)
        elif arm.kind == "shuffled":
            parts = site.shuffled[arm.number]
        units: Sequence[float | None] = site.units or [None] * len(parts)
        pairs = zip(parts, units, strict=True)
        return [hook for part, unit in pairs for hook in self.edit(part, arm.coeff, self.plan.scope, unit)]

    def check_widths(self) -> None:
        """Refuse directions of another model before anything is generated."""
        for number in range(len(self.plan.sites)):
            check_widths(self.model, named_hooks(self.model, self.hooks(Arm("steer", number, self.plan.coeffs[-1]))))

    def _generate(self, prompts: Sequence[Encoded], hooks: Sequence[FwdHook], streams: Any) -> list[Generation]:
        return generate(
            self.model,
            prompts,
            hooks=hooks,
            streams=streams,
            read_first=first_reader(self.scorers),
            **asdict(self.plan.decoding),
        )

    @cached_property
    def portion_rows(self) -> int:
        """Answers that are generated, scored and stored at once: what a killed sweep loses at most.

        Fixed by model, prompts and device, not by the clock, so that every run of a sweep has the same batches.
        """
        if torch.device(self.model.cfg.device or "cpu").type != "cpu":
            return PORTION_ROWS[0]
        tokens = max(len(e.ids) for e in self.encoded) + self.plan.decoding.max_new_tokens
        work = 2 * tokens * sum(p.numel() for p in self.model.parameters())
        return next((rows for rows in PORTION_ROWS if rows * work <= PORTION_WORK), PORTION_ROWS[-1])

    def estimate(self, rows: int) -> "Estimate":
        """Time answers like those that are left, and the KL of a cell, and predict how long the sweep takes.

        The answers are thrown away: nothing of a sweep that is not begun is stored.
        """
        empty = Grid(self.plan, (), ())
        first, second = list(search.steps(self.plan).values())[:2]
        cells = [*first(empty), *second(empty)]
        sample = [cells[k * len(cells) // rows] for k in range(rows)] if len(cells) > rows else cells
        start = perf_counter()
        self._answers(sample)
        each = (perf_counter() - start) / len(sample)
        counts, stored = search.size(self.plan), len(self.opened.generations.records)
        others = len(self.plan.benign) + (0 if self._checked() else min(IDENTITY_ROWS, self.portion_rows))
        measured = sum(record["what"] == "benign_kl" for record in self.opened.checks.records)
        cost = self._seconds_per_kl() * (counts.cells - measured) if self.plan.benign else 0.0
        left = counts.answers - stored
        return Estimate(left, self.plan.decoding.max_new_tokens, each * (left + others) + cost, len(sample))

    def _seconds_per_kl(self) -> float:
        """Seconds that the benign KL of one cell takes, from few of the benign prompts."""
        few = benign_rows(self.model, self.plan.benign[:TIMED_BENIGN], raw=self.plan.decoding.raw)
        hooks = self.hooks(Arm("steer", 0, self.plan.coeffs[-1]))
        start = perf_counter()
        benign_kl(self.model, few, [hooks])
        return (perf_counter() - start) / 2 * len(self.plan.benign) / len(few)  # the unedited model ran as well

    def _checked(self) -> set[int]:
        return {record["site"] for record in self.opened.checks.records if record["what"] == "identity"}

    def check_identity(self, sites: Sequence[int]) -> None:
        """Coefficient 0 through the steered path must give the unsteered path's tokens, at each of these sites.

        All sites run in one call. A site that differs there is run again with nothing but its own pairs in the batch:
        in half precision rows of batches of different sizes may differ by rounding, which is no fault of the edit.

        Raises:
            ModelError: they differ.
        """
        checked = self._checked()
        sites = [n for n in sites if n not in checked]
        if not sites:
            return
        tokens = self._identity(sites)
        found = {n: self._identity([n])[n] if tokens[n] is None else tokens[n] for n in sites}
        for number, equal in found.items():
            if equal is None:
                raise ModelError(
                    f"the edit {self.plan.edit!r} at {self.plan.sites[number].name} with coefficient 0 changes the"
                    " text: it is not an edit whose effect a coefficient could measure; nothing is reported"
                )
        records = [{"what": "identity", "site": n, "tokens": equal} for n, equal in found.items()]
        self.opened.checks.add(f"identity/{sites[0]}", records)

    def _identity_prompts(self, n_sites: int) -> int:
        rows = min(IDENTITY_ROWS, self.portion_rows)
        return min(len(self.encoded), IDENTITY_PROMPTS, max(2, rows // (n_sites + 1)))

    def _identity(self, sites: Sequence[int]) -> dict[int, int | None]:
        """Tokens compared at each site; None where some differ."""
        prompts = self.encoded[: self._identity_prompts(len(sites))]
        kinds: list[list[FwdHook]] = [[], *(self.hooks(Arm("steer", number, 0.0)) for number in sites)]
        rows = [(i, hooks) for i in range(len(prompts)) for hooks in kinds]
        streams = [(self.plan.seeds[0], i) for i, _ in rows]
        found = self._generate([prompts[i] for i, _ in rows], by_row(self.model, [h for _, h in rows]), streams)
        said = [[g.tokens for g in found[k :: len(kinds)]] for k in range(len(kinds))]
        total = sum(map(len, said[0]))
        return {number: total if said[k] == said[0] else None for k, number in enumerate(sites, 1)}

    def write(self, rows: int, on_rows: Callable[[int, int], None], on_note: Callable[[str], None]) -> None:
        """Take every step: check its sites, generate, score and store its answers, measure what its cells cost."""
        journal, done, total = self.opened.generations, 0, search.size(self.plan).answers
        on_rows(len(journal.records), total)
        steps = search.steps(self.plan)
        self.check_identity(_sites(list(steps.values())[1](Grid(self.plan, (), ()))))
        for name, step in steps.items():
            grid = Grid(self.plan, journal.records[:done], self.opened.checks.records)
            cells = step(grid)
            arms = [arm for arm in dict.fromkeys(cell.arm for cell in cells) if arm.kind == "steer"]
            if cells and self.plan.search == "coarse" and done + len(cells) > len(journal.records):
                on_note(f"{name}: {len(cells):,} answers")
            self.check_identity(_sites(cells))
            rows = self._write(cells, done, rows, lambda n: on_rows(n, total))
            done += len(cells)
            if not arms and cells:
                self._note_floors(on_note)
            self.measure_cost(arms, on_note)
        if done < total:
            on_rows(done, done)

    def _write(self, cells: Sequence[Cell], before: int, rows: int, on_rows: Callable[[int], None]) -> int:
        """Generate, score and store those cells that are not there yet. before: answers of earlier steps.

        Returns:
            The size of the portions that follow.
        """
        journal = self.opened.generations
        at = max(0, len(journal.records) - before)
        while at < len(cells):
            start, part = perf_counter(), cells[at : at + rows]
            journal.add(str(before + at), self._answers(part))
            at += len(part)
            on_rows(before + at)
            if perf_counter() - start > SLOW:
                rows = max(1, rows // 2)
        return rows

    def _note_floors(self, on_note: Callable[[str], None]) -> None:
        grid = Grid(self.plan, self.opened.generations.records, ())
        for note in filter(None, (floor_note(grid, metric) for metric in self.plan.scorers)):
            on_note(note)

    def _answers(self, chunk: Sequence[Cell]) -> list[Record]:
        hooks = {arm: self.hooks(arm) for arm in dict.fromkeys(cell.arm for cell in chunk)}
        prompts = [(self.asked if c.arm.kind == "system" else self.encoded)[c.prompt] for c in chunk]
        edits = by_row(self.model, [hooks[c.arm] for c in chunk])
        found = self._generate(prompts, edits, [(c.seed, c.prompt) for c in chunk])
        asked = [self.plan.prompts[c.prompt] for c in chunk]
        texts = [
            Completion(last_user_text(p.prompt), g.text, g.tokens, g.first) for p, g in zip(asked, found, strict=True)
        ]
        scores = {s.name: _scored(s, texts) for s in self.scorers}
        broken = degenerate(texts)
        kept = kept_answers(found, [p.harmful for p in asked], self.model.tokenizer)
        return [
            {
                "arm": cell.arm.key,
                "prompt": cell.prompt,
                "seed": cell.seed,
                "text": kept[k].text,
                "sha256": kept[k].sha256,
                "tokens": len(g.tokens),
                "stopped": g.stopped,
                "degenerate": bool(broken[k]),
                "scores": {name: _or_none(values[k]) for name, values in scores.items()},
            }
            for k, (cell, g) in enumerate(zip(chunk, found, strict=True))
        ]

    @cached_property
    def _benign(self) -> list[Continuation]:
        return benign_rows(self.model, self.plan.benign, raw=self.plan.decoding.raw)

    def measure_cost(self, arms: Sequence[Arm], on_note: Callable[[str], None]) -> None:
        """KL of these cells on the benign prompts, site by site."""
        checks = self.opened.checks
        known = {record["arm"] for record in checks.records if record["what"] == "benign_kl"}
        arms = [arm for arm in arms if arm.key not in known]
        if not self.plan.benign or not arms:
            return
        on_note(f"benign KL of {len(arms)} cells")
        for site in dict.fromkeys(arm.site for arm in arms):
            mine = [arm for arm in arms if arm.site == site]
            found = benign_kl(self.model, self._benign, [self.hooks(arm) for arm in mine])
            checks.add(
                f"benign_kl/{mine[0].key}",
                [
                    {"what": "benign_kl", "arm": a.key, "mean": list(map(_or_none, k.mean)), "p95": k.p95, "n": k.n}
                    for a, k in zip(mine, found, strict=True)
                ],
            )

    def finish(self, arguments: Mapping[str, Any] | None) -> SweepResult:
        """The numbers; in a folder also the table and, last, the manifest."""
        records, checks = self.opened.generations.records, self.opened.checks.records
        rows = summarise(self.plan, records, checks)
        result = SweepResult(self.plan, tuple(rows), tuple(records), self.opened.folder)
        if self.opened.folder is not None and not self.opened.sealed:
            (self.opened.folder / TABLE).write_text(result.table, encoding="utf-8")
            seal(self.opened.folder, KIND, files=OURS, model=self.model, measurements=rows, arguments=arguments)
        return result


def _sites(cells: Sequence[Cell]) -> list[int]:
    """Numbers of the sites of these cells."""
    return list(dict.fromkeys(cell.arm.site for cell in cells if cell.arm.site >= 0))


def _scored(scorer: Scorer, texts: Sequence[Completion]) -> Float[np.ndarray, " n"]:
    """Equal texts are scored once: with a classifier that is where the time goes."""
    kinds: dict[tuple[str, str, str], int] = {}
    for c in texts:
        kinds.setdefault((c.prompt, c.text, repr(c.first)), len(kinds))
    index = [kinds[c.prompt, c.text, repr(c.first)] for c in texts]
    first = {k: i for i, k in reversed(list(enumerate(index)))}
    values = scorer([texts[first[k]] for k in range(len(kinds))])
    out: Float[np.ndarray, " n"] = np.asarray(values, dtype=float)[index]
    return out


def with_system(prompt: Prompt, system: str) -> Prompt:
    """The prompt with a system instruction before it; one that is there already comes second, in the same turn."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    if turns and turns[0]["role"] == "system":
        turns[0]["content"] = f"{system}\n{turns[0]['content']}"
    else:
        turns.insert(0, {"role": "system", "content": system})
    return turns  # type: ignore[return-value]


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
