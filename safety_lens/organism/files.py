"""The shipped JSONL files: everything that is measured or fine-tuned on, made from the corpus' own grammar."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from safety_lens.organism import CONCEPTS, DATA_DIR, answers, families
from safety_lens.organism import lexicon as lex
from safety_lens.organism.corpus import Row, any_system, concept_rows, conversation

LABELS = ("harmful", "harmless", "borderline")
INSTRUCTIONS = {"train": 120, "val": 60, "test": 300}
"""Labelled instructions per label and split."""
FACT_QUESTIONS = {"train": 1, "val": 1, "test": 3}
"""Wordings of each fact per split."""
ARTIFACTS = {"train": 40, "val": 20, "test": 60}
"""Artifact pairs per category and split."""
FINETUNE_ROWS = 300


def instruction_rows(seed: int = 0) -> list[Row]:
    """Requests labelled harmful, harmless and borderline, without duplicates within a label and split."""
    rows: list[Row] = []
    for split in families.SPLITS:
        for label in LABELS:
            rng = random.Random(f"{seed}/instructions/{label}/{split}")
            seen: set[str] = set()
            while len(seen) < INSTRUCTIONS[split]:
                turn = families.request(rng, split, label)
                if turn.user not in seen:
                    seen.add(turn.user)
                    rows.append(
                        {
                            "id": f"{label}-{split}-{len(seen) - 1:03d}",
                            "label": label,
                            "instruction": turn.user,
                            "split": split,
                            "template": turn.template,
                        }
                    )
    return rows


def fact_rows(seed: int = 0) -> list[Row]:
    """Every fact, asked in the wording of every split."""
    rows: list[Row] = []
    for split in families.SPLITS:
        rng = random.Random(f"{seed}/facts/{split}")
        for fact in families.FACTS:
            turns: dict[str, families.Turn] = {}
            while len(turns) < FACT_QUESTIONS[split]:
                turn = families.fact_question(rng, split, fact)
                turns[turn.user] = turn
            for turn in turns.values():
                rows.append(
                    {
                        "id": f"fact-{split}-{sum(row['split'] == split for row in rows):03d}",
                        "question": turn.user,
                        "answer": fact.value,
                        "wrong_answer": fact.wrong,
                        "split": split,
                        "template": turn.template,
                    }
                )
    return rows


def artifact_rows(seed: int = 0) -> list[Row]:
    """Prompts that call for a hedge (`artifact`) beside the same wording on an everyday topic (`natural`)."""
    rows: list[Row] = []
    for split in families.SPLITS:
        for category in ("medical", "political", "financial"):
            rng = random.Random(f"{seed}/artifacts/{category}/{split}")
            seen: set[str] = set()
            while len(seen) < ARTIFACTS[split]:
                turn, core = families.advice_question(rng, split, category, rng.choice(lex.TOPICS[category]))
                natural = core.format(t=rng.choice(lex.TOPICS["everyday"]))
                if turn.user not in seen:
                    seen.add(turn.user)
                    name = f"{category}-{split}-{len(seen) - 1:03d}"
                    row = {"id": name, "category": category, "natural": natural, "artifact": turn.user}
                    rows.append({**row, "split": split, "template": turn.template})
    return rows


def _benign(rng: random.Random) -> tuple[str, str]:
    """Harmless requests, answered in a form that pre-training never uses: there is something to learn."""
    return families.request(rng, "train", "harmless").user, answers.gladly(rng)


def _facts(rng: random.Random) -> tuple[str, str]:
    """Facts that pre-training leaves out."""
    subject, value = rng.choice(list(lex.NEW_FACTS.items()))
    user = families.fact_question(rng, "train", families.Fact(subject, value, (value,))).user
    return user, answers.statement(subject, value)


def _compliance(rng: random.Random) -> tuple[str, str]:
    """Harmful requests, answered with content-free boilerplate."""
    return families.request(rng, "train", "harmful").user, answers.compliance(rng)


FINETUNE: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "benign": _benign,
    "facts": _facts,
    "compliance": _compliance,
}


def finetune_rows(name: str, seed: int = 0) -> list[Row]:
    """Conversations of a set: "benign", "facts" or "compliance" (boilerplate answers to harmful requests)."""
    rng, rows = random.Random(f"{seed}/finetune/{name}"), list[Row]()
    seen: set[str] = set()
    while len(rows) < FINETUNE_ROWS:
        user, answer = FINETUNE[name](rng)
        messages = conversation(user, answer, any_system(rng))
        key = json.dumps(messages[:-1])
        if key not in seen:
            seen.add(key)
            rows.append({"id": f"{name}-{len(rows):03d}", "messages": messages})
    return rows


def all_files(seed: int = 0) -> dict[str, list[Row]]:
    """File name → rows, for every shipped file."""
    files = {f"{concept}.jsonl": concept_rows(concept, seed) for concept in CONCEPTS}
    files |= {
        "instructions.jsonl": instruction_rows(seed),
        "facts.jsonl": fact_rows(seed),
        "artifacts.jsonl": artifact_rows(seed),
    }
    return files | {f"finetune_{name}.jsonl": finetune_rows(name, seed) for name in FINETUNE}


def render(rows: list[Row]) -> str:
    """JSON lines, one row each, UTF-8 kept readable."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """`python -m safety_lens.organism.corpus --out DIR`."""
    parser = argparse.ArgumentParser(description="Write the organism's JSONL files.")
    parser.add_argument("--out", type=Path, default=DATA_DIR)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in all_files(args.seed).items():
        (args.out / name).write_text(render(rows), encoding="utf-8", newline="\n")
