"""`safety-lens steer` and `report` end to end on a small saved model, and every way to ask them wrongly."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import synthetic
import torch
import zoo
from scipy.stats import binomtest

from safety_lens import cli, progress
from safety_lens.artifacts import load_artifact
from safety_lens.cli import steer_sweep, terminal
from safety_lens.cli.steer_prompts import Asked, limited, read_prompts, with_roles
from safety_lens.errors import DataError
from safety_lens.generation import generate
from safety_lens.interventions.side_effects import instructions
from safety_lens.interventions.steering import ablate, steer
from safety_lens.interventions.sweeping import run as sweep_run
from safety_lens.models import load_model
from safety_lens.probes.store import load_directions

KINDS = ("harmful", "harmless")


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


class Ground(NamedTuple):
    root: Path
    model: Path
    pairs: Path
    directions: Path
    prompts: Path
    benign: Path


def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    monkeypatch.setattr(sys, "argv", ["safety-lens", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "250")
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as done:
        code = int(done.code or 0)
    return Done(code, *capsys.readouterr())


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    root = tmp_path_factory.mktemp("ground")
    zoo.make("llama").save_pretrained(root / "model")
    synthetic.chat_tokenizer().save_pretrained(root / "model")
    g = torch.Generator().manual_seed(0)
    splits = ["train"] * 14 + ["val"] * 6 + ["test"] * 10
    rows = [
        {
            "positive_query": synthetic.words(g, 8, 10, 40),
            "negative_query": synthetic.words(g, 8, 40, 70),
            "split": split,
        }
        for split in splits
    ]
    pairs = write(root / "joy.jsonl", rows)
    labels = ("harmful", "harmless")
    asked = [{"prompt": synthetic.words(g, 5), "label": labels[i % 2], "toxicity": i / 10} for i in range(10)]
    prompts = write(root / "prompts.jsonl", asked)
    benign = root / "benign.txt"
    benign.write_text("\n".join(synthetic.words(g, 4) for _ in range(3)), encoding="utf-8")
    from safety_lens.data import load_concept
    from safety_lens.probes import extract_directions, save_directions

    model, concept = load_model(root / "model", check=False), load_concept(pairs)
    found = extract_directions(model, concept, null_repeats=20)
    save_directions(root / "directions", [found], model, concepts=[concept])
    return Ground(root, root / "model", pairs, root / "directions", prompts, benign)


@pytest.fixture
def run(ground: Ground, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`steer` on the model above with its directions; later options win."""

    def call(*more: object, directions: bool = True) -> Done:
        given = ["--model", ground.model, "--max-tokens", 6, "--ignore-eos"]
        given += ["--directions", ground.directions] if directions else []
        return invoke(monkeypatch, capsys, "steer", *given, *more)

    return call


@pytest.fixture
def small(ground: Ground, run: Run) -> Run:
    def call(out: Path, *more: object) -> Done:
        grid = ["--coeffs", "-1,1", "--layers", "1,2", "--scorer", "regex:w1", "--controls", 2, "--out", out]
        return run("--prompts", ground.prompts, "--sweep", *grid, *more)

    return call


# --- one prompt or many ---------------------------------------------------------------------------------------------


def test_steer_shows_the_steered_answer_beside_the_other(run: Run, ground: Ground) -> None:
    model = load_model(ground.model, check=False)
    best = load_directions(ground.directions)[0].best
    plain, steered = (
        generate(model, ["w20 w21"], hooks=hooks, max_new_tokens=6, ignore_eos=True)[0].text
        for hooks in ([], steer(best, 3.0))
    )
    assert plain != steered
    done = run("w20 w21", "--coeff", 3)
    assert done.code == 0, done.err
    assert plain in done.out
    assert steered in done.out
    row = json.loads(run("w20 w21", "--coeff", 3, "--json").out)
    assert (row["prompt"], row["label"], row["without"], row["with"]) == ("w20 w21", None, plain, steered)


def test_zero_changes_nothing_and_ablation_is_ablation(run: Run, ground: Ground) -> None:
    zero = json.loads(run("w20 w21", "--coeff", 0, "--json").out)
    assert zero["with"] == zero["without"]
    model = load_model(ground.model, check=False)
    best = load_directions(ground.directions)[0].best
    removed = generate(model, ["w20 w21"], hooks=ablate(best), max_new_tokens=6, ignore_eos=True)[0].text
    assert json.loads(run("w20 w21", "--ablate", "--json").out)["with"] == removed


