"""Runs that were interrupted under a penalty, with frozen and watched groups: resumed, they are bit for bit one run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from synthetic_groups import save_organism_groups
from transformers import TrainerCallback, TrainingArguments

from safety_lens.log import Measurement
from safety_lens.monitors.finetune.config import RunConfig, read_config
from safety_lens.monitors.finetune.run import run

STEPS, SAVED, KILLED = 6, 4, 5

ASKED: dict[str, dict[str, Any]] = {
    "kl": {"protect.penalty": "kl", "tuning.dropout": 0.1},
    "fisher": {"protect.penalty": "fisher", "protect.anchor": 0.1},
    "alignguard": {"protect.penalty": "alignguard"},
    "frozen entries": {"tuning.freeze": ["entries"], "monitor.groups": ["entries"]},
    "frozen neurons, kl": {"tuning.freeze": ["units"], "tuning.targets": "all-linear", "protect.penalty": "kl"},
    "all weights, frozen entries, kl": {
        "tuning.method": "full", "tuning.freeze": ["entries"], "protect.penalty": "kl", "training.learning_rate": 1e-4,
    },
}  # fmt: skip


class Interrupted(TrainerCallback):
    """Ends the run without any goodbye, as a kill does."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED:
            raise KeyboardInterrupt


def config(out: Path, groups: Path, changes: dict[str, Any]) -> RunConfig:
    settings: dict[str, Any] = {
        "out": out, "model": "organism", "device": "cpu", "data.source": "benign", "data.limit": 40,
        "tuning.targets": ["q_proj", "v_proj"], "tuning.rank": 4, "training.max_steps": STEPS,
        "training.per_device_train_batch_size": 4, "training.learning_rate": 1e-3, "training.save_steps": SAVED,
        "training.logging_steps": 1, "monitor.probes": False, "monitor.every": 3, "monitor.budget": None,
        "monitor.concepts": ["refusal"] if "monitor.groups" in changes else [], "protect.rows": 20, "protect.batch": 8,
    }  # fmt: skip
    named = {
        key: [f"{groups}:{name}" for name in value] if key in ("tuning.freeze", "monitor.groups") else value
        for key, value in changes.items()
    }
    return read_config(None, settings | named)


def numbers(rows: tuple[Measurement, ...]) -> dict[tuple[Any, ...], str]:
    """Values by what they measure, exact to the bit; NaN equals NaN."""
    timed = ("seconds", "train_runtime")
    return {(r.step, r.subject, r.metric, r.hook, r.split): float(r.value).hex() for r in rows if r.metric not in timed}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_organism_groups(tmp_path_factory.mktemp("groups") / "g")


@pytest.mark.slow
@pytest.mark.parametrize("case", ASKED)
def test_an_interrupted_run_resumes_to_the_same_bits(case: str, groups: Path, tmp_path: Path) -> None:
    whole = run(config(tmp_path / "whole", groups, ASKED[case]))
    asked = config(tmp_path / "cut", groups, ASKED[case])
    with pytest.raises(KeyboardInterrupt):
        run(asked, callbacks=[Interrupted()])
    resumed = run(asked, resume=True)
    (name,) = (file.name for file in whole.out.glob("*model.safetensors"))
    ours, theirs = (load_file(out / name) for out in (resumed.out, whole.out))
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert numbers(resumed.measurements) == numbers(whole.measurements)
