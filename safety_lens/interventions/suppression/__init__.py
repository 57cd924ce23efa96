"""Suppression of alignment artifacts: signed, calibrated, measured, logged token by token.

`suppress` gives hooks with their evidence, `suppress_prompt` before and after. Public names are imported when first
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safety_lens.interventions.suppression.analysis import analyse as analyse
    from safety_lens.interventions.suppression.analysis import direction_cosine as direction_cosine
    from safety_lens.interventions.suppression.analysis import hedges_g as hedges_g
    from safety_lens.interventions.suppression.apply import Suppression as Suppression
    from safety_lens.interventions.suppression.apply import suppress as suppress
    from safety_lens.interventions.suppression.compared import compare_modes as compare_modes
    from safety_lens.interventions.suppression.data import ArtifactPairs as ArtifactPairs
    from safety_lens.interventions.suppression.data import artifact_pairs as artifact_pairs
    from safety_lens.interventions.suppression.firing import FiringLog as FiringLog
    from safety_lens.interventions.suppression.measure import ModeResult as ModeResult
    from safety_lens.interventions.suppression.modes import MODES as MODES
    from safety_lens.interventions.suppression.prompts import BeforeAfter as BeforeAfter
    from safety_lens.interventions.suppression.prompts import before_after as before_after
    from safety_lens.interventions.suppression.prompts import suppress_prompt as suppress_prompt

_HOMES = {
    "analysis": ("analyse", "direction_cosine", "hedges_g"),
    "apply": ("Suppression", "suppress"),
    "compared": ("compare_modes",),
    "data": ("ArtifactPairs", "artifact_pairs"),
    "firing": ("FiringLog",),
    "measure": ("ModeResult",),
    "modes": ("MODES",),
    "prompts": ("BeforeAfter", "before_after", "suppress_prompt"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'safety_lens.interventions.suppression' has no attribute {name!r}")
    return getattr(import_module(f"safety_lens.interventions.suppression.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
