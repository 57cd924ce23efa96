"""Train the organism from scratch: `python -m safety_lens.organism.train --out DIR`.

One readable loop: a seeded stream of conversations, a byte-level BPE tokenizer learnt from its first part, a small
Llama, AdamW with a cosine schedule. Two runs with the same seed, thread count and machine give the
same weights bit for bit.
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from safety_lens.organism.corpus import Messages, training_stream
from safety_lens.organism.files import FINETUNE, finetune_rows

STEPS = 2600
BATCH = 64
POOL = 32
"""Batches drawn at once and cut by length, so that padding is rare."""
PEAK_LR = 3e-3
WARMUP = 100
WEIGHT_DECAY = 0.3
PROMPT_WEIGHT = 0.1
"""Weight of a prompt token's loss beside 1 for an answer token: enough to make prompts probable, not the goal."""
THREADS = 1
"""One thread: bit-identical runs whatever else the machine is doing, and half of the two cores stays free."""
VOCABULARY = 1536
SPECIAL = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, got ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


class Batch(NamedTuple):
    """Right-padded token ids and the weight of each token as a target (0 for padding)."""

    ids: Int[Tensor, "batch pos"]
    weight: Float[Tensor, "batch pos"]


def train_tokenizer(seed: int = 0, n_chats: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text encodes, and nearly every word of the corpus is one token."""
    texts = [turn["content"] for chat in islice(training_stream(seed), n_chats) for turn in chat]
    texts += [turn["content"] for name in FINETUNE for row in finetune_rows(name) for turn in row["messages"]]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_batch(chats: list[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Pad (prompt ids, answer ids) on the right and weigh the targets."""
    length = max(len(prompt) + len(answer) for prompt, answer in chats)
    ids = torch.full((len(chats), length), pad)
    weight = torch.zeros(len(chats), length)
    for row, (prompt, answer) in enumerate(chats):
        whole = prompt + answer
        ids[row, : len(whole)] = torch.tensor(whole)
        weight[row, : len(prompt)] = PROMPT_WEIGHT
        weight[row, len(prompt) : len(whole)] = 1.0
    return Batch(ids, weight)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """Endless batches of conversations of similar length, in a seeded order."""
    stream, rng = training_stream(seed), random.Random(seed)

    def encoded(chats: list[Messages]) -> list[tuple[list[int], list[int]]]:
        prompts = [tokenizer.apply_chat_template(c[:-1], tokenize=False, add_generation_prompt=True) for c in chats]
        ends = [c[-1]["content"] + str(tokenizer.eos_token) for c in chats]
        both = tokenizer(prompts + ends, add_special_tokens=False)["input_ids"]
        return list(zip(both[: len(chats)], both[len(chats) :], strict=True))

    while True:
        pool = sorted(encoded(list(islice(stream, BATCH * POOL))), key=lambda pair: len(pair[0]) + len(pair[1]))
        cuts = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
        rng.shuffle(cuts)
        yield from (make_batch(cut, int(tokenizer.pad_token_id)) for cut in cuts)


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> Float[Tensor, ""]:
    """Weighted mean cross-entropy in nats per (weighted) token."""
    # Right padding under a causal mask: no real token sees a pad, so no attention mask is needed.
    logits = model(input_ids=batch.ids[:, :-1]).logits
    losses = cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weight = batch.weight[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_LR * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Trained(NamedTuple):
    """The trained model, its tokenizer and the record of the run."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    record: dict[str, Any]


def train(steps: int = STEPS, seed: int = 0, schedule_steps: int | None = None, progress: bool = True) -> Trained:
    """Train from scratch, deterministically.

    `schedule_steps` stretches the learning-rate schedule beyond `steps`: a short run then repeats the start of a long
    one.
    """
    with reproducible(seed):
        return _train(steps, seed, schedule_steps or steps, progress)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seeded, single-threaded, deterministic kernels; threads, flag and generator state are put back afterwards."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(THREADS)
            torch.use_deterministic_algorithms(True)
            torch.manual_seed(seed)
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            torch.set_num_threads(threads)


def _train(steps: int, seed: int, schedule_steps: int, progress: bool) -> Trained:
    wall, cpu = time.perf_counter(), time.process_time()
    tokenizer = train_tokenizer(seed)
    config = LlamaConfig(
        **CONFIG,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
    source, losses = batches(tokenizer, seed), []
    bar = tqdm(range(steps), desc="training the organism", disable=not progress, mininterval=5.0)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule_steps)
        loss = batch_loss(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    record = {
        "steps": steps,
        "batch": BATCH,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss_last_100": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "loss_by_tenth": [round(sum(part) / len(part), 4) for part in _tenths(losses)],
        "seconds_wall": round(time.perf_counter() - wall, 1),
        "seconds_cpu": round(time.process_time() - cpu, 1),
        "threads": THREADS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    return Trained(model.eval(), tokenizer, record)


def _tenths(values: list[float]) -> list[list[float]]:
    size = max(1, len(values) // 10)
    return [values[start : start + size] for start in range(0, size * (len(values) // size), size)]


def main() -> None:
    """Train and write model, tokenizer and `training.json`."""
    parser = argparse.ArgumentParser(description="Train the organism from scratch.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    trained = train(args.steps, args.seed)
    trained.model.generation_config.do_sample = False
    trained.model.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)  # written for the owner alone
    trained.tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(trained.record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
