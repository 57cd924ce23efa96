"""What keeps a model safe while it is fine-tuned: penalties on its loss, and a projection behind it.

A penalty is called without arguments, at any point of any training loop, and returns its terms:
`loss = task_loss + penalty().total`. Every weight is zero or more: there is no way to ask for less safety.
"""

from safety_lens.interventions.penalties.alignguard import AlignGuard
from safety_lens.interventions.penalties.energy import FisherPenalty
from safety_lens.interventions.penalties.equal_loss import AtEqualLoss, Reading, at_equal_loss
from safety_lens.interventions.penalties.kl import KlPenalty
from safety_lens.interventions.penalties.moved import Moved
from safety_lens.interventions.penalties.projection import Projection, safe_lora
from safety_lens.interventions.penalties.terms import Penalty, Terms
from safety_lens.interventions.penalties.trainer import PenaltyCallback

__all__ = [
    "AlignGuard",
    "AtEqualLoss",
    "FisherPenalty",
    "KlPenalty",
    "Moved",
    "Penalty",
    "PenaltyCallback",
    "Projection",
    "Reading",
    "Terms",
    "at_equal_loss",
    "safe_lora",
]
