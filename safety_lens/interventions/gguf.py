"""Control vectors of other tools: read from GGUF files, judged like any direction.

repeng and llama.cpp share one layout: architecture "controlvector", and one tensor "direction.N" for each block N,
counted from 0, which is added to that block's output. That place is `blocks.N.hook_resid_post`. (llama.cpp refuses
N = 0; repeng does not fit it unless asked to.)
"""

import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from transformer_lens import HookedTransformer

from safety_lens.data import Concept
from safety_lens.errors import ArtifactError, ModelMismatchError
from safety_lens.log import Measurement
from safety_lens.positions import Positions, last_token
from safety_lens.probes.controls import bigram_scores, embedding_scores, length_scores, lexical_scores
from safety_lens.probes.directions import Direction, Evidence
from safety_lens.probes.estimators import estimator
from safety_lens.probes.evaluate import HeldOut, clusters_of, gap_in_deviations, plain_scores, random_null, separation
from safety_lens.probes.extract import DirectionSet, evidence_rows
from safety_lens.probes.reading import ConceptActivations, read_concepts
from safety_lens.probes.selection import Candidates, by_separability
from safety_lens.probes.store import load_directions
from safety_lens.stats import auroc_difference, auroc_permutation

ARCHITECTURE = "controlvector"
METHOD = "gguf"


def read_directions(path: str | Path, model: HookedTransformer) -> list[DirectionSet]:
    """Directions from a directions artifact, or from a GGUF control vector (by its ending).

    Raises:
        ArtifactError: neither, or damaged.
        ModelMismatchError: made with another model, or of another width or depth.
    """
    return [import_gguf(path, model)] if Path(path).suffix == ".gguf" else load_directions(path, model)


def import_gguf(path: str | Path, model: HookedTransformer | None = None, concept: str | None = None) -> DirectionSet:
    """The directions of a GGUF control vector, one for each block it names; they come without evidence.

    concept: what to call it, by default the file's name. With `model`, its width and depth are checked. Nothing in a
    control vector says with which model or data it was made: `judge` measures what it separates.

    Raises:
        ArtifactError: missing, not a control vector, damaged, or a vector that is zero or not finite.
        ModelMismatchError: of another width than the model's residual stream, or for more blocks than it has.
    """
    reader = _open(Path(path))
    name = concept or Path(path).stem
    vectors = {_layer(t.name, path): _vector(t, path) for t in reader.tensors if t.name.startswith("direction.")}
    if not vectors:
        raise ArtifactError(f"{path} holds no tensor named direction.N: it is not a control vector")
    if len({len(v) for v in vectors.values()}) > 1:
        raise ArtifactError(
            f"{path} holds directions of different widths: {sorted({len(v) for v in vectors.values()})}"
        )
    if model is not None:
        _check_model(vectors, model, path)
    hooks = {layer: f"blocks.{layer}.hook_resid_post" for layer in sorted(vectors)}
    hint = _text(reader, f"{ARCHITECTURE}.model_hint")
    notes = [f"imported from {Path(path).name}, which says it was made for {hint or 'no model in particular'}"]
    if model is not None and max(vectors) == model.cfg.n_layers - 1:
        notes.append(f"repeng fits {hooks[max(vectors)]} behind the final norm and adds it before")
    blank = Evidence(notes=("imported: not judged yet",))
    directions = {hooks[n]: Direction(name, hooks[n], vectors[n], METHOD, blank) for n in hooks}
    return DirectionSet(name, METHOD, directions, dict.fromkeys(directions, blank), None, (), tuple(notes))


