"""Edits: what each op does in closed form, and that hooks do to a model what was asked and nothing else."""

from functools import cache
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from safety_lens.activations import capture
from safety_lens.data import Encoded
from safety_lens.errors import DataError, HookNameError, ModelError, ModelMismatchError
from safety_lens.generation import generate
from safety_lens.interventions.edits import Ablate, Add, Affine, Clamp, Edit, unit_of
from safety_lens.interventions.scopes import scope_named
from safety_lens.interventions.steering import ablate, affine, applied, clamp, is_writing_site, steer
from safety_lens.loading.architectures import blocks_of
from safety_lens.models import hooks_at, load_model, named_hooks
from safety_lens.positions import all_tokens
from safety_lens.probes.directions import Direction

MIDDLE = "blocks.1.hook_resid_post"


@cache
def pair(name: str) -> tuple[PreTrainedModel, HookedTransformer]:
    hf = zoo.make(name)
    return hf, load_model(hf, tokenizer=zoo.tokenizer(), check=False)


def direction(seed: int = 0, width: int = 64, norm: float = 8.0, hook: str = MIDDLE) -> Direction:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction("random", hook, vector / vector.norm() * norm, "random")


def acts(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def prompts(lengths: tuple[int, ...] = (3, 17, 9, 26, 5), seed: int = 0) -> list[Encoded]:
    g = torch.Generator().manual_seed(seed)
    rows = [tuple(torch.randint(4, zoo.VOCAB, (n,), generator=g).tolist()) for n in lengths]
    return [Encoded(ids=ids, text="", instruction=None, answer=None) for ids in rows]


def logits_of(model: HookedTransformer, hooks: Any = ()) -> Tensor:
    with applied(model, list(hooks)):
        return zoo.hooked_logits(model, zoo.ragged())


# --- the ops, in closed form ----------------------------------------------------------------------------------------


def test_adding_is_a_translation_and_its_opposite_takes_it_back() -> None:
    x, v = acts(), direction().vector
    assert_close(Add(v)(x) - x, v.double().expand_as(x))
    assert_close(Add(-v)(Add(v)(x)), x)


def test_ablation_removes_the_component_keeps_the_rest_and_changes_nothing_the_second_time() -> None:
    x, u = acts(), unit_of(direction().vector)
    once = Ablate(u)(x)
    assert (once @ u).abs().max() < 1e-14
    assert (x @ u).abs().max() > 0.5  # there was something to remove
    across = x - (x @ u)[..., None] * u
    assert_close(once, across)
    assert_close(Ablate(u)(once), once)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 2.0])
def test_graded_ablation_leaves_that_share_of_the_component(strength: float) -> None:
    x, u = acts(), unit_of(direction().vector)
    assert_close(Ablate(u, strength)(x) @ u, (1 - strength) * (x @ u))


def test_mirroring_twice_is_nothing() -> None:
    x, u = acts(), unit_of(direction().vector)
    assert_close(Ablate(u, 2.0)(Ablate(u, 2.0)(x)), x)


def test_clamp_moves_only_what_is_outside_and_only_along_the_direction() -> None:
    x, u = acts(), unit_of(direction().vector)
    out = Clamp(u, -0.3, 0.4)(x)
    assert_close(out @ u, (x @ u).clamp(-0.3, 0.4))
    assert_close(out - (out @ u)[..., None] * u, x - (x @ u)[..., None] * u)
    one_sided = Clamp(u, float("-inf"), 0.0)(x)
    assert_close(one_sided @ u, (x @ u).clamp(max=0.0))
    assert_close(Clamp(u, 1.5, 1.5)(x) @ u, torch.full((3, 5), 1.5, dtype=torch.float64))


