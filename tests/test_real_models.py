"""Real chat models, from GGUF: what is loaded, captured and generated equals transformers' own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from safety_lens.activations import capture
from safety_lens.artifacts import fingerprint
from safety_lens.data.chat import encode
from safety_lens.generation import generate
from safety_lens.models import hooks_at, load_hf, load_model

PROMPTS = ("What is the capital of France?", "Write a short poem about 3 rivers, please.", "Name 12 fruits.")


class Pair:
    """The same file loaded by transformers and by us."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.hf: PreTrainedModel = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        self.ours: HookedTransformer = load_model(file)

    def ids(self, prompt: str) -> Tensor:
        message = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def logits_of(model: PreTrainedModel | HookedTransformer, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        out = model(ids)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def check_logits(pair: Pair) -> None:
    """Largest gap to transformers' own load: 1e-5 through its model class, 1e-5 of the logits' size through ours."""
    plain, _ = load_hf(pair.file)
    for prompt in PROMPTS:
        with torch.inference_mode():
            ids = pair.ids(prompt)
            theirs = pair.hf(ids).logits
            assert_close(plain(ids).logits, theirs, rtol=0, atol=1e-5)
            assert float((pair.ours(ids) - theirs).abs().max() / theirs.square().mean().sqrt()) < 1e-5


@pytest.fixture(scope="module")
def small(smollm2: Path) -> Pair:
    return Pair(smollm2)


@pytest.mark.real
def test_weights_are_transformers_own_to_the_last_bit(small: Pair) -> None:
    mine = {name: p for name, p in small.ours.named_parameters() if name.endswith("mlp.W_in")}
    for n, layer in enumerate(small.hf.model.layers):
        assert torch.equal(mine[f"blocks.{n}.mlp.W_in"], layer.mlp.up_proj.weight.T)
    assert torch.equal(small.ours.W_E, small.hf.model.embed_tokens.weight)
    assert torch.equal(small.ours.W_U, small.hf.lm_head.weight.T)


@pytest.mark.real
def test_logits_equal_transformers_own_load(small: Pair) -> None:
    check_logits(small)


@pytest.mark.real
def test_prompts_are_tokenised_as_transformers_does_it_with_the_template_of_the_file(small: Pair) -> None:
    for prompt in PROMPTS:
        ours = encode([prompt], small.ours.tokenizer)[0]
        assert list(ours.ids) == small.ids(prompt)[0].tolist()


@pytest.mark.real
def test_the_fingerprint_names_the_quantisation(small: Pair) -> None:
    assert fingerprint(small.ours)["quantization"] == "Q4_1"
    assert fingerprint(small.ours)["name"] == str(small.file)


@pytest.mark.real
def test_captured_activations_are_hidden_states(small: Pair) -> None:
    hooks = hooks_at(small.ours, "resid_post")[:-1]  # transformers' last hidden state has passed the final norm
    read = capture(small.ours, PROMPTS, hooks)
    for n, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            states = small.hf(small.ids(prompt), output_hidden_states=True).hidden_states
        for layer, hook in enumerate(hooks):
            theirs = states[layer + 1][0, -1]
            assert float((read.acts[hook][n] - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.real
def test_greedy_answers_are_transformers_own(small: Pair) -> None:
    answers = generate(small.ours, list(PROMPTS), max_new_tokens=24)
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        ids = small.ids(prompt)
        with torch.inference_mode():
            whole = small.hf.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        theirs = small.tokenizer.decode(whole, skip_special_tokens=True)
        assert answer.text == theirs
        assert len(theirs.split()) > 3


@pytest.mark.real
def test_a_converted_folder_has_the_same_weights(small: Pair, smollm2_folder: Path) -> None:
    kept = load_model(smollm2_folder, check=False)
    assert fingerprint(kept)["weights_sha256"] == fingerprint(small.ours)["weights_sha256"]
    assert kept.origin.quantization == "Q4_1"
    assert (smollm2_folder / "model.safetensors").stat().st_size < 0.55e9  # the embedding is stored once


def doctor(model: Path) -> None:
    code = "from safety_lens.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--model", str(model), "--json"], capture_output=True, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert len(rows) >= 12
    assert all(row["metric"] for row in rows)


@pytest.mark.real
def test_doctor_finds_nothing_wrong(smollm2_folder: Path) -> None:
    doctor(smollm2_folder)


@pytest.mark.real_large
def test_the_larger_model_has_transformers_logits_and_an_untied_head(qwencoder: Path) -> None:
    pair = Pair(qwencoder)
    assert fingerprint(pair.ours)["quantization"] == "Q4_K_M"
    embedding, head = pair.hf.model.embed_tokens.weight, pair.hf.lm_head.weight
    distance = float((embedding - head).norm() / head.norm())
    assert np.isfinite(distance)
    assert distance > 1e-3  # quantised apart, they differ: tying them would change the model
    plain, _ = load_hf(qwencoder)
    for prompt in PROMPTS:
        with torch.inference_mode():
            assert_close(plain(pair.ids(prompt)).logits, pair.hf(pair.ids(prompt)).logits, rtol=0, atol=1e-5)
    del plain
    theirs = [logits_of(pair.hf.double(), pair.ids(prompt)) for prompt in PROMPTS]
    pair.hf.float()
    ours = load_model(qwencoder, dtype=torch.float64, check=False)
    for prompt, expected in zip(PROMPTS, theirs, strict=True):  # in float32, rounding alone gives 1.7e-5
        gap = (logits_of(ours, pair.ids(prompt)) - expected).abs().max()
        assert float(gap / expected.square().mean().sqrt()) < 1e-5  # transformers keeps its rotary tables in float32


@pytest.mark.real_large
def test_doctor_finds_nothing_wrong_with_the_larger_model(qwencoder_folder: Path) -> None:
    doctor(qwencoder_folder)
