"""WATCH: what moves in a model while it is trained. Public names are imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safety_lens.monitors.alarm import Limits as Limits
    from safety_lens.monitors.alarm import StopRule as StopRule
    from safety_lens.monitors.alarm import Verdict as Verdict
    from safety_lens.monitors.asking import Probes as Probes
    from safety_lens.monitors.audit import audit_adapter as audit_adapter
    from safety_lens.monitors.baseline import Baseline as Baseline
    from safety_lens.monitors.callback import MonitorCallback as MonitorCallback
    from safety_lens.monitors.drift_log import csv_view as csv_view
    from safety_lens.monitors.drift_log import read_log as read_log
    from safety_lens.monitors.forecast import Budget as Budget
    from safety_lens.monitors.forecast import RiskReport as RiskReport
    from safety_lens.monitors.forecast import assess_risk as assess_risk
    from safety_lens.monitors.forecasting.scoring import score_forecast as score_forecast
    from safety_lens.monitors.monitor import Monitor as Monitor
    from safety_lens.monitors.readings import Pairs as Pairs

_HOMES = {
    "alarm": ("Limits", "StopRule", "Verdict"),
    "asking": ("Probes",),
    "audit": ("audit_adapter",),
    "baseline": ("Baseline",),
    "callback": ("MonitorCallback",),
    "drift_log": ("csv_view", "read_log"),
    "forecast": ("Budget", "RiskReport", "assess_risk"),
    "forecasting.scoring": ("score_forecast",),
    "monitor": ("Monitor",),
    "readings": ("Pairs",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'safety_lens.monitors' has no attribute {name!r}")
    return getattr(import_module(f"safety_lens.monitors.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
