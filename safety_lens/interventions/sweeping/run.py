"""A sweep in the making: identity first, then portions of answers, then what the edits cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.artifacts import seal
from safety_lens.data import Encoded
from safety_lens.data.pairs import last_user_text
from safety_lens.errors import ModelError
from safety_lens.generation import Generation, generate
from safety_lens.interventions.fluency import degenerate
from safety_lens.interventions.kept_answers import kept_answers
from safety_lens.interventions.rows import by_row
from safety_lens.interventions.scopes import Scope
from safety_lens.interventions.scorers.completion import Completion, Scorer, first_reader
from safety_lens.interventions.side_effects import benign_kl, benign_rows
from safety_lens.interventions.steering import check_widths
from safety_lens.interventions.sweeping.choice import floor_notes
from safety_lens.interventions.sweeping.controls import random_set
from safety_lens.interventions.sweeping.plan import Arm, Cell, Plan
from safety_lens.interventions.sweeping.store import KIND, OURS, TABLE, Opened, Record
from safety_lens.interventions.sweeping.table import summarise, table_csv
from safety_lens.log import Measurement
from safety_lens.models import named_hooks
from safety_lens.probes.directions import Direction
from safety_lens.types import FwdHook, Prompt

IDENTITY_PROMPTS = 8
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

    def check_identity(self) -> None:
        """Coefficient 0 through the steered path must give the unsteered path's tokens, at every site.

        All sites run in one call. A site that differs there is run again with nothing but its own pairs in the batch:
        in half precision rows of batches of different sizes may differ by rounding, which is no fault of the edit.
        """
        if "identity" in self.opened.checks:
            return
        sites = range(len(self.plan.sites))
        tokens = self._identity(sites)
        found = {n: self._identity([n])[n] if tokens[n] is None else tokens[n] for n in sites}
        for number, equal in found.items():
            if equal is None:
                raise ModelError(
                    f"the edit {self.plan.edit!r} at {self.plan.sites[number].name} with coefficient 0 changes the"
                    " text: it is not an edit whose effect a coefficient could measure; nothing is reported"
                )
        self.opened.checks.add(
            "identity", [{"what": "identity", "site": n, "tokens": equal} for n, equal in found.items()]
        )

    def _identity(self, sites: Sequence[int]) -> dict[int, int | None]:
        """Tokens compared at each site; None where some differ."""
        prompts = self.encoded[:IDENTITY_PROMPTS]
        kinds: list[list[FwdHook]] = [[], *(self.hooks(Arm("steer", number, 0.0)) for number in sites)]
        rows = [(i, hooks) for i in range(len(prompts)) for hooks in kinds]
        streams = [(self.plan.seeds[0], i) for i, _ in rows]
        found = self._generate([prompts[i] for i, _ in rows], by_row(self.model, [h for _, h in rows]), streams)
        said = [[g.tokens for g in found[k :: len(kinds)]] for k in range(len(kinds))]
        total = sum(map(len, said[0]))
        return {number: total if said[k] == said[0] else None for k, number in enumerate(sites, 1)}

    def write(self, on_rows: Callable[[int, int], None] | None, on_note: Callable[[str], None]) -> None:
        """Generate, score and store every portion that is not there yet."""
        chunks = self.plan.chunks
        unsteered = sum(cell.arm.kind == "baseline" for chunk in chunks for cell in chunk)
        total, done, seen = sum(map(len, chunks)), len(self.opened.generations.records), 0
        if on_rows:
            on_rows(done, total)
        for number, chunk in enumerate(chunks):
            if str(number) not in self.opened.generations:
                self.opened.generations.add(str(number), self._answers(chunk))
                done += len(chunk)
                if on_rows:
                    on_rows(done, total)
            if seen < unsteered <= seen + len(chunk):
                for note in floor_notes(self.plan, self.opened.generations.records):
                    on_note(note)
            seen += len(chunk)

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

    def measure_cost(self) -> None:
        """KL of every cell on the benign prompts, site by site."""
        checks, coeffs = self.opened.checks, [c for c in self.plan.coeffs if c != 0]
        todo = [n for n in range(len(self.plan.sites)) if f"benign_kl/{n}" not in checks]
        if not self.plan.benign or not todo:
            return
        rows = benign_rows(self.model, self.plan.benign, raw=self.plan.decoding.raw)
        for number in todo:
            arms = [Arm("steer", number, c) for c in coeffs]
            found = benign_kl(self.model, rows, [self.hooks(arm) for arm in arms])
            checks.add(
                f"benign_kl/{number}",
                [
                    {"what": "benign_kl", "arm": a.key, "mean": list(map(_or_none, k.mean)), "p95": k.p95, "n": k.n}
                    for a, k in zip(arms, found, strict=True)
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
