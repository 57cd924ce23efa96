"""A forecast on the disk: everything that scoring it needs, so that it can be compared with a run that came later."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from safety_lens.artifacts import load_artifact, save_artifact
from safety_lens.errors import ArtifactError
from safety_lens.log import NAN, Measurement
from safety_lens.monitors.drift_log import read_log
from safety_lens.monitors.finetune.place import LOG
from safety_lens.monitors.forecast import RiskReport
from safety_lens.monitors.forecasting.growth import Curve
from safety_lens.monitors.forecasting.levels import LEVELS, Level
from safety_lens.monitors.forecasting.scoring import Measured, measured_of
from safety_lens.stats import Interval

KIND = "risk"
FIELDS = ("steps", "kl", "low", "high")


def curves_of(report: RiskReport) -> dict[str, Curve]:
    """The forecasts of a report by name: closed_form, rehearsal (quartic) and rehearsal_fitted."""
    found = {
        "closed_form": report.closed.curve if report.closed else None,
        "rehearsal": report.rehearsed,
        "rehearsal_fitted": report.fitted,
    }
    return {name: curve for name, curve in found.items() if curve is not None}


def measurements_of(report: RiskReport) -> list[Measurement]:
    """The report as rows: what is forecast when, the closed form's terms, the overlap, sensitivity by matrix.

    An infinite step (not reached) is NaN with a note.
    """
    level = LEVELS.index(report.warning.level)
    rows = [
        Measurement("risk", "level", float(level), note="; ".join(report.warning.reasons)),
        Measurement("risk", "mean_loss", report.mean_loss, n=report.budget.batches),
        Measurement("risk", "gradient_norm", report.gradient_norm, n=report.budget.batches),
    ]
    for name, curve in curves_of(report).items():
        rows += _curve_rows(f"risk/{name}", curve, report.steps, report.n_safety)
    if report.rehearsal is not None:
        rows += [
            Measurement("risk/rehearsal", "token_kl_measured", *kl.interval, n=report.n_safety, step=k)
            for k, kl in enumerate(report.rehearsal.kl, 1)
        ]
        exponent = report.rehearsal.exponent(np.arange(report.n_safety))
        rows.append(Measurement("risk/rehearsal_fitted", "exponent", exponent, n=len(report.rehearsal.kl)))
    return [*rows, *_closed_rows(report), *_sensitivity_rows(report)]


def _curve_rows(subject: str, curve: Curve, steps: int, n: int) -> list[Measurement]:
    when, end = curve.reaches, steps - 1
    note = None if np.isfinite(when.value) else f"not within {int(curve.steps[-1])} steps"
    if np.isfinite(when.value) and when.value > curve.valid:
        note = f"beyond step {curve.valid:.0f} the closed form claims nothing"
    return [
        Measurement(subject, "step_to_limit", *_known(when), n=n, note=note),
        Measurement(subject, "valid_until_step", curve.valid if np.isfinite(curve.valid) else NAN, note=curve.claims),
        Measurement(subject, "token_kl", curve.kl[end], curve.low[end], curve.high[end], n=n, step=steps),
    ]


def _known(interval: Interval) -> Interval:
    return Interval(*(x if np.isfinite(x) else NAN for x in interval))


def _closed_rows(report: RiskReport) -> list[Measurement]:
    if report.closed is None:
        return []
    p, n = report.closed.polynomial, report.n_safety
    rows = [Measurement("risk/closed_form", name, value, n=n) for name, value in asdict(p).items()]
    end = float(report.times[-1])
    shares = [Measurement("risk/closed_form", f"share_{k}", v, step=report.steps) for k, v in p.shares(end).items()]
    sizes = [("u_norm", report.closed.u_norm), ("w_norm", report.closed.w_norm), ("t_valid", report.closed.t_valid)]
    return [*rows, *shares, *(Measurement("risk/closed_form", k, v if np.isfinite(v) else NAN) for k, v in sizes)]


def _sensitivity_rows(report: RiskReport) -> list[Measurement]:
    s = report.sensitivity
    if s is None:
        return []
    rows = [
        Measurement("risk/overlap", "lift", s.overlap.lift, n=report.n_safety, note=f"rank {len(s.spectrum)}"),
        Measurement("risk/overlap", "share", s.overlap.share, n=report.n_safety),
        Measurement("risk/overlap", "chance", s.overlap.chance, n=report.n_safety),
        Measurement("risk/overlap", "p", s.overlap.p, n=report.n_safety),
        Measurement("risk/fisher", "trace", s.spectrum.total, n=report.n_safety),
        Measurement("risk/fisher", "mean_gradient_share", s.mean_share, n=report.n_safety),
    ]
    for name, trace, energy in zip(s.matrices, s.trace, s.energy, strict=True):
        rows.append(Measurement("risk/sensitivity", "fisher_trace", float(trace), split=name))
        rows.append(Measurement("risk/sensitivity", "update_energy", float(energy), split=name))
    return rows


def save_risk(
    path: Path,
    report: RiskReport,
    *,
    more: Sequence[Measurement] = (),
    extra: Mapping[str, Any] | None = None,
    attach: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write a forecast: curves as tensors, everything else as rows.

    Raises:
        ArtifactError: the place is taken or cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, curve in curves_of(report).items():
        tensors |= {
            f"{name}.{field}": torch.from_numpy(np.ascontiguousarray(getattr(curve, field))) for field in FIELDS
        }
        tensors[f"{name}.when"] = torch.tensor([*curve.reaches, curve.valid, curve.taken], dtype=torch.float64)
    if report.sensitivity is not None:
        tensors["eigenvalues"] = torch.from_numpy(np.ascontiguousarray(report.sensitivity.spectrum.eigenvalues))
    return save_artifact(
        path,
        KIND,
        tensors=tensors,
        measurements=[*measurements_of(report), *more],
        arguments={"config": report.config.model_dump(mode="json"), "budget": asdict(report.budget)},
        extra={"seconds": report.seconds, "notes": list(report.notes), **(extra or {})},
        attach=attach,
        overwrite=overwrite,
    )


class SavedRisk(NamedTuple):
    """A forecast as it was written. limit: KL per token that counts as broken. manifest: of the artifact."""

    curves: dict[str, Curve]
    limit: float
    measurements: list[Measurement]
    manifest: dict[str, Any]

    @property
    def level(self) -> Level:
        return LEVELS[int(self.value("risk", "level"))]

    def value(self, subject: str, metric: str) -> float:
        """One number of it; NaN where there is none."""
        return next((r.value for r in self.measurements if (r.subject, r.metric) == (subject, metric)), NAN)


def load_risk(path: Path) -> SavedRisk:
    """Read a forecast back.

    Raises:
        ArtifactError: no forecast there.
    """
    found = load_artifact(path, kind=KIND)
    curves = {}
    for key in found.tensors:
        name, dot, field = key.partition(".")
        if dot and field == "when":
            *when, valid, taken = found.tensors[key].tolist()
            steps, kl, low, high = (found.tensors[f"{name}.{f}"].numpy() for f in FIELDS)
            curves[name] = Curve(steps, kl, low, high, Interval(*when), valid, int(taken))
    limit = float(found.manifest["arguments"]["budget"]["limit"])
    return SavedRisk(curves, limit, found.measurements, found.manifest)


def read_run(folder: Path) -> Measured:
    """The measured side: the log of a monitored run, also of one that is still going on.

    Raises:
        ArtifactError: no log there. DataError: a log without KL.
    """
    log = folder / LOG if folder.is_dir() else folder
    if not log.is_file():
        raise ArtifactError(f"{folder} is no monitored run: it has no {LOG}; fine-tune with --concept")
    return measured_of(read_log(log))