def test_affine_maps_the_component_and_contains_the_other_ops() -> None:
    x, u = acts(), unit_of(direction().vector)
    assert_close(Affine(u, 0.5, 2.0)(x) @ u, 0.5 * (x @ u) + 2.0)
    assert_close(Affine(u, 0.0, 0.0)(x), Ablate(u)(x))
    assert_close(Affine(u, 1.0, 3.0)(x), Add(3.0 * u)(x))
    assert_close(Affine(u, 0.0, 1.5)(x), Clamp(u, 1.5, 1.5)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_are_rounded_once(dtype: torch.dtype) -> None:
    x, d = acts(dtype), direction()
    u = unit_of(d.vector)
    for op in (Add(d.vector), Ablate(u), Clamp(u, -0.1, 0.1), Affine(u, 0.5, 1.0)):
        exact, found = op(x.double()), op(x)
        assert found.dtype == dtype
        # one rounding of the float32 result: within half a unit in the last place of the true value, but for the
        # few values that lie on the fence
        assert (found == exact.to(dtype)).float().mean() > 0.995


def test_an_edit_returns_a_new_tensor_and_leaves_its_input() -> None:
    x = acts(torch.float32)
    before = x.clone()
    for fn in (Edit(Add(direction().vector)), Edit(Ablate(unit_of(direction().vector)))):
        assert fn(x).data_ptr() != x.data_ptr()
        assert torch.equal(x, before)


def test_a_gate_chooses_tokens_by_their_activations_and_a_watch_is_told_which() -> None:
    x, u = acts(torch.float32), unit_of(direction().vector)
    seen: list[tuple[Tensor, Tensor]] = []
    edit = Edit(Ablate(u), gate=lambda a: a @ u.to(a) > 0).watched(lambda frame, a, touched: seen.append((a, touched)))
    out = edit(x)
    along = x @ u.to(x)
    assert_close(out @ u.to(x), along.clamp(max=0.0), atol=1e-6, rtol=0)
    ((given, touched),) = seen
    assert torch.equal(given, x)
    assert torch.equal(touched, along > 0)
    assert 0 < int(touched.sum()) < touched.numel()


@pytest.mark.parametrize("vector", [torch.zeros(4), torch.full((4,), float("nan")), torch.tensor([1.0, float("inf")])])
def test_a_direction_without_length_is_refused(vector: Tensor) -> None:
    d = Direction("x", MIDDLE, vector, "dim")
    for make in (steer, ablate, lambda d: clamp(d, 0.0, 1.0), lambda d: affine(d, 1.0, 0.0)):
        with pytest.raises(DataError, match="finite length above 0"):
            make(d)


@pytest.mark.parametrize(
    "make",
    [
        lambda d: steer(d, float("nan")),
        lambda d: steer(d, float("inf")),
        lambda d: steer(d, 1.0, units=float("nan")),
        lambda d: ablate(d, float("nan")),
        lambda d: affine(d, float("nan"), 0.0),
        lambda d: affine(d, 1.0, float("inf")),
    ],
)
def test_strengths_that_are_no_numbers_are_refused(make: Any) -> None:
    with pytest.raises(DataError, match="must be a finite number"):
        make(direction())


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("nan"))])
def test_clamp_limits_in_the_wrong_order_are_refused(low: float, high: float) -> None:
    with pytest.raises(DataError, match="low <= high"):
        clamp(direction(), low, high)


def test_units_give_the_unit_vector_that_length() -> None:
    d = direction(norm=3.0)
    ((_, raw),) = steer(d, 2.0)
    ((_, unit),) = steer(d, 2.0, units=5.0)
    assert isinstance(raw, Edit)
    assert isinstance(unit, Edit)
    assert_close(float(raw.op.vector.norm()), 6.0)
    assert_close(float(unit.op.vector.norm()), 10.0)


# --- on models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*zoo.ARCHITECTURES, "neox_sequential", "qwen2_window"])
def test_strength_zero_is_bit_for_bit_no_hook(name: str) -> None:
    _, model = pair(name)
    d = direction()
    plain = zoo.hooked_logits(model, zoo.ragged())
    for hooks in (steer(d, 0.0, at=hooks_at(model)), ablate(d, 0.0), affine(d, 1.0, 0.0, at=hooks_at(model))):
        assert torch.equal(logits_of(model, hooks), plain)
    assert not torch.equal(logits_of(model, steer(d)), plain)


