"""repeng and steering-vectors steering the models of `steering.py`. Runs inside `.bench-venv`, imports nothing of ours.

For every model folder under FOLDER: the logits of `tokens` and a greedy continuation of its first row, plain and
steered by each peer with the vectors of `vectors.safetensors` at the blocks they name; and repeng's own GGUF file.
What a peer cannot do is left out and said on stdout, one JSON line a model.

Usage: peers_steering.py FOLDER COEFFICIENT
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from repeng import ControlModel, ControlVector
from safetensors.torch import load_file, save_file
from steering_vectors import SteeringVector
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

NEW = 8


@contextmanager
def by_steering_vectors(model: PreTrainedModel, vectors: dict[int, Tensor], coeff: float) -> Iterator[None]:
    with SteeringVector(vectors).apply(model, multiplier=coeff):
        yield


@contextmanager
def by_repeng(model: PreTrainedModel, vectors: dict[int, Tensor], coeff: float) -> Iterator[None]:
    control = ControlModel(model, list(vectors))
    control.set_control(ControlVector(model.config.model_type, {n: v.numpy() for n, v in vectors.items()}), coeff)
    try:
        yield
    finally:
        control.unwrap()


Steer = Callable[[PreTrainedModel, dict[int, Tensor], float], object]
PEERS: dict[str, Steer] = {"steering-vectors": by_steering_vectors, "repeng": by_repeng}


def run(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        # given in full: repeng reads the shape of its padding mask from them
        logits = model(tokens, position_ids=torch.arange(tokens.shape[1]).expand(tokens.shape)).logits
        first = tokens[:1]
        mask = torch.ones_like(first)
        text = model.generate(first, attention_mask=mask, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
    return logits.contiguous(), text[0, first.shape[1] :].contiguous()


def one_model(folder: Path, coeff: float) -> dict[str, str]:
    given = load_file(folder / "vectors.safetensors")
    tokens = given.pop("tokens")
    vectors = {int(name): vector for name, vector in given.items()}
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
    out, failed = {}, {}
    out["plain"], out["plain text"] = run(model, tokens)
    for name, steer in PEERS.items():
        try:
            with steer(model, vectors, coeff):  # type: ignore[attr-defined]
                out[name], out[f"{name} text"] = run(model, tokens)
        except (ValueError, AttributeError, KeyError, TypeError) as error:  # a model the peer does not know
            failed[name] = str(error)[:80]
    save_file(out, folder / "peers.safetensors")
    control = ControlVector(model.config.model_type, {n: v.numpy() for n, v in vectors.items()})
    control.export_gguf(folder / "repeng.gguf")
    return failed


def main() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("repeng", "steering-vectors", "transformers")}
    print(json.dumps(versions), flush=True)
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        print(json.dumps({folder.name: one_model(folder, float(sys.argv[2]))}), flush=True)


if __name__ == "__main__":
    main()
