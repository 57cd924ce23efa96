"""LoRA runs of the organism on its own fine-tuning sets, loss on answers only, to be watched."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback
from watched import trainer

from safety_lens.models import load_hf
from safety_lens.organism import DATA_DIR

TARGETS = ["q_proj", "v_proj"]


def organism(
    seed: int = 0, dropout: float = 0.0, layers: Sequence[int] | None = None, targets: Sequence[str] = TARGETS
) -> tuple[PeftModel, Any]:
    """The organism with fresh adapters, and its tokenizer."""
    base, tokenizer = load_hf("organism", device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM",
            layers_to_transform=None if layers is None else list(layers),
        )  # fmt: skip
        return get_peft_model(base, config), tokenizer


def answers(name: str, tokenizer: Any) -> list[tuple[list[int], int]]:
    """Token ids of each conversation of a set, and how many of them are the prompt."""
    out = []
    for line in (DATA_DIR / f"finetune_{name}.jsonl").read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        asked = tokenizer.apply_chat_template(messages[:-1], return_dict=True, add_generation_prompt=True)["input_ids"]
        out.append((whole, len(asked)))
    return out


def padded(rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
    """One batch: padded behind, loss on the answer only."""
    width = max(len(ids) for ids, _ in rows)
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, (ids, asked) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = 1
        labels[i, asked : len(ids)] = torch.tensor(ids[asked:])
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def organism_trainer(
    name: str,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    seed: int = 0,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
    **more: Any,
) -> Trainer:
    """A run on "benign", "facts" or "compliance" (the organism's own boilerplate); 16 rows a step."""
    model, tokenizer = organism(seed, dropout, layers)
    settings = {"per_device_train_batch_size": 16, "seed": seed, "remove_unused_columns": False, **more}
    return trainer(
        model, folder, callbacks, tokenizer=tokenizer, data=answers(name, tokenizer), collate=padded, **settings
    )
