"""What watching costs: one measurement against the training between two of them, and against safety-compass.

Times are CPU seconds, so that other work on the machine does not enter. The organism trains on its own rows; the
100 M-parameter random Llama on 16 rows of 256 tokens a step, rank 16 on all seven projections. Its random weights make
every greedy answer differ after a step, so its measurement is the most costly one: all answers are written anew.
safety-compass runs its own code from PyPI on 40 + 20 pairs of the same three concepts, with its default batch of 4,
and reads one block; ours reads every block by default, and that one block for a comparison of equal work.
--pairs reads the concepts from files in its format (`refusal.jsonl` or `pairs_refusal_*.jsonl`, …) instead of the
organism's, --tokenizer and --template how the 100 M model reads them; the organism is then left out.

Run: python benchmarks/monitor.py [--threads 1] [--every 50] [--pairs FOLDER --tokenizer FOLDER --template FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from figures import Report
from models import llama_100m
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from safety_lens.data import Concept, load_concept
from safety_lens.models import load_hf
from safety_lens.monitors import Monitor, Pairs
from safety_lens.organism import DATA_DIR

CONCEPTS = ("refusal", "sycophancy", "deception")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEER, PEERS_FOLDER = "safety-compass==0.1.3", Path(__file__).resolve().parents[1] / ".bench-venv" / "safety-compass"
PEER_PAIRS = {"train": 40, "val": 20}


def cpu_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """The least CPU time of a few runs, after one to warm up."""
    found = []
    work()
    for _ in range(repeats):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def adapted(hf: Any) -> PeftModel:
    return get_peft_model(hf, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))


def moved(live: PeftModel) -> None:
    """What a few steps of training do to the factors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in live.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.01)


def step_seconds(live: PeftModel, rows: int, width: int, parts: int) -> float:
    """One optimizer step of `rows` rows, gathered over equal parts: one of them is timed and counted `parts` times."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, live.get_input_embeddings().weight.shape[0], (rows // parts, width), generator=generator)
    trained = [p for p in live.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    live.train()

    def part() -> None:
        live(input_ids=tokens, labels=tokens).loss.backward()

    seconds = cpu_seconds(part, repeats=2 if parts > 1 else 5) * parts
    seconds += cpu_seconds(optimizer.step)
    optimizer.zero_grad(set_to_none=True)
    return seconds


def files(pairs: Path) -> dict[str, Path]:
    """Concept → its file of contrast pairs."""
    return {
        n: next(f for f in (pairs / f"{n}.jsonl", *pairs.glob(f"pairs_{n}_*.jsonl")) if f.is_file()) for n in CONCEPTS
    }


def peer_pairs(pairs: Path, folder: Path) -> None:
    """The same concepts in safety-compass's format and number."""
    for name, file in files(pairs).items():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        kept = [r for split, n in PEER_PAIRS.items() for r in [r for r in rows if r["split"] == split][:n]]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in kept), encoding="utf-8")


def peer_measurement(live: PeftModel, tokenizer: Any, pairs: Path, folder: Path) -> Callable[[], Any]:
    """safety-compass's own `measure`, layers given as its users do after the baseline."""
    if not PEERS_FOLDER.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS_FOLDER), PEER]
        subprocess.run(pip, check=True)
    sys.path.insert(0, str(PEERS_FOLDER))
    from safety_compass.monitor import SafetyCompassMonitor

    peer_pairs(pairs, folder)
    layers, strategy = live.config.num_hidden_layers, {}
    for name in CONCEPTS:
        strategy[name] = json.loads((folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[0])["strategy"]
    best = peer_layer(live)
    configs = [
        {"name": n, "pairing_strategy": strategy[n], "contrastive_pairs_file": f"{n}.jsonl", "best_layer": best}
        for n in CONCEPTS
    ]
    settings = {"num_layers": layers, "hidden_dim": live.config.hidden_size, "extraction_batch_size": 4}
    peer = SafetyCompassMonitor(live, tokenizer, configs, settings, base_dir=str(folder))
    peer.setup()
    return lambda: peer.measure(1)


def measured(report: Report, name: str, live: PeftModel, tokenizer: Any, pairs: Path, step: float, every: int) -> None:
    concepts = [replace(load_concept(file), name=name) for name, file in files(pairs).items()]
    monitor = Monitor(live, concepts, tokenizer=tokenizer)
    monitor.baseline()
    moved(live)
    ours = cpu_seconds(lambda: monitor.measure(1))
    report.add(f"{name}: one step of training, CPU s", step)
    report.add(f"{name}: one measurement at default settings, CPU s", ours)
    target = 5.0 if name != "organism" else None
    report.add(
        f"{name}: measurements, % of training, every {every} steps", 100 * ours / (every * step), target, most=True
    )
    same = unprobed(live, concepts, tokenizer, None)
    one = unprobed(live, concepts, tokenizer, [f"blocks.{peer_layer(live) - 1}.hook_resid_post"])
    live.eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs = cpu_seconds(peer_measurement(live, tokenizer, pairs, Path(folder)), repeats=1)
    report.add(f"{name}: safety-compass / ours at default settings, probes included", theirs / ours, 5.0)
    report.add(f"{name}: safety-compass / ours on its number of pairs, every block, without probes", theirs / same, 5.0)
    report.add(f"{name}: safety-compass / ours on its number of pairs at its one block", theirs / one, 5.0)


def unprobed(live: PeftModel, concepts: Sequence[Concept], tokenizer: Any, hooks: Sequence[str] | None) -> float:
    """CPU seconds of a measurement on as many pairs as safety-compass reads, without behaviour."""
    pairs = Pairs(PEER_PAIRS["train"], PEER_PAIRS["val"])
    monitor = Monitor(live, concepts, tokenizer=tokenizer, probes=None, pairs=pairs, hooks=hooks)
    monitor.baseline()
    return cpu_seconds(lambda: monitor.measure(1))


def peer_layer(live: PeftModel) -> int:
    """What safety-compass is told to read: its users give a layer for each concept. It counts hidden states, of which
    the first is the embedding, so layer n is what block n − 1 puts out.
    """
    return int(live.config.num_hidden_layers) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--pairs", type=Path, default=DATA_DIR)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--template", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    report = Report()
    hf, tokenizer = load_hf("organism", device="cpu")
    if args.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.template is not None:
        tokenizer.chat_template = args.template.read_text(encoding="utf-8")
    if args.pairs == DATA_DIR:
        small = adapted(hf)
        measured(report, "organism", small, tokenizer, args.pairs, step_seconds(small, 16, 48, 1), args.every)
    large = adapted(llama_100m())
    measured(report, "100 M Llama", large, tokenizer, args.pairs, step_seconds(large, 16, 256, 4), args.every)
    report.show()
    if args.out:
        args.out.write_text(json.dumps(report.rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
