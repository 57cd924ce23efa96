"""READ: directions with their evidence. Public names are imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safety_lens.probes.attribution import Scores as Scores
    from safety_lens.probes.attribution import aggregated as aggregated
    from safety_lens.probes.attribution import attribute_neurons as attribute_neurons
    from safety_lens.probes.attribution import change_scores as change_scores
    from safety_lens.probes.attribution import merge_scores as merge_scores
    from safety_lens.probes.attribution import snip_scores as snip_scores
    from safety_lens.probes.attribution import wanda_scores as wanda_scores
    from safety_lens.probes.directions import Direction as Direction
    from safety_lens.probes.directions import Evidence as Evidence
    from safety_lens.probes.estimators import diff_in_means as diff_in_means
    from safety_lens.probes.estimators import logistic_direction as logistic_direction
    from safety_lens.probes.estimators import pca_direction as pca_direction
    from safety_lens.probes.estimators import robust_direction as robust_direction
    from safety_lens.probes.estimators import whitened_direction as whitened_direction
    from safety_lens.probes.examples import ExampleSet as ExampleSet
    from safety_lens.probes.examples import own_answers as own_answers
    from safety_lens.probes.examples import read_examples as read_examples
    from safety_lens.probes.extract import DirectionSet as DirectionSet
    from safety_lens.probes.extract import directions_from as directions_from
    from safety_lens.probes.extract import extract_directions as extract_directions
    from safety_lens.probes.gradients import example_gradients as example_gradients
    from safety_lens.probes.groups import NeuronGroup as NeuronGroup
    from safety_lens.probes.groups import group_of as group_of
    from safety_lens.probes.groups import load_groups as load_groups
    from safety_lens.probes.groups import save_groups as save_groups
    from safety_lens.probes.matching import random_groups as random_groups
    from safety_lens.probes.matching import random_like as random_like
    from safety_lens.probes.matrices import Matrix as Matrix
    from safety_lens.probes.matrices import matrices_of as matrices_of
    from safety_lens.probes.matrices import weight_of as weight_of
    from safety_lens.probes.ranking import set_difference as set_difference
    from safety_lens.probes.ranking import top as top
    from safety_lens.probes.reading import read_concepts as read_concepts
    from safety_lens.probes.row_risk import RowRisk as RowRisk
    from safety_lens.probes.selection import Candidates as Candidates
    from safety_lens.probes.selection import Choice as Choice
    from safety_lens.probes.sharing import corrected as corrected
    from safety_lens.probes.sharing import difference as difference
    from safety_lens.probes.sharing import intersection as intersection
    from safety_lens.probes.sharing import overlap as overlap
    from safety_lens.probes.sharing import rank_overlap as rank_overlap
    from safety_lens.probes.sharing import union as union
    from safety_lens.probes.store import load_directions as load_directions
    from safety_lens.probes.store import save_directions as save_directions

_HOMES = {
    "attribution": (
        "Scores",
        "aggregated",
        "attribute_neurons",
        "change_scores",
        "merge_scores",
        "snip_scores",
        "wanda_scores",
    ),
    "directions": ("Direction", "Evidence"),
    "estimators": ("diff_in_means", "logistic_direction", "pca_direction", "robust_direction", "whitened_direction"),
    "examples": ("ExampleSet", "own_answers", "read_examples"),
    "extract": ("DirectionSet", "directions_from", "extract_directions"),
    "gradients": ("example_gradients",),
    "groups": ("NeuronGroup", "group_of", "load_groups", "save_groups"),
    "matching": ("random_groups", "random_like"),
    "matrices": ("Matrix", "matrices_of", "weight_of"),
    "ranking": ("set_difference", "top"),
    "reading": ("read_concepts",),
    "row_risk": ("RowRisk",),
    "selection": ("Candidates", "Choice"),
    "sharing": ("corrected", "difference", "intersection", "overlap", "rank_overlap", "union"),
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
