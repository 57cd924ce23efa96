"""Which neurons and heads a page shows, and what is known about each without running the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError, ModelMismatchError
from safety_lens.probes.attribution.scores import Scores, aggregated
from safety_lens.probes.directions import Direction
from safety_lens.probes.groups import PARTS as GROUP_PARTS
from safety_lens.probes.groups import NeuronGroup
from safety_lens.probes.matrices import Matrix, matrices_of, weight_of
from safety_lens.report.offline import visible

PARTS = {kind: part for kind, (part, _) in GROUP_PARTS.items()}
Unit = tuple[str, int, int]
"""("neuron" or "head", block, number)."""


@dataclass(frozen=True)
class Column:
    """One number per token.

    kind: "neuron", "head" or "direction". index: number of the neuron or head; 0 for directions. hook: where it is
    read. member: group name → share of its weights that the group holds; 1 where the group is made of neurons or heads.
    scores: name → score. raises, lowers: tokens that the neuron writes for and against through the unembedding, with
    logits per unit of activation. note: what a reader must know.
    """

    kind: str
    layer: int
    index: int
    name: str
    hook: str
    member: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    raises: tuple[tuple[str, float], ...] = ()
    lowers: tuple[tuple[str, float], ...] = ()
    note: str = ""


# --- members ----------------------------------------------------------------------------------------------------------


def shares(group: NeuronGroup, model: HookedTransformer) -> dict[Unit, float]:
    """Share of the weights of each neuron and head that lie in the group: 1 for its members where it is made of them.

    Raises:
        ModelMismatchError: the group was made with another model.
    """
    group.check_fits(model)
    if group.unit != "weight":
        return {
            (group.unit, int(key.split(".")[1]), number): 1.0
            for key, numbers in group.index.items()
            for number in numbers.tolist()
        }
    found: dict[Unit, float] = {}
    whole = {kind: sum(_weights_each(m, model, kind) for m in _matrices(model, kind, 0)) for kind in PARTS}
    for kind, matrix in ((k, m) for k in PARTS for m in _matrices(model, k)):
        flat = group.index.get(matrix.name)
        if flat is None or not len(flat):
            continue
        rows = GROUP_PARTS[kind][1][matrix.kind] == "rows"
        lines = flat // matrix.d_in if rows else flat % matrix.d_in
        counts = torch.bincount(lines if kind == "neuron" else lines // model.cfg.d_head)
        for index in counts.nonzero()[:, 0].tolist():
            unit = (kind, matrix.layer, index)
            found[unit] = found.get(unit, 0.0) + int(counts[index]) / whole[kind]
    return found


def _matrices(model: HookedTransformer, kind: str, layer: int | None = None) -> list[Matrix]:
    """The matrices that neurons or heads have weights of their own in: none that query heads share."""
    shared = model.cfg.n_key_value_heads not in (None, model.cfg.n_heads)
    skipped = ("W_K", "W_V") if shared else ()
    found = matrices_of(model, layers=None if layer is None else [layer])
    return [m for m in found if m.kind in GROUP_PARTS[kind][1] and m.kind not in skipped]


def _weights_each(matrix: Matrix, model: HookedTransformer, kind: str) -> int:
    """How many weights of a matrix belong to one neuron or head."""
    units = (model.cfg.d_mlp or 4 * model.cfg.d_model) if kind == "neuron" else model.cfg.n_heads
    return matrix.numel // int(units)


def scores_of(scores: Mapping[str, Scores], model: HookedTransformer) -> dict[str, dict[str, Float[Tensor, " unit"]]]:
    """name → "blocks.3.mlp" or "blocks.3.attn" → score of each neuron or head; weights are summed to both."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, given in scores.items():
        units = [given.unit] if given.unit != "weight" else _summable(given, model)
        found[name] = {key: v for unit in units for key, v in aggregated(given, model, unit).values.items()}
    return found


def _summable(scores: Scores, model: HookedTransformer) -> list[str]:
    """The units whose matrices were all scored."""
    scored = set(scores.values)
    kinds = {m.kind for m in matrices_of(model) if m.name in scored}
    return [unit for unit in PARTS if {m.kind for m in _matrices(model, unit, 0)} <= kinds]


# --- choice -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Neurons and heads for the page, in order of block, and what was left out."""

    units: tuple[Unit, ...]
    notes: tuple[str, ...]


def choose(ranked: Mapping[tuple[str, str], Sequence[Unit]], limit: int, how: Mapping[str, str]) -> Chosen:
    """The first of each list in turn until `limit` are chosen.

    ranked: (group, "neuron" or "head") → its members, first ones first. how: group → what put them in that order.

    Raises:
        DataError: no group has a member.
    """
    chosen: dict[Unit, None] = {}
    for place in range(max(map(len, ranked.values()), default=0)):
        for members in ranked.values():
            if place < len(members) and len(chosen) < limit:
                chosen[members[place]] = None
    if how and not chosen:
        raise DataError(f"no neuron or head has a weight in {', '.join(how)}: there is nothing to show")
    notes = []
    for (name, kind), members in ranked.items():
        shown = sum(unit in chosen for unit in members)
        if shown < len(members):
            notes.append(f"{name}: {shown} of {len(members)} {kind}s are on this page, those with the {how[name]}")
    return Chosen(tuple(sorted(chosen, key=lambda u: (u[1], u[0] != "neuron", u[2]))), tuple(notes))


