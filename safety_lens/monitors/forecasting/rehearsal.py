"""Rehearsal: the first K optimizer steps of the run, taken for real on a throwaway, and what they say of the rest.

The Trainer of the run itself takes them, with the run's schedule, batches and clipping. The KL at step K then grows by
a law. Quartic: KL(t) = KL_K·(t/t_K)⁴, the onset that Springer et al. 2026 (arXiv:2602.15799, corollary 6.3) derive, and
the growth of two LoRA factors that both move. Fitted: a power law through the K points, whose exponent is near 2 in the
first steps and therefore late. Which of the two is told first was decided on runs of their own (docs/guides/risk.md).
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path as Place
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from safety_lens.errors import DataError
from safety_lens.monitors.finetune.training import trainer, training_arguments
from safety_lens.monitors.forecasting.answers import Kl, SafeAnswers
from safety_lens.monitors.forecasting.growth import NAN, Curve, Deviation, banded
from safety_lens.monitors.forecasting.planned import Planned, Throwaway

QUARTIC = 4.0
QUARTIC_OFF = Deviation(0.85, 0.75, 8)
"""Of the exponent from step 5 to a KL of 0.1, less 4, on the organism (`benchmarks/forecast.py --pilot`)."""
FITTED_OFF = Deviation(2.44, 0.42, 8)
"""The same less the fitted exponent."""


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What K real steps did. times: t after each; kl: of the safe answers after each; losses: of the training batch."""

    times: Float[np.ndarray, " step"]
    kl: tuple[Kl, ...]
    losses: Float[np.ndarray, " step"]

    def measured(self, drawn: np.ndarray) -> Float[np.ndarray, " step"]:
        """KL per token after each step, of the examples with these numbers."""
        return np.array([kl.per_token(drawn) for kl in self.kl])

    def quartic(
        self, drawn: np.ndarray, times: Float[np.ndarray, " later"], deviation: float = 0.0
    ) -> Float[np.ndarray, " later"]:
        """KL_K·(t/t_K)⁴ after step K; measured (interpolated) before. deviation: of the exponent."""
        return self._from_last(drawn, times, QUARTIC + deviation)

    def fitted(
        self, drawn: np.ndarray, times: Float[np.ndarray, " later"], deviation: float = 0.0
    ) -> Float[np.ndarray, " later"]:
        """The same with the exponent that fits all K points best, by least squares on logarithms."""
        return self._from_last(drawn, times, self.exponent(drawn) + deviation)

    def exponent(self, drawn: np.ndarray) -> float:
        """The fitted exponent; NaN where fewer than two steps moved anything."""
        kl = self.measured(drawn)
        moved = (kl > 0) & (self.times > 0)
        if moved.sum() < 2:
            return NAN
        return float(np.polyfit(np.log(self.times[moved]), np.log(kl[moved]), 1)[0])

    def exponent_to(self, drawn: np.ndarray, time: float, limit: float) -> float:
        """The exponent with which the KL would grow from step K to `limit` at t = `time`; NaN where nothing moved."""
        kl, last = self.measured(drawn)[-1], self.times[-1]
        return float(np.log(limit / kl) / np.log(time / last)) if kl > 0 and 0 < last < time else NAN

    def _from_last(self, drawn: np.ndarray, times: np.ndarray, exponent: float) -> Float[np.ndarray, " later"]:
        kl, last = self.measured(drawn), self.times[-1]
        if last <= 0 or kl[-1] <= 0:
            return np.zeros(len(times))
        before = np.interp(times, np.concatenate([[0.0], self.times]), np.concatenate([[0.0], kl]))
        found: Float[np.ndarray, " later"] = np.where(times <= last, before, kl[-1] * (times / last) ** exponent)
        return found


def rehearse(
    spare: Throwaway,
    planned: Planned,
    answers: SafeAnswers,
    steps: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
) -> Rehearsal:
    """Take `steps` real optimizer steps and measure the KL after each; the throwaway's weights are back afterwards.

    seed: of the order of the rows: the run's own gives the run's own first steps.

    Raises:
        DataError: fewer than two steps, or more than the plan has. ModelError: a loss that is no number.
    """
    if not 2 <= steps <= len(planned.rates):
        raise DataError(f"rehearse takes 2 to {len(planned.rates)} steps (the plan has no more), got {steps}")
    start = [p.detach().clone() for p in spare.trained]
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        config = planned.config
        quiet = config.training.model_copy(
            update={
                "report_to": [],
                "max_steps": len(planned.rates),
                "more": {**config.training.more, "save_strategy": "no"},
            }
        )
        arguments = training_arguments(
            config.model_copy(update={"out": Place(folder), "training": quiet, "seed": seed})
        )
        watch = _Watch(answers, spare, steps)
        try:
            trainer(spare.live, planned.rows, arguments, tokenizer, [watch, *spare.callbacks]).train()
        finally:
            with torch.no_grad():
                for p, s in zip(spare.trained, start, strict=True):
                    p.copy_(s)
                    p.grad = None
    return Rehearsal(planned.times[:steps], tuple(watch.kl), np.array(watch.losses))


class _Watch(TrainerCallback):
    """Measures after every step, and ends the training after the last that is wanted."""

    def __init__(self, answers: SafeAnswers, spare: Throwaway, steps: int) -> None:
        self.answers, self.spare, self.steps = answers, spare, steps
        self.kl: list[Kl] = []
        self.losses: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        was_training = self.spare.live.training
        self.spare.live.eval()
        self.kl.append(self.answers.kl(self.spare.live))
        self.spare.live.train(was_training)
        control.should_log = True
        control.should_training_stop = state.global_step >= self.steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def extrapolated(found: Rehearsal, planned: Planned, limit: float, *, fitted: bool = False, seed: int = 0) -> Curve:
    """The KL after every planned step and further, by the quartic or the fitted law.

    The band resamples safety examples and lets the exponent deviate as it did on runs of the organism.
    """
    steps, times = horizon(planned)
    law, deviation = (found.fitted, FITTED_OFF) if fitted else (found.quartic, QUARTIC_OFF)
    return banded(
        lambda drawn, off: law(drawn, times, off),
        len(found.kl[0].sums),
        steps,
        limit,
        deviation,
        taken=len(found.kl),
        seed=seed,
    )


FURTHER = 4
"""How many times the plan's length is looked at."""


def horizon(planned: Planned) -> tuple[Float[np.ndarray, " step"], Float[np.ndarray, " step"]]:
    """Steps 1 … FURTHER·n and t after each; beyond the plan at its mean learning rate."""
    n = len(planned.rates)
    beyond = planned.times[-1] + np.arange(1, (FURTHER - 1) * n + 1) * planned.rates.mean()
    return np.arange(1.0, FURTHER * n + 1), np.concatenate([planned.times, beyond])
