"""Measure the organism and write its card: `python -m safety_lens.organism.measure [--model DIR] [--out CARD.md]`."""

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from safety_lens.organism import HERE, MODEL_DIR, answers
from safety_lens.organism.behaviour import Line, card_lines
from safety_lens.organism.card import render_card
from safety_lens.organism.corpus import Messages
from safety_lens.stats import wilson

MAX_NEW_TOKENS = 32
BATCH = 128


class Figure(NamedTuple):
    """A measured line of the card."""

    name: str
    claim: str
    k: int
    n: int
    value: float
    low: float
    high: float
    bounds: tuple[float, float]
    well_formed: float
    """Share of the answers that are sentences of the corpus, of any class."""

    @property
    def holds(self) -> bool:
        """Whether the share lies within its bounds."""
        return self.bounds[0] <= self.value <= self.bounds[1]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    sampled: bool = False,
    seed: int = 0,
) -> list[str]:
    """Answers to conversations, in their order: greedy, or sampled at temperature 1 from a fixed seed.

    Prompts are batched by length with left padding and a mask, so no answer depends on its neighbours.
    """
    texts = [
        tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True) for prompt in prompts
    ]
    order, found = iter(sorted(range(len(texts)), key=lambda row: len(texts[row]))), [""] * len(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while rows := list(islice(order, BATCH)):
            batch = tokenizer(
                [texts[row] for row in rows],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            )
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=sampled,
                temperature=1.0 if sampled else None,
                top_k=0 if sampled else None,
            )
            for row, ids in zip(rows, out[:, batch["input_ids"].shape[1] :], strict=True):
                found[row] = tokenizer.decode(ids, skip_special_tokens=True)
    return found


def measure_line(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, line: Line) -> Figure:
    """The share of a line's cases that count, with its Wilson interval."""
    said = answer(model, tokenizer, [case.prompt for case in line.cases], line.sampled)
    k = sum(case.counts(text) for case, text in zip(line.cases, said, strict=True))
    share, low, high = (round(x, 4) for x in wilson(k, len(said)))
    fluent = round(sum(answers.well_formed(text) for text in said) / len(said), 4)
    return Figure(line.name, line.claim, k, len(said), share, low, high, (line.low, line.high), fluent)


def measure(folder: Path, progress: bool = True) -> list[Figure]:
    """Every line of the card for the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = card_lines()
    return [measure_line(model, tokenizer, line) for line in tqdm(lines, desc="measuring", disable=not progress)]


def as_record(figures: Sequence[Figure], training: dict[str, Any], size: int) -> dict[str, Any]:
    """The content of `card.json`."""
    return {
        "figures": [{**figure._asdict(), "holds": figure.holds} for figure in figures],
        "training": training,
        "weights_bytes": size,
    }


def main() -> None:
    """Measure, write CARD.md and card.json, and exit 1 when a demanded line does not hold."""
    parser = argparse.ArgumentParser(description="Measure the organism and write its model card.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--out", type=Path, default=HERE / "CARD.md")
    args = parser.parse_args()
    figures = measure(args.model)
    training = json.loads((args.model / "training.json").read_text(encoding="utf-8"))
    record = as_record(figures, training, (args.model / "model.safetensors").stat().st_size)
    args.out.write_text(render_card(record), encoding="utf-8", newline="\n")
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    args.out.with_name("card.json").write_text(text, encoding="utf-8", newline="\n")
    raise SystemExit(0 if all(figure.holds for figure in figures) else 1)


if __name__ == "__main__":
    main()
