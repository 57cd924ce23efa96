"""Effects of a chosen direction on prompts that took no part in the choice: labels and log-odds, before and after.

An edit can move the first words of an answer alone. So answers are generated with and without the edit and labelled by
the behaviour's reader, and the agreement of labels and log-odds is reported for both. No answer is kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.bootstrap import mean_interval
from safety_lens.data import Encoded
from safety_lens.interventions.behaviours import Behaviour
from safety_lens.interventions.steering import ablate, steer
from safety_lens.log import Measurement
from safety_lens.probes.directions import Direction
from safety_lens.stats import UNKNOWN, Interval, wilson
from safety_lens.types import FwdHook, Prompt

NAN = float("nan")


class _Answered(NamedTuple):
    """Log-odds (nats) and labels of the same prompts."""

    odds: Float[np.ndarray, " prompt"]
    labels: Float[np.ndarray, " prompt"]


def measure_after(
    model: HookedTransformer,
    sides: Sequence[tuple[Sequence[Prompt], Sequence[Encoded]]],
    direction: Direction,
    behaviour: Behaviour,
    *,
    coeff: float = 1.0,
    scope: str = "prompt",
    split: str = "test",
    seed: int = 0,
) -> list[Measurement]:
    """Measure a behaviour before and after ablating a direction on positive prompts and adding it on negative ones.

    Args:
        model: The model that answers.
        sides: Positive and negative prompts, as the user asks them and as they are read. None is filtered out.
        direction: Ablated wherever the stream is written to; added at its own hook.
        behaviour: How the behaviour is read.
        coeff: Coefficient of the addition.
        scope: Tokens to which it is added.
        split: Split of the prompts.
        seed: Seed of the bootstrap.

    Returns:
        For each side the rates of the behaviour, their paired change, log-odds, and shares of prompts where labels
        agree with log-odds above the threshold. For positive prompts that showed the behaviour before, the rate after;
        likewise for negative ones that did not.
    """
    rows: list[Measurement] = []
    for name, (prompts, encoded), hooks, wanted in (
        ("ablated", sides[0], ablate(direction), 1.0),
        ("added", sides[1], steer(direction, coeff, scope=scope), 0.0),
    ):
        before, after = (_answer(model, behaviour, prompts, encoded, h) for h in ([], hooks))

        def row(metric: str, value: Interval, n: int) -> None:
            rows.append(Measurement(direction.concept, metric, *value, n=n, hook=direction.hook, split=split))

        side = "positive" if wanted else "negative"
        for stage, found in ((f"before_{side}", before), (f"{name}_{side}", after)):
            known = found.labels[np.isfinite(found.labels)]
            row(f"rate_{stage}", wilson(int(known.sum()), len(known)), len(known))
            row(f"log_odds_{stage}", mean_interval(found.odds, seed=seed), len(found.odds))
            agree = (found.odds > behaviour.threshold)[np.isfinite(found.labels)] == (known == 1)
            row(f"agreement_{stage}", wilson(int(agree.sum()), len(agree)), len(agree))
        change = after.labels - before.labels
        row(f"rate_change_{name}", mean_interval(change, seed=seed) if len(change) else UNKNOWN, len(change))
        kept = (before.labels == wanted) & np.isfinite(after.labels)
        row(f"rate_{name}_filtered", wilson(int(after.labels[kept].sum()), int(kept.sum())), int(kept.sum()))
    return rows


def _answer(
    model: HookedTransformer,
    behaviour: Behaviour,
    prompts: Sequence[Prompt],
    encoded: Sequence[Encoded],
    hooks: Sequence[FwdHook],
) -> _Answered:
    odds = behaviour.log_odds(model, encoded, hooks)
    return _Answered(odds, behaviour.labels(model, prompts, hooks, encoded=encoded))
