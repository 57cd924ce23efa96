"""What training held frozen, so that neither a group nor its random partners are made of weights that cannot move."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_lens.artifacts import MANIFEST
from safety_lens.errors import ArtifactError
from safety_lens.monitors.finetune.config import read_config
from safety_lens.monitors.finetune.early import chosen_group, split_name
from safety_lens.monitors.finetune.place import CHECKPOINTS, CONFIG
from safety_lens.probes.groups import PARTS, NeuronGroup, load_groups


class HeldGroups(NamedTuple):
    """Groups that a run has frozen. lost: those of its configuration that are no longer where it says."""

    groups: tuple[NeuronGroup, ...] = ()
    lost: tuple[str, ...] = ()


def held_by(source: str | Path) -> HeldGroups:
    """What the run behind an adapter or checkpoint has frozen, by the configuration that it keeps; nothing without one.

    Paths are taken from the current folder, as the run took them from its own.
    """
    folder = Path(source).expanduser()
    for place in (folder, folder.parent.parent):  # the run itself, or one of its checkpoints
        if (place / CONFIG).is_file() and any((place / name).exists() for name in (MANIFEST, CHECKPOINTS)):
            return _read(read_config(place / CONFIG).tuning.freeze)
    return HeldGroups()


def _read(names: Sequence[str]) -> HeldGroups:
    groups, lost = [], []
    for text in names:
        try:
            there = load_groups(split_name(text)[0])
            groups.append(there[[g.name for g in there].index(chosen_group(text, [g.name for g in there]))])
        except ArtifactError:
            lost.append(text)
    return HeldGroups(tuple(groups), tuple(lost))


def entries_of(groups: Sequence[NeuronGroup]) -> dict[str, Int[Tensor, " k"]]:
    """Matrix → sorted flat entries of the union of groups."""
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        for name, flat in group.entries().items():
            found.setdefault(name, []).append(flat)
    return {name: torch.unique(torch.cat(flat)) for name, flat in found.items()}


def held_share(group: NeuronGroup, key: str, held: Mapping[str, Int[Tensor, " k"]]) -> Float[Tensor, " n"]:
    """Of every unit at a key, members or not: the share of its weights that is frozen; of entries 0 or 1."""
    if group.unit == "weight":
        share = torch.zeros(group.count(key))
        share[held.get(key, torch.zeros(0, dtype=torch.int64))] = 1
        return share
    n = group.count(key)
    still, size = torch.zeros(n), 0
    for kind, along in PARTS[group.unit][1].items():
        if (name := f"{key}.{kind}") in group.shapes:
            d_out, d_in = group.shapes[name]
            flat = held.get(name, torch.zeros(0, dtype=torch.int64))
            lines = flat // d_in if along == "rows" else flat % d_in
            still += torch.bincount(lines // (group.d_head if group.unit == "head" else 1), minlength=n)
            size += d_out * d_in // n
    return still / size
