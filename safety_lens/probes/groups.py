"""Named sets of weights, neurons or heads of one model, and how they are kept.

Two literatures say "neuron": Wei et al. 2024 (arXiv:2402.05162) mean one scalar weight, others a hidden unit of an MLP.
Here a group says which: unit "weight", "neuron" or "head".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.artifacts import load_artifact, save_artifact
from safety_lens.errors import ArtifactError, DataError, ModelMismatchError
from safety_lens.log import Measurement
from safety_lens.probes.matrices import Matrix, matrices_of

KIND = "groups"
PARTS = {
    "neuron": ("mlp", {"W_gate": "rows", "W_in": "rows", "W_out": "columns"}),
    "head": ("attn", {"W_Q": "rows", "W_K": "rows", "W_V": "rows", "W_O": "columns"}),
}
"""What neurons and heads consist of. Key and value rows belong to a head where every query head has its own."""


@dataclass(frozen=True, eq=False)
class NeuronGroup:
    """Members of a group by matrix or block part, each sorted and without repeats.

    index: unit weight: matrix name → flat entries of [d_out, d_in]; neuron: "blocks.3.mlp" → hidden units; head:
    "blocks.3.attn" → heads. shapes: matrix name → (d_out, d_in) of every matrix that its keys stand for, whatever the
    unit. d_head: features per head; needed for heads. source: how it was made (method, fractions, data, model).

    Raises:
        DataError: an unknown unit, or members that are repeated, unsorted or outside their matrix.
    """

    name: str
    unit: str
    index: dict[str, Int64[Tensor, " _"]]
    shapes: dict[str, tuple[int, int]]
    source: dict[str, Any] = field(default_factory=dict)
    d_head: int = 0

    def __post_init__(self) -> None:
        if self.unit not in ("weight", *PARTS):
            raise DataError(f"a group is of weights, neurons or heads, not of {self.unit!r}")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise DataError(f"a group's name is a word without '/', got {self.name!r}")
        if self.unit == "head" and self.d_head < 1:
            raise DataError(f"group {self.name!r} is of heads: say d_head, the features of each")
        for key, members in self.index.items():
            self._check(key, members)

    def _check(self, key: str, members: Int64[Tensor, " _"]) -> None:
        n = self.count(key)
        if len(members) and (int(members[0]) < 0 or int(members[-1]) >= n):
            raise DataError(f"group {self.name!r}: {key} has members 0 to {n - 1}, got {int(members[-1])}")
        if not bool((members.diff() > 0).all()):
            raise DataError(f"group {self.name!r}: members of {key} are not sorted, or are there twice")

    def count(self, key: str) -> int:
        """How many weights, neurons or heads there are at a key, members or not."""
        if self.unit == "weight" and key in self.shapes:
            return self.shapes[key][0] * self.shapes[key][1]
        part = PARTS[self.unit][1] if self.unit != "weight" else {}
        for kind, along in part.items():
            if (name := f"{key}.{kind}") in self.shapes:
                features = self.shapes[name][0 if along == "rows" else 1]
                return features // self.d_head if self.unit == "head" else features
        raise DataError(f"group {self.name!r} has members in {key!r} and no shape of it")

    @property
    def size(self) -> int:
        """Members: weights, neurons or heads."""
        return sum(len(members) for members in self.index.values())

    @property
    def universe(self) -> int:
        """How many weights, neurons or heads the group was chosen from."""
        return sum(self.count(key) for key in self.index)

    @property
    def share(self) -> float:
        """Members as a share of what they were chosen from; NaN where that is nothing."""
        return self.size / self.universe if self.universe else float("nan")

    def entries(self, of: HookedTransformer | Iterable[Matrix] | None = None) -> dict[str, Int64[Tensor, " _"]]:
        """The group as single weights: matrix name → sorted flat entries. Matrices without any are left out.

        of: a model, or its matrices, to check the group against and to choose among; default all that the group names.

        Raises:
            ModelMismatchError: a matrix of the group that is not there, or of another shape.
        """
        names: Iterable[str] = self.shapes
        if of is not None:
            found = {m.name: m for m in (matrices_of(of) if isinstance(of, HookedTransformer) else of)}
            self.check_fits(found.values())
            names = [name for name in self.shapes if name in found]
        flat = {name: self._flat(name) for name in names}
        return {name: members for name, members in flat.items() if len(members)}

    def check_fits(self, matrices: HookedTransformer | Iterable[Matrix]) -> None:
        """Refuse a model whose matrices are not those of the group.

        Only matrices that hold members are looked for; those that share a name must have one shape.

        Raises:
            ModelMismatchError: a matrix of the group that is not there, or of another shape.
        """
        listed = matrices_of(matrices) if isinstance(matrices, HookedTransformer) else matrices
        found = {m.name: m.shape for m in listed}
        for name, shape in self.shapes.items():
            if name in found and tuple(found[name]) != tuple(shape):
                has = f"has shape {tuple(shape)} there and {tuple(found[name])} here"
                raise ModelMismatchError(f"the group {self.name!r} was made with another model: {name} {has}")
            if name not in found and len(self._flat(name)):
                raise ModelMismatchError(f"the group {self.name!r} has members in {name}, which this model has not")

    def mask(self, matrix: Matrix | str) -> Bool[Tensor, "d_out d_in"]:
        """True at the entries of a matrix that belong to the group.

        Raises:
            ModelMismatchError: a matrix of another shape than the group's. DataError: one the group does not know.
        """
        name = matrix if isinstance(matrix, str) else matrix.name
        if name not in self.shapes:
            raise DataError(f"the group {self.name!r} was not chosen from {name}; it knows {', '.join(self.shapes)}")
        if isinstance(matrix, Matrix):
            self.check_fits([matrix, *(Matrix(n, 0, "", *s) for n, s in self.shapes.items() if n != name)])
        out = torch.zeros(self.shapes[name], dtype=torch.bool)
        out.view(-1)[self._flat(name)] = True
        return out

    def _flat(self, name: str) -> Int64[Tensor, " _"]:
        """Entries of a matrix in the group, spelled out from neurons or heads."""
        if self.unit == "weight":
            return self.index.get(name, torch.zeros(0, dtype=torch.int64))
        key, _, kind = name.rpartition(".")
        members = self.index.get(key, torch.zeros(0, dtype=torch.int64))
        d_out, d_in = self.shapes[name]
        per = self.d_head if self.unit == "head" else 1
        lines = (members[:, None] * per + torch.arange(per)).flatten()
        if PARTS[self.unit][1][kind] == "rows":
            return (lines[:, None] * d_in + torch.arange(d_in)).flatten()
        return (torch.arange(d_out)[:, None] * d_in + lines).flatten()

    def renamed(self, name: str) -> "NeuronGroup":
        """The same members under another name."""
        return replace(self, name=name)


def group_of(
    model: HookedTransformer,
    name: str,
    unit: str,
    index: Mapping[str, Sequence[int] | Tensor],
    source: Mapping[str, Any] | None = None,
) -> NeuronGroup:
    """A group from members by matrix ("blocks.3.attn.W_Q"), MLP ("blocks.3.mlp") or attention ("blocks.3.attn").

    Members are sorted and counted once.

    Raises:
        DataError: a key that the model or the unit does not have, or a member outside it.
    """
    shapes = part_shapes(model, unit, index)
    members = {key: torch.unique(torch.as_tensor(found, dtype=torch.int64).cpu()) for key, found in index.items()}
    d_head = model.cfg.d_head if unit == "head" else 0
    return NeuronGroup(name, unit, members, shapes, dict(source or {}), d_head)


def part_shapes(model: HookedTransformer, unit: str, keys: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Shapes of the matrices that keys of a unit stand for.

    Raises:
        DataError: a key that the model or the unit does not have.
    """
    if unit not in ("weight", *PARTS):
        raise DataError(f"a group is of weights, neurons or heads, not of {unit!r}")
    shared = model.cfg.n_key_value_heads not in (None, model.cfg.n_heads)
    left_out = ("W_K", "W_V") if unit == "head" and shared else ()
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for matrix in matrices_of(model):
        key, _, kind = matrix.name.rpartition(".")
        if unit == "weight":
            found[matrix.name] = {matrix.name: matrix.shape}
        elif kind in PARTS[unit][1] and kind not in left_out:
            found.setdefault(key, {})[matrix.name] = matrix.shape
    out: dict[str, tuple[int, int]] = {}
    for key in keys:
        if key not in found:
            raise DataError(f"{key!r} holds no {unit}s of this model; keys are such as {next(iter(found))!r}")
        out |= found[key]
    return out


