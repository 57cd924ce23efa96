"""A sweep that is killed at random points: seconds of work that each kill loses, and the table at the end.

The model is loaded once. Every run is a fork of this process, killed with SIGKILL, and the next one goes on in the same
folder. The last one is left to finish; its table is compared with that of a sweep that nothing killed.

Run: python benchmarks/killed_sweeps.py [--model SOURCE] [--kills 20] [--shortest 5] [--longest 60] [--skip-whole]
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from figures import Report
from transformer_lens import HookedTransformer

from safety_lens.data.built_in import built_in_for
from safety_lens.interventions.scorers import SubstringRefusal
from safety_lens.interventions.sweeping.engine import sweep
from safety_lens.interventions.sweeping.plan import Controls, SweepPrompt
from safety_lens.interventions.sweeping.run import SweepResult
from safety_lens.interventions.sweeping.store import CHECKS, GENERATIONS, TABLE
from safety_lens.models import hooks_at, load_model
from safety_lens.probes.directions import Direction

PROMISED = 30.0
"""Seconds of work that a kill may lose."""


def run(model: HookedTransformer, out: Path | None) -> SweepResult:
    """Search from coarse to fine with random directions at every block."""
    stream = torch.Generator().manual_seed(0)
    directions = [
        Direction("random", h, torch.randn(model.cfg.d_model, generator=stream), "dim") for h in hooks_at(model)
    ]
    asked = built_in_for(model).requests("harmless", "test")[:36]
    prompts = [SweepPrompt(text, "selection" if i < 12 else "test") for i, text in enumerate(asked)]
    controls = Controls(5)
    return sweep(model, directions, prompts, scorers=[SubstringRefusal()], units="rms", controls=controls, out=out)


def killed(model: HookedTransformer, out: Path, seconds: float) -> float | None:
    """Run for so many seconds, then kill.

    Returns:
        Seconds since something was last stored, or since the start of a run that stored nothing; None where the sweep
        ended before.
    """
    start = time.time()
    child = os.fork()
    if child == 0:
        run(model, out)
        os._exit(0)
    time.sleep(seconds)
    if os.waitpid(child, os.WNOHANG)[0] == child:
        return None
    end = time.time()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    stored = [(out / name).stat().st_mtime for name in (GENERATIONS, CHECKS) if (out / name).exists()]
    return end - max([start, *stored])


def answers(out: Path) -> int:
    """Lines of answers that are stored."""
    file = out / GENERATIONS
    return file.read_bytes().count(b"\n") if file.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="organism")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shortest", type=float, default=5.0, help="seconds that a run is given at least")
    parser.add_argument("--longest", type=float, default=60.0, help="and at most")
    parser.add_argument("--skip-whole", action="store_true", help="no second sweep to compare the table with")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a fork of a process that has started threads would wait for them for ever
    model, draw, report, lost = load_model(asked.model, check=False), random.Random(0), Report(), []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "killed"
        for number in range(asked.kills):
            before = answers(out)
            seconds = killed(model, out, draw.uniform(asked.shortest, asked.longest))
            if seconds is None:
                print(f"the sweep ended before kill {number + 1}: give it less time with --longest")
                break
            lost.append(seconds)
            print(f"kill {number + 1}: {before} answers before, {answers(out)} after, {seconds:.1f} s lost", flush=True)
        report.add("runs that were killed", len(lost), asked.kills)
        report.add("seconds of work lost, largest", max(lost, default=0.0), PROMISED, most=True)
        run(model, out)
        if not asked.skip_whole:
            run(model, Path(folder) / "whole")
            same = (out / TABLE).read_bytes() == (Path(folder) / "whole" / TABLE).read_bytes()
            report.add("the table is that of a sweep that nothing killed", float(same), 1.0)
    report.show()


if __name__ == "__main__":
    main()
