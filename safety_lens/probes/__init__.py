"""READ: directions with their evidence. Public names are imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safety_lens.probes.directions import Direction as Direction
    from safety_lens.probes.directions import Evidence as Evidence
    from safety_lens.probes.estimators import diff_in_means as diff_in_means
    from safety_lens.probes.estimators import logistic_direction as logistic_direction
    from safety_lens.probes.estimators import pca_direction as pca_direction
    from safety_lens.probes.estimators import robust_direction as robust_direction
    from safety_lens.probes.estimators import whitened_direction as whitened_direction
    from safety_lens.probes.extract import DirectionSet as DirectionSet
    from safety_lens.probes.extract import directions_from as directions_from
    from safety_lens.probes.extract import extract_directions as extract_directions
    from safety_lens.probes.reading import read_concepts as read_concepts
    from safety_lens.probes.selection import Candidates as Candidates
    from safety_lens.probes.selection import Choice as Choice
    from safety_lens.probes.store import load_directions as load_directions
    from safety_lens.probes.store import save_directions as save_directions

_HOMES = {
    "directions": ("Direction", "Evidence"),
    "estimators": ("diff_in_means", "logistic_direction", "pca_direction", "robust_direction", "whitened_direction"),
    "extract": ("DirectionSet", "directions_from", "extract_directions"),
    "reading": ("read_concepts",),
    "selection": ("Candidates", "Choice"),
    "store": ("load_directions", "save_directions"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'safety_lens.probes' has no attribute {name!r}")
    return getattr(import_module(f"safety_lens.probes.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
