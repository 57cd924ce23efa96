"""Carry-over of the built-in refusal direction to public requests that took no part in the fit, on a real chat model.

Directions are fitted on the built-in pairs (train), a block is chosen on their val pairs, and everything is reported on
public rows: harmful against harmless, next to an embedding-only direction on the same rows; and, since harmfulness is
not refusal (Zhao et al. 2025, arXiv:2507.11878), refused against answered requests within the harmful ones and within
safe look-alikes, by the model's own greedy answers. Both readings are made at the last token of the instruction and at
the last token of the chat template.

Run: python benchmarks/carry_over.py --model MODEL --instructions refusal_instructions.jsonl --lookalikes
overrefusal_xstest.jsonl --out FILE.json
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens import capture, generate, hooks_at, load_concept, load_model
from safety_lens.data import Encoded
from safety_lens.interventions.scorers import Completion, SubstringRefusal
from safety_lens.positions import Positions, last_token, mean_over
from safety_lens.stats import Interval, auroc_difference, auroc_interval, d_prime, wilson

ANSWER_TOKENS = 24
EMBEDDING = "hook_embed"
LAST_INSTRUCTION = Positions("last instruction token", lambda encoded: (_instruction_end(encoded),))
READ_AT = {"last template token": last_token, "last instruction token": LAST_INSTRUCTION}

Rows = dict[str, list[str]]
Scores = Float[np.ndarray, " prompt"]


def _instruction_end(encoded: Encoded) -> int:
    if encoded.instruction is None:
        raise ValueError(f"no instruction was found in {encoded.text[-60:]!r}")
    return encoded.instruction[1] - 1


def public_rows(instructions: Path, lookalikes: Path, most: int | None) -> Rows:
    """Prompts by set: "harmful", "harmless", and "lookalike" (safe prompts that look unsafe)."""
    out: Rows = {"harmful": [], "harmless": [], "lookalike": []}
    for row in map(json.loads, instructions.read_text(encoding="utf-8").splitlines()):
        out[row["label"]].append(row["instruction"])
    for row in map(json.loads, lookalikes.read_text(encoding="utf-8").splitlines()):
        if row["label"] == "safe":
            out["lookalike"].append(row["prompt"])
    return {name: prompts[:most] for name, prompts in out.items()}


def refusals(model: HookedTransformer, rows: Rows) -> dict[str, Scores]:
    """1 where the greedy answer refuses, 0 where it does not, NaN where it is empty; answers are not kept."""
    out = {}
    for name, prompts in rows.items():
        answers = generate(model, prompts, max_new_tokens=ANSWER_TOKENS)
        out[name] = SubstringRefusal()([Completion(str(a.prompt), a.text, a.tokens) for a in answers])
    return out


def labelled(model: HookedTransformer, rows: Rows, file: Path | None) -> dict[str, Scores]:
    """Labels of all prompts; those in the file are not generated again, new ones are added to it."""
    known = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
    missing = {name: [p for p in prompts if p not in known] for name, prompts in rows.items()}
    fresh = refusals(model, {name: prompts for name, prompts in missing.items() if prompts})
    for name, labels in fresh.items():
        known |= dict(zip(missing[name], [float(v) if np.isfinite(v) else None for v in labels], strict=True))
    if file is not None:
        file.write_text(json.dumps(known, ensure_ascii=False, indent=0), encoding="utf-8")
    return {name: np.array([known[p] for p in prompts], dtype=float) for name, prompts in rows.items()}


def vectors_at(
    model: HookedTransformer, prompts: Sequence[Any], hooks: Sequence[str], at: Positions
) -> dict[str, torch.Tensor]:
    """Activations in float64, hook -> [prompt, d]."""
    return {hook: x.double() for hook, x in capture(model, list(prompts), list(hooks), positions=at).acts.items()}


def interval(value: Interval) -> list[float | None]:
    """Estimate and limits; unknown numbers as null."""
    return [None if not np.isfinite(v) else round(float(v), 4) for v in value]


def carried(model: HookedTransformer, rows: Rows, refused: dict[str, Scores], at: Positions) -> dict[str, Any]:
    """Figures of one reading position: the chosen block, and every block of the three comparisons."""
    concept, hooks = load_concept("refusal", model=model), hooks_at(model)
    sides = {
        (split, side): vectors_at(model, [getattr(p, side) for p in getattr(concept, split)], hooks, at)
        for split in ("train", "val")
        for side in ("positive", "negative")
    }
    fitted = {h: sides["train", "positive"][h].mean(0) - sides["train", "negative"][h].mean(0) for h in hooks}
    gaps = {
        h: float(d_prime(*((sides["val", s][h] @ fitted[h]).numpy() for s in ("positive", "negative")))) for h in hooks
    }
    chosen = max(gaps, key=lambda h: gaps[h])
    public = {name: vectors_at(model, prompts, hooks, at) for name, prompts in rows.items()}
    scores = {h: {name: (public[name][h] @ fitted[h]).numpy() for name in rows} for h in hooks}
    embedding = embedding_scores(model, concept, rows)
    return {
        "chosen": chosen,
        "val_d_prime": {h: round(gaps[h], 3) for h in hooks},
        "at_chosen": compared(scores[chosen], embedding, refused),
        "by_block": {h: {k: v["auroc"][0] for k, v in compared(scores[h], embedding, refused).items()} for h in hooks},
    }


def embedding_scores(model: HookedTransformer, concept: Any, rows: Rows) -> dict[str, Scores]:
    """Projections of the mean token embedding on the embedding-only direction of the same training pairs."""
    at, words = mean_over("all"), [EMBEDDING]
    means = [
        vectors_at(model, [getattr(p, side) for p in concept.train], words, at)[EMBEDDING].mean(0)
        for side in ("positive", "negative")
    ]
    unit = means[0] - means[1]
    return {name: (vectors_at(model, prompts, words, at)[EMBEDDING] @ unit).numpy() for name, prompts in rows.items()}


def compared(scores: dict[str, Scores], embedding: dict[str, Scores], refused: dict[str, Scores]) -> dict[str, Any]:
    """AUROC of the direction, of the embedding-only direction on the same rows, and their difference, each with its
    interval; comparisons with fewer than 5 prompts on a side are left out by name."""

    def split(found: dict[str, Scores], name: str) -> tuple[Scores, Scores]:
        return found[name][refused[name] == 1], found[name][refused[name] == 0]

    sides = {
        "harmful against harmless": [(s["harmful"], s["harmless"]) for s in (scores, embedding)],
        "harmful against look-alikes": [(s["harmful"], s["lookalike"]) for s in (scores, embedding)],
        "refused against answered, harmful": [split(s, "harmful") for s in (scores, embedding)],
        "refused against answered, look-alikes": [split(s, "lookalike") for s in (scores, embedding)],
    }
    out = {}
    for name, ((pos, neg), (e_pos, e_neg)) in sides.items():
        enough = min(len(pos), len(neg)) >= 5
        out[name] = {
            "n": [len(pos), len(neg)],
            "auroc": interval(auroc_interval(pos, neg)) if enough else [None] * 3,
            "embedding": interval(auroc_interval(e_pos, e_neg)) if enough else [None] * 3,
            "gain": interval(auroc_difference(pos, neg, e_pos, e_neg)) if enough else [None] * 3,
        }
    return out


def draw(result: dict[str, Any], file: Path) -> None:
    """AUROC over blocks of harmful against harmless and of refused against answered, one panel a reading position."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(READ_AT), figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, place in zip(panels, READ_AT, strict=True):
        found = result[place]["by_block"]
        for name, style in (
            ("harmful against harmless", "C0o-"),
            ("harmful against look-alikes", "C2^-"),
            ("refused against answered, harmful", "C3s-"),
        ):
            panel.plot(range(len(found)), [at[name] for at in found.values()], style, ms=3, lw=1, label=name)
        panel.axhline(0.5, color="0.6", lw=0.8)
        panel.set(title=f"read at the {place}", xlabel="block")
    panels[0].set_ylabel("AUROC on public requests")
    panels[1].legend(fontsize=7, loc="lower right")
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measure and write; the figures go to a file and the comparisons at the chosen block to the terminal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--lookalikes", type=Path, required=True)
    parser.add_argument("--labels", type=Path, help="JSON of labels by prompt, reused and completed")
    parser.add_argument("--most", type=int, help="prompts of each set (default all)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    began = time.process_time()
    model = load_model(args.model)
    rows = public_rows(args.instructions, args.lookalikes, args.most)
    refused = labelled(model, rows, args.labels)
    rates = {}
    for name, labels in refused.items():
        known = labels[np.isfinite(labels)]
        rates[name] = {"refused": interval(wilson(int(known.sum()), len(known))), "n": len(known)}
    found = {name: carried(model, rows, refused, at) for name, at in READ_AT.items()}
    result = {"model": args.model, "refusal rates": rates, "cpu seconds": time.process_time() - began, **found}
    args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    draw(result, args.out.with_suffix(".png"))
    print(json.dumps(rates, indent=1))
    for name in READ_AT:
        print(name, found[name]["chosen"], json.dumps(found[name]["at_chosen"], indent=1))


if __name__ == "__main__":
    main()
