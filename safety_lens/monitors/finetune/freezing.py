"""What a run keeps frozen: groups named in its configuration, read early and checked against the model it trains."""

import warnings
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from safety_lens.artifacts import MANIFEST, load_artifact, sha256_of
from safety_lens.interventions.freezing import Frozen, NothingToFreeze, freeze, trained_matrices
from safety_lens.loading.live import has_quantised
from safety_lens.models import load_model
from safety_lens.monitors.finetune.early import chosen_group, split_name
from safety_lens.probes.groups import KIND, NeuronGroup, load_groups


def named_groups(names: Sequence[str], hf: PreTrainedModel | None = None) -> list[NeuronGroup]:
    """Groups from `FOLDER` (which then holds one group) or `FOLDER:GROUP`.

    hf: the model to be trained, without adapters; groups of another one are refused. Weights that bitsandbytes holds
    are compared by shape alone.

    Raises:
        ArtifactError: no such folder or group, or a folder of several and no name.
        ModelMismatchError: groups of another model.
    """
    comparable = hf is not None and not has_quantised(hf)
    model = load_model(hf, check=False) if hf is not None and comparable and names else None
    return [_named(text, load_groups(split_name(text)[0], model)) for text in names]


def _named(text: str, found: Sequence[NeuronGroup]) -> NeuronGroup:
    have = [group.name for group in found]
    return found[have.index(chosen_group(text, have))]


def group_lines(live: nn.Module, names: Sequence[str], groups: Sequence[NeuronGroup], what: str) -> list[str]:
    """A line for each group of a run: what is done with it, its name, members, share of what is trained, and source.

    live: the model about to be trained. names: `FOLDER:GROUP` of each group. what: such as "frozen".
    """
    if not groups:
        return []
    trained = {matrix.name: matrix for matrix in trained_matrices(live)}
    of = sum(matrix.numel for matrix in trained.values())
    return [_line(text, group, set(trained), of, what) for text, group in zip(names, groups, strict=True)]


def _line(text: str, group: NeuronGroup, trained: Set[str], of: int, what: str) -> str:
    entries = {name: len(flat) for name, flat in group.entries().items()}
    members = f"{group.size:,} {group.unit}{'s' if group.size != 1 else ''}"
    weights = "" if group.unit == "weight" else f", {sum(entries.values()):,} weights"
    inside = sum(count for name, count in entries.items() if name in trained)
    share = f"{inside / of:.3%} of the {of:,} weights that are trained" if of else "no matrix of a block is trained"
    return f"{what}: {group.name}: {members}{weights}; {share}; from {Path(split_name(text)[0]) / MANIFEST}"


def frozen_entry(names: Sequence[str], frozen: Frozen | None) -> dict[str, Any]:
    """What the manifest of a run says of its frozen groups."""
    if frozen is None:
        return {}
    files = {text: sha256_of(Path(split_name(text)[0]) / MANIFEST) for text in names}
    made = {text: load_artifact(split_name(text)[0], kind=KIND).manifest.get("created") for text in names}
    return {
        "frozen": {
            "groups": {text: {"manifest_sha256": files[text], "created": made[text]} for text in names},
            "entries": frozen.size,
            "entries_by_route": frozen.counts(),
            "share_untrained": frozen.untrained,
            "largest_move": frozen.moved(),
        }
    }


def freeze_named(live: nn.Module, groups: Sequence[NeuronGroup]) -> tuple[Frozen | None, list[str]]:
    """Freeze groups in a model about to be trained, and what a reader must know of it; None where there are none."""
    if not groups:
        return None, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFreeze)  # a note says it
        frozen = freeze(live, groups)
    notes = []
    if frozen.untrained == 1:
        notes.append(f"nothing to freeze: no matrix of {', '.join(frozen.groups)} is trained by this run")
    elif frozen.untrained > 0:
        notes.append(
            f"{frozen.untrained:.0%} of the {frozen.size:,} frozen entries lie in matrices that are not trained and"
            " could not move anyway"
        )
    if has_quantised(live):
        notes.append("the base is quantised: the model of the frozen groups was compared by shapes, not by weights")
    return frozen, notes
