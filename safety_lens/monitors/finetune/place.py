"""The folder of a run: taken, resumed or refused before anything loads."""

import json
import re
import shutil
from pathlib import Path

import yaml

from safety_lens.artifacts import FROZEN, MANIFEST, MEASUREMENTS, check_place, refuse_foreign
from safety_lens.errors import ArtifactError, DataError
from safety_lens.monitors.finetune.config import RunConfig, differences, read_config

CONFIG, CHECKPOINTS, LOG = "config.yaml", "checkpoints", "drift.jsonl"
"""Files of a run: its configuration, the Trainer's checkpoints, the monitor's log."""

_MODEL = (
    *("adapter_config.json", "adapter_model.safetensors", FROZEN, "config.json", "generation_config.json", "README.md"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "training_args.bin"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"),
)
_STATE = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_*.pth")
RESULTS = (CONFIG, LOG, "drift.csv", "row_risk.jsonl", MEASUREMENTS, *_MODEL)
"""Patterns of the files of a run that its manifest lists."""
RUN_FILES = (
    *RESULTS,
    *(f"{LOG}.*", f".{LOG}.tmp", f".{MANIFEST}", "figures/drift-*.png", "figures/neurons-*.png"),
    *(f"drift-baseline/{name}" for name in (MANIFEST, MEASUREMENTS, "baseline.safetensors")),
    *(f"{CHECKPOINTS}/checkpoint-*/{name}" for name in (*_MODEL, *_STATE)),
    f"{CHECKPOINTS}/runs/*/events.out.tfevents.*",
)
"""Patterns of everything that a run writes, and that --overwrite may remove."""


def claim(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Make the folder of a run and write its configuration, or find the interrupted run that is to go on.

    Raises:
        ArtifactError: the place is taken, cannot be written, or holds a run of another configuration.
    """
    out = config.out
    check_room(config, resume=resume, overwrite=overwrite)
    try:
        if not resume and out.exists():
            shutil.rmtree(out)
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


def check_room(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a folder that `claim` would refuse; nothing is written or removed, and torch is not imported.

    Raises:
        ArtifactError: the place is taken, cannot be written, or holds a run of another configuration, or files that
            no run wrote.
    """
    if resume:
        _check_resumable(config)
        return
    out = config.out
    finished = (out / MANIFEST).is_file()
    if (out / CONFIG).is_file() and not overwrite:
        _refuse_taken(out, finished)
    if (out / CONFIG).is_file() and not finished:
        _refuse_other_config(out)
        refuse_foreign(out, RUN_FILES)
    else:
        check_place(out, "finetune", overwrite, RUN_FILES)


def _refuse_taken(out: Path, finished: bool) -> None:
    if finished:
        raise ArtifactError(f"{out} already holds a finished run; choose another --out or pass --overwrite")
    raise ArtifactError(
        f"{out} holds a run that was interrupted: pass --resume to go on from its last checkpoint, or --overwrite"
    )


def _refuse_other_config(out: Path) -> None:
    """Refuse a config.yaml that is not as a run writes it: of another program, or typed by hand."""
    try:
        read_config(out / CONFIG)
        text = (out / CONFIG).read_text(encoding="utf-8")
        if text == yaml.safe_dump(yaml.safe_load(text), sort_keys=False, allow_unicode=True):
            return
    except DataError:
        pass
    raise ArtifactError(f"{out} holds no run: no run wrote its {CONFIG}; move that file away or choose another --out")


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

    The Trainer names them checkpoint-STEP and writes trainer_state.json last; folders of other names are left alone.
    """
    steps = {int(name[1]): path for path in folder.glob("*") if (name := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    for _, place in sorted(steps.items(), reverse=True):
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
