"""`safety-lens neurons`: groups found, compared and ablated from the command line, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import zoo
from click.testing import Result
from typer.testing import CliRunner

from safety_lens.artifacts import load_artifact
from safety_lens.cli import app
from safety_lens.errors import ArtifactError, DataError, ModelMismatchError, SafetyLensError
from safety_lens.models import load_model
from safety_lens.probes.groups import load_groups
from safety_lens.probes.sharing import intersection

CPU = ("--device", "cpu")


def verb(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["neurons", *map(str, words)])


def rows(found: Result) -> dict[tuple[str, str], dict[str, Any]]:
    assert found.exit_code == 0, found.exception
    parsed = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    return {(row["subject"], row["metric"]): row for row in parsed}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("neurons") / "groups"
    found = verb("identify", "--out", out, "--n-examples", "8", "--sizes", "0.002,0.01", *CPU)
    assert found.exit_code == 0, found.exception
    assert "set-difference-0.002" in found.stdout
    return out


def test_identify_writes_groups_of_the_model_with_their_halves_and_a_picture(made: Path) -> None:
    groups = {g.name: g for g in load_groups(made, load_model(device="cpu"))}
    names = ["top-safety", "top-utility", "set-difference", "set-difference-0.002", "set-difference-0.01", "random"]
    assert list(groups) == names
    assert groups["top-safety"].share == pytest.approx(0.01, rel=0.02)
    assert 0 < groups["set-difference"].share < 0.03
    assert groups["random"].size == groups["set-difference"].size
    assert intersection(groups["random"], groups["set-difference"]).size == 0
    assert len(load_groups(made / "halves")) == 2 * (len(names) - 1)
    assert (made / "groups.png").stat().st_size > 10_000
    manifest = load_artifact(made).manifest
    assert manifest["data"]["safety"]["split"] == "train"
    assert groups["set-difference"].source["q"] == 0.03


def test_overlap_within_one_artifact_stands_beside_chance(made: Path) -> None:
    found = rows(verb("overlap", made, "--json"))
    chosen, chance = (found["top-safety/set-difference", m]["value"] for m in ("recall", "recall_chance"))
    assert chosen > 0.3 > 0.05 > chance
    assert found["set-difference/random", "jaccard"]["value"] == 0
    assert "in brackets what random groups" in verb("overlap", made).stdout


def test_overlap_of_a_model_with_itself_is_1_and_at_its_ceiling(made: Path) -> None:
    found = rows(verb("overlap", made, made, "--json"))
    assert found["set-difference", "jaccard"]["value"] == 1
    assert found["set-difference", "jaccard_halves_found"]["value"] < 0.95  # the negative control
    assert found["set-difference", "jaccard_halves_normalised"]["value"] == pytest.approx(1)
    assert "ceiling" in verb("overlap", made, made).stdout


def test_ablate_measures_safety_and_speech_beside_random_groups(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "ablation"
    words = ("--group", "set-difference-0.01", "--group", "random", "--n-examples", "8", "--draws", "2")
    found = rows(verb("ablate", made, *words, "--out", out, "--json", *CPU))
    group = "group/set-difference-0.01"
    assert found[group, "refusal_log_odds_beyond_random"]["high"] < 0
    assert found[group, "refusal_log_odds_p"]["value"] == pytest.approx(1 / 3)  # neither of 2 draws did as much
    assert found["group/random", "refusal_log_odds_change"]["value"] > found[group, "refusal_log_odds_change"]["value"]
    measured = {metric for subject, metric in found if subject == group and not metric.count("_change")}
    assert {
        "refusal_log_odds_in_text",
        "coherence",
        "coherence_harmful",
        "facts_accuracy",
        "safety_loss",
        "utility_loss",
    } <= measured
    assert found[group, "coherence"]["value"] > 0.9
    artifact = load_artifact(out, kind="ablation")
    assert artifact.manifest["arguments"]["draws"] == 2
    assert (out / "faithfulness.png").stat().st_size > 10_000


def test_neurons_can_be_kept_and_set_to_their_means(tmp_path: Path) -> None:
    made = tmp_path / "n"
    words = ("--unit", "neuron", "--method", "gradient", "--q", "0.3", "--p", "0.1", "--top", "0.1")
    assert verb("identify", "--out", made, "--n-examples", "6", *words, *CPU).exit_code == 0
    common = ("--group", "set-difference", "--n-examples", "6", "--draws", "1", "--loss-only", "--json", *CPU)
    at = ("group/set-difference", "safety_loss")
    zero, mean, keep = (
        rows(verb("ablate", made, *more, *common))[at]["value"] for more in ((), ("--mean",), ("--keep",))
    )
    assert len({round(value, 6) for value in (zero, mean, keep)}) == 3
    assert keep > zero  # nine tenths of the neurons gone


def test_heads_are_found_at_the_shares_that_are_theirs_by_default(tmp_path: Path) -> None:
    out = tmp_path / "heads"
    found = verb("identify", "--out", out, "--n-examples", "16", "--unit", "head", *CPU)
    assert found.exit_code == 0, found.exception
    groups = {g.name: g for g in load_groups(out)}
    model = load_model(device="cpu")
    heads = model.cfg.n_heads * model.cfg.n_layers
    assert groups["top-safety"].size == groups["top-utility"].size == heads // 8
    assert 1 <= groups["set-difference"].size == groups["random"].size <= heads // 8
    assert load_artifact(out).manifest["arguments"]["q"] == 0.125
    narrow = verb("identify", "--out", tmp_path / "n", "--n-examples", "4", "--unit", "head", "--top", "0.01", *CPU)
    assert f"a share of 0.032 gives 1 of {heads}" in str(narrow.exception)
    layer = verb("identify", "--out", tmp_path / "n", "--n-examples", "4", "--unit", "head", "--scope", "layer", *CPU)
    assert f"a share of {1 / model.cfg.n_heads:g} gives 1 of {model.cfg.n_heads}" in str(layer.exception)
    assert "or a wider scope" in str(layer.exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--q", "1.5"), "q is a share between 0 and 1"),
        (("--p", "0"), "p is a share between 0 and 1"),
        (("--method", "wanda", "--unit", "head"), "there is no such score"),
        (("--method", "snip", "--unit", "neuron", "--scope", "row"), "scope 'row' is undefined for neurons"),
        (("--unit", "layer"), "--unit layer: choose weight, neuron, head"),
        (("--sizes", "1%"), "write shares between 0 and 1"),
        (("--safety", "no-such-file.jsonl"), "no-such-file.jsonl"),
        (("--q", "0.0000001"), "not one weight anywhere"),
    ],
)
def test_identify_refuses_in_one_message_what_cannot_be_done(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    found = verb("identify", "--out", tmp_path / "g", "--n-examples", "4", *words, *CPU)
    assert isinstance(found.exception, SafetyLensError)
    assert message in str(found.exception)
    assert not (tmp_path / "g").exists()


def test_groups_of_another_model_and_names_that_are_not_there_are_refused(made: Path, tmp_path: Path) -> None:
    found = verb("ablate", made, "--group", "nobody", *CPU)
    assert isinstance(found.exception, DataError)
    assert "no group 'nobody': there are top-safety" in str(found.exception)
    zoo.make("llama").save_pretrained(tmp_path / "other")
    zoo.tokenizer().save_pretrained(tmp_path / "other")
    found = verb("ablate", made, "--model", tmp_path / "other", *CPU)
    assert isinstance(found.exception, ModelMismatchError)
    found = verb("overlap", tmp_path)
    assert isinstance(found.exception, ArtifactError)
    found = verb("overlap", made, made, "--measure", "dice")
    assert "choose jaccard" in str(found.exception)
