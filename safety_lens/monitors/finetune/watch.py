"""The monitor of a run, as its configuration says."""

from collections.abc import Sequence
from typing import Any

from safety_lens.data import Concept
from safety_lens.errors import DataError
from safety_lens.monitors import Probes
from safety_lens.monitors.alarm import StopRule
from safety_lens.monitors.callback import MonitorCallback
from safety_lens.monitors.finetune.config import RunConfig
from safety_lens.monitors.finetune.place import LOG
from safety_lens.monitors.readings import Pairs
from safety_lens.probes.groups import NeuronGroup


def monitor_callback(
    config: RunConfig,
    concepts: Sequence[Concept],
    n_layers: int,
    groups: Sequence[NeuronGroup] = (),
    frozen: Sequence[NeuronGroup] = (),
) -> MonitorCallback:
    """A callback that writes its log into the run's folder. groups: neuron groups that it watches too; frozen: groups
    that the run keeps as they are.

    Raises:
        DataError: blocks that the model does not have.
    """
    chosen = config.monitor
    return MonitorCallback(
        concepts,
        every=chosen.every,
        log=config.out.absolute() / LOG,
        on_error=chosen.on_error,
        stop_rule=StopRule(**chosen.stop.model_dump()),
        on_alarm=tuple(chosen.on_alarm),
        groups=groups,
        frozen=frozen,
        **monitor_settings(config, n_layers),
    )


def monitor_settings(config: RunConfig, n_layers: int) -> dict[str, Any]:
    """What `Monitor` and `MonitorCallback` are both told: hooks, method, pairs, probes and seed.

    Raises:
        DataError: blocks that the model does not have.
    """
    chosen = config.monitor
    return {
        "hooks": None if chosen.layers is None else resid_hooks(chosen.layers, n_layers),
        "method": chosen.method,
        "pairs": Pairs(**chosen.pairs.model_dump()),
        "probes": Probes(n=chosen.probe_prompts) if chosen.probes else None,
        "seed": config.seed,
    }


def resid_hooks(layers: Sequence[int], n_layers: int) -> list[str]:
    """Names of resid_post at blocks; negative ones count from the end.

    Raises:
        DataError: a block that the model does not have.
    """
    if wrong := [layer for layer in layers if not -n_layers <= layer < n_layers]:
        raise DataError(
            f"monitored layers: block {wrong[0]} was asked for; this model has {n_layers}: 0 to {n_layers - 1}"
        )
    return [f"blocks.{layer % n_layers}.hook_resid_post" for layer in layers]
