"""Artifacts: what was written comes back, nothing half-written stays, nothing foreign or damaged is taken for it."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.artifacts import Artifact, fingerprint, load_artifact, save_artifact, tokenizer_fingerprint
from safety_lens.errors import ArtifactError, ModelMismatchError
from safety_lens.log import Measurement, read_measurements, write_measurements
from safety_lens.models import load_model
from safety_lens.monitors.drift_log import DriftLog, read_log

NAN = float("nan")
TENSORS = {"joy/dim/blocks.0.hook_resid_post": torch.tensor([1.0, -2.0, 3e-8])}
ROWS = [
    Measurement("joy/dim", "auroc", 0.75, 0.5, 0.9, n=12, hook="blocks.0.hook_resid_post", split="test", seed=3),
    Measurement("joy/dim", "p", NAN, note="größer – „unknown“"),
]


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_model(zoo.make("llama"), tokenizer=zoo.tokenizer(), check=False)


@pytest.fixture
def folder(model: HookedTransformer, tmp_path: Path) -> Path:
    arguments = {"method": "dim", "seed": 3, "layers": None}
    return save_artifact(
        tmp_path / "run", "directions", model=model, tensors=TENSORS, measurements=ROWS, arguments=arguments
    )


def left_behind(place: Path) -> list[str]:
    return sorted(p.name for p in place.iterdir())


# --- round trip -----------------------------------------------------------------------------------------------------


def test_everything_comes_back_and_unknown_numbers_are_null_on_disk(folder: Path, model: HookedTransformer) -> None:
    found = load_artifact(folder, model, kind="directions")
    assert torch.equal(found.tensors["joy/dim/blocks.0.hook_resid_post"], TENSORS["joy/dim/blocks.0.hook_resid_post"])
    assert found.measurements[0] == ROWS[0]
    unknown = found.measurements[1]
    assert math.isnan(unknown.value)
    assert math.isnan(unknown.low)
    assert unknown.note == ROWS[1].note
    written = [json.loads(line) for line in (folder / "measurements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written[1]["value"] is None
    assert "NaN" not in (folder / "measurements.jsonl").read_text(encoding="utf-8")


def test_the_manifest_says_where_the_content_comes_from(folder: Path, model: HookedTransformer) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["schema"], manifest["kind"]) == (1, "directions")
    assert manifest["arguments"] == {"method": "dim", "seed": 3, "layers": None}
    assert manifest["model"]["architecture"] == "LlamaForCausalLM"
    assert (manifest["model"]["n_layers"], manifest["model"]["d_model"]) == (4, 64)
    assert manifest["tokenizer"] == tokenizer_fingerprint(model.tokenizer)
    assert {"torch", "transformers", "transformer-lens", "numpy"} <= set(manifest["versions"])
    assert set(manifest["files"]) == {"directions.safetensors", "measurements.jsonl"}


def test_files_that_are_attached_are_sealed_with_the_rest(tmp_path: Path) -> None:
    def attach(place: Path) -> None:
        (place / "plot.png").write_bytes(b"picture")

    path = save_artifact(tmp_path / "run", "directions", attach=attach)
    assert left_behind(path) == ["manifest.json", "measurements.jsonl", "plot.png"]
    (path / "plot.png").write_bytes(b"another")
    with pytest.raises(ArtifactError, match=r"plot.png is not what was written"):
        load_artifact(path)


def test_a_missing_parent_folder_is_made(tmp_path: Path) -> None:
    assert load_artifact(save_artifact(tmp_path / "a" / "b" / "run", "x")).kind == "x"


def test_measurements_round_trip_by_themselves(tmp_path: Path) -> None:
    write_measurements(tmp_path / "rows.jsonl", ROWS[:1] * 3)
    assert read_measurements(tmp_path / "rows.jsonl") == ROWS[:1] * 3


@pytest.mark.parametrize(
    "line",
    [
        "{broken",
        '{"subject": "a", "metric": "b"}',
        '{"subject": "a", "metric": "b", "value": 1, "colour": "red"}',
        '{"subject": "a", "metric": "b", "value": "high"}',
        "[1, 2]",
        "7",
        "",
    ],
)
def test_a_line_that_is_no_measurement_is_named_by_file_and_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS[0].to_json() + "\n" + line + "\n" + ROWS[0].to_json() + "\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"rows.jsonl, line 2: not a measurement row"):
        read_measurements(path)


# --- other models ---------------------------------------------------------------------------------------------------


def test_the_same_shape_with_other_weights_is_refused(folder: Path) -> None:
    other = load_model(zoo.make("llama", seed=5), check=False)
    with pytest.raises(ModelMismatchError, match=r"same shape, other weights"):
        load_artifact(folder, other)
    assert load_artifact(folder).kind == "directions"  # without a model there is nothing to compare


def test_another_width_is_refused_with_both_widths(folder: Path) -> None:
    other = load_model(zoo.make("llama", hidden_size=32), check=False)
    with pytest.raises(ModelMismatchError, match=r"d_model 64, 4 layers.*d_model 32, 4 layers"):
        load_artifact(folder, other)


def test_an_artifact_without_a_model_does_not_pass_for_one_with(tmp_path: Path, model: HookedTransformer) -> None:
    path = save_artifact(tmp_path / "run", "directions")
    with pytest.raises(ModelMismatchError, match="does not say which model"):
        load_artifact(path, model)


def test_one_checkpoint_has_one_fingerprint_in_every_precision_and_from_memory_or_disk(tmp_path: Path) -> None:
    hf = zoo.make("qwen2", dtype=torch.bfloat16)
    hf.save_pretrained(tmp_path)
    hashes = {
        fingerprint(load_model(source, check=False, **more))["weights_sha256"]
        for source in (hf, tmp_path)
        for more in ({}, {"dtype": torch.float32}, {"share": False})
    }
    assert len(hashes) == 1


def test_a_small_adapter_gives_another_fingerprint_and_an_empty_one_does_not() -> None:
    hf = zoo.make("llama")
    plain = fingerprint(load_model(hf, check=False))["weights_sha256"]
    peft = get_peft_model(zoo.make("llama"), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[3]))
    assert fingerprint(load_model(peft, check=False))["weights_sha256"] == plain  # B = 0: nothing has changed yet
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert fingerprint(load_model(peft, check=False))["weights_sha256"] != plain


def test_a_change_in_the_middle_of_a_large_tensor_is_seen_where_it_is_dense() -> None:
    small, large = zoo.make("llama", vocab_size=4000), zoo.make("llama", vocab_size=4000)
    with torch.no_grad():
        large.model.embed_tokens.weight[1000:2000] *= 1.05
    hashes = {fingerprint(load_model(m, check=False))["weights_sha256"] for m in (small, large)}
    assert len(hashes) == 2


def test_tokenizers_are_told_apart_by_vocabulary_and_template() -> None:
    one, two = zoo.tokenizer(), zoo.tokenizer()
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(two)
    two.chat_template = "{{ messages[0]['content'] }}"
    three = zoo.tokenizer()
    three.add_tokens(["new"])
    assert tokenizer_fingerprint(one)["chat_template_sha256"] is None
    assert tokenizer_fingerprint(two)["chat_template_sha256"] is not None
    assert tokenizer_fingerprint(three)["vocab_sha256"] != tokenizer_fingerprint(one)["vocab_sha256"]


# --- damage ---------------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray((path / "directions.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "directions.safetensors").write_bytes(bytes(content))


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        (path / "manifest.json").write_text(json.dumps({**manifest, **changes}), encoding="utf-8")

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"directions.safetensors is not what was written"),
        (lambda path: (path / "measurements.jsonl").unlink(), r"measurements.jsonl is missing"),
        (lambda path: (path / "manifest.json").unlink(), r"no manifest.json.*cut off"),
        (lambda path: (path / "manifest.json").write_text('{"schema": 1,'), r"is not JSON"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"), r"is not JSON"),
        (lambda path: (path / "manifest.json").write_text("[]"), r"schema None; this version reads schema 1"),
        (edit_manifest(schema=2), r"schema 2; this version reads schema 1"),
        (edit_manifest(kind="groups"), r"holds 'groups', not 'directions'"),
    ],
)
def test_a_damaged_or_foreign_artifact_is_refused_with_what_is_wrong(
    damage: Callable[[Path], None], message: str, folder: Path
) -> None:
    load_artifact(folder, kind="directions")
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(folder, kind="directions")


def test_what_is_not_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", folder / "manifest.json"):
        with pytest.raises(ArtifactError, match="is not a folder"):
            load_artifact(path)


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("out of ideas"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("taken", [False, True])
def test_an_interrupted_write_leaves_nothing_new_and_nothing_lost(
    error: BaseException, taken: bool, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    if taken:
        save_artifact(path, "directions", tensors=TENSORS)
    before = left_behind(tmp_path)

    def attach(place: Path) -> None:
        (place / "half.bin").write_bytes(b"half")
        raise error

    expected = ArtifactError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        save_artifact(path, "directions", attach=attach, overwrite=True)
    assert left_behind(tmp_path) == before
    if taken:
        assert load_artifact(path).tensors


def test_arguments_that_json_cannot_hold_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    for bad in (object(), NAN):
        with pytest.raises((TypeError, ValueError)):
            save_artifact(tmp_path / "run", "directions", arguments={"x": bad})
        assert left_behind(tmp_path) == []


def test_an_artifact_is_replaced_only_on_request_and_whole(tmp_path: Path) -> None:
    path = save_artifact(tmp_path / "run", "directions", tensors=TENSORS)
    with pytest.raises(ArtifactError, match=r"already holds an artifact.*--overwrite"):
        save_artifact(path, "directions")
    assert load_artifact(path).tensors
    save_artifact(path, "directions", overwrite=True)
    found: Artifact = load_artifact(path)
    assert (found.kind, found.tensors) == ("directions", {})
    assert left_behind(tmp_path) == ["run"]


def test_an_artifact_of_another_kind_is_never_replaced(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"replaces 'other' artifacts alone.*holds 'directions'"):
        save_artifact(folder, "other", overwrite=True)
    assert load_artifact(folder).tensors


def with_figures(place: Path) -> None:
    (place / "figures" / "[run]").mkdir(parents=True)
    for name in ("figures/drift-cosine.png", "figures/[run]/drift-cosine.png", "joy [1].png"):
        (place / name).write_bytes(b"picture")


@pytest.mark.parametrize("foreign", ["notes.txt", "figures/mine.png", "figures/[run]/mine.png", "deep/er/x", ".hidden"])
@pytest.mark.parametrize("version", ["this", "0.1"])
def test_files_that_no_verb_wrote_are_named_and_survive_and_the_artifact_too(
    foreign: str, version: str, tmp_path: Path
) -> None:
    path = save_artifact(tmp_path / "run", "monitor", attach=with_figures)
    if version == "0.1":  # listed the top level alone
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        manifest["files"] = {name: sha for name, sha in manifest["files"].items() if "/" not in name}
        (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (path / foreign).parent.mkdir(parents=True, exist_ok=True)
    (path / foreign).write_text("years of work")
    with pytest.raises(ArtifactError) as caught:
        save_artifact(path, "monitor", overwrite=True)
    assert foreign in str(caught.value)
    assert "drift-cosine" not in str(caught.value)
    assert (path / foreign).read_text() == "years of work"
    assert load_artifact(path).kind == "monitor"
    (path / foreign).unlink()
    save_artifact(path, "monitor", overwrite=True)  # with its own files alone it is replaced
    assert left_behind(path) == ["manifest.json", "measurements.jsonl"]


def test_a_link_is_a_foreign_file_whatever_it_points_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (folder / "link").symlink_to(tmp_path / "work", target_is_directory=True)
    with pytest.raises(ArtifactError, match=r"did not write .*: link;"):
        save_artifact(folder, "directions", overwrite=True)


@pytest.mark.parametrize(
    "manifest", ['{"name": "extension", "manifest_version": 3}', "{", "[]", '{"schema": 1, "kind": "directions"}']
)
def test_the_manifest_of_another_program_does_not_make_an_artifact(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "background.js").write_text("code")
    with pytest.raises(ArtifactError, match="choose another --out"):
        save_artifact(tmp_path, "directions", overwrite=True)
    assert left_behind(tmp_path) == ["background.js", "manifest.json"]


def test_a_file_that_came_while_the_artifact_was_made_survives(folder: Path) -> None:
    def attach(_: Path) -> None:
        (folder / "notes.txt").write_text("written meanwhile")

    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        save_artifact(folder, "directions", attach=attach, overwrite=True)
    assert (folder / "notes.txt").read_text() == "written meanwhile"
    assert left_behind(folder.parent) == ["run"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b"])
def test_names_with_any_kind_of_line_break_come_back(mark: str, tmp_path: Path) -> None:
    rows = [Measurement(f"a{mark}b/dim", "auroc", 0.5, 0.4, 0.6), Measurement("c", "auroc", 0.5, 0.4, 0.6, note=mark)]
    assert load_artifact(save_artifact(tmp_path / "run", "directions", measurements=rows)).measurements == rows
    log = DriftLog(tmp_path / "drift.jsonl")
    log.open(0)
    log.append([replace(row, step=1) for row in rows])
    assert read_log(log.path) == log.rows


def test_a_folder_or_file_that_is_not_an_artifact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("content")
    for name in ("thesis", "file"):
        with pytest.raises(ArtifactError, match="is not an artifact"):
            save_artifact(tmp_path / name, "directions", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert load_artifact(save_artifact(tmp_path / "empty", "directions")).kind == "directions"


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    with pytest.raises(ArtifactError, match="not a folder that can be written; choose another --out"):
        save_artifact(tmp_path / "file" / "run", "directions")


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "sealed"
    place.mkdir()
    place.chmod(0o500)
    yield place
    place.chmod(0o700)


def test_a_folder_without_write_permission_is_refused(sealed: Path) -> None:
    import os

    if os.access(sealed, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(ArtifactError, match="cannot write"):
        save_artifact(sealed / "run", "directions")


def test_tensors_are_written_from_any_layout(tmp_path: Path) -> None:
    square: Tensor = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    path = save_artifact(tmp_path / "run", "x", tensors={"a": square, "b": square})
    assert torch.equal(load_artifact(path).tensors["a"], square.detach())
