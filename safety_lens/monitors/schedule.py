"""When to measure: full or light measurements, within a share of the training time.

A full measurement reads directions and writes answers; a light one reads log-odds and KL on stored answers. Costs and
training time are measured while the run goes on, and the drift log holds them, so a resumed run goes on with them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from safety_lens.errors import DataError
from safety_lens.log import Measurement

BUDGET = 0.05
"""Share of the training time that measuring may take by default."""
FEWEST = 8
"""Prompts of a set that a light measurement reads at least."""
ENOUGH = 16
"""Prompts of a set that a light measurement waits for, but for the early ones and the last: with 8 a change must be 1.6
times as large to be told from chance."""
EARLY = 5
"""First step of a light measurement; the next ones, at twice the step of the last, need not wait for earned budget."""
SETTLED = 3
"""Steps after which the time of a step is taken as known."""


class Tier(Enum):
    """What a measurement reads: nothing, log-odds and KL, or everything."""

    NONE = 0
    LIGHT = 1
    FULL = 2


class Due(NamedTuple):
    """What is measured at a step. prompts: of each set, in a light measurement."""

    tier: Tier
    prompts: int = 0


@dataclass
class Schedule:
    """Decides after every step what is measured.

    Attributes:
        every: Steps between full measurements, at least.
        faster: After a notice a full measurement may come this many times as often; light ones always may.
        budget: Share of the training time that measuring may take; None for no limit and full measurements alone.
        steps: Steps of the run.
        full: Seconds of a full measurement.
        light: Seconds of a light measurement per prompt of each set; NaN where nothing is probed.
        prompts: Prompts of each set.
        trained: Seconds of training so far.
        spent: Seconds of measuring so far, the measurement before training left out.

    Raises:
        DataError: A budget outside (0, 1].
    """

    every: int
    faster: int
    budget: float | None
    steps: int = 0
    full: float = 0.0
    light: float = float("nan")
    prompts: int = 0
    trained: float = 0.0
    spent: float = 0.0
    _measured: dict[Tier, int] = field(default_factory=lambda: {Tier.LIGHT: 0, Tier.FULL: 0})

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise DataError(f"the monitor's budget is a share of the training time, such as 0.05: got {self.budget!r}")

    def interval(self, noticed: bool) -> int:
        """Steps between full measurements, where the budget allows them."""
        return max(1, self.every // self.faster) if noticed else self.every

    @property
    def most(self) -> int:
        """Measurements that the run can have at most."""
        interval = self.interval(True)
        early = 0 if self.budget is None else sum(EARLY * 2**k < min(interval, self.steps) for k in range(32))
        return -(-self.steps // interval) + 1 + early

    def due(self, step: int, *, last: bool, noticed: bool) -> Due:
        """Decide what is measured after this step."""
        full = self.interval(noticed)
        if self.budget is None:
            return Due(Tier.FULL if last or step % full == 0 else Tier.NONE)
        total = self.budget * self.expected(step)
        now = self.budget * self.trained - self.spent
        if last:
            return Due(Tier.FULL) if self.full <= now else self._light(step, now, least=FEWEST)
        least = FEWEST * self.light if self.light > 0 else 0.0
        reserved = self.full if self.full <= total else least  # for the last step
        later = total - self.spent - reserved
        if step - self._measured[Tier.FULL] >= full and self.full <= min(now, later):
            return Due(Tier.FULL)
        latest = max(self._measured.values())
        if step >= max(EARLY, 2 * latest) and least <= later:  # what breaks fast breaks early
            return self._light(step, least, least=FEWEST)
        if step - latest < self.interval(True):
            return Due(Tier.NONE)
        return self._light(step, min(now, later))

    def _light(self, step: int, seconds: float, least: int = 0) -> Due:
        """A light measurement that takes up to these seconds, of `least` prompts in any case; without it, of enough."""
        if not self.light > 0:
            return Due(Tier.NONE)
        most = min(self.prompts, max(FEWEST, int(self.trained / step / self.light)))  # about one training step
        n = min(most, max(least, int(seconds / self.light)))
        return Due(Tier.LIGHT, n) if n >= min(least or ENOUGH, most) else Due(Tier.NONE)

    def expected(self, step: int) -> float:
        """Seconds of training in the whole run, from its steps so far."""
        return self.trained / step * max(self.steps, step) if step else 0.0

    def measured(self, tier: Tier, step: int, seconds: float, prompts: int) -> None:
        """Take in what a measurement took."""
        self._measured[tier] = step
        self.spent += seconds
        if tier is Tier.FULL:
            self.full = seconds
        elif prompts:
            self.light = seconds / prompts

    def replay(self, rows: Iterable[Measurement], step: int) -> None:
        """Take in a log: its measurements, and its training time, carried on to `step` at the same speed."""
        found = {(row.metric, row.step): row for row in rows if row.subject == "run" and row.step}
        reached = 0
        for (metric, at), row in sorted(found.items(), key=lambda item: item[0][1] or 0):
            if metric == "training_seconds" and at:
                self.trained, reached = row.value, at
            if metric == "tier" and at and ("seconds", at) in found:
                self.measured(Tier(int(row.value)), at, found["seconds", at].value, row.n or 0)
        if reached:
            self.trained *= step / reached

    @property
    def share(self) -> float:
        """Seconds of measuring per second of training, so far."""
        return self.spent / self.trained if self.trained else float("nan")

    def spending(self) -> str:
        """One line at the end: what measuring took."""
        over = self.budget is not None and self.share > self.budget
        why = "; the last step is measured whatever it costs" if over else ""
        share = f"{100 * self.share:.1f} % of {self.trained:.0f} s of training"
        return f"monitor: {self.spent:.1f} s of measuring, {share}{why}"

    def plan(self) -> str:
        """One line, before the first step: what will be measured how often."""
        if self.budget is None:
            return f"monitor: a full measurement (about {self.full:.0f} s) every {self.every} steps, without a budget"
        needed = self.full / self.budget
        return (
            f"monitor: at most {100 * self.budget:.3g} % of the training time; a full measurement takes about"
            f" {self.full:.1f} s and so needs {needed:.0f} s of training: if a step takes less than"
            f" {needed / max(1, self.steps):.1f} s, this run of {self.steps} steps is too short for one, and only"
            " log-odds and KL are measured"
        )

    def shortage(self, step: int) -> str | None:
        """One line, once the time of a step is known, where the run is too short for a full measurement."""
        if self.budget is None or step != min(SETTLED, self.steps) or self.full <= self.budget * self.expected(step):
            return None
        return (
            f"a step takes {self.trained / step:.1f} s: this run of {self.steps} steps is too short for a full"
            f" measurement under a budget of {100 * self.budget:.3g} % (one would take"
            f" {self.full / self.expected(step):.0%} of the training time), so directions and answers are not measured"
            " while it trains; raise --monitor-budget, or set it to none"
        )
