"""Small training runs to be watched: zoo models that learn word sequences, and what they leave behind, bit by bit."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from synthetic import chat_tokenizer, concept, words
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from safety_lens.data import Concept
from safety_lens.monitors.asking import Probes
from safety_lens.monitors.readings import Pairs

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PAIRS = Pairs(train=6, test=6)


def prompts(seed: int, n: int = 8) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [words(generator, 5) for _ in range(n)]


PROBES = Probes(harmful=prompts(1), harmless=prompts(2), lookalike=(), n=4, new_tokens=3, facts=0)


def tiny_concepts() -> list[Concept]:
    """Two concepts that a random model can tell: one side says w40 where the other says w50 (or w60, w70)."""

    def saying(a: str, b: str) -> Callable[[torch.Generator], tuple[str, str]]:
        def sides(generator: torch.Generator) -> tuple[str, str]:
            stem = words(generator, 4)
            return f"{stem} {a}", f"{stem} {b}"

        return sides

    n = {"train": 8, "val": 0, "test": 6}
    return [
        concept(saying("w40 w41", "w50 w51"), name="joy", n=n, seed=1),
        concept(saying("w60", "w70"), name="calm", n=n, seed=2),
    ]


def adapted(seed: int = 0, name: str = "llama", model: nn.Module | None = None, **lora: Any) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = zoo.make(name, attention_dropout=0.1) if model is None else model
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{**LORA, **lora}))


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Random token rows of one length."""

    def __init__(self, n: int = 64, length: int = 12, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(4, zoo.VOCAB, (n, length), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "labels": self.rows[index].clone()}


def trainer(
    model: nn.Module,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    data: Any = None,
    collate: Any = None,
    **more: Any,
) -> Trainer:
    """A Trainer on CPU; eight steps of four rows, a constant large learning rate, nothing saved or reported."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1000,
        "dataloader_pin_memory": False,
        **more,
    }
    args = TrainingArguments(str(folder), **settings)
    return Trainer(
        model=model,
        args=args,
        train_dataset=Rows() if data is None else data,
        eval_dataset=Rows(8, seed=9),
        data_collator=collate,
        processing_class=chat_tokenizer() if tokenizer is None else tokenizer,
        callbacks=list(callbacks),
    )


def left_behind(made: Trainer) -> dict[str, Tensor]:
    """Everything that a later step depends on: parameters, optimizer state, and all random streams."""
    out = {f"parameter/{name}": p.detach().clone() for name, p in made.model.named_parameters()}
    for index, state in made.optimizer.state_dict()["state"].items():
        out |= {f"optimizer/{index}/{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    out["rng/torch"] = torch.get_rng_state()
    out["rng/numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    out["rng/python"] = torch.tensor(random.getstate()[1])
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names that differ by a bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
