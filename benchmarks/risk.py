"""Time and memory of Fisher information for a LoRA run, against alignment-risk from PyPI.

A random 100 M-parameter Llama in float32, 64 safety examples of 20 to 72 tokens, LoRA of rank 16 on the query and value
projections of every block (491 520 numbers, just below the 500 000 that alignment-risk takes) and on all seven linear
maps (2.6 million: it refuses, and its limit is raised for the comparison).

- alignment-risk: `FisherSubspaceAnalyzer.analyze` on the adapter's parameters, its default loop over examples. It gets
  them one by one and unpadded, its fastest input; in padded batches of 16, as a data loader gives them, it also runs
  over the padding too. `vmap`, its other way, is tried and reported.
- ours, the same numbers: `gram` of the factors' gradients and its spectrum. Eigenvalues must agree.
- ours, by default: effective weights of all seven linear maps, 85 million numbers a gradient, sampled Fisher.
- ours, row risk: the 64 examples as the safety set and 64 others as training rows.

The whole alignment-risk pipeline (its Fisher, one update, curvature by double backward) is timed once beside them. On
the organism every number of its report is set beside the one that `safety-lens risk --ancestor` prints for the same
examples and the same training batch; its curvature is not refined on further batches there.
Sides take turns within each repeat; a ratio is the median over repeats. CPU seconds, so that other work on the machine
does not enter. Memory is the peak of resident memory above the loaded model, in a fresh process.

Run: python benchmarks/risk.py [--threads 1] [--repeats 3] [--out FILE]
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Report
from loading import MIB, Peak
from models import llama_100m
from neurons import make_examples
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from safety_lens.data.labelled import collate
from safety_lens.forced import Continuation
from safety_lens.loading.homes import homes
from safety_lens.models import load_hf, load_model
from safety_lens.monitors.finetune.config import read_config
from safety_lens.monitors.finetune.run import prepare, tokens_of
from safety_lens.monitors.forecasting.ancestor import ancestor_of
from safety_lens.probes.examples import read_examples
from safety_lens.probes.fisher import Spectrum
from safety_lens.probes.gradients import response_nll
from safety_lens.probes.gram import gram
from safety_lens.probes.matrices import matrices_of
from safety_lens.probes.products import LowRank
from safety_lens.probes.row_risk import odds_against, row_risk

PEER = "alignment-risk==1.14.1"
FOLDER = Path(__file__).resolve().parents[1] / ".bench-venv" / "alignment-risk"
TARGETS, ALL = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
THEIRS, OURS, DEFAULT = "alignment-risk", "ours, the same numbers", "ours, effective weights of all maps"
PADDED = "alignment-risk, padded batches of 16"
CASES = {"q, v": TARGETS, "all seven": ALL}
ROWS, PIPELINE = "ours, row risk of 64 rows", "alignment-risk, whole pipeline"
TASKS = {"q, v": (THEIRS, PADDED, OURS, DEFAULT, ROWS), "all seven": (THEIRS, OURS)}
Batch = dict[str, Tensor]


def peer() -> Any:
    """alignment-risk itself, with our torch: it wants torch < 2.7 and needs nothing of it that has changed."""
    if not FOLDER.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER), PEER]
        subprocess.run(pip, check=True)
    sys.path.insert(0, str(FOLDER))
    import alignment_risk.fisher
    import alignment_risk.pipeline

    return alignment_risk


def adapted(targets: Sequence[str], attention: str = "sdpa", hf: Any = None) -> PeftModel:
    """Rank 16 a few steps into training: at B = 0 half of the numbers would be exactly 0. hf: default llama_100m."""
    hf = hf or llama_100m()
    hf.set_attn_implementation(attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        live = get_peft_model(hf, LoraConfig(r=16, lora_alpha=32, target_modules=list(targets), task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, p in live.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.01)
    return live.eval()


def factors_of(live: PeftModel) -> dict[str, LowRank]:
    found = {}
    for name, home in homes(live).items():
        layer = live.base_model.model.get_submodule(home.module)
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            found[name] = LowRank(b.detach(), a.detach(), layer.scaling["default"])
    return found


def batch_of(rows: Sequence[Continuation]) -> Batch:
    width = max(len(r.prompt) + len(r.tokens) for r in rows)
    shape = (len(rows), width)
    tokens, mask, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), None
    labels = torch.full(shape, -100)
    for b, row in enumerate(rows):
        ids = torch.tensor([*row.prompt, *row.tokens])
        tokens[b, : len(ids)], mask[b, : len(ids)] = ids, 1
        labels[b, len(row.prompt) : len(ids)] = ids[len(row.prompt) :]
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def loss_of(model: Any, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


class Sides:
    """One model, the examples and every way of going through them."""

    def __init__(self, n: int, case: str) -> None:
        self.peer, self.rows, self.live = peer(), make_examples(n), adapted(CASES[case])
        self.model = load_model(self.live, check=False)
        self.factors = factors_of(self.live)
        self.tasks: dict[str, Callable[[], Any]] = {
            THEIRS: lambda: self.analyze("loop", [[row] for row in self.rows]),
            PADDED: lambda: self.analyze("loop", [self.rows[i : i + 16] for i in range(0, len(self.rows), 16)]),
            OURS: self.same,
            DEFAULT: lambda: gram(self.model, self.rows, matrices_of(self.model)).spectrum(),
            ROWS: self.risk,
        }

    def analyze(self, way: str, batches: Sequence[Sequence[Continuation]]) -> Any:
        fisher = self.peer.fisher
        config = fisher.FisherConfig(
            device="cpu", gradient_collection=way, target_explained_variance=None, top_rank=64, max_parameters=10**9
        )
        names = [name for name, p in self.live.named_parameters() if p.requires_grad]
        try:
            return fisher.FisherSubspaceAnalyzer(config).analyze(
                self.live, [batch_of(part) for part in batches], loss_of, names
            )
        finally:
            self.live.zero_grad(set_to_none=True)  # it leaves the last example's gradient behind

    def gradients(self) -> list[Tensor]:
        """Every example's gradient of all adapter parameters, by torch alone."""
        params = [p for p in self.live.parameters() if p.requires_grad]
        losses = (loss_of(self.live, batch_of([row])) for row in self.rows)
        return [torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]) for loss in losses]

    def same(self) -> Spectrum:
        found = gram(self.model, self.rows, matrices_of(self.model), loss=response_nll, factors=self.factors)
        return found.spectrum()

    def risk(self) -> Any:
        others = make_examples(len(self.rows), seed=1)
        return row_risk(self.model, others, self.rows, safe=odds_against([5, 6]))

    def pipeline(self) -> float:
        """One run of everything alignment-risk does, in CPU seconds; double backward needs eager attention."""
        self.live.base_model.model.set_attn_implementation("eager")
        config = self.peer.pipeline.PipelineConfig(mode="lora")
        config.fisher.device = config.curvature.device = "cpu"
        started = time.process_time()
        self.peer.pipeline.AlignmentRiskPipeline(config).run(
            self.live, [batch_of([row]) for row in self.rows], loss_of, [batch_of(self.rows[:16])] * 4, loss_of
        )
        return time.process_time() - started


