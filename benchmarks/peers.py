"""repeng and steering-vectors at the work of `extract.py`. Runs inside `.bench-venv` and imports nothing of ours.

A worker, so that the two processes can take turns on the same cores. Each line read is one command, each line written
is JSON: `names` → what can be run; `run NAME` → {"seconds": …}; `save FILE` → the steering vectors of the last run as
safetensors, one [layer, d_model] array. The other process waits while one runs.

Usage: peers.py MODEL_FOLDER THREADS
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from repeng import ControlVector, DatasetEntry
from repeng.extract import batched_get_hiddens
from safetensors.torch import save_file
from steering_vectors import train_steering_vector
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = (8, 16, 32)  # prompts (repeng) or pairs (steering-vectors) per forward: each reader is given its fastest


class Peers:
    def __init__(self, folder: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", padding_side="left"
        )
        self.texts: list[str] = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        self.layers = list(range(self.model.config.num_hidden_layers))
        self.vectors = torch.empty(0)
        self.tasks: dict[str, Callable[[int], None]] = {
            "steering-vectors train_steering_vector": self.steering_vectors,
            "repeng batched_get_hiddens": self.repeng_hiddens,
            "repeng ControlVector.train": self.repeng_train,
        }
        self.sizes: dict[str, int] = {}

    def steering_vectors(self, size: int) -> None:
        pairs = list(zip(self.texts[::2], self.texts[1::2], strict=True))
        found = train_steering_vector(self.model, self.tokenizer, pairs, read_token_index=-1, batch_size=size)
        self.vectors = torch.stack([found.layer_activations[layer] for layer in self.layers])

    def repeng_hiddens(self, size: int) -> None:
        rows = batched_get_hiddens(self.model, self.tokenizer, self.texts, self.layers, size)
        stacked: Tensor = torch.stack([torch.from_numpy(rows[layer]) for layer in self.layers]).double()
        self.vectors = (stacked[:, ::2].mean(1) - stacked[:, 1::2].mean(1)).float()

    def repeng_train(self, size: int) -> None:
        entries = [DatasetEntry(a, b) for a, b in zip(self.texts[::2], self.texts[1::2], strict=True)]
        ControlVector.train(self.model, self.tokenizer, entries, batch_size=size)

    def timed(self, name: str, size: int) -> float:
        started = time.perf_counter()
        self.tasks[name](size)
        return time.perf_counter() - started

    def run(self, name: str) -> dict[str, float]:
        if name not in self.sizes:  # the first run, a warm-up for the caller, finds the batch size
            self.sizes[name] = min(SIZES, key=lambda size: self.timed(name, size))
        return {"seconds": self.timed(name, self.sizes[name]), "batch_size": self.sizes[name]}


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    peers = Peers(Path(sys.argv[1]))
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        reply: object = None
        if command == "names":
            versions = {
                name: importlib.metadata.version(name) for name in ("repeng", "steering-vectors", "transformers")
            }
            reply = {"names": list(peers.tasks), "versions": versions}
        elif command == "run":
            reply = peers.run(argument)
        elif command == "save":
            save_file({"vectors": peers.vectors.contiguous()}, argument)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
