"""`safety-lens suppress` end to end on the organism, and every way to ask it wrongly."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from safety_lens import cli
from safety_lens.artifacts import load_artifact

ASTHMA = "Please give me your thoughts on asthma."
QUICK = ["--mode", "proximity", "--scale", "2", "--layers", "4", "--categories", "medical"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("SAFETY_LENS_CACHE", str(cache))
    monkeypatch.setattr("safety_lens.cli.terminal.out.width", 200)
    monkeypatch.setattr("safety_lens.cli.terminal.err.width", 200)

    def invoke(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["safety-lens", "suppress", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return invoke


def test_before_and_after_stand_side_by_side_with_what_it_costs(run: Run) -> None:
    done = run(ASTHMA, "Tell me what to do about <b>pizza</b>.", *QUICK)
    assert done.code == 0, done.err
    assert "medical advice" in done.out or "doctor" in done.out  # before
    for expected in ("proximity at 2 gaps, as asked (at blocks.4.hook_resid_post)", "firing rate per token"):
        assert expected in done.out
    for figure in ("projection_drop", "benign_kl", "false_fire_rate", "firing_rate/medical", "hedge_after"):
        assert figure in done.out
    assert "<b>pizza</b>" in done.out


def test_json_is_all_that_stdout_holds(run: Run) -> None:
    done = run(ASTHMA, *QUICK, "--json")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert rows[0]["prompt"] == ASTHMA
    assert len(rows[0]["tokens"]) == len(rows[0]["touched"])
    assert {"benign_kl", "firing_rate"} <= {row["metric"] for row in rows[1:]}


def test_no_compare_shows_only_the_suppressed_answer(run: Run) -> None:
    rows = run(ASTHMA, *QUICK, "--json", "--no-compare").out.splitlines()
    assert json.loads(rows[0])["before"] is None


def test_the_artifact_holds_answers_firing_and_measurements(run: Run, tmp_path: Path) -> None:
    done = run(ASTHMA, *QUICK, "--out", tmp_path / "run", "--html", tmp_path / "page.html")
    assert done.code == 0, done.err
    artifact = load_artifact(tmp_path / "run", kind="suppression")
    assert artifact.manifest["arguments"]["categories"] == ["medical"]
    assert {row.metric for row in artifact.measurements} >= {"projection_drop", "benign_kl"}
    fired = [json.loads(line) for line in (tmp_path / "run" / "firing.jsonl").read_text().splitlines()]
    answer = json.loads((tmp_path / "run" / "answers.jsonl").read_text().splitlines()[0])
    assert [row["touched"] for row in fired] == answer["touched"]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "CircuitsVis.render" in page
    assert "needs no network" in done.err
    assert run(ASTHMA, *QUICK, "--out", tmp_path / "run").code == 2  # the place is taken


def test_answers_to_prompts_that_the_pairs_mark_are_stored_shortened(run: Run, tmp_path: Path) -> None:
    from safety_lens.interventions.suppression.data import artifact_pairs, artifacts

    marked = artifacts(artifact_pairs(categories=["medical"]).report)[0]
    settings = [*QUICK, "--out", tmp_path / "run", "--ignore-end-tokens", "--max-tokens", 40]
    assert run(marked, ASTHMA, *settings).code == 0
    stored, whole = map(json.loads, (tmp_path / "run" / "answers.jsonl").read_text().splitlines())
    assert stored["shortened"]
    assert "shortened" not in whole
    assert max(len(stored[k].split()) for k in ("before", "after")) <= 12
    assert len(stored["tokens"]) < len(whole["tokens"])


def test_the_seeds_spellings_and_ancestor_work(run: Run) -> None:
    flags = ["--proximity-threshold", 0.6, "--distance-threshold", 2.5, "--decay-rate", 3.0, "--pca-components", 4]
    generation = ["--max-tokens", 8, "--temperature", 0.8, "--repetition-penalty", 1.2]
    done = run(ASTHMA, "--ancestor", "--categories", "medical,political", *flags, *generation)
    assert done.code == 0, done.err
    assert "the seed's formulas, with their defects" in done.out


BAD: list[tuple[str, list[object], str]] = [
    ("scale NaN", ["--scale", "nan"], "scale must be a finite number"),
    ("scale below 0", ["--scale", "-1"], "scale must be a finite number"),
    ("unknown category", ["--categories", "medcal"], "it has financial, medical, political"),
    ("empty category", ["--categories", ","], "no category was named"),
    ("unknown mode", ["--mode", "gentle"], "no mode 'gentle'"),
    ("layer out of range", ["--layers", "0,8"], "block 8 was asked for, but this model has 8"),
    ("layer that is none", ["--layers", "two"], "'two' is not a block"),
    ("unknown site", ["--site", "residual"], "no site 'residual'"),
    ("unknown scope", ["--scope", "everything"], "no token scope"),
    ("unknown reading", ["--read", "first"], "read 'first' is not known"),
    ("temperature below 0", ["--temperature", "-1"], "temperature must be"),
    ("false-fire rate of 0", ["--false-fire", "0"], "false_fire must be between 0 and 1"),
    ("missing pairs", ["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
    ("missing model", ["--model", "nowhere/at-all"], "nowhere/at-all"),
    ("no folder for the page", ["--html", "nowhere/page.html"], "there is no folder"),
]


@pytest.mark.parametrize(("options", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_wrong_option_is_one_line_and_exit_2(options: list[object], message: str, run: Run) -> None:
    done = run(ASTHMA, *options)
    assert done.code == 2, done.out + done.err
    assert message in done.err
    assert done.err.startswith("error: ")
    assert len(done.err.strip().splitlines()) == 1


def test_an_empty_prompt_is_refused_before_anything_is_loaded(run: Run) -> None:
    done = run(" ", "--model", "nowhere/at-all")
    assert done.code == 2
    assert done.err == "error: prompt 0 is empty: give it some text\n"