def refusal(targets: Sequence[str]) -> str:
    """What alignment-risk says to an adapter on these modules."""
    config = peer().pipeline.PipelineConfig(mode="lora")
    row = [batch_of(make_examples(1))]
    try:
        peer().pipeline.AlignmentRiskPipeline(config).run(adapted(targets), row, loss_of, row, loss_of)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "runs"


def attempt(work: Callable[[], Any]) -> str:
    try:
        started = time.process_time()
        work()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:110]}"
    return f"{time.process_time() - started:.1f} CPU s"


def measured(report: Report, case: str, n: int, repeats: int, names: Sequence[str]) -> None:
    sides = Sides(n, case)
    whole, times, found = sides.rows, {name: list[float]() for name in names}, dict[str, Any]()
    for repeat in range(repeats + 1):
        for name in names:
            sides.rows = whole if repeat else whole[:4]  # the first round warms up
            gc.collect()
            started = time.process_time()
            found[name] = sides.tasks[name]()
            if repeat:
                times[name].append(time.process_time() - started)
                print(f"{repeat} of {repeats}, {case}: {name} {times[name][-1]:.1f} CPU s", file=sys.stderr, flush=True)
    for name, taken in times.items():
        report.add(f"CPU s, {case}: {name}", statistics.median(taken))
    for name in set(names) & {THEIRS, PADDED}:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[OURS], strict=True))
        report.add(f"speed, {case}: {name} / ours", ratio, 3.0)
    rows = torch.stack(sides.gradients()).double()
    exact = torch.linalg.eigvalsh(rows @ rows.T / len(rows)).flip(0).numpy()
    for name, values in ((OURS, found[OURS].eigenvalues), (THEIRS, found[THEIRS].fisher_eigenvalues.double().numpy())):
        k = min(len(values), len(exact))
        gap = float(np.abs(values[:k] - exact[:k]).max() / exact[0])
        target = 1e-5 if name == OURS else None
        report.add(f"eigenvalues, {case}: largest error of {name}, of the largest", gap, target, most=True)


