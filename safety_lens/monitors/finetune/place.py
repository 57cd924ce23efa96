"""The folder of a run: taken, resumed or refused before anything loads."""

import json
import shutil
from pathlib import Path

from safety_lens.artifacts import MANIFEST, check_place
from safety_lens.errors import ArtifactError
from safety_lens.monitors.finetune.config import RunConfig, differences, read_config

CONFIG, CHECKPOINTS, LOG = "config.yaml", "checkpoints", "drift.jsonl"
"""Files of a run: its configuration, the Trainer's checkpoints, the monitor's log."""


def claim(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Make the folder of a run and write its configuration, or find the interrupted run that is to go on.

    Raises:
        ArtifactError: the place is taken, cannot be written, or holds a run of another configuration.
    """
    out = config.out
    if resume:
        _check_resumable(config)
    else:
        if overwrite and (out / CONFIG).is_file():
            shutil.rmtree(out)
        elif (out / CONFIG).is_file():
            _refuse_taken(out)
        check_place(out, overwrite)
        if out.exists():
            shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            (out / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        with (out / LOG).open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    if (out / LOG).stat().st_size == 0:
        (out / LOG).unlink()
    return out


def _refuse_taken(out: Path) -> None:
    if (out / MANIFEST).is_file():
        raise ArtifactError(f"{out} already holds a finished run; choose another --out or pass --overwrite")
    raise ArtifactError(
        f"{out} holds a run that was interrupted: pass --resume to go on from its last checkpoint, or --overwrite"
    )


def _check_resumable(config: RunConfig) -> None:
    out = config.out
    if not (out / CONFIG).is_file():
        raise ArtifactError(f"nothing to resume: {out} holds no run ({CONFIG} is missing)")
    if (out / MANIFEST).is_file():
        raise ArtifactError(f"nothing to resume: the run in {out} is finished")
    if changed := differences(read_config(out / CONFIG), config):
        raise ArtifactError(
            f"{out} holds a run of another configuration (different: {', '.join(changed)}); resume it with its own,"
            f" --config {out / CONFIG}, or choose another --out"
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; one whose writing was cut off is removed, so that it cannot stand in the way.

    The Trainer writes trainer_state.json last.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for place in found:
        if _is_whole(place):
            return place
        shutil.rmtree(place)
    return None


def _is_whole(place: Path) -> bool:
    try:
        json.loads((place / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(place.glob("*.safetensors"))
