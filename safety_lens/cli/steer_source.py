"""Where `steer` gets its directions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safety_lens.errors import DataError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from safety_lens.data import Concept
    from safety_lens.probes.extract import DirectionSet
    from safety_lens.probes.reading import ConceptActivations
    from safety_lens.types import Prompt


class Source(NamedTuple):
    """Directions and what is known about where they came from. acts: None where only the artifact is at hand."""

    found: "DirectionSet"
    acts: "ConceptActivations | None"
    trained_on: "list[Prompt] | None"
    chosen_on: "list[Prompt] | None"


def read_source(
    model: "HookedTransformer",
    artifact: Path | None,
    concepts: Sequence[str] | None,
    pairs: Sequence[str] | None,
    method: str,
    point: str,
    positions: str,
    seed: int,
    raw: bool,
) -> Source:
    """The directions of an artifact, or those of a concept or a file of pairs, extracted on the spot.

    Raises:
        DataError: an artifact with several sets, none of them named. ModelMismatchError: of another model.
    """
    from safety_lens.cli import terminal
    from safety_lens.data import load_concept
    from safety_lens.interventions.gguf import read_directions
    from safety_lens.models import hooks_at
    from safety_lens.positions import parse_positions
    from safety_lens.probes.extract import directions_from
    from safety_lens.probes.reading import read_concepts

    name = next(iter([*(concepts or []), *(pairs or [])]), None)
    if artifact is not None:
        sets = read_directions(artifact, model)
        fitting = [s for s in sets if name in (None, s.concept) and (len(sets) == 1 or s.method == method)]
        if len(fitting) != 1:
            known = ", ".join(f"{s.concept}/{s.method}" for s in sets)
            wanted = "several sets" if name is None else f"not {name}/{method}"
            raise DataError(f"{artifact} holds {known}, {wanted}: choose one with --concept and --method")
        if artifact.suffix == ".gguf":
            return Source(fitting[0], None, None, None)
        behind = _behind(model, artifact, fitting[0].concept, seed)
        return Source(fitting[0], None, *((None, None) if behind is None else _texts(behind)))
    concept = load_concept(str(name), model=model, seed=seed, raw=True if raw else None)
    terminal.print_pairs([concept])
    acts = read_concepts(model, [concept], hooks_at(model, point), positions=parse_positions(positions))[0]
    found = directions_from(model, acts, method=method, seed=seed, null_repeats=20)
    return Source(found, acts, *_texts(concept))


def _texts(concept: "Concept") -> "tuple[list[Prompt], list[Prompt]]":
    """What fitted the direction, and what chose its hook."""
    train, val = (
        [side for pair in pairs for side in (pair.positive, pair.negative)] for pairs in (concept.train, concept.val)
    )
    return train, val


def _behind(model: "HookedTransformer", artifact: Path, name: str, seed: int) -> "Concept | None":
    """The pairs behind an artifact, where its source can still be read and is unchanged."""
    from safety_lens.artifacts import load_artifact
    from safety_lens.data import load_concept

    said = load_artifact(artifact).manifest["data"].get(name)
    if said is None:
        return None
    try:
        concept = load_concept(said["source"], model=model, seed=seed)
    except DataError:
        return None  # moved or offline: the caller tells the reader that overlap could not be checked
    return concept if concept.sha256 == said["sha256"] else None


def hooks_of(
    model: "HookedTransformer", found: "DirectionSet", point: str, layers: Sequence[int] | None, hook: str | None
) -> list[str]:
    """The hooks asked for, each with a direction; all of them where none is asked for."""
    from safety_lens.models import check_hooks, hooks_at

    if hook is not None:
        check_hooks(model, [hook])
    named = [hook] if hook is not None else hooks_at(model, point, layers) if layers is not None else None
    return [direction.hook for direction in found] if named is None else [found[name].hook for name in named]
