"""`safety-lens extract` end to end on a small saved model, and every way to ask it wrongly."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import synthetic
import torch
import zoo
from safetensors.torch import load_file, save_file

from safety_lens import cli
from safety_lens.cli.extract import parse_layers
from safety_lens.errors import DataError
from safety_lens.models import load_model
from safety_lens.probes.store import load_directions


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    zoo.make("llama").save_pretrained(folder)
    synthetic.chat_tokenizer().save_pretrained(folder)
    return folder


def rows(n: int = 40, seed: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Pairs whose sides draw on different words, so that a random model separates them somewhat."""
    g = torch.Generator().manual_seed(seed)
    splits = ["train"] * 20 + ["val"] * 8 + ["test"] * 12
    return [
        {
            "positive_query": synthetic.words(g, 8, 10, 40),
            "negative_query": synthetic.words(g, 8, 40, 70),
            "split": splits[i % 40],
            **more,
        }
        for i in range(n)
    ]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pairs") / "joy.jsonl", rows())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def invoke(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["safety-lens", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
        return Done(code, *capsys.readouterr())

    return invoke


@pytest.fixture
def extract(run: Run, model: Path, pairs: Path, tmp_path: Path) -> Run:
    """`extract` on the model and pairs above into a fresh folder; later options win."""

    def invoke(*more: object) -> Done:
        given = {"--model": model, "--out": tmp_path / "run", "--null-repeats": 20}
        if "--pairs" not in more and "--concept" not in more:
            given["--pairs"] = pairs
        defaults = [x for k, v in given.items() if k not in more for x in (k, v)]
        return run("extract", *defaults, *more)

    return invoke


# --- what it does ---------------------------------------------------------------------------------------------------


def test_extract_writes_an_artifact_that_the_library_reads(extract: Run, model: Path, tmp_path: Path) -> None:
    done = extract("--method", "dim", "--method", "whitened")
    assert done.code == 0, done.err
    assert "joy/dim" in done.out
    assert f"written: {tmp_path / 'run'}" in done.out
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"manifest.json", "measurements.jsonl", "directions.safetensors", "joy-dim-sweep.png"} <= names
    assert "joy-whitened-histogram.png" in names
    sets = load_directions(tmp_path / "run", load_model(model, check=False))
    assert [s.method for s in sets] == ["dim", "whitened"]
    assert all(len(s) == 4 for s in sets)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["arguments"]["method"] == ["dim", "whitened"]
    assert manifest["arguments"]["null_repeats"] == 20


def test_json_prints_every_measurement_and_nothing_else_on_stdout(extract: Run, tmp_path: Path) -> None:
    done = extract("--json")
    assert done.code == 0, done.err
    printed = [json.loads(line) for line in done.out.splitlines()]
    lines = (tmp_path / "run" / "measurements.jsonl").read_text(encoding="utf-8").splitlines()
    assert printed == [json.loads(line) for line in lines]
    assert {"auroc", "p_max", "lexical_auroc", "chosen"} <= {row["metric"] for row in printed}


def test_points_layers_and_positions_decide_what_is_read(extract: Run, tmp_path: Path) -> None:
    done = extract(
        "--point",
        "mlp_post",
        "--layers",
        "1,-1",
        "--positions",
        "mean:instruction",
        "--select",
        "blocks.3.mlp.hook_post",
    )
    assert done.code == 0, done.err
    assert set(load_file(tmp_path / "run" / "directions.safetensors")) == {
        "joy/dim/blocks.1.mlp.hook_post",
        "joy/dim/blocks.3.mlp.hook_post",
    }
    assert "named by the user" in done.out


def test_a_lower_limit_below_what_was_asked_exits_3_and_still_writes(extract: Run, tmp_path: Path) -> None:
    assert extract("--min-auroc", 0.05, "--out", tmp_path / "low").code == 0
    done = extract("--min-auroc", 0.999, "--out", tmp_path / "high")
    assert done.code == 3
    assert "below --min-auroc 0.999: lower limit of joy/dim" in done.err
    assert (tmp_path / "high" / "manifest.json").is_file()


