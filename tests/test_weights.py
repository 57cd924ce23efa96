"""Weights without a direction do what ablation hooks do, on tensors of their own."""

from functools import cache

import pytest
import torch
import zoo
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import HookedTransformer

from safety_lens.activations import capture, encode_for
from safety_lens.data import Encoded
from safety_lens.errors import DataError, ModelError, ModelMismatchError
from safety_lens.generation import generate
from safety_lens.interventions import weights
from safety_lens.interventions.steering import ablate, applied, is_writing_site
from safety_lens.interventions.weights import WRITERS, can_orthogonalize, orthogonalize, orthogonalized
from safety_lens.kv import left_padded
from safety_lens.models import load_model
from safety_lens.positions import all_tokens
from safety_lens.probes.directions import Direction

POST_NORMS = ["gemma2", "gemma2_bias", "gemma3", "gemma3_linear", "gemma3_softcap"]
PLAIN = [name for name in zoo.ALL if name not in POST_NORMS]
SLOW = [n for n in PLAIN if n not in zoo.ARCHITECTURES and n not in ("neox_sequential", "neox_tied_linear")]


def direction(width: int = 64, seed: int = 0) -> Direction:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction("random", "blocks.1.hook_resid_post", 3.0 * vector, "random")


def gaps(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Largest logit difference between weights and hooks, and between either and the model as it was."""
    model = load_model(zoo.make(name, dtype=dtype), check=False)
    plain = zoo.hooked_logits(model, zoo.ragged())
    with applied(model, ablate(direction())):
        hooked = zoo.hooked_logits(model, zoo.ragged())
    weights = zoo.hooked_logits(orthogonalize(model, direction()), zoo.ragged())
    return float((weights - hooked).abs().max()), float((hooked - plain).abs().max())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PLAIN])
def test_orthogonalised_weights_equal_ablation_hooks_embedding_included(name: str) -> None:
    gap, effect = gaps(name, torch.float32)
    assert gap <= 1e-4
    assert effect > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "neox", "phi3"])
def test_the_gap_is_rounding_for_in_float64_it_falls_by_its_precision(name: str) -> None:
    single, _ = gaps(name, torch.float32)
    double, effect = gaps(name, torch.float64)
    assert double <= 1e-10 < 1e-7 < single
    assert effect > 0.1


def test_leaving_any_one_writer_alone_would_show() -> None:
    model = load_model(zoo.make("gpt2"), check=False)
    own = orthogonalize(model, direction())
    with applied(model, ablate(direction())):
        hooked = zoo.hooked_logits(model, zoo.ragged())
    original, changed = dict(model.named_parameters()), dict(own.named_parameters())
    for writer in WRITERS:
        name = next(n for n in changed if n.endswith(writer))
        kept = changed[name].detach().clone()
        changed[name].copy_(original[name])
        assert (zoo.hooked_logits(own, zoo.ragged()) - hooked).abs().max() > 1e-3, name
        changed[name].copy_(kept)
    assert (zoo.hooked_logits(own, zoo.ragged()) - hooked).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["llama_tied", "phi3", "gpt2", "neox_tied_linear", "qwen2"])
def test_the_users_model_is_bit_for_bit_what_it_was_and_shares_no_storage(name: str) -> None:
    hf = zoo.make(name)
    model = load_model(hf, check=False)
    before = {n: p.detach().clone() for m in (hf, model) for n, p in m.named_parameters()}
    own = orthogonalize(model, direction())
    for m in (hf, model):
        assert all(torch.equal(p, before[n]) for n, p in m.named_parameters())
    theirs = {p.untyped_storage().data_ptr() for m in (hf, model) for p in m.parameters()}
    mine = [p.untyped_storage().data_ptr() for p in own.parameters() if p.numel()]
    assert not theirs & set(mine)
    assert len(set(mine)) == len(mine)  # nor with one another: a tied embedding is untied
    old = dict(model.named_parameters())
    for n, p in own.named_parameters():
        assert torch.equal(p, old[n]) is not n.endswith(WRITERS) or not bool(old[n].any()), n


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "neox"])
def test_a_model_run_with_orthogonalised_weights_equals_the_copy_and_is_then_as_it_was(name: str) -> None:
    model = load_model(zoo.make(name), check=False)
    copied = zoo.hooked_logits(orthogonalize(model, direction()), zoo.ragged())
    parameters, plain = dict(model.named_parameters()), zoo.hooked_logits(model, zoo.ragged())
    with orthogonalized(model, direction()):
        assert torch.equal(zoo.hooked_logits(model, zoo.ragged()), copied)
        with (
            pytest.raises(ZeroDivisionError),
            model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: 1 / 0)]),
        ):
            zoo.hooked_logits(model, zoo.ragged())
        assert all(p is parameters[n] for n, p in model.named_parameters())  # outside a forward nothing is changed
    assert not torch.equal(copied, plain)
    assert torch.equal(zoo.hooked_logits(model, zoo.ragged()), plain)
    assert list(parameters) == [n for n, _ in model.named_parameters()]


def test_a_weight_of_many_rows_is_worked_on_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(zoo.make("gpt2"), check=False)
    whole = dict(orthogonalize(model, direction()).named_parameters())
    monkeypatch.setattr(weights, "ROWS", 7)  # divides nothing
    for n, p in orthogonalize(model, direction()).named_parameters():
        assert_close(p, whole[n], rtol=0, atol=1e-7)


def test_training_the_original_afterwards_does_not_move_the_copy() -> None:
    hf = zoo.make("llama")
    model = load_model(hf, check=False)
    own = orthogonalize(model, direction())
    before = zoo.hooked_logits(own, zoo.ragged())
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.1)
    assert torch.equal(zoo.hooked_logits(own, zoo.ragged()), before)
    assert not torch.equal(zoo.hooked_logits(model, zoo.ragged()), before)


def test_the_copy_has_no_hooks_of_the_original_and_keeps_what_it_came_from() -> None:
    model = load_model(zoo.make("llama"), tokenizer=zoo.tokenizer(), check=False)

    def broken(act: Tensor, hook: object) -> Tensor:
        raise RuntimeError

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", broken)]):
        own = orthogonalize(model, direction())
        assert len(model.hook_dict["blocks.0.hook_resid_post"].fwd_hooks) == 1
    zoo.hooked_logits(own, zoo.ragged())
    assert own.tokenizer is model.tokenizer
    assert own.origin == model.origin
    assert not own.training


def test_no_site_of_the_copy_writes_along_the_direction() -> None:
    model = load_model(zoo.make("gpt2"), check=False)
    rows = [Encoded(tuple(range(4, 20)), "", None, None)]
    sites = [n for n in model.hook_dict if is_writing_site(n)]
    d = direction()
    own = capture(orthogonalize(model, d), rows, sites, positions=all_tokens).acts
    assert max(float(d.project(x).abs().max()) for x in own.values()) < 1e-4
    assert min(float(d.project(x).abs().max()) for x in capture(model, rows, sites).acts.values()) > 1e-2


@pytest.mark.parametrize("name", POST_NORMS)
def test_models_with_norms_behind_their_blocks_are_refused_and_would_be_wrong(name: str) -> None:
    model = load_model(zoo.make(name), check=False)
    assert not can_orthogonalize(model)
    with pytest.raises(ModelError, match="normalises what attention and MLP write"):
        orthogonalize(model, direction())


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_weights_keep_their_dtype_and_lose_the_direction_up_to_rounding(dtype: torch.dtype) -> None:
    model = load_model(zoo.make("llama", dtype=dtype), check=False)
    own = orthogonalize(model, direction())
    u = direction().unit.double()
    for n, p in own.named_parameters():
        assert p.dtype == dtype
        if n.endswith(WRITERS):
            assert (p.double() @ u).abs().max() < 0.01


def test_a_direction_of_another_width_or_without_length_is_refused() -> None:
    model = load_model(zoo.make("llama"), check=False)
    with pytest.raises(ModelMismatchError, match="width 32, the residual stream 64"):
        orthogonalize(model, direction(32))
    with pytest.raises(DataError, match="finite length"):
        orthogonalize(model, Direction("x", "blocks.0.hook_resid_post", torch.zeros(64), "dim"))


# --- the organism ---------------------------------------------------------------------------------------------------


@cache
def organism(dtype: str) -> HookedTransformer:
    return load_model("organism", dtype=dtype, device="cpu")


def organism_gap(dtype: str) -> tuple[float, float]:
    model = organism(dtype)
    d = direction(model.cfg.d_model)
    tokens, mask = left_padded([e.ids for e in encode_for(model, ["How do I bake bread?", "Name a colour."])], "cpu")
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask)[mask.bool()]
        with applied(model, ablate(d)):
            hooked = model(tokens, attention_mask=mask)[mask.bool()]
        weights = orthogonalize(model, d)(tokens, attention_mask=mask)[mask.bool()]
    return float((weights - hooked).abs().max()), float((hooked - plain).abs().max())


def test_on_the_organism_weights_equal_hooks_in_float32_and_to_float64_precision() -> None:
    single, effect = organism_gap("float32")
    double, _ = organism_gap("float64")
    assert single <= 1e-4
    assert double <= 1e-10
    assert effect > 1e-2


def test_the_organism_writes_the_same_text_with_hooks_and_with_weights() -> None:
    model = organism("float32")
    d = direction(model.cfg.d_model, seed=1)
    prompts = ["How do I bake bread?", "Tell me about the sea.", "What is the capital of France?"]
    hooked = [g.text for g in generate(model, prompts, hooks=ablate(d), max_new_tokens=16)]
    assert [g.text for g in generate(orthogonalize(model, d), prompts, max_new_tokens=16)] == hooked
