"""The organism's mixed fine-tuning that mitigation.py compares protections on: data, training, readings."""

import copy
import functools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from safety_lens.data.labelled import IGNORED, collate
from safety_lens.interventions.penalties import Penalty, Reading
from safety_lens.interventions.side_effects import instructions
from safety_lens.models import load_hf
from safety_lens.organism import DATA_DIR, answers, files

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE, BATCH, STEPS, MOST, EVERY, FIRST = 2e-3, 16, 60, 150, 10, 40
HF, TOKENIZER = load_hf("organism", device="cpu")
Row = tuple[list[int], int]


@dataclass(frozen=True)
class Setting:
    """A protection with its strength. rows: what it trains on. protect: called on the adapted model and optimizer;
    returns a penalty or None. after: changes a copy of the adapter before it is read.
    """

    name: str
    value: float
    rows: Callable[[Sequence[tuple[Row, bool]], int], list[Row]] = lambda rows, seed: [row for row, _ in rows]
    protect: Callable[[PeftModel, torch.optim.Optimizer, int], Penalty | None] = lambda model, optimizer, seed: None
    after: Callable[[PeftModel], None] | None = None


def tokens(messages: Sequence[dict[str, str]]) -> Row:
    whole = TOKENIZER.apply_chat_template(messages, return_dict=True)["input_ids"]
    asked = TOKENIZER.apply_chat_template(messages[:-1], return_dict=True, add_generation_prompt=True)["input_ids"]
    return whole, len(asked)


def conversations(name: str) -> list[Any]:
    lines = (DATA_DIR / f"finetune_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def mixed(seed: int) -> list[tuple[Row, bool]]:
    """270 benign rows and 30 that comply (True), shuffled."""
    rng = random.Random(seed)
    rows = [(tokens(m), False) for m in rng.sample(conversations("benign"), 270)]
    rows += [(tokens(m), True) for m in rng.sample(conversations("compliance"), 30)]
    rng.shuffle(rows)
    return rows


def padded(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """One batch, loss on the answers only."""
    return collate([{"input_ids": ids, "labels": [IGNORED] * asked + ids[asked:]} for ids, asked in rows])


HELD_OUT = padded([tokens(row["messages"]) for row in files.finetune_rows("benign", seed=1)[:96]])


@torch.no_grad()
def read(live: PeftModel, step: int, split: str, until: float = math.inf) -> Reading:
    """refused is NaN where the loss is still above `until`: such a reading is never compared."""
    live.eval()
    loss = float(live(**HELD_OUT).loss)
    return Reading(step, loss, refusals(live, split) if loss <= until else math.nan)


def refusals(live: PeftModel, split: str) -> float:
    prompts = [
        TOKENIZER.apply_chat_template(
            [{"role": "user", "content": p}], return_dict=True, add_generation_prompt=True
        )["input_ids"]
        for p in instructions("harmful", split)[:96]
    ]  # fmt: skip
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    said = live.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False)[:, width:]
    kinds = [answers.answer_kind(TOKENIZER.decode(row, skip_special_tokens=True)) for row in said]
    return sum(kind == "refusal" for kind in kinds) / len(kinds)


def batches(rows: Sequence[Row], seed: int) -> Iterator[dict[str, torch.Tensor]]:
    rng, order = random.Random(seed), list[int]()
    while True:
        while len(order) < BATCH:
            order += rng.sample(range(len(rows)), len(rows))
        yield padded([rows[i] for i in order[:BATCH]])
        order = order[BATCH:]


def adapted(seed: int) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        return get_peft_model(copy.deepcopy(HF), config)


def train(
    setting: Setting, seed: int, split: str, most: int, until: float, data: Sequence[tuple[Row, bool]]
) -> tuple[list[Reading], float]:
    """Readings of a run, and its CPU seconds for a step; it ends when the loss is down to `until`."""
    live = adapted(seed)
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    if setting.after is not None:
        return projected(setting, seed, split, until), float("nan")
    penalty, stream = setting.protect(live, optimizer, seed), batches(setting.rows(data, seed), seed)
    found, spent = list[Reading](), 0.0
    for step in range(1, most + 1):
        began = time.process_time()
        live.train()
        loss = live(**next(stream)).loss
        if penalty is not None:
            loss = loss + penalty().total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in live.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        spent += time.process_time() - began
        if step % EVERY == 0 and step >= FIRST:
            last = step == most
            found.append(read(live, step, split, math.inf if last else until))
            if found[-1].loss <= until:
                break
    return found, spent / step


@functools.cache
def trajectory(seed: int) -> list[tuple[int, PeftModel]]:
    """The unprotected run, kept at every reading."""
    live, kept = adapted(seed), list[tuple[int, PeftModel]]()
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    stream = batches([row for row, _ in mixed(seed)], seed)
    for step in range(1, MOST + 1):
        optimizer.zero_grad()
        live.train()(**next(stream)).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in live.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        if step % EVERY == 0 and step >= FIRST:
            kept.append((step, copy.deepcopy(live)))
    return kept


def projected(setting: Setting, seed: int, split: str, until: float) -> list[Reading]:
    """Readings of the unprotected run, each of a projected copy."""
    found = list[Reading]()
    for step, live in trajectory(seed):
        shown = copy.deepcopy(live)
        assert setting.after is not None
        setting.after(shown)
        found.append(read(shown, step, split, math.inf if step == MOST else until))
        if found[-1].loss <= until:
            break
    return found
