"""Forecasts set beside what happened: per checkpoint, per run, and over several runs.

The measured side is the monitor's own log: `behaviour/harmful` token_kl, refusal_log_odds_change, and the drift of the
directions. A forecast that abstains is a miss, not a gap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from safety_lens.errors import DataError
from safety_lens.log import NAN, Measurement
from safety_lens.monitors.forecasting.growth import NEVER, Curve, crossing

KL = ("behaviour/harmful", "token_kl")
BESIDE = (("behaviour/harmful", "refusal_log_odds_change"), ("behaviour/harmful", "refusal_rate_change"))
FACTOR = 3.0
"""A forecast step within this factor of the measured one counts as right."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What a monitored run did. steps: those measured after training began. kl: nats per token. beside: further series
    by name, at the same steps, NaN where not measured.
    """

    steps: Float[np.ndarray, " step"]
    kl: Float[np.ndarray, " step"]
    beside: dict[str, Float[np.ndarray, " step"]]

    @property
    def last(self) -> float:
        return float(self.steps[-1])


def measured_of(rows: Sequence[Measurement]) -> Measured:
    """The series of a monitored run.

    Raises:
        DataError: no KL on harmful prompts in it, at fewer than two steps after the first.
    """
    kl = {row.step: row.value for row in rows if (row.subject, row.metric) == KL and row.step}
    steps = sorted(step for step, value in kl.items() if step is not None and np.isfinite(value))
    if len(steps) < 2:
        raise DataError(
            "the run's log has no KL on harmful prompts at two steps or more: monitor it with a concept and probes"
            " (finetune --concept refusal --every 5)"
        )
    beside: dict[str, dict[int, float]] = {}
    for row in rows:
        named = (row.subject, row.metric)
        if row.step in kl and named in BESIDE:
            beside.setdefault(row.metric, {})[row.step] = row.value
        elif row.step in kl and row.metric == "cosine_to_baseline" and row.hook == _headline(rows):
            beside.setdefault(f"drift {row.subject}", {})[row.step] = 1 - row.value
    return Measured(
        np.array(steps, dtype=float),
        np.array([kl[step] for step in steps]),
        {name: np.array([found.get(step, NAN) for step in steps]) for name, found in beside.items()},
    )


def _headline(rows: Sequence[Measurement]) -> str | None:
    return next((row.hook for row in rows if row.subject == "run" and row.metric == "headline"), None)


def score_forecast(curves: Mapping[str, Curve], run: Measured, *, limit: float) -> list[Measurement]:
    """Each forecast beside one run.

    Rows of subject "score/<forecast>": calibration (forecast / measured KL) at every step; log_slope of the forecast's
    KL and, under "score/measured", of the measured one (2: the first-order part, 4: quartic onset); step_to_limit
    with `n` the run's last step, NaN with a note where it is not reached; step_ratio, forecast over measured;
    right, 1 or 0; rank_… : Spearman over the run's steps with what lies beside.

    Raises:
        DataError: no forecast.
    """
    if not curves:
        raise DataError("there is no forecast to score")
    truth = crossing(run.steps, run.kl, limit)
    rows = [
        _step("score/measured", truth, run.last),
        Measurement("score/measured", "log_slope", log_slope(run.steps, run.kl), n=len(run.steps)),
    ]
    for name, curve in curves.items():
        subject = f"score/{name}"
        forecast = np.array([curve.at(step) for step in run.steps])
        rows += [
            Measurement(subject, "calibration", _ratio(f, m), n=len(run.steps), step=int(s))
            for f, m, s in zip(forecast, run.kl, run.steps, strict=True)
        ]
        rows.append(Measurement(subject, "log_slope", log_slope(run.steps, forecast), n=len(run.steps)))
        rows.append(_step(subject, curve.reaches.value, run.last))
        rows.append(Measurement(subject, "step_ratio", _ratio(curve.reaches.value, truth)))
        right = is_right(curve, truth, run.last)
        note = f"abstains beyond step {curve.valid:.0f}" if np.isfinite(curve.valid) and curve.abstains else None
        rows.append(Measurement(subject, "right", float(right), note=note))
        rows += [_rank(subject, f"rank_{what}", forecast, np.abs(series)) for what, series in run.beside.items()]
    return rows


def is_right(curve: Curve, truth: float, last: float) -> bool:
    """Whether the forecast step lies within FACTOR of the measured one and within what the forecast claims to know.

    A run that never reached the limit: whether the forecast puts it no earlier than the run's last step / FACTOR.
    """
    step = curve.reaches.value
    if truth == NEVER:
        return step >= last / FACTOR
    return step <= curve.valid and truth / FACTOR <= step <= truth * FACTOR


def is_late(curve: Curve, truth: float) -> bool:
    """The grave error: the limit was reached, and the forecast puts it more than FACTOR later or says nothing."""
    return truth < NEVER and not (curve.reaches.value <= min(truth * FACTOR, curve.valid))


def log_slope(steps: Float[np.ndarray, " step"], kl: Float[np.ndarray, " step"]) -> float:
    """Exponent of the growth: least squares of log KL on log step; NaN for fewer than two steps above 0."""
    good = (kl > 0) & np.isfinite(kl) & (steps > 0)
    if good.sum() < 2:
        return NAN
    return float(np.polyfit(np.log(steps[good]), np.log(kl[good]), 1)[0])


def rank_runs(forecast: Mapping[str, Sequence[float]], measured: Sequence[float]) -> list[Measurement]:
    """Spearman's rank agreement over runs of each forecast number with the measured KL, with a bootstrap interval.

    Raises:
        DataError: fewer than three runs.
    """
    if len(measured) < 3:
        raise DataError(f"ranks over {len(measured)} runs say nothing: give three or more")
    return [
        _rank(f"score/{name}", "rank_runs", np.array(values), np.array(measured)) for name, values in forecast.items()
    ]


def _rank(subject: str, metric: str, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Measurement:
    good = np.isfinite(x) & np.isfinite(y)
    x, y, n = x[good], y[good], int(good.sum())
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Measurement(subject, metric, NAN, n=n, note="fewer than three different values")
    rng, draws = np.random.default_rng(0), []
    for _ in range(1000):
        pick = rng.integers(0, n, n)
        if np.ptp(x[pick]) > 0 and np.ptp(y[pick]) > 0:
            draws.append(float(stats.spearmanr(x[pick], y[pick]).statistic))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Measurement(subject, metric, float(stats.spearmanr(x, y).statistic), float(low), float(high), n=n)


def _ratio(forecast: float, measured: float) -> float:
    known = np.isfinite(forecast) and np.isfinite(measured) and measured > 0
    return forecast / measured if known else NAN


def _step(subject: str, step: float, last: float) -> Measurement:
    note = None if np.isfinite(step) else "not reached"
    return Measurement(subject, "step_to_limit", step if np.isfinite(step) else NAN, n=int(last), note=note)
