"""Edits that differ from row to row of one batch: what makes a sweep one `generate` call."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.frames import Frame, frame_of, running
from safety_lens.interventions.edits import Add, Edit, check_width
from safety_lens.interventions.scopes import Scope
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


def _at_hook(chains: list[tuple[Any, ...]]) -> "_AddByRow | _EachOwn":
    kinds = {chain for chain in chains if chain}
    edits = [chain[0] for chain in kinds]
    plain = all(len(c) == 1 and isinstance(c[0], Edit) and isinstance(c[0].op, Add) for c in kinds)
    plain = plain and len({len(e.op.vector) for e in edits}) == 1
    if plain and len({e.scope for e in edits}) == 1 and all(e.gate is None and e.watch is None for e in edits):
        return _AddByRow(chains)
    return _EachOwn(chains)


def _check_rows(frame: Frame, n: int) -> None:
    """Refuse prompts that no entry of `rows` belongs to, once per batch (asking a GPU costs a wait).

    Raises:
        DataError: says how many there are.
    """
    if frame.position.shape[1] > 1 and int(frame.row.max()) >= n:
        raise DataError(f"by_row was given edits for {n} prompts, and prompt {int(frame.row.max())} is being run")


class _AddByRow:
    """Every row has its own vector added: one gather and one sum for the whole batch."""

    def __init__(self, chains: list[tuple[Any, ...]]) -> None:
        edits: list[Edit] = list(dict.fromkeys(chain[0] for chain in chains if chain))
        number = {edit: i + 1 for i, edit in enumerate(edits)}
        vectors = [edit.op.vector for edit in edits if isinstance(edit.op, Add)]
        self.first = edits[0].op
        self.scope: Scope = edits[0].scope
        self.table: Float[Tensor, "edit d"] = torch.stack([torch.zeros_like(vectors[0]), *vectors])
        self.index: Int[Tensor, " row"] = torch.tensor([number[c[0]] if c else 0 for c in chains])
        self.spares_prompt = self.scope.spares_prompt

    def __call__(self, act: Tensor, hook: Any = None) -> Tensor:
        frame = frame_of(act)
        _check_rows(frame, len(self.index))
        x = act.flatten(2)
        check_width(self.first, x, hook)
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        self.table, self.index = self.table.to(wide), self.index.to(act.device)
        added = wide + self.table[self.index[frame.row]][:, None]
        return torch.where(self.scope(frame)[..., None], added.to(x.dtype), x).view_as(act)


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
