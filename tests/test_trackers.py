"""What TensorBoard and Weights & Biases have on disk after a watched run, read back with their own readers."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from watched import PAIRS, PROBES, adapted, tiny_concepts, trainer

from safety_lens.monitors import MonitorCallback, read_log
from safety_lens.monitors.reporters import figures

Curves = dict[str, dict[int, float]]
RUN: dict[str, Any] = {"max_steps": 4, "logging_steps": 2, "run_name": "watched"}


def watched(folder: Path, tracker: str) -> Curves:
    """Train under the monitor with a tracker, and what the log says that it should hold: name → step → value."""
    callback = MonitorCallback(tiny_concepts(), every=2, budget=None, probes=PROBES, pairs=PAIRS)
    made = trainer(adapted(), folder, [callback], report_to=[tracker], **RUN)
    made.train()
    rows = read_log(folder / "drift.jsonl")
    headline = next(row.hook for row in rows if row.metric == "headline")
    expected: Curves = {}
    for step in (0, 2, 4):
        for name, value in figures([row for row in rows if row.step == step], str(headline)).items():
            expected.setdefault(f"train/{name}", {})[step] = value
    for entry in made.state.log_history:
        if "loss" in entry:
            expected.setdefault("train/loss", {})[int(entry["step"])] = entry["loss"]
    return expected


def assert_holds(found: Curves, expected: Curves) -> None:
    assert {name for name in found if name.startswith("train/drift/")} == {n for n in expected if "/drift/" in n}
    for name, curve in expected.items():
        assert found[name].keys() == curve.keys(), name
        np.testing.assert_allclose([found[name][s] for s in curve], list(curve.values()), rtol=1e-6, err_msg=name)
    assert {"train/loss", "train/drift/joy/dim/cosine_to_baseline", "train/drift/run/level"} <= found.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_the_log_beside_the_loss_in_one_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: its files cannot be read")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = watched(tmp_path, "tensorboard")
    (folder,) = (tmp_path / "runs").iterdir()  # two folders would be two runs in TensorBoard
    events = EventAccumulator(str(folder)).Reload()
    found = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert_holds(found, expected)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for the runs of wandb, which sends nothing."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: its files cannot be read")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield tmp_path / "wandb"
    wandb.teardown()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_has_the_log_beside_the_loss_in_one_run(offline: Path, tmp_path: Path) -> None:
    import wandb

    expected = watched(tmp_path / "run", "wandb")
    wandb.teardown()  # finish() alone may return before all is written
    (file,) = offline.glob("offline-run-*/*.wandb")
    assert_holds(history(file), expected)


def history(file: Path) -> Curves:
    """The curves of an offline run by global step."""
    from wandb.proto.wandb_internal_pb2 import Record

    out = Curves()
    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if name.startswith("train/") and name != "train/global_step":
                out.setdefault(name, {})[int(row["train/global_step"])] = value
    return out


def records(content: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: seven bytes, then LevelDB's log format, whose blocks of 32 KiB hold records in parts.

    Each part: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last), data.
    """
    place, parts = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""
