"""Steering by our hooks against steering-vectors and repeng on the Hugging Face model; repeng's GGUF file read back.

Same weights, vectors, blocks and coefficient on both sides: random tiny models, random vectors about as long as the
activations, at two blocks at once. The peers run in an environment of their own (`peers_env.py`, transformers < 5).
Printed: largest logit difference to each peer, to the peer's plain model (nothing steered), how far steering moved the
logits, and whether eight greedily written tokens agree.

Run: python benchmarks/steering.py [--out FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers_env import make
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo

from safety_lens.activations import capture
from safety_lens.data import Encoded
from safety_lens.generation import generate
from safety_lens.interventions.gguf import import_gguf
from safety_lens.interventions.steering import applied, steer
from safety_lens.models import load_model
from safety_lens.types import FwdHook

MODELS = (
    "llama",
    "llama_tied",
    "llama_head_dim",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi3_full",
    "gpt2",
    "neox",
)
BLOCKS, COEFF, TARGET = (1, 2), 1.5, 1e-4


def prepare(name: str, folder: Path) -> None:
    """The model folder, tokens and vectors that both sides start from."""
    hf = zoo.make(name)
    hf.save_pretrained(folder)
    tokens = torch.randint(4, zoo.VOCAB, (4, 20), generator=torch.Generator().manual_seed(1))
    rows = [Encoded(tuple(row), "", None, None) for row in tokens.tolist()]
    hooks = [f"blocks.{n}.hook_resid_post" for n in BLOCKS]
    acts = capture(load_model(hf, check=False), rows, hooks).acts
    generator = torch.Generator().manual_seed(2)
    vectors: dict[str, Tensor] = {"tokens": tokens}
    for n, hook in zip(BLOCKS, hooks, strict=True):
        vector = torch.randn(acts[hook].shape[1], generator=generator)
        vectors[str(n)] = (vector / vector.norm() * acts[hook].norm(dim=1).mean() / 2).contiguous()
    save_file(vectors, folder / "vectors.safetensors")


def logits_of(model: HookedTransformer, tokens: Tensor, hooks: list[FwdHook]) -> Tensor:
    with torch.no_grad(), applied(model, hooks):
        logits: Tensor = model(tokens)
    return logits


def compare(name: str, folder: Path) -> dict[str, Any]:
    model = load_model(folder)
    given, theirs = load_file(folder / "vectors.safetensors"), load_file(folder / "peers.safetensors")
    found = import_gguf(folder / "repeng.gguf", model)
    hooks = [hook for direction in found for hook in steer(direction, COEFF)]
    tokens = given["tokens"]
    plain, steered = logits_of(model, tokens, []), logits_of(model, tokens, hooks)
    (text,) = generate(
        model, [Encoded(tuple(tokens[0].tolist()), "", None, None)], hooks=hooks, max_new_tokens=8, ignore_eos=True
    )
    row: dict[str, Any] = {
        "model": name,
        "plain": float((plain - theirs["plain"]).abs().max()),
        "effect": float((steered - plain).abs().max()),
        "gguf": all(torch.equal(found[f"blocks.{n}.hook_resid_post"].vector, given[str(n)]) for n in BLOCKS),
    }
    for peer in ("steering-vectors", "repeng"):
        if peer in theirs:
            row[peer] = float((steered - theirs[peer]).abs().max())
            row[f"{peer} text"] = theirs[f"{peer} text"].tolist() == list(text.tokens)
    return row


def shown(value: Any) -> str:
    return "–" if value is None else ("yes" if value else "NO") if isinstance(value, bool) else f"{value:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    out = parser.parse_args().out
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    python = make()
    with tempfile.TemporaryDirectory() as temporary:
        for name in MODELS:
            prepare(name, Path(temporary) / name)
        worker = Path(__file__).with_name("peers_steering.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [str(python), str(worker), temporary, str(COEFF)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr)
        versions, *notes = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
        rows = [compare(name, Path(temporary) / name) for name in MODELS]
    columns = ("plain", "effect", "steering-vectors", "steering-vectors text", "repeng", "repeng text", "gguf")
    print(" ".join(f"{name} {number}" for name, number in versions.items()))
    print(f"{'model':<16}" + "".join(f"{column:>23}" for column in columns))
    for row in rows:
        print(f"{row['model']:<16}" + "".join(f"{shown(row.get(column)):>23}" for column in columns))
    for note in notes:
        for name, failed in note.items():
            for peer, why in failed.items():
                print(f"{peer} cannot steer {name}: {why}")
    worst = {peer: max(row[peer] for row in rows if peer in row) for peer in ("steering-vectors", "repeng")}
    print(f"worst: {worst}; target: {TARGET:g} where the plain models agree to that")
    if out:
        out.write_text(json.dumps({"versions": versions, "rows": rows, "failed": notes}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
