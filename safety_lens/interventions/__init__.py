"""CHANGE: edits, steering, suppression, and honest comparison of what they do.

Public names are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safety_lens.interventions.behaviours import BEHAVIOURS as BEHAVIOURS
    from safety_lens.interventions.behaviours import Behaviour as Behaviour
    from safety_lens.interventions.behaviours import BehaviourSpec as BehaviourSpec
    from safety_lens.interventions.behaviours import derive_behaviour as derive_behaviour
    from safety_lens.interventions.causality.limits import Limits as Limits
    from safety_lens.interventions.causality.selector import causal_selector as causal_selector
    from safety_lens.interventions.compare import Method as Method
    from safety_lens.interventions.compare import equal_cost as equal_cost
    from safety_lens.interventions.comparison import EqualCost as EqualCost
    from safety_lens.interventions.conditions import Condition as Condition
    from safety_lens.interventions.conditions import conditional as conditional
    from safety_lens.interventions.conditions import fit_condition as fit_condition
    from safety_lens.interventions.conditions import when as when
    from safety_lens.interventions.edits import Ablate as Ablate
    from safety_lens.interventions.edits import Add as Add
    from safety_lens.interventions.edits import Affine as Affine
    from safety_lens.interventions.edits import Clamp as Clamp
    from safety_lens.interventions.edits import Edit as Edit
    from safety_lens.interventions.freezing import Frozen as Frozen
    from safety_lens.interventions.freezing import freeze as freeze
    from safety_lens.interventions.gguf import import_gguf as import_gguf
    from safety_lens.interventions.gguf import judge as judge
    from safety_lens.interventions.gguf import read_directions as read_directions
    from safety_lens.interventions.neuron_effects import ablation_agreement as ablation_agreement
    from safety_lens.interventions.neuron_effects import causal_check as causal_check
    from safety_lens.interventions.neurons import ablated as ablated
    from safety_lens.interventions.neurons import kept as kept
    from safety_lens.interventions.openings import Opening as Opening
    from safety_lens.interventions.openings import Openings as Openings
    from safety_lens.interventions.penalties import AlignGuard as AlignGuard
    from safety_lens.interventions.penalties import FisherPenalty as FisherPenalty
    from safety_lens.interventions.penalties import KlPenalty as KlPenalty
    from safety_lens.interventions.penalties import PenaltyCallback as PenaltyCallback
    from safety_lens.interventions.penalties import safe_lora as safe_lora
    from safety_lens.interventions.rewind import merged as merged
    from safety_lens.interventions.rewind import rewound as rewound
    from safety_lens.interventions.rows import by_row as by_row
    from safety_lens.interventions.scopes import Scope as Scope
    from safety_lens.interventions.scopes import from_position as from_position
    from safety_lens.interventions.scopes import scope_named as scope_named
    from safety_lens.interventions.side_effects import benign_kl as benign_kl
    from safety_lens.interventions.side_effects import benign_rows as benign_rows
    from safety_lens.interventions.side_effects import facts_accuracy as facts_accuracy
    from safety_lens.interventions.side_effects import over_refusal as over_refusal
    from safety_lens.interventions.steering import ablate as ablate
    from safety_lens.interventions.steering import affine as affine
    from safety_lens.interventions.steering import applied as applied
    from safety_lens.interventions.steering import clamp as clamp
    from safety_lens.interventions.steering import steer as steer
    from safety_lens.interventions.strength import residual_norm as residual_norm
    from safety_lens.interventions.strength import solve_strength as solve_strength
    from safety_lens.interventions.suppression import suppress as suppress
    from safety_lens.interventions.suppression import suppress_prompt as suppress_prompt
    from safety_lens.interventions.sweeping.controls import random_direction as random_direction
    from safety_lens.interventions.sweeping.controls import random_set as random_set
    from safety_lens.interventions.sweeping.controls import shuffled_directions as shuffled_directions
    from safety_lens.interventions.sweeping.engine import sweep as sweep
    from safety_lens.interventions.sweeping.plan import Controls as Controls
    from safety_lens.interventions.sweeping.plan import Decoding as Decoding
    from safety_lens.interventions.sweeping.plan import SweepPrompt as SweepPrompt
    from safety_lens.interventions.weights import orthogonalize as orthogonalize

_HOMES = {
    "behaviours": ("BEHAVIOURS", "Behaviour", "BehaviourSpec", "derive_behaviour"),
    "causality.limits": ("Limits",),
    "causality.selector": ("causal_selector",),
    "compare": ("Method", "equal_cost"),
    "comparison": ("EqualCost",),
    "conditions": ("Condition", "conditional", "fit_condition", "when"),
    "edits": ("Ablate", "Add", "Affine", "Clamp", "Edit"),
    "freezing": ("Frozen", "freeze"),
    "gguf": ("import_gguf", "judge", "read_directions"),
    "neuron_effects": ("ablation_agreement", "causal_check"),
    "neurons": ("ablated", "kept"),
    "openings": ("Opening", "Openings"),
    "penalties": ("AlignGuard", "FisherPenalty", "KlPenalty", "PenaltyCallback", "safe_lora"),
    "rewind": ("merged", "rewound"),
    "rows": ("by_row",),
    "scopes": ("Scope", "from_position", "scope_named"),
    "side_effects": ("benign_kl", "benign_rows", "facts_accuracy", "over_refusal"),
    "steering": ("ablate", "affine", "applied", "clamp", "steer"),
    "strength": ("residual_norm", "solve_strength"),
    "suppression": ("suppress", "suppress_prompt"),
    "sweeping.controls": ("random_direction", "random_set", "shuffled_directions"),
    "sweeping.engine": ("sweep",),
    "sweeping.plan": ("Controls", "Decoding", "SweepPrompt"),
    "weights": ("orthogonalize",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'safety_lens.interventions' has no attribute {name!r}")
    return getattr(import_module(f"safety_lens.interventions.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