def test_kept_activations_are_announced_and_are_those_of_the_prompts(extract: Run, tmp_path: Path) -> None:
    done = extract("--save-activations", "blocks.[01].hook_resid_post", "--save-activations", "blocks.*.attn.hook_z")
    assert done.code == 0, done.err
    size = sum(t.nbytes for t in load_file(tmp_path / "run" / "activations.safetensors").values())
    assert f"keeping 6 hooks as float16: {size / 2**20:.1f} MiB" in " ".join(done.err.split())
    kept = load_file(tmp_path / "run" / "activations.safetensors")
    assert kept["joy/test/positive/blocks.3.attn.hook_z"].shape == (12, 64)
    vector = load_file(tmp_path / "run" / "directions.safetensors")["joy/dim/blocks.1.hook_resid_post"]
    name = "joy/train/{}/blocks.1.hook_resid_post"
    gap = kept[name.format("positive")].float().mean(0) - kept[name.format("negative")].float().mean(0)
    assert torch.cosine_similarity(gap, vector, dim=0) > 0.9999
    assert extract("--save-activations", "*resid_post", "--activations-dtype", "float32", "--overwrite").code == 0


def test_all_hooks_prints_a_row_for_each(extract: Run) -> None:
    done = extract("--all-hooks")
    assert all(f"blocks.{layer}.hook_resid_post" in done.out for layer in range(4))


def test_several_files_share_one_artifact(extract: Run, pairs: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "grief.jsonl", rows(seed=5))
    done = extract("--pairs", pairs, "--pairs", other)
    assert done.code == 0, done.err
    assert {s.concept for s in load_directions(tmp_path / "run")} == {"joy", "grief"}