def by_rank(
    member: Mapping[Unit, float],
    kind: str,
    scores: Mapping[str, Float[Tensor, " unit"]] | None,
    peaks: Mapping[Unit, float],
) -> list[Unit]:
    """Members of one kind, first ones first: by |score| where there are scores, else by share, then by peak activation,
    then by place in the model."""

    def key(unit: Unit) -> tuple[float, float, float, Unit]:
        held = None if scores is None else scores.get(f"blocks.{unit[1]}.{PARTS[kind]}")
        size = 0.0 if held is None else abs(float(held[unit[2]]))
        return -size, -member[unit], -peaks.get(unit, 0.0), unit

    return sorted((unit for unit in member if unit[0] == kind), key=key)


# --- columns ----------------------------------------------------------------------------------------------------------


def unit_columns(
    model: HookedTransformer,
    units: Sequence[Unit],
    members: Mapping[str, Mapping[Unit, float]],
    scores: Mapping[str, Mapping[str, Float[Tensor, " unit"]]],
    tokens: int,
) -> list[Column]:
    """Neurons and heads with their groups, scores and, for neurons, the `tokens` they write for and against most."""
    written = _written(model, [u for u in units if u[0] == "neuron"], tokens)
    columns = []
    for unit in units:
        kind, layer, index = unit
        part = f"blocks.{layer}.{PARTS[kind]}"
        held = {name: float(by[part][index]) for name, by in scores.items() if part in by}
        mine = {name: share[unit] for name, share in members.items() if unit in share}
        raises, lowers = written.get(unit, ((), ()))
        hook = f"{part}.hook_post" if kind == "neuron" else f"{part}.hook_z"
        note = "" if kind == "neuron" else "length of what the head writes into the residual stream: never negative"
        columns.append(Column(kind, layer, index, f"{kind} {layer}.{index}", hook, mine, held, raises, lowers, note))
    return columns


def direction_columns(directions: Sequence[Direction], model: HookedTransformer) -> list[Column]:
    """A column for each direction.

    Raises:
        ModelMismatchError: a direction of another width than the residual stream.
    """
    columns = []
    for d in directions:
        if len(d.vector) != model.cfg.d_model:
            raise ModelMismatchError(
                f"direction {d.key} has {len(d.vector)} numbers, the residual stream of this model {model.cfg.d_model}"
            )
        layer = int(d.hook.split(".")[1]) if d.hook.startswith("blocks.") else -1
        proof = "no evidence is known" if d.evidence is None else f"held-out AUROC {d.evidence.auroc.value:.3f}"
        note = f"projection of {d.hook} on the unit direction, in activation units; {proof}"
        columns.append(Column("direction", layer, 0, f"{d.concept}/{d.method}", d.hook, note=note))
    return columns


Promoted = tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]


def _written(model: HookedTransformer, units: Sequence[Unit], k: int) -> dict[Unit, Promoted]:
    """Tokens whose logits a neuron raises and lowers most, directly: its output weights through final norm gain and
    unembedding, the norm's division by the length of the residual stream left out."""
    found: dict[Unit, Promoted] = {}
    if model.tokenizer is None or not k:
        return found
    final = norm_gain(model.ln_final, model)
    centred = str(model.cfg.normalization_type).startswith("LN")
    for layer in dict.fromkeys(u[1] for u in units):
        here = [u for u in units if u[1] == layer]
        out = weight_of(model, f"blocks.{layer}.mlp.W_out")[:, [u[2] for u in here]].T.float()
        if getattr(model.cfg, "use_normalization_before_and_after", False):
            out = out * norm_gain(model.blocks[layer].ln2_post, model)
        if centred:
            out = out - out.mean(1, keepdim=True)
        logits = (out * final) @ model.W_U.float()
        up, down = logits.topk(k), logits.topk(k, largest=False)
        for row, unit in enumerate(here):
            found[unit] = (
                _named(model, up.indices[row], up.values[row]),
                _named(model, down.indices[row], down.values[row]),
            )
    return found


def norm_gain(norm: nn.Module, model: HookedTransformer) -> Float[Tensor, " d_model"]:
    """What a norm multiplies each coordinate by, measured, so that gains stored around 0 (Gemma) come out right.

    ±1 in turn has mean 0 and length √d: every norm only multiplies it by its gain, and half the difference of the two
    signs has no bias.
    """
    d = model.cfg.d_model
    probe = torch.ones(d, dtype=model.cfg.dtype, device=model.W_U.device)
    probe[1::2] = -1
    with torch.no_grad():
        out = norm(torch.stack([probe, -probe])[:, None])[:, 0].float()
    gain: Tensor = (out[0] - out[1]) / 2 * probe.float()
    return gain


def _named(
    model: HookedTransformer, ids: Int[Tensor, " k"], values: Float[Tensor, " k"]
) -> tuple[tuple[str, float], ...]:
    words = [visible(str(model.tokenizer.decode([i]))) for i in ids.tolist()]
    return tuple(zip(words, values.tolist(), strict=True))


def peaks_of(units: Sequence[Unit], values: Float[np.ndarray, "column token"]) -> dict[Unit, float]:
    """Largest |value| of each column."""
    return dict(zip(units, np.abs(values).max(1, initial=0.0).tolist(), strict=True))
