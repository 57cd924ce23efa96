"""What of a run can be refused at once: names of data, concepts and groups, without importing torch or reading rows."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from safety_lens.artifacts import MANIFEST, check_place, read_manifest
from safety_lens.data.built_in import built_in_for
from safety_lens.data.concept import check_concept
from safety_lens.data.training import check_source
from safety_lens.errors import ArtifactError
from safety_lens.loading.gguf_files import names_gguf, resolve_gguf
from safety_lens.monitors.finetune.config import RunConfig
from safety_lens.probes.example_sets import KINDS, asked_of


def check_early(config: RunConfig) -> None:
    """Refuse names that lead nowhere. Content is checked when it is read, sets of the Hub when they are asked for.

    Raises:
        DataError: no such training data, concept or safety data, or control runs of another kind.
        ArtifactError: no such folder of groups, no such group in it, or a baseline's folder that cannot be used.
    """
    if names_gguf(config.model):
        resolve_gguf(config.model)
    check_source(config.data.source)
    for name in config.monitor.concepts:
        check_concept(name, config.model)
    check_protection(config)
    check_baseline(config.monitor.baseline)
    if config.monitor.control_runs:
        from safety_lens.monitors.finetune.watch import control_runs

        control_runs(config)
    for text in (*config.tuning.freeze, *config.monitor.groups):
        chosen_group(text, group_names(split_name(text)[0]))


def check_baseline(folder: Path | None) -> None:
    """Refuse a folder that neither holds a baseline nor can take one.

    Raises:
        ArtifactError: it holds something else, or cannot be written.
    """
    try:
        if folder is not None and (folder / MANIFEST).is_file():
            read_manifest(folder, kind="baseline")
        elif folder is not None:
            check_place(folder, "baseline")
    except ArtifactError as error:
        raise ArtifactError(f"--baseline: {str(error).replace('--out', '--baseline')}") from error


def check_protection(config: RunConfig) -> None:
    """Refuse safety data that cannot be read.

    Raises:
        DataError: no such file or set, or a malformed row.
    """
    if config.protect.is_on:
        asked_of(config.protect.safety, None, None, built_in_for(config.model), KINDS["safety"])


def split_name(text: str) -> tuple[str, str | None]:
    """`FOLDER:GROUP` as folder and group; a folder whose own name has a colon is itself."""
    place, colon, name = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, None
    return place, name


def group_names(place: str | Path) -> list[str]:
    """Names of the groups in an artifact, from its manifest alone.

    Raises:
        ArtifactError: no artifact of groups there.
    """
    return list(read_manifest(Path(place), kind="groups")["groups"])


def chosen_group(text: str, have: Sequence[str]) -> str:
    """The group that `FOLDER` or `FOLDER:GROUP` means, out of those that the folder holds.

    Raises:
        ArtifactError: no such group, or a folder of several and no name.
    """
    place, name = split_name(text)
    if name is None and len(have) == 1:
        return have[0]
    if name is None:
        raise ArtifactError(f"{place} holds several groups: name one of {', '.join(have)}, such as {place}:{have[0]}")
    if name not in have:
        near = difflib.get_close_matches(name, have, n=1)
        hint = f"; did you mean {place}:{near[0]}?" if near else ""
        raise ArtifactError(f"{place} holds no group {name!r}: it has {', '.join(have)}{hint}")
    return name