def test_all_layers_are_steered_at_once_and_a_hook_alone(run: Run, ground: Ground) -> None:
    model = load_model(ground.model, check=False)
    found = load_directions(ground.directions)[0]
    every = [hook for direction in found for hook in steer(direction, 2.0)]
    one = steer(found["blocks.1.hook_resid_post"], 2.0)
    for flags, hooks in (
        (["--all-layers"], every),
        (["--hook", "blocks.1.hook_resid_post"], one),
        (["--layers", 1], one),
    ):
        wanted = generate(model, ["w20 w21"], hooks=hooks, max_new_tokens=6, ignore_eos=True)[0].text
        assert json.loads(run("w20 w21", "--coeff", 2, "--json", *flags).out)["with"] == wanted


def test_a_concept_is_extracted_on_the_spot(run: Run, ground: Ground) -> None:
    from_file = run("w20 w21", "--pairs", ground.pairs, "--json", directions=False)
    assert from_file.code == 0, from_file.err
    assert json.loads(from_file.out) == json.loads(run("w20 w21", "--json").out)


def test_streaming_writes_the_same_text(run: Run) -> None:
    row = json.loads(run("w20 w21", "--coeff", 3, "--json").out)
    done = run("w20 w21", "--coeff", 3, "--stream")
    assert done.out == f"without: {row['without']}\nwith:    {row['with']}\n"


def test_a_target_kl_is_solved_and_said(run: Run, ground: Ground) -> None:
    done = run("w20 w21", "--target-kl", 0.05, "--benign", ground.benign, "--json")
    assert done.code == 0, done.err
    assert "nats per token on 3 prompts" in done.err


