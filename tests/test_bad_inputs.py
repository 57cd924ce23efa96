"""What a user can get wrong: each mistake is one message that says what to do, exit code 2, and no traceback."""

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import make, tokenizer

from safety_lens.artifacts import save_artifact
from safety_lens.cli import main

WORDS = [f"w{i}" for i in range(4, 40)]


def pair(i: int, split: str, **more: object) -> dict[str, object]:
    return {
        "id": f"row-{i}",
        "concept": "demo",
        "positive": f"{WORDS[i % 30]} w50 {WORDS[(i * 7) % 30]}",
        "negative": f"{WORDS[i % 30]} w60 {WORDS[(i * 5) % 30]}",
        "split": split,
        **more,
    }


def rows(n: int = 20) -> list[dict[str, object]]:
    return [pair(i, "train" if i < 10 else "val" if i < 14 else "test") for i in range(n)]


def write(path: Path, content: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ground:
    """Files that the mistakes are made with."""

    root: Path
    model: Path
    pairs: Path
    artifact: Path

    def file(self, name: str, content: list[dict[str, object]]) -> str:
        return str(write(self.root / name, content))

    def place(self) -> str:
        """A folder nobody wrote yet."""
        return str(self.root / "out" / uuid.uuid4().hex)

    def copy_model(self, name: str) -> Path:
        shutil.copytree(self.model, self.root / name, dirs_exist_ok=True)
        return self.root / name


def run(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["safety-lens", *argv])
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out, shown.err


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    root = tmp_path_factory.mktemp("ground")
    folder = root / "model"
    make("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    pairs = write(root / "pairs.jsonl", rows())
    from safety_lens.data import load_concept
    from safety_lens.models import load_model
    from safety_lens.probes import extract_directions, save_directions

    model = load_model(folder)
    found = extract_directions(model, load_concept(str(pairs)), null_repeats=20)
    artifact = save_directions(root / "artifact", [found], model)
    return Ground(root, folder, pairs, artifact)


def extract(g: Ground, *more: str, model: object = None, pairs: object = None) -> list[str]:
    return ["extract", "--model", str(model or g.model), "--pairs", str(pairs or g.pairs), *more, "--out", g.place()]


def nan_weights(g: Ground) -> list[str]:
    folder = g.root / "nan"
    broken = make("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    broken.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return extract(g, model=folder)


def pickled(g: Ground) -> list[str]:
    folder = g.copy_model("pickled")
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    return extract(g, model=folder)


def unlisted_architecture(g: Ground) -> list[str]:
    folder = g.copy_model("unlisted")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return extract(g, model=folder)


def no_tokenizer(g: Ground) -> list[str]:
    folder = g.copy_model("mute")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    return extract(g, model=folder)


def bad_json(g: Ground) -> list[str]:
    lines = [json.dumps(row) for row in rows()]
    lines[4] = '{"id": "row-4", "positive": '
    path = g.root / "bad.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return extract(g, pairs=path)


def corrupted(g: Ground) -> list[str]:
    folder = g.root / "corrupted"
    shutil.copytree(g.artifact, folder, dirs_exist_ok=True)
    file = folder / "directions.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40
    file.write_bytes(bytes(content))
    return ["doctor", "--model", str(g.model), "--directions", str(folder)]


def interrupted(g: Ground) -> list[str]:
    """What an interrupted write leaves: a folder without its manifest."""
    folder = g.root / ".artifact.tmp-cut"
    shutil.copytree(g.artifact, folder, dirs_exist_ok=True)
    (folder / "manifest.json").unlink()
    return ["doctor", "--model", str(g.model), "--directions", str(folder)]


def other_model(g: Ground) -> list[str]:
    folder = g.root / "other"
    make("llama", seed=7).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return ["doctor", "--model", str(folder), "--directions", str(g.artifact)]


def other_width(g: Ground) -> list[str]:
    folder = g.root / "wide"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=96, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return ["doctor", "--model", str(folder), "--directions", str(g.artifact)]


def other_kind(g: Ground) -> list[str]:
    folder = g.root / "notes"
    save_artifact(folder, "notes", overwrite=folder.exists())
    return ["doctor", "--model", str(g.model), "--directions", str(folder)]


def taken(g: Ground) -> list[str]:
    return [*extract(g)[:-1], str(g.artifact)]


def foreign_folder(g: Ground) -> list[str]:
    return [*extract(g, "--overwrite")[:-1], str(g.model)]


def under_a_file(g: Ground) -> list[str]:
    return [*extract(g)[:-1], str(g.pairs / "out")]


def long_prompt(g: Ground) -> list[str]:
    content = rows()
    content[3] = pair(3, "train", positive=" ".join(["w5"] * 300))
    return extract(g, pairs=g.file("long.jsonl", content))


def system_without_template(g: Ground) -> list[str]:
    content = [
        {
            "id": str(i), "concept": "lie", "strategy": "caa", "user_query": f"w{i + 4}",
            "positive_system": "w30", "negative_system": "w31", "split": "train" if i < 10 else "test",
        }
        for i in range(16)
    ]  # fmt: skip
    return extract(g, pairs=g.file("system.jsonl", content))


def same_sides(g: Ground) -> list[str]:
    content = [{**row, "negative": row["positive"]} for row in rows()]
    return extract(g, pairs=g.file("same.jsonl", content))


def one_sided(g: Ground) -> list[str]:
    content = rows()
    del content[6]["negative"]
    return extract(g, pairs=g.file("one.jsonl", content))


def empty_side(g: Ground) -> list[str]:
    content = rows()
    content[2]["negative"] = ""
    return extract(g, pairs=g.file("empty.jsonl", content))


Mistake = Callable[[Ground], list[str]]
MISTAKES: dict[str, tuple[Mistake, tuple[str, ...]]] = {
    "nothing named": (lambda g: ["extract", "--out", g.place()], ("--concept", "--pairs")),
    "missing pairs file": (lambda g: extract(g, pairs=g.root / "none.jsonl"), ("none.jsonl",)),
    "unknown concept": (lambda g: ["extract", "--concept", "refusl", "--out", g.place()], ("refusl", "refusal")),
    "bad JSON": (bad_json, ("bad.jsonl", "5")),
    "one-sided pair": (one_sided, ("one.jsonl", "7", "negative")),
    "empty side": (empty_side, ("empty.jsonl", "3", "negative")),
    "empty split": (
        lambda g: extract(g, pairs=g.file("val.jsonl", [pair(i, "val") for i in range(12)])),
        ("val.jsonl", "0 train", "to fit on"),
    ),
    "unknown split": (
        lambda g: extract(g, pairs=g.file("split.jsonl", [pair(i, "trian") for i in range(12)])),
        ("split.jsonl", "trian"),
    ),
    "duplicate id": (
        lambda g: extract(g, pairs=g.file("twice.jsonl", [*rows(), pair(3, "test")])),
        ("twice.jsonl", "row-3"),
    ),
    "identical sides": (same_sides, ("no direction", "same activations")),
    "over-long prompt": (long_prompt, ("300", "128", "--truncate")),
    "system prompt without a template": (system_without_template, ("template", "system")),
    "missing model folder": (lambda g: extract(g, model="./nowhere"), ("nowhere",)),
    "missing adapter": (lambda g: extract(g, "--adapter", str(g.root / "noad")), ("noad",)),
    "NaN weights": (nan_weights, ("up_proj", "nan")),
    "pickle only": (pickled, ("safetensors",)),
    "architecture not listed": (unlisted_architecture, ("Mamba", "LlamaForCausalLM")),
    "no tokenizer": (no_tokenizer, ("tokenizer",)),
    "hook typo": (lambda g: extract(g, "--select", "blocks.1.hook_resid_pst"), ("hook_resid_pst", "hook_resid_post")),
    "point typo": (lambda g: extract(g, "--point", "resid_pots"), ("resid_pots", "resid_post")),
    "block out of range": (lambda g: extract(g, "--layers", "2,9"), ("9", "4")),
    "layers not numbers": (lambda g: extract(g, "--layers", "2,x"), ("'x'",)),
    "unknown method": (lambda g: extract(g, "--method", "dimm"), ("dimm", "whitened")),
    "unknown selector": (lambda g: extract(g, "--select", "best"), ("best", "separability")),
    "unknown position": (lambda g: extract(g, "--positions", "first"), ("first", "mean:K")),
    "several rows per prompt": (lambda g: extract(g, "--positions", "all"), ("several rows", "mean:K")),
    "no answer to read": (lambda g: extract(g, "--positions", "answer_letter"), ("answer",)),
    "unknown dtype": (lambda g: extract(g, "--dtype", "float12"), ("float12", "float32")),
    "unknown device": (lambda g: extract(g, "--device", "gpu9"), ("gpu9", "cpu")),
    "pattern without hooks": (lambda g: extract(g, "--save-activations", "block.*"), ("block.*", "no hook")),
    "storage dtype": (
        lambda g: extract(g, "--save-activations", "blocks.0.*resid_post", "--activations-dtype", "int8"),
        ("int8", "float16"),
    ),
    "place taken": (taken, ("--overwrite",)),
    "place holds something else": (foreign_folder, ("not an artifact",)),
    "place cannot be written": (under_a_file, ("cannot write", "--out")),
    "corrupted artifact": (corrupted, ("damaged", "directions.safetensors")),
    "interrupted write": (interrupted, ("manifest.json", "cut off")),
    "artifact of another kind": (other_kind, ("'notes'", "'directions'")),
    "artifact of another model": (other_model, ("other weights",)),
    "artifact of another width": (other_width, ("d_model 64", "d_model 96")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_that_says_what_to_do(
    name: str, ground: Ground, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake, expected = MISTAKES[name]
    code, out, err = run(mistake(ground), monkeypatch, capsys)
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, (out, err)
    assert len(message) == 1, err
    assert "Traceback" not in out + err
    for part in expected:
        assert part.lower() in message[0].lower(), message[0]


def test_the_same_command_without_the_mistake_works(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run([*extract(ground, "--null-repeats", "20")], monkeypatch, capsys)
    assert code == 0, err
    assert "demo" in out


def test_debug_shows_where_an_error_arose(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    from safety_lens.errors import DataError

    monkeypatch.setattr("sys.argv", ["safety-lens", "--debug", *extract(ground, "--method", "dimm")])
    with pytest.raises(DataError):
        main()


def test_prompts_cut_on_request_are_counted_in_the_report(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*long_prompt(ground)[:-2], "--truncate", "--null-repeats", "20", "--out", ground.place()]
    code, out, err = run(argv, monkeypatch, capsys)
    assert code == 0, err
    assert "1 prompts were cut to fit the model's context" in out


EARLY = {
    "layers of extract": (["extract", "--concept", "refusal", "--out", "new", "--layers", "3x"], "'3x'"),
    "layers of monitor": (["monitor", "organism", "new", "--layers", "3-"], "'3-'"),
    "layers of finetune": (["finetune", "--data", "benign", "--out", "new", "--layers", "3x"], "'3x'"),
    "positions": (["extract", "--concept", "refusal", "--out", "new", "--positions", "first"], "mean:K"),
    "directions of doctor": (["doctor", "--directions", "none"], "none is not a folder"),
    "directions of steer": (["steer", "Hello", "--directions", "none.gguf"], "no file none.gguf"),
    "directions of page": (["neurons", "page", "--out", "a.html", "--directions", "taken"], "manifest.json"),
    "folder of extract": (["extract", "--concept", "refusal", "--out", "taken"], "not an artifact"),
    "folder of finetune": (["finetune", "--data", "benign", "--out", "taken"], "not an artifact"),
    "folder of a dry run": (["finetune", "--data", "benign", "--out", "taken", "--dry-run"], "not an artifact"),
    "nothing to resume": (["finetune", "--data", "benign", "--out", "taken", "--resume"], "nothing to resume"),
}


@pytest.mark.parametrize("name", EARLY)
def test_a_mistake_that_needs_no_model_is_named_without_importing_torch(name: str, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("mine", encoding="utf-8")
    argv, expected = EARLY[name]
    code = "import sys; sys.modules['torch'] = None; from safety_lens.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert (tmp_path / "taken" / "diary.txt").read_text(encoding="utf-8") == "mine"
