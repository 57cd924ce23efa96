"""The work that every reader in `extract.py` is given: contrast prompts that share a prefix, as text and as tokens."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from models import llama_100m
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAIRS, PREFIX, SUFFIX = 32, 20, (5, 35)
VOCAB = 32000


class Work(NamedTuple):
    """Prompts in the order positive, negative, positive, …; token n is written as the word w<n>."""

    texts: list[str]
    ids: list[list[int]]


def make_work(seed: int = 0, pairs: int = PAIRS) -> Work:
    """Prompts of 25 to 55 tokens that start with the same 20: what a system prompt and a chat template leave."""
    rng = random.Random(seed)

    def words(n: int) -> list[int]:
        return [rng.randrange(5, VOCAB) for _ in range(n)]

    prefix = words(PREFIX)
    ids = [prefix + words(rng.randint(*SUFFIX)) for _ in range(2 * pairs)]
    return Work([" ".join(f"w{i}" for i in row) for row in ids], ids)


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocab = {word: i for i, word in enumerate(special.values())} | {f"w{i}": i for i in range(4, VOCAB)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def save(folder: Path, hf: LlamaForCausalLM, work: Work) -> None:
    """The model folder and the prompts file that readers in another process start from."""
    hf.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "prompts.json").write_text(json.dumps(work.texts), encoding="utf-8")


def difference_in_means(rows: Tensor) -> Tensor:
    """[prompt, layer, d] rows in the order of `Work` → [layer, d] positive mean minus negative mean, in float64."""
    wide = rows.double()
    return wide[::2].mean(0) - wide[1::2].mean(0)


def make_model() -> LlamaForCausalLM:
    return llama_100m(torch.float32)
