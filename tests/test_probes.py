"""Probe sets: which prompts behaviour is read on, for which model and concept, from which file."""

from pathlib import Path

import pytest

from safety_lens.data.built_in import ENGLISH, ORGANISM
from safety_lens.errors import DataError
from safety_lens.interventions.behaviours import BEHAVIOURS
from safety_lens.monitors import Limits, Probes
from safety_lens.monitors.alarm import WATCHED
from safety_lens.monitors.asking import deriving, probe_sets
from safety_lens.monitors.finetune.config import ProbeFiles, read_config
from safety_lens.monitors.finetune.watch import probes_of, stop_rule

CONCEPTS = ("refusal", "sycophancy", "deception", "hedging")


def test_real_models_are_asked_in_english_and_the_organism_in_its_own_words() -> None:
    english, own = (probe_sets(Probes(n=8), sets, CONCEPTS, 0) for sets in (ENGLISH, ORGANISM))
    assert set(english) >= {"harmful", "lookalike", "harmless"}
    assert "facts" not in english
    assert set(own) == {"harmful", "harmless", "facts"}, "its look-alikes are its harmless requests"
    assert set(english["harmful"].prompts) <= set(ENGLISH.requests("harmful", "test"))
    assert not set(map(str, english["harmful"].prompts)) & set(ORGANISM.requests("harmful", "test"))
    assert [name for name, one in english.items() if one.harmful] == ["harmful"]


def test_every_watched_concept_with_a_behaviour_is_asked_and_can_raise_an_alarm() -> None:
    asked = probe_sets(Probes(n=8), ENGLISH, CONCEPTS, 0)
    for spec in BEHAVIOURS.values():
        name = "harmful" if spec.name == "refusal" else spec.name
        assert asked[name].behaviour == spec.name
        assert WATCHED[f"behaviour/{name}"][:2] == (spec.concept, spec.name)
    assert set(probe_sets(Probes(n=8), ENGLISH, ["refusal"], 0)) == {"harmful", "lookalike", "harmless"}


def test_prompts_that_derive_the_behaviour_are_not_measured() -> None:
    own = Probes(harmful=[f"h{i}" for i in range(10)], harmless=[f"s{i}" for i in range(10)], n=8)
    derives = deriving(own)
    assert derives is not None
    measured = probe_sets(own, ENGLISH, ["refusal"], 0)
    for label, fit in zip(("harmful", "harmless"), derives, strict=True):
        assert len(fit) == 5
        assert not set(map(str, fit)) & set(map(str, measured[label].prompts))
    assert deriving(Probes()) is None
    train = {str(prompt) for prompt in ENGLISH.requests("harmful", "train")}
    assert not train & set(map(str, probe_sets(Probes(n=64), ENGLISH, ["refusal"], 0)["harmful"].prompts))


def test_probes_and_limits_come_from_yaml_and_files(tmp_path: Path) -> None:
    (tmp_path / "harmful.txt").write_text("".join(f"request {i}\n" for i in range(6)))
    (tmp_path / "harmless.jsonl").write_text(
        "".join(f'{{"prompt": "ask {i}", "system": "Be kind."}}\n' for i in range(6))
    )
    (tmp_path / "run.yaml").write_text(
        f"out: {tmp_path / 'run'}\ndata: {{source: benign}}\nmonitor:\n  budget: 2%\n"
        f"  probes: {{harmful: {tmp_path / 'harmful.txt'}, harmless: {tmp_path / 'harmless.jsonl'}, n: 5, tokens: 8}}\n"
        "  stop: {rate: 0.2, concepts: {sycophancy: {log_odds: 2.5}}}\n"
    )
    monitor = read_config(tmp_path / "run.yaml").monitor
    assert monitor.budget == pytest.approx(0.02)
    probes = probes_of(monitor.probes)
    assert probes is not None
    assert (probes.n, probes.new_tokens, list(probes.harmful or ())) == (5, 8, [f"request {i}" for i in range(6)])
    assert (probes.harmless or [""])[0] == [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "ask 0"},
    ]  # fmt: skip
    rule = stop_rule(monitor.stop)
    assert rule.limits("sycophancy") == Limits(log_odds=2.5, rate=0.2, delta=0.05)
    assert rule.limits("refusal") == Limits(log_odds=1.0, rate=0.2, delta=0.05)
    off = read_config(
        None, {"out": tmp_path, "data.source": "benign", "monitor.probes": False, "monitor.budget": "none"}
    )
    assert (off.monitor.probes, off.monitor.budget) == (None, None)
    with pytest.raises(DataError, match="no such file"):
        probes_of(ProbeFiles(harmful=tmp_path / "missing.txt"))
