"""`safety-lens finetune` under torchrun: two processes leave and print what one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from synthetic_groups import save_organism_groups

from safety_lens.artifacts import load_artifact
from safety_lens.monitors.drift_log import read_log
from safety_lens.monitors.finetune.config import RunConfig, read_config
from safety_lens.monitors.finetune.run import RunResult, run

pytestmark = pytest.mark.slow

STEPS = 4


class Said(NamedTuple):
    code: int
    out: str
    err: str


def asked(out: Path, groups: Path, batch: int) -> RunConfig:
    """Everything that a run can be asked for at once; the last block alone, to be quick."""
    settings: dict[str, Any] = {
        "out": out, "model": "organism", "device": "cpu", "data.source": "benign", "data.limit": 64,
        "tuning.targets": ["q_proj", "v_proj"], "tuning.rank": 4, "training.max_steps": STEPS,
        "training.per_device_train_batch_size": batch, "training.learning_rate": 1e-3, "training.save_steps": 2,
        "training.logging_steps": 1, "monitor.concepts": ["refusal"], "monitor.every": 2, "monitor.budget": None,
        "monitor.probes": False,
        "tuning.freeze": [f"{groups}:entries"], "monitor.groups": [f"{groups}:entries"],
        "protect.penalty": "kl", "protect.rows": 20, "protect.batch": 8, "protect.drop_risky": 0.1,
    }  # fmt: skip
    return read_config(None, settings)


def in_two_processes(config: RunConfig, folder: Path, *flags: str) -> Said:
    folder.mkdir(exist_ok=True)
    (folder / "main.py").write_text("from safety_lens.cli import main\n\nmain()\n")
    (folder / "run.yaml").write_text(config.to_yaml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += [str(folder / "main.py"), "finetune", "--config", str(folder / "run.yaml"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Said, Path]:
    """A run in one process with four rows a step, and the same in two with two rows each."""
    place = tmp_path_factory.mktemp("processes")
    groups = save_organism_groups(place / "groups")
    one = run(asked(place / "one", groups, 4))
    return one, in_two_processes(asked(place / "two", groups, 2), place / "launch"), place / "two"


def numbers(folder: Path) -> dict[tuple[Any, ...], float]:
    rows = read_log(folder / "drift.jsonl")
    found = {(r.step, r.subject, r.metric, r.hook, r.split): r.value for r in rows if r.metric != "seconds"}
    assert len(found) == sum(r.metric != "seconds" for r in rows), "a row is there twice"
    return found


def test_two_processes_leave_the_log_the_losses_and_the_adapter_of_one(pair: tuple[RunResult, Said, Path]) -> None:
    one, said, folder = pair
    assert said.code == 0, said.err
    mine, theirs = numbers(folder), numbers(one.out)
    assert mine.keys() == theirs.keys()
    known = [k for k in theirs if theirs[k] == theirs[k] and "angle" not in k[2]]
    # gradients are summed in another order
    assert max(abs(mine[k] - theirs[k]) / max(1.0, abs(theirs[k])) for k in known) < 2e-3
    trained = {(r.metric, r.step): r.value for r in one.measurements if r.metric in ("loss", "penalty/kl")}
    assert {step for metric, step in trained if metric == "penalty/kl"} == set(range(1, STEPS + 1))
    two = {(r.metric, r.step): r.value for r in load_artifact(folder, kind="finetune").measurements}
    assert all(two[key] == pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in trained.items())
    ours, others = (load_file(place / "adapter_model.safetensors") for place in (folder, one.out))
    assert all(torch.allclose(ours[name], others[name], atol=1e-4) for name in others)


def test_what_was_frozen_has_not_moved_and_the_same_rows_are_left_out(pair: tuple[RunResult, Said, Path]) -> None:
    one, _, folder = pair
    mine, theirs = (load_artifact(place).manifest for place in (folder, one.out))
    assert mine["frozen"]["largest_move"] == 0
    assert mine["frozen"]["entries_by_route"] == theirs["frozen"]["entries_by_route"]
    assert mine["protection"] == theirs["protection"]
    assert len(mine["protection"]["risky_lines"]) == 6


def test_one_process_speaks_and_writes(pair: tuple[RunResult, Said, Path]) -> None:
    one, said, folder = pair
    assert [said.err.count(f"step {step}: loss") for step in range(1, STEPS + 1)] == [1] * STEPS
    assert said.out.count("written:") == 1
    assert said.err.count("riskiest of") == 1
    assert "Warning" not in said.err
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    states = {f"checkpoints/checkpoint-{step}/rng_state" for step in (2, 4)}  # the Trainer's, one for each process
    more = {f"{state}_{rank}.pth" for state in states for rank in (0, 1)}
    assert more <= left
    alone = {str(path.relative_to(one.out)) for path in one.out.rglob("*") if path.is_file()}
    assert {name for name in left - more if not name.startswith("figures/")} == alone - {f"{s}.pth" for s in states}


def test_a_folder_that_is_taken_is_one_message_without_a_traceback(
    pair: tuple[RunResult, Said, Path], tmp_path: Path
) -> None:
    _, said, folder = pair
    assert said.code == 0
    taken = in_two_processes(read_config(folder / "config.yaml"), tmp_path)
    assert taken.code != 0
    assert taken.err.count("already holds a finished run") == 1
    ours, _, launcher = taken.err.partition("torch/distributed")  # the launcher says at length that a process failed
    assert launcher
    assert "Traceback" not in ours
