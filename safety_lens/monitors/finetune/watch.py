"""The monitor of a run, as its configuration says."""

from collections.abc import Sequence
from typing import Any

from safety_lens.data import Concept
from safety_lens.data.prompt_files import read_prompt_file
from safety_lens.errors import ArtifactError, DataError
from safety_lens.monitors import Probes
from safety_lens.monitors.alarm import Limits, StopRule
from safety_lens.monitors.asking import REQUESTS
from safety_lens.monitors.callback import MonitorCallback
from safety_lens.monitors.control_runs import ControlRuns
from safety_lens.monitors.finetune.config import ProbeFiles, RunConfig, Stop, read_config
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
        baseline=None if chosen.baseline is None else chosen.baseline.absolute(),
        on_error=chosen.on_error,
        budget=chosen.budget,
        stop_rule=stop_rule(chosen.stop, control_runs(config)),
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
        "probes": probes_of(chosen.probes),
        "seed": monitor_seed(config),
    }


def control_runs(config: RunConfig) -> ControlRuns | None:
    """The control runs that a configuration names, None where it names none.

    Raises:
        DataError: Too few, or one of other steps, batches, learning rate or adapters than this run.
        ArtifactError: A folder that is no monitored run.
    """
    if not config.monitor.control_runs:
        return None
    for folder in config.monitor.control_runs:
        if not (folder / "config.yaml").is_file():
            raise ArtifactError(f"{folder} is no run of finetune: it has no config.yaml")
        other = read_config(folder / "config.yaml", {})
        for section, keys in ALIKE.items():
            here, there = getattr(config, section), getattr(other, section)
            if unlike := [key for key in keys if getattr(here, key) != getattr(there, key)]:
                raise DataError(
                    f"control run {folder} has {section}.{unlike[0]} {getattr(there, unlike[0])!r} and this run"
                    f" {getattr(here, unlike[0])!r}: harmless drift is judged between runs of one kind"
                )
    return ControlRuns.read([folder / LOG for folder in config.monitor.control_runs])


ALIKE = {
    "training": ("max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size",
                 "gradient_accumulation_steps", "lr_scheduler_type", "optim"),
    "tuning": ("method", "rank", "targets", "layers"),
}  # fmt: skip
"""Settings that control runs share with the run that is compared with them."""


def monitor_seed(config: RunConfig) -> int:
    """The seed of measurements: the monitor's own, else the run's."""
    return config.seed if config.monitor.seed is None else config.monitor.seed


def stop_rule(stop: Stop, controls: ControlRuns | None = None) -> StopRule:
    """The rule that a configuration describes; a concept's limits fall back on those of all concepts."""
    common = stop.model_dump(exclude={"concepts"})
    own = {name: limits.model_dump(exclude_none=True) for name, limits in stop.concepts.items()}
    shared = {key: common[key] for key in ("log_odds", "rate", "delta")}
    return StopRule(
        **common, controls=controls, concepts={name: Limits(**{**shared, **limits}) for name, limits in own.items()}
    )


def probes_of(files: ProbeFiles | None) -> Probes | None:
    """The probes that a configuration describes, its files read.

    Raises:
        DataError: A file that cannot be read, or with too few prompts.
    """
    if files is None:
        return None
    given = {name: getattr(files, name) for name in REQUESTS}
    prompts: dict[str, Any] = {name: read_prompt_file(file) for name, file in given.items() if file is not None}
    return Probes(n=files.n, new_tokens=files.tokens, **prompts)


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
