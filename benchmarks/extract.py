"""Speed and memory of extraction against Hugging Face, and against repeng and steering-vectors with --peers.

One process, 2 threads, a random 100 M-parameter Llama in float32, 64 contrast prompts of 25 to 55 tokens that share
their first 20, the last token of every block. Readers take turns within each repeat, and every ratio is the median
over repeats of the ratio within a repeat, so that a machine that slows down slows all of them. Memory is the peak of
resident memory above the loaded model, each reader in a fresh process.

Run: python benchmarks/extract.py [--peers] [--repeats N] [--out FILE]
"""

import argparse
import gc
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peers_env
import torch
from figures import (
    FLOOR,
    HF,
    HF_LARGE,
    PLAIN,
    PREFIX,
    SAME_VECTOR,
    Report,
    compare_memory,
    compare_ours,
    compare_peers,
)
from loading import MIB, Peak
from safetensors.torch import load_file
from torch import Tensor
from workload import Work, difference_in_means, make_model, make_tokenizer, make_work, save

from safety_lens.activations import capture
from safety_lens.batching import length_batches, prefix_groups
from safety_lens.capturing import TOKEN_BUDGET
from safety_lens.kv import left_padded
from safety_lens.models import hooks_at, load_model

THREADS = 2


class Readers:
    """The four ways of reading, each a function that gives rows [prompt, layer, d_model]."""

    def __init__(self, work: Work) -> None:
        self.work, self.hf = work, make_model()
        self.model = load_model(self.hf, tokenizer=make_tokenizer(), check=False)
        self.hooks = hooks_at(self.model)
        self.batch_sizes: dict[str, list[int]] = {}
        self.tasks: dict[str, Callable[[], Tensor]] = {
            HF: lambda: self.hidden_states(PREFIX),
            HF_LARGE: lambda: self.hidden_states(PLAIN),
            FLOOR: self.backbone,
            PREFIX: lambda: self.ours(PREFIX, reuse=True),
            PLAIN: lambda: self.ours(PLAIN, reuse=False),
        }

    def ours(self, name: str, *, reuse: bool) -> Tensor:
        """Text in, rows out: tokenising is part of what is timed, which it is not for Hugging Face."""
        sizes: list[int] = []
        found = capture(self.model, self.work.texts, self.hooks, raw=True, reuse_prefix=reuse, on_batch=sizes.append)
        self.batch_sizes[name] = sizes
        return torch.stack([found.acts[hook] for hook in self.hooks], 1)

    @torch.no_grad()
    def hidden_states(self, like: str) -> Tensor:
        """The usual way: hidden states of all tokens and logits, batches in order, as many as ours."""
        n = len(self.work.ids)
        size = -(-n // len(self.batch_sizes[like]))
        rows = []
        for start in range(0, n, size):
            inputs = padded(self.work.ids[start : start + size])
            out = self.hf(**inputs, use_cache=False, output_hidden_states=True)
            rows.append(torch.stack([state[:, -1] for state in out.hidden_states[1:]], 1))
        return torch.cat(rows)

    @torch.no_grad()
    def backbone(self) -> Tensor:
        """The floor without prefix reuse: no logits, the batches of ours, nothing kept but the last token."""
        layers = self.hf.model.layers
        rows = torch.empty(len(self.work.ids), len(layers), self.hf.config.hidden_size)
        for batch in length_batches([len(row) for row in self.work.ids], TOKEN_BUDGET["cpu"]):
            with reading(layers, rows, batch):
                self.hf.model(**padded([self.work.ids[i] for i in batch]), use_cache=False)
        return rows


def padded(ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    tokens, mask = left_padded(ids, "cpu")
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@contextmanager
def reading(layers: Sequence[torch.nn.Module], rows: Tensor, batch: list[int]) -> Iterator[None]:
    """Copy the last token of every block's output into the rows of this batch."""

    def reader(index: int) -> Callable[..., None]:
        def read(_module: object, _inputs: object, out: Any) -> None:
            rows[batch, index] = (out[0] if isinstance(out, tuple) else out)[:, -1]

        return read

    handles = [layer.register_forward_hook(reader(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class PeerWorker:
    """peers.py in its own environment, taking turns with this process."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.errors = (folder / "peers.log").open("w+", encoding="utf-8")
        command = [str(python), str(Path(__file__).with_name("peers.py")), str(folder), str(torch.get_num_threads())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def ask(self, command: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            self.errors.seek(0)
            raise RuntimeError(f"peers.py ended at {command!r}:\n{self.errors.read()[-2000:]}")
        return json.loads(reply)

    def names(self) -> tuple[list[str], dict[str, str]]:
        """What the worker can run, and the versions it runs (named peers: <package>, since transformers differs)."""
        reply = self.ask("names")
        return reply["names"], {f"peers: {package}": version for package, version in reply["versions"].items()}

    def run(self, name: str) -> float:
        return float(self.ask(f"run {name}")["seconds"])

    def vectors(self, name: str) -> Tensor:
        """[layer, d_model] steering vectors of one task, in float64."""
        file = Path(self.errors.name).with_name("vectors.safetensors")
        self.ask(f"run {name}")
        self.ask(f"save {file}")
        return load_file(file)["vectors"].double()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def start_peers(folder: Path, readers: Readers, stack: ExitStack) -> PeerWorker:
    """The worker on the same saved model and prompts; it ends with the stack."""
    save(folder, readers.hf, readers.work)
    worker = PeerWorker(folder, peers_env.make())
    stack.callback(worker.close)
    return worker


def time_all(tasks: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every task in every repeat, in turn, after one warm-up round that is not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            gc.collect()
            taken = task()
            if repeat:
                seconds[name].append(taken)
            print(f"{repeat or 'warm-up'} of {repeats}: {name} {taken:.2f} s", file=sys.stderr, flush=True)
    return seconds


def timed(task: Callable[[], Tensor], results: dict[str, Tensor], name: str) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        results[name] = task()
        return time.perf_counter() - started

    return run


def peak_memory(name: str) -> float:
    """Peak MiB above the loaded model while one reader runs, in this (fresh) process."""
    readers = Readers(make_work())
    whole, readers.work = readers.work, make_work(pairs=1)
    for like in (PREFIX, PLAIN):
        readers.tasks[like]()  # two prompts: thread buffers and one-off tables are no cost of any reader
        readers.batch_sizes[like] = planned(whole.ids, reuse=like == PREFIX)
    for other in (HF, FLOOR):
        readers.tasks[other]()
    readers.work = whole
    gc.collect()
    with Peak() as memory:
        readers.tasks[name]()
    return (memory.top - memory.start) / MIB


def planned(ids: Sequence[Sequence[int]], *, reuse: bool) -> list[int]:
    """Rows in each batch that `capture` would run."""
    groups = prefix_groups(ids, [len(row) - 1 if reuse else 0 for row in ids])
    batches = [length_batches([len(ids[i]) - prefix for i in rows], TOKEN_BUDGET["cpu"]) for prefix, rows in groups]
    return [len(batch) for group in batches for batch in group]


def memory_all(names: Sequence[str]) -> dict[str, float]:
    found = {}
    for name in names:
        command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--memory-of", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = float(done.stdout.splitlines()[-1])
    return found


def print_times(seconds: dict[str, list[float]], readers: Readers) -> None:
    tokens, threads = sum(map(len, readers.work.ids)), torch.get_num_threads()
    print(f"{len(readers.work.ids)} prompts, {tokens} tokens, {threads} threads; batches of {readers.batch_sizes}")
    for name, taken in seconds.items():
        print(f"{name:<60}{statistics.median(taken):>8.3f} s   {min(taken):.3f} to {max(taken):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers", action="store_true", help="make .bench-venv where missing and compare with the peers"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_memory(args.memory_of))
        return
    report, readers = Report(), Readers(make_work())
    rows: dict[str, Tensor] = {}
    for name in (PREFIX, PLAIN):
        readers.tasks[name]()  # the others take their batch sizes from ours
    tasks = {name: timed(task, rows, name) for name, task in readers.tasks.items()}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        worker = start_peers(Path(folder), readers, stack) if args.peers else None
        names, versions = worker.names() if worker else ([], {})
        if worker:
            tasks |= {name: partial(worker.run, name) for name in names}
        seconds = time_all(tasks, args.repeats)
        compare_ours(report, seconds, rows)
        if worker:
            mine = difference_in_means(rows[PREFIX])
            compare_peers(report, seconds, names, mine, worker.vectors(SAME_VECTOR))
    compare_memory(report, memory_all([HF, FLOOR, PREFIX, PLAIN]))
    print_times(seconds, readers)
    report.show()
    if not args.peers:
        print("repeng and steering-vectors: skipped; --peers makes .bench-venv (about 1 GB) and compares with them")
    if args.out:
        versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", "transformer-lens")}
        figures = {"threads": args.threads, "versions": versions, "seconds": seconds, "figures": report.rows}
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