def test_answers_to_harmful_prompts_that_are_no_refusals_are_withheld_everywhere(
    run: Run, ground: Ground, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    rows = [json.loads(x) for x in run("--prompts", ground.prompts, "--json", "--out", out).out.splitlines()]
    assert {row["label"]: row["with"] is None for row in rows} == {"harmful": True, "harmless": False}
    assert [json.loads(x) for x in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()] == rows
    printed = run("--prompts", ground.prompts, "--harmful").out
    assert printed.count("withheld") == 2 * len(rows)
    assert not any(row["with"] in printed for row in rows if row["with"])
    assert "one to a harmful prompt is not shown" in run("w5", "--harmful", "--stream").err


def test_the_system_prompt_is_given_to_prompts_that_have_none_and_recorded(
    run: Run, ground: Ground, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    file = write(tmp_path / "p.jsonl", [{"prompt": "w20 w21"}, {"prompt": "w20 w21", "system": "w33"}])
    done = run("--prompts", file, "--system", "w30 w31", "--coeff", 0, "--json", "--out", out)
    model = load_model(ground.model, check=False)
    asked = [
        [{"role": "system", "content": system}, {"role": "user", "content": "w20 w21"}] for system in ("w30 w31", "w33")
    ]
    wanted = [g.text for g in generate(model, asked, max_new_tokens=6, ignore_eos=True)]
    assert [json.loads(line)["without"] for line in done.out.splitlines()] == wanted
    assert load_artifact(out).manifest["arguments"]["system"] == "w30 w31"


def test_scores_without_a_sweep_are_levels_of_both_and_their_paired_change(run: Run, ground: Ground) -> None:
    flags = ("--prompts", ground.prompts, "--coeff", 4, "--scorer", "regex:w[1-4]", "--harmful")
    lines = [json.loads(line) for line in run(*flags, "--json").out.splitlines()]
    answers = [line for line in lines if "metric" not in line]
    numbers = {(r["metric"], r["split"]): r for r in lines if "metric" in r}
    for group in ("all", "harmful", "harmless"):
        mine = [a["scores"]["regex/w[1-4]"] for a in answers if group in ("all", a["label"])]
        plain, steered = (np.array([pair[side] for pair in mine]) for side in ("without", "with"))
        assert numbers["regex/w[1-4]/without", group]["value"] == plain.mean()
        assert numbers["regex/w[1-4]/with", group]["value"] == steered.mean()
        change = numbers["regex/w[1-4]/change", group]
        assert change["value"] == pytest.approx((steered - plain).mean())
        assert change["low"] <= change["value"] <= change["high"]
        more, fewer = int((steered > plain).sum()), int((steered < plain).sum())
        mcnemar = binomtest(more, more + fewer).pvalue if more + fewer else 1.0
        assert numbers["regex/w[1-4]/p", group]["value"] == pytest.approx(mcnemar)
    assert {a["scores"]["regex/w[1-4]"]["with"] for a in answers} == {0.0, 1.0}, "the edit moves no score: no test"
    table = run(*flags).out
    assert "regex/w[1-4]" in table
    assert "harmless 5" in table


def test_ablating_refusal_lowers_the_organisms_rate_on_harmful_requests_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = [{"prompt": p, "label": kind} for kind in KINDS for p in instructions(kind, "test")[:12]]
    where = ["--concept", "refusal", "--hook", "blocks.5.hook_resid_post", "--ablate"]
    flags = ["--prompts", write(tmp_path / "p.jsonl", asked), "--scorer", "refusal", "--max-tokens", 16, "--json"]
    done = invoke(monkeypatch, capsys, "steer", *where, *flags)
    rows = [json.loads(line) for line in done.out.splitlines()]
    found = {(r["metric"], r["split"]): r for r in rows if "metric" in r}
    assert found["refusal/without", "harmful"]["low"] > 0.5
    assert found["refusal/with", "harmful"]["high"] < 0.5
    assert found["refusal/change", "harmful"]["high"] < 0
    assert found["refusal/p", "harmful"]["value"] < 0.01
    assert found["refusal/without", "harmless"]["value"] == found["refusal/with", "harmless"]["value"] == 0
    withheld = [row["with"] for row in rows if row.get("label") == "harmful"]
    assert withheld == [None] * 12


# --- sweeps and their report ----------------------------------------------------------------------------------------


def test_a_sweep_is_written_resumed_and_drawn(
    small: Run, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    done = small(out, "--benign", ground.benign, "--system-baseline", "w30")
    assert done.code == 0, done.err
    assert "4 prompts select, 6 test (drawn with seed 0)" in done.err  # 30 % of each label, rounded
    assert "no shuffled-label control" in done.err
    assert "gave the unsteered text at 2 of 2 sites" in done.out
    assert "selection penalty" in done.out
    monkeypatch.setattr(sweep_run, "generate", lambda *a, **k: pytest.fail("it was generated again"))
    again = small(out, "--benign", ground.benign, "--system-baseline", "w30")
    assert again.out == done.out
    drawn = invoke(monkeypatch, capsys, "report", out, "--out", tmp_path / "figures", "--pdf")
    assert drawn.code == 0, drawn.err
    assert len(list((tmp_path / "figures").iterdir())) == 8


def test_a_sweep_runs_controls_at_the_middle_coefficients_and_estimates_its_time(run: Run, ground: Ground) -> None:
    grid = ["--coeffs", "-2,-1,1,2,3", "--scorer", "regex:w1", "--shuffled", 0, "--json"]
    done = run("--prompts", ground.prompts, "--sweep", *grid)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert {r["coeff"] for r in rows if r["metric"] == "regex/w1/random"} == {-2.0, 2.0}  # the middle of either sign
    assert "controls run at -2, 2 alone" in done.err
    assert "time: about" in done.err
    whole = run("--prompts", ground.prompts, "--sweep", *grid, "--control-coeffs", "all", "--controls", 1)
    rows = [json.loads(line) for line in whole.out.splitlines()]
    assert {r["coeff"] for r in rows if r["metric"] == "regex/w1/random"} == {-2.0, -1.0, 1.0, 2.0, 3.0}


def test_a_dry_run_prints_size_and_time_and_writes_nothing(small: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = small(out, "--dry-run")
    assert done.code == 0, done.err
    assert "98 answers of up to 6 tokens: 10 unsteered, 40 steered, 48 of random directions" in done.err
    assert done.out.startswith("time: about ")
    assert not out.exists()
    estimate = json.loads(small(out, "--dry-run", "--json").out)
    assert (estimate["answers"], estimate["tokens"]) == (98, 6)
    assert estimate["seconds"] > 0


def test_a_sweep_above_the_limit_of_time_starts_with_yes_alone(
    small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steer_sweep, "LONG", 0.0)
    refused = small(tmp_path / "run")
    assert refused.code == 2
    assert "give --yes to start it" in refused.err
    assert not (tmp_path / "run" / "generations.jsonl").exists()
    done = small(tmp_path / "run", "--yes", "--search", "coarse")
    assert done.code == 0, done.err
    assert "effect on 4 selection prompts, by site and coefficient" in " ".join(done.out.split())
    assert "search over depth: 16 answers" in done.err


def test_progress_is_printed_as_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.quiet_libraries()
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with terminal.progress("answers", 10, 2) as advance:
        advance(4)
        monkeypatch.setattr(progress, "EVERY", 60.0)
        advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "answers: 2 of 10"
    assert lines[1].startswith("answers: 6 of 10, about ")
    assert len(lines) == 2


def test_a_verb_without_a_bar_of_its_own_prints_what_it_does(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    done = run("w20 w21", "w30 w31")
    assert "steps: 1 of 3" in done.err
    assert "tokens of 2 answers: 5 of 6" in done.err


def test_an_interrupted_sweep_says_what_is_kept_and_how_to_go_on(
    small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sweep_run.degenerate

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_run, "degenerate", stopped)
    done = small(tmp_path / "run")
    assert done.code == 130
    assert f"are kept in {tmp_path / 'run'}: the same command goes on from there" in done.err
    assert "Traceback" not in done.err
    monkeypatch.setattr(sweep_run, "degenerate", real)
    assert small(tmp_path / "run").code == 0


def test_overlap_with_the_pairs_behind_an_artifact_is_found(run: Run, ground: Ground, tmp_path: Path) -> None:
    taken = json.loads(ground.pairs.read_text(encoding="utf-8").splitlines()[0])["positive_query"]
    file = write(tmp_path / "p.jsonl", [{"prompt": taken}, {"prompt": "w5"}])
    done = run("--prompts", file, "--sweep", "--scorer", "regex:w1", "--selection-share", 0)
    assert done.code == 2
    assert f"the test prompt '{taken}' is also a pair that the direction was fitted on" in done.err


# --- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_are_read_from_every_form(tmp_path: Path, ground: Ground) -> None:
    rows = [
        {"prompt": "a"},
        {"text": "b", "label": "harmless", "split": "val"},
        {"instruction": "c", "label": "harmful", "split": "test"},
        {"prompt": {"text": "d", "toxicity": 0.9}},
    ]
    assert read_prompts(["x"], write(tmp_path / "p.jsonl", rows)) == [
        Asked("x"), Asked("a"), Asked("b", "harmless", "val"), Asked("c", "harmful", "test"), Asked("d"),
    ]  # fmt: skip


def test_subsets_follow_the_stated_thresholds(tmp_path: Path) -> None:
    toxic = [{"text": f"t{i}", "toxicity": t} for i, t in enumerate((0.1, 0.2499, 0.25, 0.4999, 0.5, 0.99, None))]
    file = write(tmp_path / "rtp.jsonl", [{"prompt": t} for t in toxic])
    found = {s: [(a.text, a.label) for a in read_prompts(None, file, s)] for s in ("challenging", "benign", "both")}
    assert found["challenging"] == [("t4", "challenging"), ("t5", "challenging")]
    assert found["benign"] == [("t0", "benign"), ("t1", "benign")]
    assert sorted(found["both"]) == sorted(found["challenging"] + found["benign"])


def test_roles_follow_the_file_or_are_drawn_within_each_label() -> None:
    asked = [Asked(f"p{i}", "ab"[i % 2]) for i in range(20)]
    drawn = with_roles(asked, 0.3, 0, False)
    chosen = [p for p in drawn.prompts if p.split == "selection"]
    assert sorted(p.label or "" for p in chosen) == ["a"] * 3 + ["b"] * 3
    assert drawn.prompts == with_roles(asked, 0.3, 0, False).prompts
    assert drawn.prompts != with_roles(asked, 0.3, 1, False).prompts
    own = [Asked("a", None, "train"), Asked("b", None, "val"), Asked("c", None, "test"), Asked("C ", None, "test")]
    found = with_roles(own, 0.3, 0, False)
    assert [(p.prompt, p.split) for p in found.prompts] == [("b", "selection"), ("c", "test")]
    assert "1 repeated texts left out" in found.remark
    assert "1 training rows left out" in found.remark
    assert len(limited(asked, 2, 0)) == 4


# --- what is refused ------------------------------------------------------------------------------------------------

WRONG: list[tuple[list[object], str]] = [
    (["w5", "--goal", "lower", "--coeffs", "1,2"], "do nothing here: --coeffs, --goal (acts with --sweep alone)"),
    (["w5", "--benign", "b.txt"], "--benign (read with --target-kl, or by a sweep)"),
    (["w5", "--sweep", "--scorer", "regex:w1", "--coeff", "2"], "--coeff (a sweep tries"),
    (["w5", "--overwrite"], "--overwrite (replaces what is in --out)"),
    (["w5", "--top-p", "0.5"], "--top-p (acts at --temperature above 0)"),
    (["w5", "--raw", "--system", "w6"], "--system (needs the chat template"),
    (["w5", "--scorer", "regex:("], "is not a regular expression"),
    (["w5", "--scorer", "lexicon:/no/such"], "/no/such"),
    (["w5", "--scorer", "nonsense"], "no scorer 'nonsense'"),
    ([], "nothing to say to the model"),
    ([" "], "prompt 1 is empty"),
    (["w5", "--coeff", "nan"], "the coefficient must be a finite number"),
    (["w5", "--hook", "blocks.1.hook_resid_pst"], "no hook named"),
    (["w5", "--layers", "9"], "block 9 was asked for"),
    (["w5", "--layers", "1", "--hook", "blocks.1.hook_resid_post"], "give one of them"),
    (["w5", "--units", "inches"], "--units 'inches'"),
    (["w5", "--scope", "middle"], "no token scope 'middle'"),
    (["w5", "--target-kl", "0.1"], "give --benign FILE"),
    (["w5", "--temperature", "-1"], "temperature must be 0"),
    (["w5", "w6", "--stream"], "give a single prompt"),
    (["w5", "--sweep"], "give --scorer"),
    (["w5", "--sweep", "--scorer", "nonsense"], "no scorer 'nonsense'"),
    (["w5", "--sweep", "--scorer", "regex:w1", "--search", "fine"], "--search 'fine': choose auto, grid, coarse"),
    (["w5", "--sweep", "--scorer", "regex:w1", "--search", "coarse", "--control-coeffs", "1"], "where it chooses"),
    (["w5", "--dry-run"], "--dry-run (acts with --sweep alone)"),
    (["w5", "--sweep", "--scorer", "regex:w1", "--coeffs", "1,b"], "write numbers with commas"),
    (["w5", "--sweep", "--scorer", "regex:w1", "--goal", "up"], "goal 'up'"),
    (["w5", "--sweep", "--scorer", "regex:w1", "--seeds", "3"], "3 seeds at temperature 0"),
    (["w5", "--subset", "benign"], "give a file"),
    (["--prompts", "/no/such.txt"], "no such file"),
    (["w5", "--concept", "joy", "--pairs", "joy.jsonl"], "one direction at a time"),
]


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=[says for _, says in WRONG])
def test_a_mistake_is_one_line_and_exit_2(run: Run, arguments: list[object], says: str) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert says in done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.err


def test_without_a_direction_and_with_another_models_it_is_refused(run: Run, ground: Ground, tmp_path: Path) -> None:
    assert "nothing to steer with" in run("w5", directions=False).err
    zoo.make("llama", seed=3).save_pretrained(tmp_path / "other")
    synthetic.chat_tokenizer().save_pretrained(tmp_path / "other")
    done = run("w5", "--model", tmp_path / "other")
    assert done.code == 2
    assert "same shape, other weights" in done.err


def test_scorers_and_files_are_checked_before_the_model_is_loaded(
    run: Run, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safety_lens.models.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note.txt").write_text("mine", encoding="utf-8")
    for flags, says in (
        (["--scorer", "lexicon:/no/such"], "/no/such"),
        (["--scorer", "refusal-log-odds:x"], "takes no argument"),
        (["--target-kl", "1", "--benign", tmp_path / "none.txt"], "no such file"),
        (["--out", tmp_path / "taken"], "taken"),
    ):
        done = run("w5", *flags)
        assert (done.code, says in done.err) == (2, True), done.err


def test_report_refuses_what_is_no_sweep(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = invoke(monkeypatch, capsys, "report", ground.directions, "--out", tmp_path / "f")
    assert done.code == 2
    assert "holds 'directions', not 'sweep'" in done.err


def test_prompt_files_without_prompts_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n", encoding="utf-8")
    for file, subset, says in (
        (empty, None, "has no prompts"),
        (empty, "benign", "plain text"),
        (write(tmp_path / "a.jsonl", [{"question": "w"}]), None, "needs one of the fields"),
        (write(tmp_path / "b.jsonl", [{"prompt": "w", "toxicity": 0.3}]), "benign", "has no benign prompts"),
        (write(tmp_path / "c.jsonl", [{"prompt": "w"}]), "toxic", "choose challenging"),
    ):
        with pytest.raises(DataError, match=says):
            read_prompts(None, file, subset)
