"""Edits that differ from row to row of one batch: what makes a sweep one `generate` call."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.frames import Frame, frame_of, running
from safety_lens.interventions.edits import Ablate, Add, Edit, check_width, vector_of, wide
from safety_lens.models import named_hooks
from safety_lens.types import FwdHook, NamedHook


def by_row(model: HookedTransformer, rows: Sequence[Sequence[FwdHook]]) -> list[NamedHook]:
    """One intervention in which prompt i of a `generate` (or `capture`) call gets the hooks of `rows[i]`.

    Hooks of one row at one hook point act in their order. Rows without hooks are left as they are.

    Raises:
        HookNameError: a hook that the model does not have.
        DataError: (in the forward pass) more prompts than rows.
    """
    # Cells of a sweep give many rows the same list: each list is resolved once.
    known: dict[int, dict[str, tuple[Any, ...]]] = {}
    for hooks in rows:
        if id(hooks) not in known:
            chains: dict[str, tuple[Any, ...]] = {}
            for name, fn in named_hooks(model, hooks):
                chains[name] = (*chains.get(name, ()), fn)
            known[id(hooks)] = chains
    names = list(dict.fromkeys(name for chains in known.values() for name in chains))
    return [(name, _at_hook([known[id(hooks)].get(name, ()) for hooks in rows])) for name in names]


def _at_hook(chains: list[tuple[Any, ...]]) -> "_OneOp | _EachOwn":
    edits = [chain[0] for chain in dict.fromkeys(chains) if len(chain) == 1 and isinstance(chain[0], Edit)]
    alone = len(edits) == len({chain for chain in chains if chain})
    plain = alone and all(e.gate is None and e.watch is None for e in edits)
    alike = len({(type(e.op), e.scope, _width(e)) for e in edits}) == 1
    stack = _STACKED.get(type(edits[0].op)) if plain and alike else None
    return _EachOwn(chains) if stack is None else _OneOp(chains, edits, stack)


def _width(edit: Edit) -> int:
    vector = vector_of(edit.op)
    return 0 if vector is None else len(vector)


def _check_rows(frame: Frame, n: int) -> None:
    """Refuse prompts that no entry of `rows` belongs to, once per batch (asking a GPU costs a wait).

    Raises:
        DataError: says how many there are.
    """
    if frame.position.shape[1] > 1 and int(frame.row.max()) >= n:
        raise DataError(f"by_row was given edits for {n} prompts, and prompt {int(frame.row.max())} is being run")


class _Adds:
    """Add, with a vector for each row; edit 0 adds nothing."""

    def __init__(self, ops: Sequence[Add]) -> None:
        vectors = [op.vector for op in ops]
        self.table: Float[Tensor, "edit d"] = torch.stack([torch.zeros_like(vectors[0]), *vectors])

    def __call__(self, x: Float[Tensor, "batch pos d"], kind: Int[Tensor, " batch"]) -> Float[Tensor, "batch pos d"]:
        self.table = self.table.to(x)
        return x + self.table[kind][:, None]


class _Ablations:
    """Ablate, with a direction and a strength for each row; edit 0 removes nothing."""

    def __init__(self, ops: Sequence[Ablate]) -> None:
        units = [op.unit for op in ops]
        self.units: Float[Tensor, "edit d"] = torch.stack([torch.zeros_like(units[0]), *units])
        self.strength: Float[Tensor, " edit"] = torch.tensor([0.0, *(op.strength for op in ops)], dtype=torch.float64)

    def __call__(self, x: Float[Tensor, "batch pos d"], kind: Int[Tensor, " batch"]) -> Float[Tensor, "batch pos d"]:
        self.units, self.strength = self.units.to(x), self.strength.to(x)
        unit = self.units[kind]
        along = self.strength[kind][:, None, None] * (x @ unit[..., None])
        return x - along * unit[:, None]


_STACKED: dict[type, Any] = {Add: _Adds, Ablate: _Ablations}
"""Ops of which a whole batch runs as one, each row with its own numbers."""


class _OneOp:
    """Every row has its own numbers for the same op, or none: one pass for the whole batch."""

    def __init__(self, chains: list[tuple[Any, ...]], edits: list[Edit], stack: Any) -> None:
        number = {edit: i + 1 for i, edit in enumerate(edits)}
        self.first, self.scope = edits[0].op, edits[0].scope
        self.op = stack([edit.op for edit in edits])
        self.index: Int[Tensor, " row"] = torch.tensor([number[c[0]] if c else 0 for c in chains])
        self.spares_prompt = self.scope.spares_prompt

    def __call__(self, act: Tensor, hook: Any = None) -> Tensor:
        frame = frame_of(act)
        _check_rows(frame, len(self.index))
        x = act.flatten(2)
        check_width(self.first, x, hook)
        self.index = self.index.to(act.device)
        changed = self.op(wide(x), self.index[frame.row]).to(x.dtype)
        return torch.where(self.scope(frame)[..., None], changed, x).view_as(act)


class _EachOwn:
    """Rows with the same chain of hook functions go through it together."""

    def __init__(self, chains: list[tuple[Any, ...]]) -> None:
        self.kinds = list(dict.fromkeys(chains))
        number = {chain: i for i, chain in enumerate(self.kinds)}
        self.index = torch.tensor([number[chain] for chain in chains])
        self.spares_prompt = all(getattr(fn, "spares_prompt", False) for chain in self.kinds for fn in chain)

    def __call__(self, act: Tensor, hook: Any = None) -> Tensor:
        frame = frame_of(act)
        _check_rows(frame, len(self.index))
        self.index = self.index.to(act.device)
        kind = self.index[frame.row]
        out = act.clone()
        for number in kind.unique().tolist():
            rows = kind == number
            part = act[rows]
            with running(frame.part(rows)):
                for fn in self.kinds[number]:
                    changed = fn(part, hook)
                    part = part if changed is None else changed
            out[rows] = part
        return out
