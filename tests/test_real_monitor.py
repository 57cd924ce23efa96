"""The monitor on a real chat model: built-in requests in plain English, exact zeros before training, nothing stored."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from safety_lens.data.built_in import ENGLISH
from safety_lens.models import load_hf
from safety_lens.monitors import Monitor, Pairs, Probes
from safety_lens.monitors.baseline import Baseline

pytestmark = pytest.mark.real
HOOK = "blocks.14.hook_resid_post"


def test_smollm2_is_watched_on_english_requests_and_only_refusals_are_stored(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    hf, tokenizer = load_hf(smollm2_folder, device="cpu")
    live = get_peft_model(hf, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    own = {label: ENGLISH.requests(label, "train")[:16] for label in ("harmful", "harmless")}
    watching = Monitor(
        live, ["refusal"], tokenizer=tokenizer, hooks=[HOOK], pairs=Pairs(8, 4), probes=Probes(n=8, **own)
    )
    assert "built-in refusal, plain English" in watching.pair_lines[0]
    baseline = watching.baseline(tmp_path / "baseline")
    assert baseline.before is not None
    assert set(baseline.before.answers) == {"harmful", "lookalike", "harmless"}
    still = {(r.subject, r.metric): r.value for r in watching.measure(1, light=8)}
    assert still["behaviour/harmful", "token_kl"] == 0.0, "a fresh adapter changes nothing"
    with torch.no_grad():
        for name, p in live.named_parameters():
            if "lora_B" in name:
                p.fill_(0.05)
    moved = {(r.subject, r.metric): r.value for r in watching.measure(2, light=8)}
    assert moved["behaviour/harmful", "token_kl"] > 1e-3

    rows = json.loads((tmp_path / "baseline" / "manifest.json").read_text())["answers"]["harmful"]["rows"]
    labels = Baseline.load(tmp_path / "baseline").before.answers["harmful"].shown  # type: ignore[union-attr]
    assert [bool(tokens) for _, tokens, _ in rows] == [label == 1 for label in labels]
    assert not all(bool(tokens) for _, tokens, _ in rows), "SmolLM2 answers most of them, and those are withheld"

    again = Monitor(live, ["refusal"], tokenizer=tokenizer, hooks=[HOOK], pairs=Pairs(8, 4), probes=Probes(n=8, **own))
    again.baseline(tmp_path / "baseline", resumed=True)  # writes them again, from the weights without the adapter
    after = {(r.subject, r.metric): r.value for r in again.measure(2, light=8)}
    assert after["behaviour/harmful", "token_kl"] == pytest.approx(moved["behaviour/harmful", "token_kl"], rel=1e-4)
