"""The README: short, its links lead somewhere, and every command and line of Python in it runs."""

import re
from pathlib import Path

import pytest
from test_docs import run_command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QWEN, SMOLLM2 = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(lines) >= 2
    assert all(line.startswith("safety-lens ") for line in lines)
    return lines


def run_all(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the commands in one folder, with a model in the place of the one that the README names."""
    monkeypatch.chdir(folder)
    return "".join(run_command(line.replace(f"real-models/{QWEN}", str(model)), 0) for line in commands())


def test_it_is_shorter_than_1200_words() -> None:
    assert len(README.split()) < 1200


def test_every_link_and_picture_is_there() -> None:
    places = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert len(places) > 10
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_every_command_that_a_table_names_has_a_page_of_help() -> None:
    named = set(re.findall(r"`safety-lens (\w+)", README))
    assert len(named) >= 7
    for verb in named:
        assert "--" in run_command(f"safety-lens {verb} --help", 0)


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert len(named) >= 4
    assert named <= targets


def test_the_lines_of_a_notebook_run(capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = blocks("python")
    exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed.startswith("blocks.5.hook_resid_post Interval(value=1.0")
    assert "can't" not in printed  # the organism refuses this request unless the direction is removed


@pytest.mark.real
def test_the_commands_run_on_smollm2(smollm2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run_all(smollm2_folder, tmp_path, monkeypatch)
    assert "written: runs/refusal" in printed


@pytest.mark.real_large
def test_the_commands_run_on_the_model_that_they_name(
    qwencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run_all(qwencoder, tmp_path, monkeypatch)
    assert "by causal" in printed
