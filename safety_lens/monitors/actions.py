"""What an alarm does to the run: one function per action, looked up by name once."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import TrainerControl

from safety_lens.errors import DataError
from safety_lens.monitors.alarm import Verdict

LOG = logging.getLogger("safety_lens.monitor")
SLOWER = 0.1
"""Factor of the learning rate under "reduce_lr"."""


class Alarm(NamedTuple):
    """What an action may use. lr_scheduler may be None (Adafactor's own schedule, custom loops)."""

    step: int
    verdict: Verdict
    control: TrainerControl
    optimizer: Any
    lr_scheduler: Any


Action = Callable[[Alarm], None]


def log(alarm: Alarm) -> None:
    """Say it."""
    LOG.warning("alarm at step %d: %s", alarm.step, "; ".join(alarm.verdict.reasons))


def checkpoint(alarm: Alarm) -> None:
    """Have the Trainer save a checkpoint behind this step."""
    alarm.control.should_save = True


def stop(alarm: Alarm) -> None:
    """End the training behind this step."""
    alarm.control.should_training_stop = True


def reduce_lr(alarm: Alarm) -> None:
    """Multiply the learning rate by 0.1 from here on, whatever schedule it follows."""
    for group in alarm.optimizer.param_groups:
        group["lr"] *= SLOWER
        if "initial_lr" in group:
            group["initial_lr"] *= SLOWER
    inner = getattr(alarm.lr_scheduler, "scheduler", alarm.lr_scheduler)  # accelerate wraps it
    if inner is not None and hasattr(inner, "base_lrs"):
        inner.base_lrs = [lr * SLOWER for lr in inner.base_lrs]


ACTIONS: dict[str, Action] = {"log": log, "checkpoint": checkpoint, "stop": stop, "reduce_lr": reduce_lr}


def actions_named(wanted: Sequence[str | Action] | str | Action) -> tuple[Action, ...]:
    """Actions by name, or functions of an `Alarm`.

    Raises:
        DataError: a name that is none.
    """
    several = [wanted] if isinstance(wanted, str) or callable(wanted) else list(wanted)
    out = []
    for action in several:
        if isinstance(action, str) and action not in ACTIONS:
            raise DataError(f"alarm action {action!r} is not known; choose {', '.join(ACTIONS)}, or pass a function")
        out.append(ACTIONS[action] if isinstance(action, str) else action)
    return tuple(out)