# --- on disk ----------------------------------------------------------------------------------------------------------


def save_groups(
    path: str | Path,
    groups: Sequence[NeuronGroup],
    model: HookedTransformer,
    *,
    measurements: Sequence[Measurement] = (),
    arguments: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    attach: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write groups, each matrix as sorted entries or as one bit per entry, whichever is smaller.

    Raises:
        ArtifactError: the place is taken or cannot be written, or two groups have one name.
        ModelMismatchError: a group that does not fit the model.
    """
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise ArtifactError(f"two groups would share a name: {', '.join(sorted(names))}; rename one")
    for group in groups:
        group.check_fits(model)
    described = {
        g.name: {"unit": g.unit, "shapes": {k: list(s) for k, s in g.shapes.items()}, "d_head": g.d_head,
                 "size": g.size, "keys": list(g.index), "source": g.source}
        for g in groups
    }  # fmt: skip
    return save_artifact(
        path,
        KIND,
        model=model,
        tensors={f"{g.name}/{key}": _packed(m, g.count(key)) for g in groups for key, m in g.index.items()},
        measurements=measurements,
        arguments=arguments,
        extra={"groups": described, **dict(extra or {})},
        attach=attach,
        overwrite=overwrite,
    )


def load_groups(path: str | Path, model: HookedTransformer | None = None) -> list[NeuronGroup]:
    """Read groups back; with `model`, refuse groups of any other model (a fine-tune of it is another model).

    Raises:
        ArtifactError: not a whole groups artifact. ModelMismatchError: made with another model.
    """
    artifact = load_artifact(path, model, kind=KIND)
    groups = []
    for name, entry in artifact.manifest["groups"].items():
        index = {key: _unpacked(artifact.tensors[f"{name}/{key}"]) for key in entry["keys"]}
        shapes = {key: (int(shape[0]), int(shape[1])) for key, shape in entry["shapes"].items()}
        groups.append(NeuronGroup(name, entry["unit"], index, shapes, entry["source"], int(entry["d_head"])))
    return groups


def _packed(members: Int64[Tensor, " _"], n: int) -> Tensor:
    width = 4 if n <= 2**31 else 8
    if width * len(members) <= -(-n // 8):
        return members.to(torch.int32 if width == 4 else torch.int64)
    bits = np.zeros(n, dtype=bool)
    bits[members.numpy()] = True
    return torch.from_numpy(np.packbits(bits))


def _unpacked(stored: Tensor) -> Int64[Tensor, " _"]:
    if stored.dtype != torch.uint8:
        return stored.to(torch.int64)
    return torch.from_numpy(np.flatnonzero(np.unpackbits(stored.numpy())).astype(np.int64))
