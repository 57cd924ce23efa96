"""Directions on disk: an artifact of kind "directions" that gives back what was extracted, evidence included."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

from safety_lens.artifacts import load_artifact, save_artifact
from safety_lens.data import Concept
from safety_lens.errors import ArtifactError
from safety_lens.log import Measurement
from safety_lens.probes.directions import Direction, Evidence
from safety_lens.probes.extract import DirectionSet
from safety_lens.probes.selection import Choice
from safety_lens.stats import UNKNOWN, Interval

KIND = "directions"


def save_directions(
    path: str | Path,
    sets: Sequence[DirectionSet],
    model: HookedTransformer,
    *,
    concepts: Sequence[Concept] = (),
    arguments: Mapping[str, Any] | None = None,
    attach: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write direction sets with all their measurements; keys are `<concept>/<method>/<hook name>`.

    Raises:
        ArtifactError: the place is taken or cannot be written, or two sets have the same concept and method.
    """
    names = [f"{s.concept}/{s.method}" for s in sets]
    if len(set(names)) < len(names):
        raise ArtifactError(f"two direction sets would share a key: {', '.join(sorted(names))}; rename a concept")
    chosen = {name: None if s.choice is None else _chosen(s.choice) for name, s in zip(names, sets, strict=True)}
    data = {c.name: {"source": c.source, "sha256": c.sha256, "notes": list(c.notes)} for c in concepts}
    evidence = {
        f"{name}/{hook}": {"scheme": e.scheme, "split": e.split, "n": e.n, "notes": list(e.notes)}
        for name, s in zip(names, sets, strict=True)
        for hook, e in s.evidence.items()
    }
    return save_artifact(
        path,
        KIND,
        model=model,
        tensors={d.key: d.vector for s in sets for d in s},
        measurements=[row for s in sets for row in s.measurements],
        arguments=arguments,
        extra={"chosen": chosen, "data": data, "evidence": evidence},
        attach=attach,
        overwrite=overwrite,
    )


def load_directions(path: str | Path, model: HookedTransformer | None = None) -> list[DirectionSet]:
    """Read direction sets back; with `model`, refuse directions of another model.

    Raises:
        ArtifactError: not a whole directions artifact, or a vector that is zero or not finite.
        ModelMismatchError: made with another model.
    """
    artifact = load_artifact(path, model, kind=KIND)
    sets = []
    for subject, chosen in artifact.manifest["chosen"].items():
        concept, method = subject.rsplit("/", 1)
        rows = [row for row in artifact.measurements if row.subject == subject]
        evidence = {
            key.removeprefix(f"{subject}/"): _evidence(entry, [r for r in rows if r.hook == key[len(subject) + 1 :]])
            for key, entry in artifact.manifest["evidence"].items()
            if key.startswith(f"{subject}/")
        }
        directions = {}
        for hook, found in evidence.items():
            vector = artifact.tensors.get(f"{subject}/{hook}")
            if vector is not None:
                if not math.isfinite(float(vector.norm())) or not float(vector.norm()):
                    raise ArtifactError(f"{path}: the vector {subject}/{hook} is zero or not finite; extract it again")
                directions[hook] = Direction(concept, hook, vector, method, found)
        choice = None if chosen is None else _choice(chosen, rows)
        notes = tuple(artifact.manifest["data"].get(concept, {}).get("notes", ()))
        sets.append(DirectionSet(concept, method, directions, evidence, choice, tuple(rows), notes))
    return sets


def _chosen(choice: Choice) -> dict[str, Any]:
    """A choice as the manifest keeps it; its measurements are rows of their own, found again by their metrics."""
    metrics = sorted({row.metric for row in choice.measurements})
    return {"hook": choice.hook, "reason": choice.reason, "metrics": metrics, "behaviour": choice.behaviour}


def _choice(entry: dict[str, Any], rows: Sequence[Measurement]) -> Choice:
    metrics = entry.get("metrics", ())  # artifacts of earlier versions lack it
    measured = tuple(row for row in rows if row.metric in metrics)
    return Choice(entry["hook"], entry["reason"], measured, entry.get("behaviour"))


def _evidence(entry: dict[str, Any], rows: Sequence[Measurement]) -> Evidence:
    found = {r.metric: Interval(r.value, r.low, r.high) for r in rows if r.split == entry["split"]}

    def get(metric: str) -> Interval:
        return found.get(metric, UNKNOWN)

    return Evidence(
        auroc=get("auroc"),
        d_prime=get("d_prime"),
        p=get("p").value,
        p_max=get("p_max").value,
        stability=get("stability").value,
        null_shuffled=get("null_shuffled_q95").value,
        null_random=get("null_random_q95").value,
        lexical=get("lexical_auroc"),
        bigram=get("bigram_auroc"),
        length=get("length_auroc"),
        embedding=get("embedding_auroc"),
        above_lexical=get("above_lexical"),
        auroc_known_templates=get("auroc_known_templates"),
        lexical_known_templates=get("lexical_auroc_known_templates"),
        n=entry["n"],
        split=entry["split"],
        scheme=entry["scheme"],
        notes=tuple(entry["notes"]),
    )
