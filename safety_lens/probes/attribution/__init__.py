"""Which weights, neurons and heads a behaviour depends on: scores from gradients, inputs, activations and changes."""

from safety_lens.probes.attribution.activations import attribute_neurons, change_scores
from safety_lens.probes.attribution.processes import reduced, scored_across_processes
from safety_lens.probes.attribution.scores import Scores, aggregated, merge_scores
from safety_lens.probes.attribution.weights import snip_scores, wanda_scores

__all__ = [
    "Scores",
    "aggregated",
    "attribute_neurons",
    "change_scores",
    "merge_scores",
    "reduced",
    "scored_across_processes",
    "snip_scores",
    "wanda_scores",
]
