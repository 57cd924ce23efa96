"""Neuron groups of the organism to be frozen and watched."""

from pathlib import Path

import torch

from safety_lens.models import load_model
from safety_lens.probes.groups import group_of, save_groups
from safety_lens.probes.matrices import matrices_of


def save_organism_groups(folder: Path) -> Path:
    """Two groups: "entries", scattered over the matrices that the runs adapt, and "units", neurons."""
    model = load_model("organism", check=False)
    generator = torch.Generator().manual_seed(0)
    index = {
        m.name: torch.randperm(m.numel, generator=generator)[: m.numel // 50]
        for m in matrices_of(model, ["W_Q", "W_V"])
    }
    made = [
        group_of(model, "entries", "weight", index),
        group_of(model, "units", "neuron", {"blocks.2.mlp": [1, 2], "blocks.5.mlp": [40]}),
    ]
    return save_groups(folder, made, model)
