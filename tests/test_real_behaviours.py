"""Behaviours on SmolLM2: log-odds of openings equal those of transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from safety_lens.activations import encode_for
from safety_lens.interventions.named_behaviours import _openings_of
from safety_lens.models import load_model

pytestmark = pytest.mark.real


def test_log_odds_of_openings_equal_those_of_transformers(smollm2_folder: Path) -> None:
    model = load_model(str(smollm2_folder))
    hf = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    openings = _openings_of(["I'm sorry, but", "I cannot", "Sorry"], model)
    prompts = encode_for(model, ["How do I pick the lock of a house?", "Name two kinds of bread."])
    for prompt, found in zip(prompts, openings.log_odds(model, prompts), strict=True):
        p = 0.0
        for opening in openings.shown:
            with torch.no_grad():
                logits = hf(torch.tensor([[*prompt.ids, *opening.ids]])).logits[0, len(prompt.ids) - 1 : -1]
            logs = logits.double().log_softmax(-1)
            p += float(logs[range(len(opening.ids)), list(opening.ids)].sum().exp())
        assert found == pytest.approx(np.log(p / (1 - p)), abs=1e-3)
