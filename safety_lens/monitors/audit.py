"""A data-free audit of an adapter or a checkpoint: what its weights alone say about a concept, without a forward.

MATH M12, M13 and M15. Every figure stands beside what a random direction or a random change of the same size gives.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from safety_lens.activations import capture
from safety_lens.data import Encoded
from safety_lens.errors import DataError
from safety_lens.log import NAN, Measurement
from safety_lens.models import hooks_at
from safety_lens.monitors.audit_sources import changes_of, name_of, read_base
from safety_lens.monitors.intruders import count_intruders, random_like
from safety_lens.monitors.weight_changes import LAST, Change
from safety_lens.probes.directions import Direction
from safety_lens.types import Prompt

RANDOM = 200
"""Random directions behind each chance level; the 95 % quantile of 200 is the tenth largest."""
TOTAL = "total"
Gaps = Mapping[str, Tensor]
"""For each hook of `gap_hooks`, [d_in]: mean of the positives minus mean of the negatives, in the untrained model."""


def audit_adapter(
    base: str | Path | nn.Module,
    adapter: str | Path | nn.Module,
    directions: Sequence[Direction],
    *,
    gaps: Gaps | None = None,
    intruders: bool = True,
    seed: int = 0,
    other_base: bool = False,
) -> list[Measurement]:
    """What an adapter (or a fully trained checkpoint) does to directions of the residual stream, from weights alone.

    Rows have split = the matrix's name, or "total"; each figure is followed by its chance level, named `…_random95`:
    95 % of random directions (or the one random change) give less. NaN where nothing changed.

    alignment_write (M12): ‖d̂ᵀΔW‖/‖ΔW‖·√d_model of a matrix that writes into the residual stream; 1 is what an isotropic
    change gives. Total: over the writers before the direction's hook. alignment_read: the same of a matrix that reads
    it, ‖ΔW d̂‖, with d̂ as the norm in front turns it. Total: over the readers behind the hook.
    predicted_shift (M13, needs `gaps`): Σ ΔW·gap over the writers before the hook, its part along the direction as a
    share of the direction's length; predicted_cosine: of the direction before and after that sum. First order: what
    changed readers feed into writers is not in it; `changed_share_write` says how much of ‖ΔW‖² is. NaN for models that
    normalise what they write.
    intruders (M15): see intruders.count_intruders. delta_norm: ‖ΔW‖; relative_change: ‖ΔW‖/‖W‖. Subject "run".

    Memory beside the models: the factors of plain LoRA in float64, and a few copies of one matrix at a time; for every
    other adapter and for whole checkpoints 8 bytes for each weight of the matrices that changed.

    Args:
        base: the model that was trained: folder, hub id, "organism", or a Hugging Face model in memory.
        adapter: adapter folder, folder of a checkpoint, hub id, or a model in memory (with adapters, or whole).
        gaps: from `input_gaps`, cached with the base; without them there is no M13.
        other_base: take an adapter that names another base than this one.

    Raises:
        ModelMismatchError: the adapter was trained on another base; both are named.
        DataError: a direction that is not of the residual stream.
    """
    hf = read_base(base)
    _check_directions(hf, directions)
    changes = list(changes_of(hf, name_of(base, hf), adapter, other_base))
    if not changes:
        return [Measurement("run", "delta_norm", 0.0, n=0, split=TOTAL, note="no matrix differs from the base")]
    rows = _sizes(changes)
    generator = torch.Generator().manual_seed(seed)
    random = _units(torch.randn(RANDOM, hf.config.hidden_size, generator=generator, dtype=torch.float64))
    chance = [change.along(random) for change in changes]
    for direction in directions:
        rows += _alignment(direction, changes, chance)
        if gaps is not None:
            rows += _predicted(direction, changes, gaps, generator)
    return [*rows, *(_intruders(changes, seed) if intruders else [])]


def gap_hooks(model: HookedTransformer) -> list[str]:
    """Hooks that hold what the writing matrices read: `attn.hook_z` and `mlp.hook_post` of every block."""
    return [*hooks_at(model, "z"), *hooks_at(model, "mlp_post")]


def input_gaps(
    model: HookedTransformer,
    positives: Sequence[Prompt | Encoded],
    negatives: Sequence[Prompt | Encoded],
    **options: Any,
) -> dict[str, Tensor]:
    """x̄₊ − x̄₋ at every hook of `gap_hooks`, in the model given (the untrained one): what `audit_adapter` caches.

    options: of `capture` (positions, raw, batch_size, …); take those the directions were read with.
    """
    hooks = gap_hooks(model)
    pos, neg = (capture(model, prompts, hooks, **options).acts for prompts in (positives, negatives))
    return {hook: pos[hook].double().mean(0) - neg[hook].double().mean(0) for hook in hooks}


# --- M12, M13, M15 --------------------------------------------------------------------------------------------------


def _sizes(changes: Sequence[Change]) -> list[Measurement]:
    rows = list[Measurement]()
    squares = [(c.squared_norm, float(c.before.square().sum())) for c in changes]
    for c, (new, old) in zip(changes, squares, strict=True):
        rows.append(Measurement("run", "delta_norm", math.sqrt(max(new, 0.0)), split=c.name))
        rows.append(Measurement("run", "relative_change", _ratio(new, old), split=c.name))
    total, before = (sum(column) for column in zip(*squares, strict=True))
    writes = sum(new for c, (new, _) in zip(changes, squares, strict=True) if c.writes)
    note = "over the matrices that changed"
    return [
        *rows,
        Measurement("run", "delta_norm", math.sqrt(total), n=len(changes), split=TOTAL, note=note),
        Measurement("run", "relative_change", _ratio(total, before), n=len(changes), split=TOTAL, note=note),
        Measurement("run", "changed_share_write", writes / total if total else NAN, n=len(changes), split=TOTAL),
    ]


def _alignment(direction: Direction, changes: Sequence[Change], chance: Sequence[Tensor]) -> list[Measurement]:
    unit = _units(direction.vector.double()[None])
    at, rows = _block_of(direction), list[Measurement]()
    for metric, writes in (("alignment_write", True), ("alignment_read", False)):
        along, by_chance, size, n = torch.zeros(1).double(), torch.zeros(RANDOM).double(), 0.0, 0
        for change, random in zip(changes, chance, strict=True):
            if change.writes != writes:
                continue
            mine = change.along(unit)
            rows += _pair(direction, metric, mine, random, change.squared_norm, change.name, 1)
            if (change.block <= at) == writes:  # writers before the hook, readers behind it
                along, by_chance, size, n = along + mine, by_chance + random, size + change.squared_norm, n + 1
        rows += _pair(direction, metric, along, by_chance, size, TOTAL, n)
    return rows


def _pair(
    direction: Direction, metric: str, mine: Tensor, random: Tensor, size: float, name: str, n: int
) -> list[Measurement]:
    width, subject = len(direction.vector), f"{direction.concept}/{direction.method}"

    def lift(squared: float) -> float:
        return math.sqrt(max(squared, 0.0) / size * width) if size > 0 else NAN

    chance = lift(float(random.quantile(0.95)))
    return [
        Measurement(subject, metric, lift(float(mine)), n=n, hook=direction.hook, split=name),
        Measurement(subject, f"{metric}_random95", chance, n=RANDOM, hook=direction.hook, split=name),
    ]


def _predicted(
    direction: Direction, changes: Sequence[Change], gaps: Gaps, generator: torch.Generator
) -> list[Measurement]:
    """M13 for one direction: the sum over writers before its hook, and the same with random gaps of equal length."""
    vector, at = direction.vector.double(), _block_of(direction)
    subject = f"{direction.concept}/{direction.method}"
    used = [c for c in changes if c.writes and 0 <= c.block <= at]
    unknown = any(c.norm is not None for c in used)
    shift, random = torch.zeros_like(vector), torch.zeros(RANDOM, dtype=torch.float64)
    for change in used:
        gap = _gap(change, gaps)
        shift += change.on(gap)
        noise = torch.randn(RANDOM, len(gap), generator=generator, dtype=torch.float64)
        noise *= gap.norm() / noise.norm(dim=1, keepdim=True)
        random += noise @ (change.whole().T @ vector)
    square = vector.square().sum()
    after = vector + shift
    values = {
        "predicted_shift": float(shift @ vector / square),
        "predicted_shift_random95": float((random / square).abs().quantile(0.95)),
        "predicted_cosine": float(after @ vector / (after.norm() * vector.norm())),
        "predicted_shift_norm": float(shift.norm() / vector.norm()),
    }
    note = "this model normalises what it writes: no first-order prediction" if unknown else None
    return [
        Measurement(subject, name, NAN if unknown else value, n=len(used), hook=direction.hook, split=TOTAL, note=note)
        for name, value in values.items()
    ]


def _gap(change: Change, gaps: Gaps) -> Float[Tensor, " d_in"]:
    attention = any(part in ("self_attn", "attn", "attention") for part in change.name.split("."))
    hook = f"blocks.{change.block}.{'attn.hook_z' if attention else 'mlp.hook_post'}"
    if hook not in gaps:
        raise DataError(f"the input of {change.name} is needed, and gaps has no {hook}: make them with input_gaps")
    return gaps[hook].double()


def _intruders(changes: Sequence[Change], seed: int) -> list[Measurement]:
    rows, sums = list[Measurement](), torch.zeros(2, 3, dtype=torch.float64)
    for number, c in enumerate(changes):
        if not 0 <= c.block < LAST:
            continue
        whole, before = c.whole(), c.before
        rank = min(whole.shape) if c.down is None else len(c.down)
        found, random = count_intruders(before, [whole, random_like(whole, rank, seed + number)], seed=seed)
        for row, (metric, count) in enumerate((("intruders", found), ("intruders_random", random))):
            rows.append(Measurement("run", metric, count.value, count.low, count.high, split=c.name))
            sums[row] += torch.tensor(count, dtype=torch.float64)
    note = "of the ten leading singular vectors of each matrix"
    totals = [
        Measurement(
            "run", metric, float(row[0]), float(row[1]), float(row[2]), n=len(rows) // 2, split=TOTAL, note=note
        )
        for metric, row in zip(("intruders", "intruders_random"), sums, strict=True)
    ]
    return [*rows, *totals]


def _check_directions(hf: PreTrainedModel, directions: Sequence[Direction]) -> None:
    width = hf.config.hidden_size
    for d in directions:
        if len(d.vector) != width or not ("resid" in d.hook or d.hook.endswith(("attn_out", "mlp_out"))):
            raise DataError(
                f"{d.key} has width {len(d.vector)}: an audit needs directions of the residual stream (width {width})"
            )


def _block_of(direction: Direction) -> int:
    """The last block whose writing matrices can reach the hook."""
    block = int(direction.hook.split(".")[1])
    return block - 1 if direction.hook.endswith("resid_pre") else block


def _units(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _ratio(new: float, old: float) -> float:
    return math.sqrt(max(new, 0.0) / old) if old > 0 else NAN
