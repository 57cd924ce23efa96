"""GGUF files are models like any other: transformers' own numbers, named, kept, trained, or refused in one line."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import pytest
import torch
import zoo
from gguf_models import MERGES, TEMPLATE, TOKENS, tensors, tiny, write
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from safety_lens.artifacts import fingerprint
from safety_lens.cli import app
from safety_lens.errors import ArtifactError, ModelError
from safety_lens.loading.gguf_files import ARCHITECTURES, read_header
from safety_lens.models import load_hf, load_model, save_model

BATCH = zoo.ragged(vocab=260)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny("llama"), "llama")


# --- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    hf = tiny(name)
    path = write(tmp_path / "m.gguf", hf, name)
    loaded, _ = load_hf(path)
    assert type(loaded) is type(hf)
    assert loaded.config.tie_word_embeddings == hf.config.tie_word_embeddings
    assert_close(zoo.hf_logits(loaded, BATCH), zoo.hf_logits(hf, BATCH), rtol=0, atol=1e-5)
    if not name.startswith("gemma"):  # their tokenizer is of another kind than the one written here
        assert_close(zoo.hooked_logits(load_model(path), BATCH), zoo.hf_logits(hf, BATCH), rtol=1e-4, atol=1e-4)


def quantised(folder: Path) -> Path:
    """A file as llama.cpp quantises it: matrices in blocks of 32, norms in float32."""
    hf = tiny("llama", num_key_value_heads=4)
    writer = gguf.GGUFWriter(folder / "q.gguf", "llama")
    for key, value in gguf_models._metadata(hf, "llama", True).items():
        gguf_models._add(writer, key, 7 if key == "general.file_type" else value)
    for name, weight in tensors(hf, "llama").items():
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "q.gguf"


def test_quantised_weights_are_dequantised_as_transformers_does_it_and_named(tmp_path: Path) -> None:
    path = quantised(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="q.gguf").eval()
    model = load_model(path)
    assert_close(zoo.hooked_logits(model, BATCH), zoo.hf_logits(theirs, BATCH), rtol=0, atol=1e-5)
    exact = zoo.hf_logits(tiny("llama", num_key_value_heads=4), BATCH)
    assert (zoo.hf_logits(theirs, BATCH) - exact).abs().max() > 1e-3  # there was something to lose
    assert model.origin.quantization == fingerprint(model)["quantization"] == "Q8_0"


def test_the_tokenizer_and_its_template_are_those_of_the_file(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, ours = load_hf(llama)
    assert capfd.readouterr() == ("", "")  # no progress bar where nobody watches
    theirs = AutoTokenizer.from_pretrained(llama.parent, gguf_file=llama.name)
    assert ours is not None
    assert ours.get_vocab() == theirs.get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    for text in ("hello world", "hell<|im_end|>\n low", "größer 12345"):
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == TEMPLATE
    assert ours.tokenize("hello") == [MERGES[3].replace(" ", "")]
    assert (ours.eos_token, ours.name_or_path) == ("<|im_end|>", str(llama))


def test_settings_of_another_model_that_lie_next_to_the_file_are_not_read(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama, tmp_path / "m.gguf")
    zoo.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "another", "tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    model = load_model(tmp_path / "m.gguf")
    assert model.tokenizer.chat_template == TEMPLATE
    assert model.origin.stop_tokens == (262,)


def test_a_head_that_is_stored_but_equal_to_the_embedding_is_tied_again(tmp_path: Path) -> None:
    hf = tiny("llama", tie_word_embeddings=False)
    hf.lm_head.weight.data.copy_(hf.model.embed_tokens.weight)
    loaded, _ = load_hf(write(tmp_path / "m.gguf", hf, "llama"))
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_close(zoo.hf_logits(loaded, BATCH), zoo.hf_logits(hf, BATCH), rtol=0, atol=1e-5)
    other, _ = load_hf(write(tmp_path / "o.gguf", tiny("llama", tie_word_embeddings=False), "llama"))
    assert other.lm_head.weight is not other.model.embed_tokens.weight


# --- sources --------------------------------------------------------------------------------------------------------


def test_a_file_a_folder_with_a_name_and_a_name_with_a_colon_mean_the_same(llama: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a:b.gguf"
    shutil.copy(llama, odd)
    for source in (llama, f"{llama.parent}:{llama.name}", str(odd)):
        assert load_model(source, check=False).origin.quantization == "F32"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.gguf", r"no file nowhere\.gguf.*"),
        ("{folder}:other.gguf", r"no file .*other\.gguf; GGUF files in that folder: tiny\.gguf"),
        ("{folder}/other.gguf", r"GGUF files in that folder: tiny\.gguf"),
        ("{folder}", r"holds GGUF files: name one, such as .*:tiny\.gguf"),
        ("/no/folder:x.gguf", r"no file /no/folder:x\.gguf: give FILE\.gguf, FOLDER:FILE\.gguf or HUB_ID:FILE\.gguf"),
        ("nobody/nothing:x.gguf", r"cannot get x\.gguf of nobody/nothing from the hub"),
    ],
)
def test_a_source_that_leads_nowhere_is_named(source: str, message: str, llama: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_hf(source.format(folder=llama.parent))


# --- kept, and used like any other ----------------------------------------------------------------------------------


def test_a_converted_file_has_the_same_weights_tokenizer_and_name_of_its_quantisation(tmp_path: Path) -> None:
    path = quantised(tmp_path)
    done = CliRunner().invoke(app, ["convert", str(path), "--out", str(tmp_path / "kept")])
    assert done.exit_code == 0, done.output
    before, after = load_model(path), load_model(tmp_path / "kept")
    assert fingerprint(after) == {**fingerprint(before), "name": str(tmp_path / "kept")}
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert after.tokenizer.chat_template == before.tokenizer.chat_template
    assert "quantization_config" not in json.loads((tmp_path / "kept" / "config.json").read_text())
    with pytest.raises(ArtifactError, match="exists and is not an artifact"):
        save_model(path, tmp_path / "kept")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "q.gguf"]


def test_an_adapter_is_trained_on_a_file_finds_its_base_again_and_is_merged(llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "hello", "response": f"world {i}"}) + "\n" for i in range(8)))
    run = ["finetune", "--model", str(llama), "--data", str(data), "--max-steps", "2", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*run, "--device", "cpu", "--learning-rate", "0.05"])
    assert done.exit_code == 0, done.output
    assert "safety-lens convert" in done.output
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(llama)
    live, _ = load_hf(tmp_path / "run")
    moved = zoo.hf_logits(live, BATCH)
    assert (moved - zoo.hf_logits(load_hf(llama)[0], BATCH)).abs().max() > 1e-3
    save_model(tmp_path / "run", tmp_path / "merged")
    assert_close(zoo.hf_logits(load_hf(tmp_path / "merged")[0], BATCH), moved, rtol=1e-4, atol=1e-4)


# --- refused in one line --------------------------------------------------------------------------------------------


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def patched(old: bytes, new: bytes) -> Callable[[Path], None]:
    def patch(path: Path) -> None:
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return patch


def other(architecture: str = "llama", **metadata: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path, tiny("llama"), "llama", **metadata)
        if architecture != "llama":
            patched(b"\x05\0\0\0\0\0\0\0llama", struct.pack("<Q", len(architecture)) + architecture.encode())(path)

    return make


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: path.write_bytes(b"") and None, "does not begin with the letters GGUF"),
    "wrong magic": (patched(b"GGUF", b"GGML"), "does not begin with the letters GGUF"),
    "another version": (patched(b"GGUF\3", b"GGUF\1"), "GGUF version 1; versions 2 and 3 are read"),
    "cut in the header": (cut(0.003), "its header goes on beyond its end"),
    "cut in the weights": (cut(0.9), "is cut short: "),
    "half a name": (patched(b"general.file_type", b"general.file\xff\xff\xff\xff\xff"), "is not UTF-8"),
    "endless array": (patched(struct.pack("<IQ", 8, len(TOKENS)), struct.pack("<IQ", 8, 2**60)), "beyond its end"),
    "unknown architecture": (other("mamba"), "architecture 'mamba'; of GGUF files, these are read: gemma2"),
    "control vector": (other("controlvector"), "is a control vector, not a model: give it as --directions"),
    "adapter": (other(general__type="adapter"), "is an adapter, not a model"),
    "one part of several": (other(split__count=3), "is one of 3 parts: join them"),
    "no tokenizer": (other(tokenizer__ggml__tokens=None), "has no tokenizer"),
    "no width": (other(llama__embedding_length=None), "llama.embedding_length is None"),
    "another width": (other(llama__embedding_length=4096), r"token_embd.weight is \(272, 64\), not \(272, 4096\)"),
    "another depth": (other(llama__block_count=32), "32 blocks are declared, 4 are there"),
    "no heads": (other(llama__attention__head_count=0), "llama.attention.head_count is 0"),
    "another mlp": (other(llama__feed_forward_length=96), "has weights of other shapes than it declares"),
    "scaled rope": (other(llama__rope__scaling__type="yarn"), r"scales its rotary frequencies \(yarn\)"),
    "unknown tokenizer": (other(tokenizer__ggml__model="nonsense"), "cannot load the tokenizer"),
    "a folder": (a_folder, "is not a model folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_or_foreign_file_is_one_line_that_names_it(case: str, llama: Path, tmp_path: Path) -> None:
    spoil, message = BAD[case]
    path = Path(shutil.copy(llama, tmp_path / "bad.gguf"))
    spoil(path)
    with pytest.raises(ModelError, match=message) as caught:
        load_hf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_of_unknown_type_and_rotary_factors_are_refused(llama: Path, tmp_path: Path) -> None:
    content = llama.read_bytes()
    name = b"blk.0.attn_q.weight"
    at = content.index(name) + len(name) + 4 + 16  # after the number of dimensions, and both of them
    (tmp_path / "a.gguf").write_bytes(content[:at] + struct.pack("<I", 999) + content[at + 4 :])
    with pytest.raises(ModelError, match=r"blk\.0\.attn_q\.weight is stored as unknown type 999"):
        load_hf(tmp_path / "a.gguf")
    named = content.replace(b"output_norm.weight", b"rope_freqs.weight\0", 1)
    (tmp_path / "b.gguf").write_bytes(named)
    with pytest.raises(ModelError, match=r"scales its rotary frequencies \(rope_freqs"):
        load_hf(tmp_path / "b.gguf")


def test_every_byte_of_the_header_may_be_damaged_without_a_traceback(llama: Path, tmp_path: Path) -> None:
    content, end = llama.read_bytes(), read_header(llama).data_start
    path = tmp_path / "bad.gguf"
    refused = 0
    for at in range(0, end, 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            read_header(path)
        except ModelError:
            refused += 1
    assert refused > 20


def test_a_damaged_file_is_refused_before_anything_heavy_is_imported(llama: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(llama, tmp_path / "bad.gguf"))
    cut(0.5)(path)
    code = "import sys\nfrom safety_lens.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    for verb in (["doctor", "--model"], ["extract", "--out", "x", "--model"], ["monitor"]):
        done = subprocess.run([sys.executable, "-c", code, *verb, str(path)], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (2, "False")
        assert done.stderr.startswith(f"error: {path} is cut short")
        assert done.stderr.count("\n") == 1


def test_bitsandbytes_on_top_of_gguf_is_refused_with_the_way_to_have_it(llama: Path) -> None:
    from transformers import BitsAndBytesConfig

    with pytest.raises(ModelError, match="`safety-lens convert` it first"):
        load_hf(llama, quantization=BitsAndBytesConfig(load_in_4bit=True))


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    hf = tiny("llama")
    with torch.no_grad():
        hf.model.norm.weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"norm\.weight has NaN"):
        load_model(write(tmp_path / "m.gguf", hf, "llama"))
