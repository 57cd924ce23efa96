"""Control vectors in repeng's GGUF layout are read as directions and judged; bad files say what is wrong."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import zoo
from torch.testing import assert_close
from transformer_lens import HookedTransformer

from safety_lens.activations import capture
from safety_lens.data import Concept, load_concept
from safety_lens.errors import ArtifactError, DataError, ModelMismatchError
from safety_lens.interventions.gguf import import_gguf, judge, read_directions
from safety_lens.interventions.steering import applied, steer
from safety_lens.loading.architectures import blocks_of
from safety_lens.models import hooks_at, load_model
from safety_lens.probes.extract import DirectionSet, extract_directions
from safety_lens.probes.store import save_directions


def write(path: Path, vectors: dict[Any, np.ndarray], arch: str = "controlvector", hint: str | None = "llama") -> Path:
    """A file as repeng's export_gguf writes it."""
    writer = gguf.GGUFWriter(path, arch)
    if hint is not None:
        writer.add_string(f"{arch}.model_hint", hint)
    writer.add_uint32(f"{arch}.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}" if isinstance(layer, int) else layer, vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vectors(layers: Any = (1, 2, 3), width: int = 64, seed: int = 0) -> dict[Any, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {layer: rng.standard_normal(width).astype(np.float32) for layer in layers}


@cache
def llama() -> HookedTransformer:
    return load_model(zoo.make("llama"), tokenizer=zoo.tokenizer(), check=False)


@cache
def organism() -> HookedTransformer:
    return load_model("organism", device="cpu")


@cache
def refusal() -> Concept:
    return load_concept("refusal", model="organism")


@cache
def extracted() -> DirectionSet:
    return extract_directions(organism(), refusal(), null_repeats=5)


# --- reading --------------------------------------------------------------------------------------------------------


def test_direction_n_is_the_output_of_block_n_bit_for_bit_in_any_order(tmp_path: Path) -> None:
    given = vectors((3, 1, 2))
    found = import_gguf(write(tmp_path / "happy.gguf", given), llama())
    assert (found.concept, found.method, found.choice) == ("happy", "gguf", None)
    assert list(found.directions) == [f"blocks.{n}.hook_resid_post" for n in (1, 2, 3)]
    for n, vector in given.items():
        assert np.array_equal(found[f"blocks.{n}.hook_resid_post"].vector.numpy(), vector)
    assert "made for llama" in found.notes[0]
    assert "behind the final norm" in found.notes[1]


def test_steering_with_every_imported_block_equals_adding_them_to_the_hugging_face_blocks(tmp_path: Path) -> None:
    hf, given = zoo.make("llama"), vectors()
    model = load_model(hf, check=False)
    found = import_gguf(write(tmp_path / "v.gguf", given), model)

    def adder(vector: torch.Tensor) -> Any:
        # repeng's ControlModule, as a plain hook: what the block gives out, plus coefficient times vector
        def add(module: object, inputs: object, out: Any) -> Any:
            return (out[0] + 1.5 * vector, *out[1:]) if isinstance(out, tuple) else out + 1.5 * vector

        return add

    handles = [blocks_of(hf)[n].register_forward_hook(adder(torch.from_numpy(v))) for n, v in given.items()]
    theirs = zoo.hf_logits(hf, zoo.ragged())
    for handle in handles:
        handle.remove()
    with applied(model, *(steer(d, 1.5) for d in found)):
        ours = zoo.hooked_logits(model, zoo.ragged())
    assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (zoo.hf_logits(hf, zoo.ragged()) - theirs).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_are_read_as_float32(tmp_path: Path, dtype: Any) -> None:
    given = {n: v.astype(dtype) for n, v in vectors().items()}
    found = import_gguf(write(tmp_path / "v.gguf", given))
    for n, d in zip((1, 2, 3), found, strict=True):
        assert d.vector.dtype == torch.float32
        assert np.array_equal(d.vector.numpy(), given[n].astype(np.float32))


def test_a_vector_at_block_0_and_tensors_of_other_names_are_no_obstacle(tmp_path: Path) -> None:
    given = vectors((0,)) | {"note": np.ones(3, dtype=np.float32)}
    found = import_gguf(write(tmp_path / "v.gguf", given), llama(), concept="mine")
    assert list(found.directions) == ["blocks.0.hook_resid_post"]
    assert found.concept == "mine"


def test_the_best_of_directions_that_nobody_judged_is_refused_and_one_can_be_named(tmp_path: Path) -> None:
    found = import_gguf(write(tmp_path / "v.gguf", vectors()), llama())
    with pytest.raises(DataError, match="3 directions, none of them chosen: name a hook, or judge"):
        _ = found.best
    assert len(steer(found["blocks.2.hook_resid_post"])) == 1


def test_read_directions_takes_either_kind_of_file(tmp_path: Path) -> None:
    write(tmp_path / "v.gguf", vectors())
    assert [s.method for s in read_directions(tmp_path / "v.gguf", llama())] == ["gguf"]
    save_directions(tmp_path / "run", [extracted()], organism())
    (back,) = read_directions(tmp_path / "run", organism())
    assert back.concept == "refusal"


# --- judging --------------------------------------------------------------------------------------------------------


def test_an_imported_copy_of_an_extracted_direction_gets_the_evidence_the_vector_deserves(tmp_path: Path) -> None:
    layers = range(organism().cfg.n_layers)
    given = {n: extracted()[hooks_at(organism())[n]].vector.numpy() for n in layers}
    imported = import_gguf(write(tmp_path / "v.gguf", given), organism())
    judged = judge(organism(), imported, refusal())
    best = judged.best
    assert best.evidence is not None
    assert best.evidence.auroc.low > 0.9
    assert best.evidence.p_max < 0.05
    assert judged.choice is not None
    assert judged.choice.hook == extracted().best.hook
    # the same vectors scored by hand
    test = [p for pair in refusal().test for p in (pair.positive, pair.negative)]
    acts = capture(organism(), test, [best.hook]).acts[best.hook].double() @ best.vector.double()
    pos, neg = acts[::2], acts[1::2]
    area = float((pos[:, None] > neg).double().mean())
    assert best.evidence.auroc.value == pytest.approx(area, abs=1e-9)
    assert np.isnan(best.evidence.stability)
    assert {row.metric for row in judged.measurements} >= {"auroc", "d_prime", "p_max", "lexical_auroc", "chosen"}
    save_directions(tmp_path / "out", [judged], organism())
    (back,) = read_directions(tmp_path / "out", organism())
    assert back.best.evidence is not None
    assert back.best.evidence.auroc == best.evidence.auroc


def test_vectors_that_point_the_other_way_are_not_turned_around_but_called_out(tmp_path: Path) -> None:
    hook = extracted().best.hook
    layer = int(hook.split(".")[1])
    judged = judge(
        organism(), import_gguf(write(tmp_path / "v.gguf", {layer: -extracted().best.vector.numpy()})), refusal()
    )
    assert judged[hook].evidence is not None
    assert judged[hook].evidence.auroc.high < 0.1
    assert judged[hook].evidence.p_max > 0.9
    assert any("points the other way" in note for note in judged[hook].evidence.notes)


@pytest.mark.slow
def test_random_vectors_are_said_to_be_no_better_than_random_vectors(tmp_path: Path) -> None:
    """The null that each vector is compared with is what 95 % of random vectors stay below."""
    given = vectors(range(organism().cfg.n_layers), organism().cfg.d_model)
    judged = judge(organism(), import_gguf(write(tmp_path / "v.gguf", given), organism()), refusal())
    above = [e.auroc.value > e.null_random for e in judged.evidence.values()]
    said = [any("5 % of random directions" in note for note in e.notes) for e in judged.evidence.values()]
    assert said == [not a for a in above]
    assert sum(above) <= len(above) // 2


# --- bad files ------------------------------------------------------------------------------------------------------


def damaged(path: Path) -> Path:
    whole = write(path, vectors()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def made(kind: str, path: Path) -> Path:
    nan = vectors()
    nan[2][5] = np.nan
    makers: dict[str, Any] = {
        "no file": lambda: path,
        "a folder": lambda: path.mkdir(),
        "empty": lambda: path.write_bytes(b""),
        "text": lambda: path.write_text(json.dumps({"direction": [1, 2, 3]}) * 10),
        "truncated": lambda: damaged(path),
        "a model": lambda: write(path, vectors(), arch="llama"),
        "no directions": lambda: write(path, {"other": np.ones(4, dtype=np.float32)}),
        "a bad name": lambda: write(path, {"direction.two": np.ones(4, dtype=np.float32)}),
        "a matrix": lambda: write(path, {1: np.ones((2, 64), dtype=np.float32)}),
        "zero": lambda: write(path, {1: np.zeros(64, dtype=np.float32)}),
        "nan": lambda: write(path, nan),
        "integers": lambda: write(path, {1: np.ones(64, dtype=np.int32)}),
        "two widths": lambda: write(path, vectors((1,)) | vectors((2,), 32)),
    }
    makers[kind]()
    return path


BAD = {
    "no file": "no file",
    "a folder": "no file",
    "empty": "not a whole GGUF file",
    "text": "not a whole GGUF file",
    "truncated": "not a whole GGUF file",
    "a model": "architecture 'llama', not a control vector",
    "no directions": "no tensor named direction.N",
    "a bad name": "does not name a block",
    "a matrix": r"direction.1 has shape \(2, 64\)",
    "zero": "direction.1 is zero or not finite",
    "integers": "direction.1 is stored as I32",
    "nan": "direction.2 is zero or not finite",
    "two widths": r"different widths: \[32, 64\]",
}


@pytest.mark.parametrize("kind", list(BAD))
def test_a_file_that_is_no_control_vector_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = made(kind, tmp_path / "v.gguf")
    with pytest.raises(ArtifactError, match=BAD[kind]) as caught:
        import_gguf(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_every_truncation_is_refused_rather_than_read(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    whole = write(path, vectors()).read_bytes()
    for length in range(0, len(whole) - 1, 13):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            import_gguf(path)


def test_vectors_of_another_model_are_refused_by_width_and_by_depth(tmp_path: Path) -> None:
    with pytest.raises(ModelMismatchError, match="width 32; the model's d_model is 64"):
        import_gguf(write(tmp_path / "a.gguf", vectors(width=32)), llama())
    with pytest.raises(ModelMismatchError, match="for block 7; this model has blocks 0 to 3"):
        import_gguf(write(tmp_path / "b.gguf", vectors((1, 7))), llama())
