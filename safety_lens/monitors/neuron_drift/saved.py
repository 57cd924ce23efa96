"""Drift of neuron groups in what is already on disk: adapters, checkpoints and whole runs, compared with their base."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from safety_lens.errors import DataError
from safety_lens.loading.hooked import main_dtype
from safety_lens.log import Measurement
from safety_lens.monitors.audit_sources import changes_of, name_of, read_base
from safety_lens.monitors.neuron_drift.held import held_by
from safety_lens.monitors.neuron_drift.moved import GroupDrift
from safety_lens.monitors.neuron_drift.rows import drift_rows
from safety_lens.monitors.neuron_drift.watch import DRAWS, DriftWatch
from safety_lens.monitors.saved import State, find_states, run_names
from safety_lens.probes.groups import NeuronGroup


class StateDrift(NamedTuple):
    """The drift of every group in one state of a run."""

    state: State
    drifts: tuple[GroupDrift, ...]

    @property
    def step(self) -> int:
        """Of its training; 1 where nothing tells."""
        return 1 if self.state.step is None else self.state.step


class SavedDrift(NamedTuple):
    """States of every run, in the order of their steps. notes: what a reader must know."""

    runs: dict[str, list[StateDrift]]
    notes: tuple[str, ...]

    @property
    def final(self) -> dict[str, tuple[GroupDrift, ...]]:
        """Name of each run → the drift of every group at its end."""
        return {name: states[-1].drifts for name, states in self.runs.items()}

    def rows(self, name: str, *, seed: int | None = None) -> list[Measurement]:
        """Measurement rows of one run, all of its states."""
        return [row for state in self.runs[name] for row in drift_rows(state.drifts, state.step, seed=seed)]


def saved_drift(
    base: str | Path | nn.Module,
    sources: Sequence[str | Path],
    groups: Sequence[NeuronGroup],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    other_base: bool = False,
) -> SavedDrift:
    """How far groups moved in every state of every source: an adapter, a checkpoint, or a run with its checkpoints.

    What a run has frozen is read from its configuration, and left out of groups and partners.

    Raises:
        ModelError: a source that holds nothing to measure. ModelMismatchError: a group or an adapter of another model.
        DataError: no sources, no groups, or an empty one.
    """
    if not sources:
        raise DataError("nothing was named whose drift could be measured: give an adapter, a checkpoint or a run")
    found = {name: find_states(source) for name, source in zip(run_names(sources), sources, strict=True)}
    hf = read_base(base)
    name = name_of(base, hf)
    runs = {}
    for run, states in found.items():
        watch = DriftWatch(hf, groups, draws=draws, seed=seed, held=held_by(states[-1].source))
        runs[run] = [StateDrift(s, watch.measure(changes_of(hf, name, s.source, other_base))) for s in states]
    whole = [s.source for states in found.values() for s in states if not s.is_adapter]
    notes = []
    if whole and main_dtype(hf) in (torch.bfloat16, torch.float16):
        notes.append(
            f"{whole[0]} holds whole weights in half precision: changes below some thousandths of a weight are rounded"
            " away there; compare adapters before they are merged"
        )
    return SavedDrift(runs, tuple(notes))