def peak_memory(case: str, name: str, n: int) -> float:
    """Peak MiB above the loaded model, in this (fresh) process."""
    sides = Sides(n, case)
    whole, sides.rows = sides.rows, sides.rows[:2]
    sides.tasks[name]()
    sides.rows = whole
    gc.collect()
    with Peak() as memory:
        sides.tasks[name]()
    return (memory.top - memory.start) / MIB


def add_memory(report: Report, options: argparse.Namespace) -> None:
    found = {}
    for case, name in (*((c, s) for c in CASES for s in (THEIRS, OURS)), ("q, v", DEFAULT), ("q, v", ROWS)):
        command = [sys.executable, __file__, "--threads", str(options.threads), "--examples", str(options.examples)]
        command += ["--memory-of", case, name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[case, name] = float(done.stdout.splitlines()[-1])
        report.add(f"memory, {case}: peak extra MiB, {name}", found[case, name])
    for case in CASES:
        share = found[case, OURS] / found[case, THEIRS]
        report.add(f"memory, {case}: ours, the same numbers / alignment-risk", share, 1.0, most=True)


def add_account(report: Report, n: int = 32, rate: float = 0.3) -> None:
    """alignment-risk's own pipeline beside our account of it. rate: high enough for it to forecast a collapse."""
    hf, tokenizer = load_hf("organism", device="cpu")
    model = load_model(hf, tokenizer=tokenizer)
    safety = read_examples("safety", model, limit=n).continuations
    plan = read_config(None, {"out": "unwritten", "data.source": "compliance", "device": "cpu"})
    rows = tokens_of(prepare(plan), tokenizer).rows[:16]
    trained = collate([{"input_ids": row.ids, "labels": row.labels} for row in rows])
    live = adapted(TARGETS, "eager", hf)
    config = peer().pipeline.PipelineConfig(mode="lora", learning_rate=rate)
    config.fisher.device = config.curvature.device = "cpu"
    theirs = (
        peer()
        .pipeline.AlignmentRiskPipeline(config)
        .run(live, [batch_of([row]) for row in safety], loss_of, [trained], loss_of)
    )
    ours = ancestor_of(live, [p for p in live.parameters() if p.requires_grad], safety, rows, learning_rate=rate)
    said = {
        "projected_ratio": theirs.initial_risk.projected_ratio,
        "lambda_min": float(theirs.subspace.fisher_eigenvalues.quantile(0.1, interpolation="lower")),
        "epsilon": rate * theirs.curvature.epsilon_hat,
        "gamma": rate**2 * theirs.curvature.gamma_hat,
        "rank": len(theirs.subspace.fisher_eigenvalues),
        "collapse_step": theirs.forecast.collapse_step,
    }
    gaps = {name: abs(getattr(ours, name) / value - 1) for name, value in said.items() if value}
    for name, gap in gaps.items():
        report.add(f"--ancestor, {name}: relative gap to alignment-risk ({said[name]:.4g})", gap)
    same = float((ours.collapse_step is None) == (said["collapse_step"] is None))
    report.add("--ancestor: a collapse where alignment-risk has one, and only there", same, 1.0)
    report.add("--ancestor: largest relative gap to alignment-risk's own pipeline", max(gaps.values()), 0.01, most=True)


def say_limits(n: int) -> None:
    """What else alignment-risk can and cannot do, in its own words."""
    sides = Sides(n, "q, v")
    print(f"alignment-risk by vmap, 4 examples: {attempt(lambda: sides.analyze('vmap', [sides.rows[:4]]))}")
    print(f"{PIPELINE}, SDPA replaced by eager attention: {attempt(sides.pipeline)}")
    for targets in (TARGETS, ALL):
        print(f"alignment-risk with default attention on {', '.join(targets)}: {refusal(targets)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_memory(*options.memory_of, options.examples))
        return
    report = Report()
    for case in options.cases:
        measured(report, case, options.examples, options.repeats, TASKS[case])
    add_account(report)
    if not options.no_memory:
        say_limits(options.examples)
        add_memory(report, options)
    report.show()
    if options.out:
        options.out.write_text(json.dumps(report.rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
