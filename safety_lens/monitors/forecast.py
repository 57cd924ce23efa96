"""Before training: how a planned fine-tune is likely to move a model's safe answers, and how far that can be known.

Two forecasts of the KL per token from the untrained model on safe answers, side by side: a closed form from the first
direction of the run's own optimiser and the way it turns, and a rehearsal of the first steps. Afterwards both are
scored against what was measured (`monitors.forecasting.scoring`). The model is left as it was.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safety_lens.errors import DataError
from safety_lens.forced import Continuation
from safety_lens.models import load_model
from safety_lens.monitors.finetune.config import RunConfig
from safety_lens.monitors.forecasting.answers import SafeAnswers
from safety_lens.monitors.forecasting.growth import (
    CLOSED_OFF,
    KAPPA,
    NAN,
    NEVER,
    Curve,
    Moments,
    Polynomial,
    banded,
    valid_until,
)
from safety_lens.monitors.forecasting.levels import Warned, warned
from safety_lens.monitors.forecasting.path import Path, find_path, optimiser_named
from safety_lens.monitors.forecasting.planned import Planned, Throwaway, plan, throwaway
from safety_lens.monitors.forecasting.rehearsal import Rehearsal, extrapolated, horizon, rehearse
from safety_lens.monitors.forecasting.sensitivity import Sensitivity, first_update, sensitivity

WIDE = 0.1
"""Share of their size by which weights are moved to see log-probabilities bend; less drowns in float32's rounding."""


@dataclass(frozen=True)
class Budget:
    """What a forecast may cost.

    batches: training batches that the direction is taken from, three passes each. rehearse: real optimizer steps, 0
    for none. closed: whether the closed form is computed. rank: sensitive directions; default those that hold 90 % of
    the Fisher trace. limit: KL per token (nats) that counts as broken. kappa: of the closed form's range. seed: of the
    batches and of the rehearsal's order of rows.
    """

    batches: int = 8
    rehearse: int = 0
    closed: bool = True
    rank: int | None = None
    limit: float = 0.1
    kappa: float = KAPPA
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batches < 2:
            raise DataError(f"the direction needs 2 or more batches of training rows, got {self.batches}")
        if not self.limit > 0:
            raise DataError(f"the KL that counts as broken must be above 0, got {self.limit}")
        if not self.closed and not self.rehearse:
            raise DataError("neither a closed form nor a rehearsal was asked for: there is nothing to forecast with")


@dataclass(frozen=True, eq=False)
class Closed:
    """The closed form. t_valid: range of the path as t. u_norm, w_norm: of trained weights' velocity and its change."""

    curve: Curve
    polynomial: Polynomial
    moments: Moments
    u_norm: float
    w_norm: float
    t_valid: float


@dataclass(frozen=True, eq=False)
class RiskReport:
    """A forecast, ready to be scored.

    steps: of the plan. times: t after each. mean_loss, gradient_norm: of the first training batches: the naive
    forecasts. seconds: by part.
    """

    config: RunConfig
    budget: Budget
    n_safety: int
    times: Float[np.ndarray, " step"]
    closed: Closed | None
    rehearsal: Rehearsal | None
    rehearsed: Curve | None
    fitted: Curve | None
    sensitivity: Sensitivity | None
    warning: Warned
    mean_loss: float
    gradient_norm: float
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.times)


def assess_risk(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    safety: Sequence[Continuation],
    config: RunConfig,
    budget: Budget | None = None,
    *,
    model: HookedTransformer | None = None,
) -> RiskReport:
    """Forecast the run that `config` describes on a model in memory, which is left untouched.

    Args:
        safety: prompts with the model's own safe answers (`probes.examples.read_examples("safety", model)`).
        model: `hf` as a HookedTransformer, where it is at hand.

    Raises:
        DataError: too few safety examples, or fewer than the rank asked; data or settings that the run would refuse.
        ModelError: half precision; a loss that is not finite, with the example named.
    """
    budget = budget or Budget()
    planned = plan(config, tokenizer, hf)
    times, watch = {"plan": 0.0}, _Clock()
    with throwaway(hf, planned) as spare:
        answers = SafeAnswers(spare.base, safety)
        closed, found, path = None, None, None
        if budget.closed:
            path = _path(spare, planned, budget)
            times["gradients"] = watch.lap()
            closed = _closed(spare, planned, answers, path, budget)
            times["closed form"] = watch.lap()
            hooked = model or load_model(hf, tokenizer=tokenizer)
            update = first_update(spare, path, path.reaching(WIDE))
            found = sensitivity(hooked, safety, update, rank=budget.rank, seed=budget.seed)
            times["sensitivity"] = watch.lap()
        rehearsal = None
        if budget.rehearse:
            rehearsal = rehearse(spare, planned, answers, budget.rehearse, tokenizer, seed=budget.seed)
            times["rehearsal"] = watch.lap()
    rehearsed, fitted = (
        None if rehearsal is None else extrapolated(rehearsal, planned, budget.limit, fitted=fit)
        for fit in (False, True)
    )
    warning = warned(
        closed.curve if closed else None,
        rehearsed,
        closed.polynomial if closed else None,
        found.overlap if found and planned.times[-1] > 0 else None,
        limit=budget.limit,
        steps=len(planned.rates),
        t_valid=min(closed.t_valid, float(planned.times[-1])) if closed else NEVER,
    )
    losses = path.gradients.losses if path else rehearsal.losses if rehearsal else np.array([NAN])
    norms = path.gradients.norms if path else np.array([NAN])
    return RiskReport(
        config, budget, len(safety), planned.times, closed, rehearsal, rehearsed, fitted, found, warning,
        float(losses.mean()), float(norms.mean()), times, planned.notes,
    )  # fmt: skip


def _path(spare: Throwaway, planned: Planned, budget: Budget) -> Path:
    training = planned.config.training
    return find_path(
        spare.live,
        spare.trained,
        planned.batches(budget.batches, budget.seed),
        optimiser_named(training.optim),
        clip=training.max_grad_norm,
        decay=training.weight_decay,
        micro=training.per_device_train_batch_size,
    )


def _closed(spare: Throwaway, planned: Planned, answers: SafeAnswers, path: Path, budget: Budget) -> Closed:
    was_training = spare.live.training
    spare.live.eval()
    moments = answers.moments(spare.live, path, path.reaching(WIDE))
    spare.live.train(was_training)
    steps, t = horizon(planned)
    u, w = (
        float(np.sqrt(sum(float(x.double().square().sum()) for x in part)))
        for part in (path.velocity, path.acceleration)
    )
    t_valid = valid_until(u, w, budget.kappa)
    inside = np.flatnonzero(t <= t_valid)
    curve = banded(
        lambda drawn, off: moments.drawn(drawn).polynomial(t * np.exp(off)),
        len(answers.rows),
        steps,
        budget.limit,
        CLOSED_OFF,
        valid=NEVER if len(inside) == len(t) else float(steps[inside[-1]]) if len(inside) else 0.0,
        seed=budget.seed,
    )
    return Closed(curve, moments.polynomial, moments, u, w, t_valid)


class _Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        self.began, passed = now, now - self.began
        return passed
