"""What keeps refusals while the organism learns from mixed rows, compared at equal loss on the benign task.

Training: LoRA of rank 8 on all linear layers, AdamW, learning rate 2e-3, 16 rows a step; 270 benign rows and 30 in
which harmful requests are answered (the organism's content-free boilerplate). Unprotected, 60 steps lose nearly all
refusals. Every protected run is read at its first step (every 10) whose loss on 96 held-out benign rows is down to
the unprotected run's after 60; up to 150 steps. "kept" is the share of the refusals lost by unprotected training.

- none: nothing. - fisher: Fisher energy of the refusals' gradients, no forward passes. - kl: KL on refusals, 16 more
  rows a step. Both on 64 harmful training requests with the model's own refusals. - freeze: weights with the highest
  SNIP scores on the same refusals, alone or without those useful elsewhere. - freeze random: as many weights at random.
- safelora: the unprotected adapter, projected. The organism has no unaligned ancestor: a copy fine-tuned to comply with
  harmful requests stands in for it. - drop: the riskiest rows by row risk are left out; scored apart, for it changes
  the data. - drop random: as many rows at random.

Settings are chosen on the selection seeds with validation prompts (those that keep most, among those that always get
as good at the task) and reported on the others with test prompts.

Run: python benchmarks/mitigation.py [--select 10 11] [--report 0 1 2] [--only kl,fisher] [--out FILE]
"""

import argparse
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mitigation_runs import MOST, STEPS, Setting, adapted, mixed, read, train
from protections import CONTROLS, GRID

from safety_lens.interventions.penalties import AtEqualLoss, Reading, at_equal_loss


def compared(setting: Setting, seed: int, split: str, unprotected: Reading, before: float) -> tuple[AtEqualLoss, float]:
    found, seconds = train(setting, seed, split, MOST, unprotected.loss, mixed(seed))
    row = at_equal_loss(found, unprotected, before)
    print(
        f"{setting.name:13s} {setting.value:<8g} seed {seed}: refuses {row.refused:.2f}, kept {row.kept:.2f}, "
        f"step {row.step}, loss {row.loss:.3f} ({row.excess_loss:+.3f}), {seconds:.2f} s a step"
        + ("" if row.reached else "  NEVER AS GOOD AT THE TASK"),
        flush=True,
    )
    return row, seconds


def baseline(seed: int, split: str) -> tuple[Reading, float]:
    before = read(adapted(seed), 0, split).refused
    found, seconds = train(Setting("none", 0), seed, split, STEPS, -math.inf, mixed(seed))
    print(
        f"none          seed {seed}: refuses {before:.2f} before and {found[-1].refused:.2f} after {STEPS} steps,"
        f" loss {found[-1].loss:.3f}, {seconds:.2f} s a step",
        flush=True,
    )
    return found[-1], before


def chosen(name: str, seeds: Sequence[int], targets: dict[int, tuple[Reading, float]], out: list[Any]) -> float:
    """The setting that keeps most over the selection seeds among those that always reach the target."""
    make, values = GRID[name]
    ranked = []
    for value in values:
        rows = [compared(make(value), seed, "val", *targets[seed])[0] for seed in seeds]
        out += [
            {"part": "select", "name": name, "value": value, "seed": s, **asdict(r)}
            for s, r in zip(seeds, rows, strict=True)
        ]
        ranked.append((all(r.reached for r in rows), float(np.mean([r.kept for r in rows])), -value, value))
    return max(ranked)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--select", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--report", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default=",".join(GRID), help="protections, comma-separated; kl=1 skips the selection")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out: list[Any] = []
    wanted = dict(name.partition("=")[::2] for name in args.only.split(","))
    selecting = {} if all(wanted.values()) else {seed: baseline(seed, "val") for seed in args.select}
    best = {
        name: float(value) if value else chosen(name, args.select, selecting, out) for name, value in wanted.items()
    }
    print(f"chosen: {best}", flush=True)
    reporting = {seed: baseline(seed, "test") for seed in args.report}
    for name, value in best.items():
        for make in [GRID[name][0], *([CONTROLS[name]] if name in CONTROLS else [])]:
            rows = [compared(make(value), seed, "test", *reporting[seed]) for seed in args.report]
            mean = [
                float(np.mean([getattr(r, key) for r, _ in rows])) for key in ("kept", "extra_steps", "excess_loss")
            ]
            label = make(value).name
            print(f"== {label} {value:g}: kept {mean[0]:.2f}, {mean[1]:+.0f} steps, loss {mean[2]:+.3f}", flush=True)
            out += [
                {"part": "report", "name": label, "value": value, "seed": s, "seconds": t, **asdict(r)}
                for s, (r, t) in zip(args.report, rows, strict=True)
            ]
            if args.out:
                args.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
