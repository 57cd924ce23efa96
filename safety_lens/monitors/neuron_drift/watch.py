"""How far the members of a neuron group moved in training, beside random others of the same size.

Read from the adapters' factors in float64, per matrix, over adapted matrices only: a weight without an
adapter cannot move, and counting it as unmoved would make every group look stable. `drift_statistics` compares and
judges.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safety_lens.errors import DataError
from safety_lens.loading.homes import homes
from safety_lens.loading.live import base_model, has_adapters, unwrapped
from safety_lens.monitors.audit_sources import changes_of, name_of, read_base
from safety_lens.monitors.neuron_drift.changes import MatrixChange, Moves, matrix_changes
from safety_lens.monitors.neuron_drift.held import HeldGroups, entries_of, held_share
from safety_lens.monitors.neuron_drift.matched import Weights, part_of, partners
from safety_lens.monitors.neuron_drift.moved import GroupDrift, Moved, Place
from safety_lens.monitors.weight_changes import Change, adapter_changes
from safety_lens.probes.groups import NeuronGroup

DRAWS = 4
WHOLE = (
    "this model is trained as a whole, so its weights before training are gone: measure the drift of groups afterwards"
    " (`safety-lens neurons drift BASE CHECKPOINT`), or train adapters"
)
SAMPLE = 100_000
"""Values of a group that are kept for its distribution: evenly spaced ones where it has more members."""


class DriftWatch:
    """Measures groups in a model, again and again; partners are drawn once.

    base: the model that training starts from; adapters may be in it, their base layers are read. draws: random partners
    of every member (memory: 8 · draws bytes a member). held: what training keeps frozen: members among it are left out
    and counted, and it is nobody's partner.

    Raises:
        DataError: no groups, an empty one, or two of one name. ModelMismatchError: a group of another model.
    """

    def __init__(
        self,
        base: nn.Module,
        groups: Sequence[NeuronGroup],
        *,
        draws: int = DRAWS,
        seed: int = 0,
        held: HeldGroups = HeldGroups(),  # noqa: B008 - frozen
    ) -> None:
        if draws < 1:
            raise DataError(f"{draws} random partners a member were asked for: give 1 or more")
        self.groups, self.draws, self.seed = _named(groups), draws, seed
        hf: Any = base_model(unwrapped(base))
        self.homes = homes(hf)
        self._weights = Weights(hf, self.homes)
        for group in (*groups, *held.groups):
            self._weights.fit(group)
        self.held, self.lost = entries_of(held.groups), held.lost
        self._partners: dict[tuple[str, str], Tensor] = {}
        self._shares: dict[tuple[str, str], Tensor] = {}

    @property
    def names(self) -> dict[str, str]:
        """Name of each group → a hash of its members."""
        return {group.name: _members_hash(group) for group in self.groups}

    def measure(self, changes: Iterable[Change]) -> tuple[GroupDrift, ...]:
        """Every group, by these changes of modules (`adapter_changes`); one matrix is held at a time."""
        found = [_Found(group, self) for group in self.groups]
        with torch.no_grad():
            for change in matrix_changes(changes, self.homes):
                for one in found:
                    one.take(change)
        return tuple(one.result() for one in found)

    def live(self, trained: nn.Module) -> tuple[GroupDrift, ...]:
        """Every group in a model with adapters, as it is now.

        Raises:
            DataError: a model without adapters: what its weights were before is not in it.
        """
        if not has_adapters(unwrapped(trained)):
            raise DataError(WHOLE)
        return self.measure(adapter_changes(unwrapped(trained)))

    def held_share(self, group: NeuronGroup, key: str) -> Tensor:
        """Of every unit at a key: the share of its weights that is frozen."""
        at = (group.name, key)
        if at not in self._shares:
            self._shares[at] = held_share(group, key, self.held)
        return self._shares[at]

    def members(self, group: NeuronGroup, key: str) -> Tensor:
        """The group's members at a key that are not frozen as a whole."""
        index = group.index[key]
        return index[self.held_share(group, key)[index] < 1]

    def partners(self, group: NeuronGroup, key: str) -> Tensor:
        """The random partners of these members."""
        at = (group.name, key)
        if at not in self._partners:
            still = self.held_share(group, key) >= 1
            drawn = partners(self._weights, group, key, draws=self.draws, seed=self.seed, still=still)
            self._partners[at] = drawn.cpu()
        return self._partners[at]


