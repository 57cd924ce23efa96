"""Gradients of every example from batched passes: parity with Hugging Face's own autograd, one example at a time."""

import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from safety_lens.errors import DataError, HookNameError, ModelError
from safety_lens.forced import Continuation
from safety_lens.loading.homes import homes
from safety_lens.models import load_model
from safety_lens.probes.gradients import Predictions, Seen, SeenPoint, example_gradients, response_nll_sum
from safety_lens.probes.matrices import as_map, as_parameter, matrices_of, named_matrix, parameter_of, weight_of

EXAMPLES = [
    Continuation((5, 6, 7), (8, 9)),
    Continuation((11, 3), (4, 5, 6, 7, 8)),
    Continuation((1, 2, 3, 4, 5, 6, 7), (20,)),
    Continuation((31, 32, 33, 34), (35, 36, 37)),
]


def hf_gradients(hf: torch.nn.Module, example: Continuation) -> tuple[float, dict[str, torch.Tensor]]:
    """Autograd on the Hugging Face model, batch 1, no padding."""
    hf.requires_grad_(True)
    hf.zero_grad()
    ids = torch.tensor([[*example.prompt, *example.tokens]])
    logits = hf(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
    loss = F.cross_entropy(logits, torch.tensor(example.tokens))
    loss.backward()
    grads = {name: p.grad.clone() for name, p in hf.named_parameters() if p.grad is not None}
    hf.zero_grad(set_to_none=True)
    hf.requires_grad_(False)
    return float(loss.detach()), grads


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_matrix_of_every_architecture_gets_the_gradient_that_hugging_face_computes(name: str) -> None:
    hf = zoo.make(name, dtype=torch.float64)
    model = load_model(hf, check=False)
    matrices, places = matrices_of(model), homes(hf)
    found: dict[tuple[str, int], torch.Tensor] = {}

    def see(seen: Seen) -> None:
        for number, gradient in zip(seen.examples.tolist(), seen.gradients(), strict=True):
            found[seen.matrix.name, number] = gradient

    losses = example_gradients(model, EXAMPLES, matrices, see, batch_size=3)
    assert set(places) == {m.name for m in matrices}
    assert len(found) == len(matrices) * len(EXAMPLES)
    for number, example in enumerate(EXAMPLES):
        loss, grads = hf_gradients(hf, example)
        assert losses[number] == pytest.approx(loss, rel=1e-6)  # transformers takes norms in float32
        for matrix in matrices:
            expected = places[matrix.name].take(grads[f"{places[matrix.name].module}.weight"])
            ours = found[matrix.name, number]
            assert (ours - expected).norm() <= 1e-5 * expected.norm() + 1e-12, (name, matrix.name)
            assert expected.norm() > 0


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_a_home_finds_the_weight_of_the_hooked_matrix_in_the_hugging_face_tree(name: str) -> None:
    hf = zoo.make(name)
    model = load_model(hf, check=False)
    modules = dict(hf.named_modules())
    for matrix in matrices_of(model):
        home = homes(hf)[matrix.name]
        module = modules[home.module]
        assert home.transposed == isinstance(module, Conv1D)
        assert torch.equal(home.take(module.weight.detach()), weight_of(model, matrix))
        scratch = torch.zeros_like(module.weight)
        home.put(scratch, weight_of(model, matrix))
        assert int((scratch != 0).sum()) == int((weight_of(model, matrix) != 0).sum())
        assert torch.equal(home.take(scratch), weight_of(model, matrix))


def test_homes_are_the_same_under_an_adapter_as_without_one() -> None:
    for name in ("phi3", "neox", "gpt2"):
        bare = homes(zoo.make(name))
        config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=name == "gpt2")
        live = get_peft_model(zoo.make(name), config)
        for matrix, home in homes(live).items():
            assert home.module == bare[matrix].module
            assert torch.equal(home.rows, bare[matrix].rows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_reading_as_a_linear_map_is_undone_by_writing_as_a_parameter(name: str) -> None:
    model = load_model(zoo.make(name), check=False)
    for matrix in matrices_of(model):
        parameter = parameter_of(model, matrix)
        assert torch.equal(as_parameter(as_map(parameter, matrix), matrix, model.cfg.d_head), parameter)


def test_padding_and_batching_do_not_change_an_examples_gradient() -> None:
    model = load_model(zoo.make("gemma2", dtype=torch.float64), check=False)
    alone: dict[tuple[str, int], torch.Tensor] = {}
    together: dict[tuple[str, int], torch.Tensor] = {}

    def into(store: dict[tuple[str, int], torch.Tensor], shift: int = 0) -> object:
        def see(seen: Seen) -> None:
            for number, gradient in zip(seen.examples.tolist(), seen.gradients(), strict=True):
                store[seen.matrix.name, number + shift] = gradient

        return see

    matrices = matrices_of(model)
    example_gradients(model, EXAMPLES, matrices, into(together), batch_size=4)
    for number, example in enumerate(EXAMPLES):
        example_gradients(model, [example], matrices, into(alone, number))
    worst = max(float((alone[key] - together[key]).norm() / alone[key].norm()) for key in alone)
    assert worst < 1e-10


def test_points_give_the_derivative_of_the_loss_by_finite_differences() -> None:
    model = load_model(zoo.make("llama", dtype=torch.float64), check=False)
    hook, seen = "blocks.1.mlp.hook_post", []
    example_gradients(model, EXAMPLES[:2], points=[hook], see_point=seen.append, loss=response_nll_sum, batch_size=1)
    point: SeenPoint = seen[0]
    unit = torch.zeros_like(point.value)
    unit[:, 1, 3] = 1e-4
    shifted = [
        example_gradients(model, [EXAMPLES[int(point.examples[0])]], loss=response_nll_sum, hooks=[(hook, edit)])[0]
        for edit in (lambda act, hook: act + unit, lambda act, hook: act - unit)
    ]
    assert (shifted[0] - shifted[1]) / 2e-4 == pytest.approx(float(point.grad[0, 1, 3]), rel=1e-4)


def test_the_model_is_left_as_found_also_when_a_callback_raises() -> None:
    model = load_model(zoo.make("llama"), check=False)
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()

    def stop(seen: Seen) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        example_gradients(model, EXAMPLES, matrices_of(model), stop)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    assert not hooks
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_matrices_are_seen_from_the_last_block_to_the_first_and_only_those_asked_for() -> None:
    model = load_model(zoo.make("llama"), check=False)
    order: list[int] = []
    example_gradients(model, EXAMPLES, matrices_of(model, ["W_out"]), lambda s: order.append(s.matrix.layer))
    assert order == sorted(order, reverse=True)
    assert set(order) == set(range(model.cfg.n_layers))


def test_a_gradient_that_is_not_finite_names_the_example() -> None:
    model = load_model(zoo.make("llama"), check=False)

    def loss(predictions: Predictions) -> torch.Tensor:
        bad = (predictions.examples == 2).to(predictions.logits.dtype)
        return predictions.summed(predictions.logits[:, 0]) * torch.where(bad > 0, torch.nan, 1.0)

    with pytest.raises(ModelError, match="example 2 has a loss that is not finite"):
        example_gradients(model, EXAMPLES, matrices_of(model), loss=loss)


def test_bad_input_is_named() -> None:
    model = load_model(zoo.make("gpt2"), check=False)
    with pytest.raises(DataError, match="no example"):
        example_gradients(model, [])
    with pytest.raises(DataError, match="example 0 has 0 prompt"):
        example_gradients(model, [Continuation((), (1,))])
    with pytest.raises(HookNameError, match="W_gate"):
        matrices_of(model, ["W_gate"])
    with pytest.raises(HookNameError, match="block 9"):
        matrices_of(model, layers=[9])
    with pytest.raises(HookNameError, match="no matrix named"):
        named_matrix(model, "blocks.0.attn.q_proj")
    with pytest.raises(HookNameError, match="not inside a block"):
        example_gradients(model, EXAMPLES, points=["hook_embed"])
