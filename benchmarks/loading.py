"""What loading a model in memory costs: extra resident memory and time, each row measured in a fresh process.

Run: python benchmarks/loading.py
"""

import json
import subprocess
import sys
import threading
import time

import psutil
import torch
from models import llama_100m

MIB = 2**20
ROWS = {
    "share=True": {"share": True, "check": False},
    "share=True, parity check": {"share": True, "check": True},
    "share=False": {"share": False, "check": False},
}


class Peak:
    """The highest resident memory of this process while a block of code runs, sampled every millisecond."""

    def __enter__(self) -> "Peak":
        self.process, self.running = psutil.Process(), True
        self.start = self.top = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.top = max(self.top, self.process.memory_info().rss)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self.end = self.process.memory_info().rss


def measure(options: dict[str, bool]) -> dict[str, float | bool]:
    """Load once, in this process; then change one HF weight and ask whether the hooked model saw it."""
    from safety_lens.models import load_model

    torch.set_num_threads(2)
    hf = llama_100m()
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        hf(input_ids=tokens)  # the first forward allocates thread buffers that are no cost of loading
    with Peak() as memory:
        started = time.perf_counter()
        model = load_model(hf, **options)
        seconds = time.perf_counter() - started
    with torch.no_grad():
        hf.model.layers[3].mlp.up_proj.weight.mul_(1.5)
        gap = float((model(tokens) - hf(input_ids=tokens).logits).abs().max())
    weights = sum(p.numel() * p.element_size() for p in hf.parameters())
    return {
        "weights": weights / MIB,
        "extra": (memory.end - memory.start) / MIB,
        "peak": (memory.top - memory.start) / MIB,
        "seconds": seconds,
        "gap": gap,
    }


def main() -> None:
    print("llama 100M in memory, float32, 2 threads; a fresh process per row")
    print(f"{'load_model':<28}{'extra MiB':>10}{'of weights':>12}{'peak MiB':>10}{'seconds':>9}  HF change seen")
    for name, options in ROWS.items():
        command = [sys.executable, __file__, json.dumps(options)]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        seen = "yes" if row["gap"] <= 1e-4 else "no"
        share = row["extra"] / row["weights"]
        print(
            f"{name:<28}{row['extra']:>10.1f}{share:>12.1%}{row['peak']:>10.1f}{row['seconds']:>9.2f}"
            f"  {seen} ({row['gap']:.1e})"
        )
    print(f"weights: {row['weights']:.0f} MiB; target: extra <= 10 % with share=True")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    else:
        main()