def torch_hooked_logits(hf: PreTrainedModel, layer: int, change: Any) -> Tensor:
    """The HF model with a plain torch hook on one block's output: no code of ours."""

    def hook(module: object, inputs: object, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = blocks_of(hf)[layer].register_forward_hook(hook)
    try:
        return zoo.hf_logits(hf, zoo.ragged())
    finally:
        handle.remove()


@pytest.mark.parametrize("name", [*zoo.ALL])
def test_steering_and_ablating_at_a_block_equal_a_plain_torch_hook_on_the_hugging_face_model(name: str) -> None:
    hf, model = pair(name)
    d = direction()
    last = model.cfg.n_layers - 1
    for layer in (1, last):
        at = f"blocks.{layer}.hook_resid_post"
        theirs = torch_hooked_logits(hf, layer, lambda out: out + 1.5 * d.vector)
        assert_close(logits_of(model, steer(d, 1.5, at=at)), theirs, atol=1e-4, rtol=0)
        u = d.vector / d.vector.norm()
        theirs = torch_hooked_logits(hf, layer, lambda out, u=u: out - (out @ u)[..., None] * u)
        assert_close(logits_of(model, ablate(d, at=at)), theirs, atol=1e-4, rtol=0)
    assert (zoo.hf_logits(hf, zoo.ragged()) - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("name", [*zoo.ARCHITECTURES, "neox_sequential"])
def test_ablation_leaves_nothing_along_the_direction_at_any_writing_site(name: str) -> None:
    _, model = pair(name)
    d = direction()
    sites = [n for n in model.hook_dict if is_writing_site(n)]
    n = model.cfg.n_layers
    assert len(sites) == 3 * n + 1  # the embedding; attention, MLP and output of every block
    left = capture(model, prompts(), sites, edits=ablate(d), positions=all_tokens).acts
    found = capture(model, prompts(), sites, positions=all_tokens).acts
    for site in sites:
        assert d.project(left[site]).abs().max() <= 1e-5 * found[site].norm(dim=1).max(), site
        assert d.project(found[site]).abs().max() > 1e-2, site


def test_what_is_read_at_a_hook_is_what_was_added_there() -> None:
    _, model = pair("qwen3")
    d = direction()
    plain = capture(model, prompts(), [MIDDLE], positions=all_tokens).acts[MIDDLE]
    steered = capture(model, prompts(), [MIDDLE], positions=all_tokens, edits=steer(d, 0.5)).acts[MIDDLE]
    assert_close(steered - plain, (0.5 * d.vector).expand_as(plain), atol=1e-4, rtol=0)


def test_interventions_compose_in_their_order() -> None:
    _, model = pair("llama")
    d, r = direction(), direction(seed=1)
    with applied(model, steer(d), ablate(r, at=MIDDLE)):
        added_first = capture(model, prompts(), [MIDDLE]).acts[MIDDLE]
    with applied(model, ablate(r, at=MIDDLE), steer(d)):
        removed_first = capture(model, prompts(), [MIDDLE]).acts[MIDDLE]
    assert r.project(added_first).abs().max() < 1e-4
    assert_close(r.project(removed_first), (d.vector @ r.unit).expand(len(removed_first)), atol=1e-4, rtol=0)


# --- names, widths --------------------------------------------------------------------------------------------------


def test_a_filter_of_names_is_the_names_it_lets_through() -> None:
    _, model = pair("llama")
    d = direction()

    def every_block(name: str) -> bool:
        return name.endswith("hook_resid_post")

    edit = ablate(d)[0][1]
    assert [name for name, _ in named_hooks(model, [(every_block, edit)])] == hooks_at(model)
    assert torch.equal(logits_of(model, [(every_block, edit)]), logits_of(model, ablate(d, at=hooks_at(model))))
    with pytest.raises(HookNameError, match="passes the filter no_hook"):
        named_hooks(model, [(no_hook, edit)])


def no_hook(name: str) -> bool:
    return False


@pytest.mark.parametrize("name", ["blocks.9.hook_resid_post", "blocks.1.hook_resid_pots", "blocks.1.attn.hook_result"])
def test_hooks_that_do_not_exist_or_would_never_fire_are_refused_everywhere(name: str) -> None:
    _, model = pair("llama")
    hooks = steer(direction(), at=name)
    with pytest.raises(HookNameError), applied(model, hooks):
        pass
    with pytest.raises(HookNameError):
        generate(model, prompts(), hooks=hooks, max_new_tokens=1)
    with pytest.raises(HookNameError):
        capture(model, prompts(), [MIDDLE], edits=hooks)


def test_a_direction_of_another_width_is_refused_by_name_wherever_it_is_used() -> None:
    _, model = pair("llama")
    narrow = steer(direction(width=32))
    with pytest.raises(ModelMismatchError, match=r"width 32.*64"), applied(model, narrow):
        pass
    with pytest.raises(ModelMismatchError, match=r"width 32.*blocks.1.hook_resid_post have 64"):
        generate(model, prompts(), hooks=narrow, max_new_tokens=1)
    with pytest.raises(ModelMismatchError, match="another kind of hook"):
        generate(model, prompts(), hooks=steer(direction(), at="blocks.1.mlp.hook_post"), max_new_tokens=1)


def test_heads_are_edited_as_one_flat_vector() -> None:
    _, model = pair("llama")
    at = "blocks.1.attn.hook_z"
    d = direction(hook=at)
    plain, steered = (capture(model, prompts(), [at], edits=e).acts[at] for e in ((), steer(d)))
    assert_close(steered - plain, d.vector.expand_as(plain), atol=1e-5, rtol=0)


def test_edits_refuse_attention_patterns() -> None:
    _, model = pair("llama")
    with pytest.raises(ModelError, match="edits work at hooks with"):
        generate(model, prompts(), hooks=steer(direction(), at="blocks.1.attn.hook_pattern"), max_new_tokens=1)


# --- nothing is left behind -----------------------------------------------------------------------------------------


def test_hooks_rng_gradients_and_modes_are_left_as_found_even_after_an_error() -> None:
    hf, model = pair("gpt2")
    d = direction()

    def mine(act: Tensor, hook: object) -> None:
        return None

    def broken(act: Tensor, hook: object) -> Tensor:
        raise RuntimeError("an edit failed")

    def state() -> list[Any]:
        hooks = [len(h.fwd_hooks) + len(h.bwd_hooks) + len(h._forward_hooks) for h in model.hook_dict.values()]
        grads = [(p.requires_grad, p.grad is None) for m in (hf, model) for p in m.parameters()]
        modes = [m.training for m in (*hf.modules(), *model.modules())]
        return [hooks, grads, modes, model.context_level, torch.get_rng_state().tolist(), torch.is_grad_enabled()]

    with model.hooks(fwd_hooks=[(MIDDLE, mine)]):
        before = state()
        with applied(model, steer(d), ablate(d)):
            generate(model, prompts(), max_new_tokens=2, temperature=1.0)
        assert state() == before
        with pytest.raises(RuntimeError, match="an edit failed"), applied(model, ablate(d)):
            generate(model, prompts(), hooks=[*steer(d), (MIDDLE, broken)], max_new_tokens=2)
        with pytest.raises(ZeroDivisionError), applied(model, steer(d)):
            _ = 1 / 0
        assert state() == before
    assert sum(state()[0]) == 0


def test_a_model_in_training_mode_stays_in_it() -> None:
    model = load_model(zoo.make("llama"), check=False).train()
    generate(model, prompts(), hooks=steer(direction()), max_new_tokens=2)
    assert model.training


@pytest.mark.parametrize("text", ["nowhere", "from:", "from:x", "ALL"])
def test_unknown_scopes_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(DataError, match=r"choose all, prompt, generated, answer or from:INDEX"):
        scope_named(text)