def _open(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise ArtifactError(f"no file {path}")
    try:
        reader = gguf.GGUFReader(path)
    # What the reader lets through from a damaged file: short data, bad text, unknown types, sizes that cannot be.
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        raise ArtifactError(f"{path} is not a whole GGUF file ({str(error) or type(error).__name__})") from error
    architecture = _text(reader, "general.architecture")
    if architecture != ARCHITECTURE:
        raise ArtifactError(
            f"{path} is a GGUF file of architecture {architecture!r}, not a control vector ({ARCHITECTURE!r})"
        )
    return reader


def _text(reader: gguf.GGUFReader, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None or not field.parts else bytes(field.parts[-1]).decode("utf-8", errors="replace")


def _layer(name: str, path: str | Path) -> int:
    if not re.fullmatch(r"direction\.\d+", name):
        raise ArtifactError(f"{path}: tensor {name!r} does not name a block; control vectors are called direction.N")
    return int(name.removeprefix("direction."))


def _vector(tensor: gguf.ReaderTensor, path: str | Path) -> torch.Tensor:
    if tensor.data.dtype.kind == "f":
        values = tensor.data
    else:
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ArtifactError(f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, not floats") from error
    vector = torch.from_numpy(np.array(values, dtype=np.float32))
    if vector.ndim != 1:
        raise ArtifactError(f"{path}: {tensor.name} has shape {tuple(vector.shape)}; a direction has one axis")
    norm = float(vector.norm())
    if not np.isfinite(norm) or norm == 0:
        raise ArtifactError(f"{path}: {tensor.name} is zero or not finite")
    return vector


def _check_model(vectors: dict[int, torch.Tensor], model: HookedTransformer, path: str | Path) -> None:
    width = len(next(iter(vectors.values())))
    if width != model.cfg.d_model:
        raise ModelMismatchError(
            f"{path} holds directions of width {width}; the model's d_model is {model.cfg.d_model}"
        )
    if max(vectors) >= model.cfg.n_layers:
        raise ModelMismatchError(
            f"{path} holds a direction for block {max(vectors)}; this model has blocks 0 to {model.cfg.n_layers - 1}"
        )


# --- evidence -------------------------------------------------------------------------------------------------------


def judge(
    model: HookedTransformer,
    imported: DirectionSet,
    concept: Concept,
    *,
    positions: Positions = last_token,
    seed: int = 0,
) -> DirectionSet:
    """The same vectors with evidence: how well they separate a concept's test pairs, beside controls and nulls.

    Nothing is fitted, sign included: a vector that points the other way gets an AUROC below one half. The hook is
    chosen on the val pairs (on the training pairs where there are none). `stability` and `null_shuffled` are NaN: they
    need refits.

    Raises:
        DataError: pairs missing from a split, or a position rule with several rows per prompt.
        HookNameError: a block the model does not have.
    """
    acts = read_concepts(model, [concept], list(imported.directions), positions=positions)[0]
    scores = {hook: _scores(d, acts, "test") for hook, d in imported.directions.items()}
    evidence = _evidence(acts, scores, seed)
    directions = {h: replace(d, concept=concept.name, evidence=evidence[h]) for h, d in imported.directions.items()}
    split = "val" if concept.val else "train"
    unjudged = {h: replace(d, evidence=None) for h, d in directions.items()}
    selection = {hook: _scores(d, acts, split) for hook, d in directions.items()}
    groups = acts.sides[split][acts.hooks[0]].groups
    choice = by_separability(Candidates(model, acts, unjudged, selection, split, groups, estimator("dim")))
    subject = f"{concept.name}/{METHOD}"
    rows = [row for hook, d in directions.items() for row in evidence_rows(subject, hook, evidence[hook], d, seed)]
    rows.append(Measurement(subject, "chosen", 1.0, hook=choice.hook, seed=seed, note=choice.reason))
    return DirectionSet(concept.name, METHOD, directions, evidence, choice, tuple(rows), imported.notes, scores)


def _scores(direction: Direction, acts: ConceptActivations, split: str) -> HeldOut:
    """Projections onto the vector as it is, standardised on the training pairs."""

    def as_it_is(pos: torch.Tensor, neg: torch.Tensor) -> torch.Tensor:
        return direction.vector

    return plain_scores(as_it_is, acts.sides["train"][direction.hook], acts.sides[split][direction.hook])


def _evidence(acts: ConceptActivations, scores: dict[str, HeldOut], seed: int) -> dict[str, Evidence]:
    groups = acts.embedding["test"].groups
    clusters = clusters_of(groups)
    lexical = lexical_scores(acts, "test")
    shared = Evidence(
        lexical=separation(lexical, groups),
        bigram=separation(bigram_scores(acts, "test"), groups),
        length=separation(length_scores(acts, "test"), groups),
        embedding=separation(embedding_scores(acts, "test"), groups),
        n=len(groups),
        split="test",
        scheme="imported vector: nothing was fitted",
    )
    tested = auroc_permutation(
        np.stack([s.pos for s in scores.values()]),
        np.stack([s.neg for s in scores.values()]),
        clusters=clusters,
        seed=seed,
    )
    out = {}
    for i, (hook, s) in enumerate(scores.items()):
        if not s.measurable:
            out[hook] = replace(shared, notes=("both sides have the same mean activation here",))
            continue
        out[hook] = replace(
            shared,
            auroc=separation(s, groups),
            d_prime=gap_in_deviations(s, groups, seed=seed),
            p=float(tested.p[i]),
            p_max=float(tested.p_max[i]),
            null_random=random_null(acts.sides["train"][hook], acts.sides["test"][hook], seed=seed),
            above_lexical=auroc_difference(s.pos, s.neg, lexical.pos, lexical.neg, clusters=clusters * 2),
        )
        out[hook] = replace(out[hook], notes=_remarks(out[hook]))
    return out


def _remarks(found: Evidence) -> tuple[str, ...]:
    notes = ["imported: with which pairs it was made is unknown, so these may be among them"]
    if found.auroc.high < 0.5:
        notes.append("it points the other way: the positive side of these pairs projects lower")
    if found.null_random >= found.auroc.value:
        notes.append(f"5 % of random directions reach AUROC {found.null_random:.2f} here")
    return tuple(notes)
