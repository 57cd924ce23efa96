"""Loading a concept: a built-in name, a file, or a data set of the Hugging Face Hub."""

import difflib
import hashlib
import json
from pathlib import Path

from safety_lens.data.built_in import BuiltIn, ModelHint, built_in_for, find_concept
from safety_lens.data.formats import detect
from safety_lens.data.pairs import Concept
from safety_lens.data.rows import Row, Table, check_ids, raw_rows, read_rows
from safety_lens.data.splits import split_pairs
from safety_lens.errors import DataError


def load_concept(
    name_or_path: str | Path, *, model: ModelHint = None, seed: int = 0, raw: bool | None = None
) -> Concept:
    """Load contrast pairs in three splits.

    Args:
        name_or_path: A built-in concept ("refusal"; "english:refusal" and "organism:refusal" whatever the model is), a
            JSONL or CSV file of any format in `safety_lens.data.formats.FORMATS`, or `hf:name[:config][:split]`
            ("hf:name::split": no config).
        model: The model that a bare built-in name is meant for, its tokenizer, or a source such as "organism" or a
            folder; None: plain English. See `built_in_for`.
        seed: Decides pairings and splits where the data does not.
        raw: True: plain text, never a chat template. False: chat turns. None: as the format is by nature, or as the
            rows say with a field "raw".

    Raises:
        DataError: An unknown name, a malformed row (names file, line and fault), mixed formats, too few pairs.
    """
    name, built_in = str(name_or_path), built_in_for(model)
    found = find_concept(name, built_in)
    source = name if found is None else f"{found[0].name}:{found[1]}"
    return _concept(read_source(name, built_in), None if found is None else found[1], source=source, seed=seed, raw=raw)


def check_concept(name_or_path: str | Path, model: ModelHint = None) -> None:
    """Refuse a name that `load_concept` could not follow; no pairs are read.

    Raises:
        DataError: With the nearest built-in concept.
    """
    name, built_in = str(name_or_path), built_in_for(model)
    if find_concept(name, built_in) is None and not name.startswith("hf:") and not Path(name).exists():
        raise DataError(_unknown_concept(name, built_in))


def read_source(name_or_path: str | Path, model: ModelHint = None) -> Table:
    """Read the rows of a name as `load_concept` takes it: built-in, file, or "hf:..."."""
    name, built_in = str(name_or_path), built_in_for(model)
    check_concept(name, built_in)
    found = find_concept(name, built_in)
    if found is not None:
        return read_rows(found[0].concept_file(found[1]))
    if name.startswith("hf:"):
        return read_hub(name)
    return read_rows(name)


def _concept(table: Table, name: str | None, *, source: str, seed: int, raw: bool | None) -> Concept:
    form = detect(table.rows)
    drafts, notes = form.read(table.rows, seed)
    splits = split_pairs(drafts, seed, source)
    return Concept(
        name=name or _own_name(table.rows) or Path(source.removeprefix("hf:").split(":")[0]).stem,
        train=splits.train,
        val=splits.val,
        test=splits.test,
        source=source,
        sha256=table.sha256,
        raw=raw_rows(table.rows, form.raw) if raw is None else raw,
        notes=(*notes, *splits.notes),
    )


def _own_name(rows: list[Row]) -> str | None:
    """The name that all rows give in `concept` or `behavior`."""
    for field in ("concept", "behavior"):
        names = {row.label(field) for row in rows}
        if len(names) == 1 and None not in names:
            return names.pop()
    return None


def _unknown_concept(name: str, built_in: BuiltIn) -> str:
    near = difflib.get_close_matches(name.lower(), built_in.concepts, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return (
        f"no concept and no file named '{name}': {hint}Built-in concepts ({built_in.title}) are"
        f" {', '.join(built_in.concepts)}; anything else is a path to a JSONL or CSV file, or hf:name for a data set"
    )


def read_hub(name: str) -> Table:
    """The rows of "hf:name[:config][:split]", or of one file of a data set, "hf://datasets/owner/name/file.jsonl".

    The first form goes through `datasets.load_dataset`; `name` may be a local folder. Rows keep a `split` field of
    their own. Otherwise, where a data set has several splits, their names count as the rows' splits; one split alone
    says nothing (`datasets` calls everything "train").

    Raises:
        DataError: the data set cannot be had (no network, no such name, config or split).
    """
    from datasets.exceptions import DatasetsError

    hub_name, hub_file = _hub_name(name), _hub_file(name)
    try:
        return _download(*hub_file) if hub_file else _load(name, *hub_name)
    except DataError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"cannot load the data set {name}: {str(error).splitlines()[0].rstrip('.')}. Check the name; without "
            "network, give a file (JSONL or CSV) or a local folder that holds the data set"
        ) from error


def _hub_file(name: str) -> tuple[str, str] | None:
    """Repository and path of "hf://datasets/owner/name/path"."""
    parts = name.removeprefix("hf://datasets/").split("/", 2)
    return ("/".join(parts[:2]), parts[2]) if name.startswith("hf://datasets/") and len(parts) == 3 else None


def _hub_name(name: str) -> tuple[str, str | None, str | None]:
    """Path, config and split of "hf:name[:config][:split]"."""
    parts = name.removeprefix("hf:").split(":")
    if not _hub_file(name) and (not parts[0] or len(parts) > 3 or name.startswith("hf://")):
        raise DataError(
            f"'{name}' is not a data set name: write hf:name, hf:name:config, hf:name:config:split, "
            "or hf://datasets/owner/name/file.jsonl"
        )
    path, config, split = (*parts, "", "")[:3]
    return path, config or None, split or None


def _download(repository: str, path: str) -> Table:
    from huggingface_hub import hf_hub_download

    return read_rows(hf_hub_download(repository, path, repo_type="dataset"))


def _load(name: str, path: str, config: str | None, split: str | None) -> Table:
    from datasets import DatasetDict, load_dataset

    loaded = load_dataset(path, config, split=split)
    named = dict(loaded) if isinstance(loaded, DatasetDict) else {"": loaded}
    rows: list[Row] = []
    for key, part in named.items():
        for fields in part:
            if len(named) > 1 and fields.get("split") is None:
                fields = {**fields, "split": key}
            rows.append(Row(fields, name, len(rows) + 1))
    if not rows:
        raise DataError(f"the data set {name} has no rows")
    check_ids(rows)
    content = json.dumps([row.fields for row in rows], sort_keys=True, default=str)
    return Table(rows, hashlib.sha256(content.encode()).hexdigest())