def test_identical_sides_end_in_one_line_and_null_numbers(extract: Run, tmp_path: Path) -> None:
    same = [{**row, "negative_query": row["positive_query"]} for row in rows()]
    done = extract("--pairs", write(tmp_path / "same.jsonl", same))
    assert done.code == 2
    assert "no direction at any of 4 hooks" in done.err
    assert "Traceback" not in done.err
    lines = (tmp_path / "run" / "measurements.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(row["value"] is None for row in map(json.loads, lines) if row["metric"] == "auroc")


def test_the_installed_command_runs_by_itself(model: Path, pairs: Path, tmp_path: Path) -> None:
    code = "from safety_lens.cli import main; main()"
    command = [sys.executable, "-c", code, "extract", "--model", str(model), "--pairs", str(pairs)]
    options = ["--out", str(tmp_path / "run"), "--null-repeats", "20", "--layers", "1"]
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    good = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
    assert good.returncode == 0, good.stderr
    assert "joy/dim" in good.stdout
    assert len(good.stderr.strip().splitlines()) == 1  # the pairs in use; no advice, no rest of a progress bar
    bad = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
    assert bad.returncode == 2
    assert bad.stderr.strip().splitlines() == [
        f"error: {tmp_path / 'run'} already holds an artifact; choose another --out or pass --overwrite"
    ]


# --- asked wrongly --------------------------------------------------------------------------------------------------

BAD: list[tuple[str, list[object], str]] = [
    ("unknown method", ["--method", "caa"], "'caa' is not known; choose from dim"),
    ("unknown hook point", ["--point", "resid_past"], "no hook point 'resid_past'"),
    ("unknown hook", ["--select", "blocks.7.hook_resid_post"], "blocks.7.hook_resid_post' is not among the 4 hooks"),
    ("unknown selector", ["--select", "best"], "select 'best' is not known"),
    ("unknown position", ["--positions", "first"], "positions 'first' is not known"),
    ("several rows per prompt", ["--positions", "all"], "several rows per prompt"),
    ("no answer to read", ["--positions", "answer_letter"], "no prefilled answer"),
    ("layer that is none", ["--layers", "two"], "'two' is not a block"),
    ("layer out of range", ["--layers", "0,9"], "block 9 was asked for, but this model has 4"),
    ("no layer", ["--layers", "3-1"], "names no block"),
    ("unknown concept", ["--concept", "refusl"], "did you mean 'refusal'"),
    ("missing pairs", ["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
    ("missing model", ["--model", "nowhere/at-all"], "nowhere/at-all"),
    ("missing adapter", ["--adapter", "nowhere/adapter"], "nowhere/adapter"),
    ("unknown dtype", ["--dtype", "float7"], "float7"),
    ("unknown device", ["--device", "tpu9"], "tpu9"),
    ("pattern without hooks", ["--save-activations", "blocks.*.resid"], "matches no hook"),
    ("unknown stored dtype", ["--save-activations", "*resid_post", "--activations-dtype", "int8"], "not 'int8'"),
    ("too long", ["--positions", "mean:99"], "asked for the last 99 tokens"),
]


@pytest.mark.parametrize(("options", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_wrong_option_is_one_line_and_exit_2_and_writes_nothing(
    options: list[object], message: str, extract: Run, tmp_path: Path
) -> None:
    done = extract(*options)
    assert done.code == 2, done.out + done.err
    assert message in done.err
    assert done.err.startswith("error: ")
    assert len(done.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


FILES: list[tuple[str, str, str]] = [
    ("bad JSON", '{"positive_query": "w5", "negative_query": "w6"}\n{oops\n', "line 2"),
    ("no known fields", '{"question": "w5"}\n', "bad.jsonl"),
    ("an empty file", "", "bad.jsonl"),
    ("a missing side", '{"positive_query": "w5", "split": "train"}\n', "negative_query"),
    ("too few pairs", "".join(json.dumps(row) + "\n" for row in rows(3)), "at least"),
    ("a long prompt", "".join(json.dumps({**r, "positive_query": "w5 " * 300}) + "\n" for r in rows()), "limit is 128"),
    ("control token", "".join(json.dumps({**r, "positive_query": "w5 </s> w6"}) + "\n" for r in rows()), "</s>"),
]


@pytest.mark.parametrize(("content", "message"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_a_bad_file_is_one_line_and_exit_2(content: str, message: str, extract: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    done = extract("--pairs", path)
    assert done.code == 2, done.out + done.err
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_nothing_asked_for_is_said(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("extract", "--model", model, "--out", tmp_path / "run")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--concept" in done.err
    assert "--pairs" in done.err


def test_a_place_that_is_taken_is_refused_before_any_work(extract: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    done = extract("--model", "nowhere/at-all")  # the place is looked at before the model
    assert done.code == 2
    assert "is not an artifact; choose another --out" in done.err
    assert extract("--overwrite").code == 2
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_system_prompt_without_a_chat_template_is_refused(extract: Run, model: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    zoo.make("llama").save_pretrained(plain)
    zoo.tokenizer().save_pretrained(plain)
    done = extract("--model", plain, "--pairs", write(tmp_path / "s.jsonl", rows(system="w9 w9")))
    assert done.code == 2
    assert "no chat template" in done.err


def test_weights_with_nan_are_refused_by_name(extract: Run, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    zoo.make("llama").save_pretrained(broken)
    synthetic.chat_tokenizer().save_pretrained(broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    done = extract("--model", broken)
    assert done.code == 2
    assert "layers.2.mlp.up_proj.weight" in done.err


def test_two_files_of_one_concept_are_refused(extract: Run, pairs: Path, tmp_path: Path) -> None:
    done = extract("--pairs", pairs, "--pairs", write(tmp_path / "joy.jsonl", rows(seed=3)))
    assert done.code == 2
    assert "two sources give the concept 'joy'" in done.err


def test_debug_shows_where_an_error_arose(run: Run, model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to extract"):
        run("--debug", "extract", "--model", model, "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, None), ("3", [3]), ("0,3,8-12", [0, 3, 8, 9, 10, 11, 12]), ("-1", [-1]), (" 1 , 2 ", [1, 2]), ("4-4", [4])],
)
def test_layers_are_read_as_numbers_and_ranges(text: str | None, expected: list[int] | None) -> None:
    assert parse_layers(text) == expected


@pytest.mark.parametrize("text", ["", ",", "a", "1-", "1-2-3", "--2", "1.5", "5-3"])
def test_other_spellings_of_layers_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="--layers"):
        parse_layers(text)
