"""A sweep on disk while it runs: the plan, the directions, and every portion of answers as soon as it is done.

A process that is killed at any moment leaves whole portions, or a torn last one that is dropped. Portions follow each
other in the order of the sweep's answers: those that are left begin where the stored ones end.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safety_lens.artifacts import MANIFEST, MEASUREMENTS, check_place, read_manifest, refuse_foreign
from safety_lens.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

    from safety_lens.interventions.sweeping.plan import Plan, Site

KIND = "sweep"
PLAN, GENERATIONS, CHECKS, TABLE = "plan.json", "generations.jsonl", "checks.jsonl", "table.csv"
VECTORS = f"{KIND}.safetensors"
OURS = (PLAN, GENERATIONS, CHECKS, TABLE, VECTORS, MANIFEST, MEASUREMENTS)
SAME = 1e-3  # relative distance of vectors that count as equal: refitting on other hardware moves them by rounding
Record = dict[str, Any]


class Journal:
    """Portions of records, each appended and flushed to the disk as a whole; in memory alone where `path` is None.

    Raises:
        ArtifactError: a line before the last portion is not what was written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.portions: dict[str, list[Record]] = {}
        if path is not None and path.exists():
            self._recover(path)

    def __contains__(self, key: str) -> bool:
        return key in self.portions

    @property
    def records(self) -> list[Record]:
        return [record for portion in self.portions.values() for record in portion]

    def add(self, key: str, records: Sequence[Record]) -> None:
        """Append one portion; when this returns it is on the disk."""
        # read back as a later run would read it: the table must not depend on where a run was cut
        lines = [json.dumps({"portion": key, "of": len(records), **r}, ensure_ascii=False) + "\n" for r in records]
        self.portions[key] = [_record(json.loads(line)) for line in lines]
        if self.path is None:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write("".join(lines).encode())
                os.fsync(file.fileno())
        except OSError as error:
            raise ArtifactError(
                f"cannot write {self.path}: {error.strerror or error}; what is there is kept"
            ) from error

    def _recover(self, path: Path) -> None:
        content = path.read_bytes()
        found: dict[str, list[Record]] = {}
        wanted: dict[str, int] = {}
        ends: dict[str, int] = {}
        place = 0
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break  # torn: the process ended while it was writing
            try:
                raw = json.loads(line)
                key, size = str(raw["portion"]), int(raw["of"])
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"{path}, line {number}: not a record of a sweep ({error})") from error
            place += len(line)
            found.setdefault(key, []).append(_record(raw))
            wanted[key], ends[key] = size, place
        whole = [key for key in found if len(found[key]) == wanted[key]]
        if len(whole) < len(found) - 1 or whole != list(found)[: len(whole)]:
            raise ArtifactError(f"{path} is damaged: a portion before the last one is not whole; start the sweep anew")
        self.portions = {key: found[key] for key in whole}
        end = ends[whole[-1]] if whole else 0
        if end < len(content):
            with path.open("r+b") as file:
                file.truncate(end)


def _record(raw: Record) -> Record:
    return {key: value for key, value in raw.items() if key not in ("portion", "of")}


class Opened(NamedTuple):
    """A sweep's place. sites: as they were when the sweep was begun. sealed: nothing is left to do."""

    folder: Path | None
    generations: Journal
    checks: Journal
    sites: "tuple[Site, ...]"
    sealed: bool = False


def open_sweep(out: Path | None, plan: "Plan", identity: Mapping[str, Any], *, overwrite: bool = False) -> Opened:
    """Begin a sweep in a folder, or go on with the one that is there, if it is the same.

    identity: what else must be the same (model, tokenizer).

    Raises:
        ArtifactError: the place is taken by something else, or by another sweep: the message says what differs.
    """
    if out is None:
        return Opened(None, Journal(None), Journal(None), plan.sites)
    wanted = json.loads(json.dumps({**plan.to_json(), **identity}))
    if overwrite:
        _clear(out)
    elif (out / PLAN).is_file() and not any((out / name).is_file() for name in (GENERATIONS, MANIFEST)):
        _clear(out)  # no answer was written: nothing is lost, and the plan may be another one
    if (out / PLAN).is_file():
        sites = _same_sites(out, plan, wanted)
    else:
        _begin(out, plan, wanted)
        sites = plan.sites
    return Opened(out, Journal(out / GENERATIONS), Journal(out / CHECKS), sites, (out / MANIFEST).is_file())