def _members_hash(group: NeuronGroup) -> str:
    digest = hashlib.sha256(group.unit.encode())
    for key in sorted(group.index):
        digest.update(key.encode() + group.index[key].numpy().tobytes())
    return digest.hexdigest()[:32]


def _named(groups: Sequence[NeuronGroup]) -> tuple[NeuronGroup, ...]:
    if not groups:
        raise DataError("there is no group whose drift could be measured")
    names = [group.name for group in groups]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"two groups are named {double!r}: their rows could not be told apart; rename one")
    for group in groups:
        if not any(len(index) for index in group.index.values()):
            raise DataError(f"group {group.name!r} is empty: nothing of it can move")
    return tuple(groups)


class _Found:
    """What has been seen of one group so far."""

    def __init__(self, group: NeuronGroup, watch: DriftWatch) -> None:
        self.group, self.watch = group, watch
        parts = {name: part for name in group.shapes if (part := part_of(group, name)) is not None}
        self.size = {name: part.each * len(group.index[part.key]) for name, part in parts.items()}
        self.stride = max(1, sum(map(len, group.index.values())) // SAMPLE)
        self.places: list[Place] = []
        self.whole: dict[str, tuple[Moves, Moves]] = {}
        self.adapted: set[str] = set()

    def take(self, change: MatrixChange) -> None:
        part = part_of(self.group, change.name)
        if part is None:
            return
        sides = (self.watch.members(self.group, part.key), self.watch.partners(self.group, part.key))
        moves = [part.read(change, part.spelled(units)).bundled(part.per) for units in sides]
        self.adapted.add(change.name)
        moved = [Moved.of(m, part.each * len(u), self.stride, False) for m, u in zip(moves, sides, strict=True)]
        self.places.append(Place(change.name, *moved))
        if self.group.unit != "weight":
            before = self.whole.get(part.key)
            both = (moves[0], moves[1])
            self.whole[part.key] = both if before is None else (before[0].plus(both[0]), before[1].plus(both[1]))

    def result(self) -> GroupDrift:
        blocks = tuple(
            Place(key, *(Moved.of(m, 0, self.stride, True) for m in both)) for key, both in sorted(self.whole.items())
        )
        size, inside = sum(self.size.values()), sum(self.size[name] for name in self.adapted)
        left = {
            name: part.each * len(self.watch.members(self.group, part.key))
            for name in self.size
            if (part := part_of(self.group, name)) is not None
        }
        return GroupDrift(
            self.group.name, self.group.unit, tuple(self.places), blocks, size, 1 - inside / size,
            1 - sum(left.values()) / size, self._withheld(),
        )  # fmt: skip

    def _withheld(self) -> str | None:
        """Why nothing is concluded: sides that training could not move alike."""
        if self.watch.lost:
            return (
                f"this run froze {', '.join(self.watch.lost)}, which is not there now, so partners may be frozen"
                " themselves: run this where the run was started"
            )
        keys = {part.key for name in self.adapted if (part := part_of(self.group, name)) is not None}
        shares = [
            _mean([self.watch.held_share(self.group, key)[units(self.group, key)] for key in sorted(keys)])
            for units in (self.watch.members, self.watch.partners)
        ]
        if not any(shares):
            return None
        return (
            f"single weights were frozen in its {self.group.unit}s ({shares[0]:.1%} of their weights) and in their"
            f" partners' ({shares[1]:.1%})"
        )


def _mean(parts: Sequence[Tensor]) -> float:
    values = torch.cat([torch.zeros(0), *parts])
    return float(values.mean()) if len(values) else 0.0


def neuron_drift(
    base: str | Path | nn.Module,
    trained: str | Path | nn.Module,
    groups: Sequence[NeuronGroup],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    other_base: bool = False,
    held: HeldGroups = HeldGroups(),  # noqa: B008 - frozen
) -> tuple[GroupDrift, ...]:
    """How far groups moved between a base and an adapter (or a checkpoint) of it.

    A checkpoint's matrices count as adapted where they differ from the base. Weights stored in half precision hide
    changes below a few thousandths of a weight: measure adapters by their factors, before they are merged.

    Args:
        base, trained: as for `audit_adapter`: folders, hub ids, or models in memory. other_base: take an adapter that
            names another base. held: what was frozen (see `DriftWatch`).

    Raises:
        DataError: no groups, or an empty one. ModelMismatchError: a group or an adapter of another model.
    """
    hf = read_base(base)
    watch = DriftWatch(hf, groups, draws=draws, seed=seed, held=held)
    return watch.measure(changes_of(hf, name_of(base, hf), trained, other_base))