def _clear(out: Path) -> None:
    """Remove the sweep that is in the way, only where nothing else lies in its folder."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    if (out / MANIFEST).is_file():
        read_manifest(out, KIND)
    elif not (out / VECTORS).is_file():  # the first file of a sweep
        raise ArtifactError(f"{out} exists and is not a sweep; choose another --out")
    refuse_foreign(out, (*OURS, f".{PLAN}", f".{MANIFEST}"))
    for name in OURS:
        (out / name).unlink(missing_ok=True)


def _begin(out: Path, plan: "Plan", wanted: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    if out.is_dir() and {f.name for f in out.iterdir()} <= {VECTORS, f".{PLAN}"}:
        _clear_begun(out)  # killed between the two writes below
    check_place(out, KIND)
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(vectors_of(plan.sites), out / VECTORS)
        _write_whole(out / PLAN, {"plan": wanted, "units": [s.units for s in plan.sites]})
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def _clear_begun(out: Path) -> None:
    for file in out.iterdir():
        file.unlink()


def _write_whole(path: Path, content: Any) -> None:
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def vectors_of(sites: "Sequence[Site]") -> "dict[str, Tensor]":
    """Every vector of a sweep by its place: `<site>/<part>` and `<site>/shuffled/<number>/<part>`."""
    out: dict[str, Tensor] = {}
    for i, site in enumerate(sites):
        out |= {f"{i}/{p}": d.vector.cpu().contiguous().clone() for p, d in enumerate(site.parts)}
        for k, parts in enumerate(site.shuffled):
            out |= {f"{i}/shuffled/{k}/{p}": d.vector.cpu().contiguous().clone() for p, d in enumerate(parts)}
    return out


def _same_sites(out: Path, plan: "Plan", wanted: Mapping[str, Any]) -> "tuple[Site, ...]":
    """The stored vectors and units, once they are known to be those asked for: refitted ones may differ by rounding."""
    from safetensors.torch import load_file

    stored = read_plan(out)
    differing = [k for k in {**stored["plan"], **wanted} if stored["plan"].get(k) != wanted.get(k)]
    if differing:
        said = "; ".join(f"{k} {_shown(stored['plan'].get(k))} there, {_shown(wanted.get(k))} here" for k in differing)
        raise ArtifactError(f"{out} holds another sweep: {said}. Choose another --out, or pass --overwrite")
    old, new = load_file(out / VECTORS), vectors_of(plan.sites)
    for key, vector in new.items():
        if key not in old or float((old[key] - vector).norm()) > SAME * float(vector.norm()):
            raise ArtifactError(
                f"{out} holds a sweep of another direction at {plan.sites[int(key.split('/')[0])].name}: choose another"
                " --out, or pass --overwrite"
            )
    sites = []
    for i, (site, units) in enumerate(zip(plan.sites, stored["units"], strict=True)):
        parts = tuple(replace(d, vector=old[f"{i}/{p}"].to(d.vector)) for p, d in enumerate(site.parts))
        shuffled = tuple(
            tuple(replace(d, vector=old[f"{i}/shuffled/{k}/{p}"].to(d.vector)) for p, d in enumerate(row))
            for k, row in enumerate(site.shuffled)
        )
        sites.append(replace(site, parts=parts, shuffled=shuffled, units=None if units is None else tuple(units)))
    return tuple(sites)


def read_plan(folder: Path) -> Record:
    """plan.json of a sweep.

    Raises:
        ArtifactError: there is none, or it is not one.
    """
    try:
        content = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} has no {PLAN}: it is not a sweep") from error
    except ValueError as error:
        raise ArtifactError(f"{folder / PLAN} is not JSON ({error}); start the sweep anew with --overwrite") from error
    if not isinstance(content, dict) or not {"plan", "units"} <= set(content):
        raise ArtifactError(f"{folder / PLAN} is not the plan of a sweep; start it anew with --overwrite")
    return content


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
