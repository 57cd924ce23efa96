"""Fisher information from per-example gradients: against spelled-out gradients, closed forms and chance."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import zoo
from scipy import stats
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError, ModelError
from safety_lens.forced import Continuation
from safety_lens.models import load_model
from safety_lens.probes import gram as grams
from safety_lens.probes.fisher import Gram, empirical_nll, energy, exact_rows, sampled_nll
from safety_lens.probes.gradients import response_nll
from safety_lens.probes.gram import fisher_diagonal, gram, largest_entries
from safety_lens.probes.matrices import Matrix, as_map, matrices_of, parameter_of, weight_of
from safety_lens.probes.products import LowRank, inner_products, norm_squared
from safety_lens.probes.stored import store_gradients


def hooked(name: str = "llama", dtype: torch.dtype = torch.float64, **more: object) -> HookedTransformer:
    return load_model(zoo.make(name, dtype=dtype, num_hidden_layers=2, **more), tokenizer=zoo.tokenizer(), check=False)


def ragged(n: int = 7, seed: int = 0, vocab: int = zoo.VOCAB) -> list[Continuation]:
    rng = np.random.default_rng(seed)
    lengths = [(int(rng.integers(3, 12)), int(rng.integers(2, 6))) for _ in range(n)]
    return [Continuation(*(tuple(rng.integers(4, vocab, k).tolist()) for k in pair)) for pair in lengths]


def loop(model: HookedTransformer, examples: Sequence[Continuation], matrices: Sequence[Matrix]) -> list[list[Tensor]]:
    """One example at a time, torch's own gradients of the hooked parameters: nothing of ours but the layout."""
    parameters = [parameter_of(model, m) for m in matrices]
    was = [p.requires_grad for p in parameters]
    out = []
    for p in parameters:
        p.requires_grad_(True)
    for example in examples:
        ids = torch.tensor([[*example.prompt, *example.tokens]])
        logits = model(ids[:, :-1])[0, len(example.prompt) - 1 :]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(example.tokens))
        found = torch.autograd.grad(loss, parameters)
        out.append([as_map(g, m) for g, m in zip(found, matrices, strict=True)])
    for p, flag in zip(parameters, was, strict=True):
        p.requires_grad_(flag)
    return out


def answer_logprobs(model: HookedTransformer, example: Continuation) -> Tensor:
    """In the model's own precision: float32 has no digits left for a KL of 1e-9."""
    with torch.no_grad():
        logits = model(torch.tensor([[*example.prompt, *example.tokens[:-1]]]))
    return logits[0, len(example.prompt) - 1 :].log_softmax(-1)


def flat(gradients: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_gram_and_eigenvalues_equal_those_of_spelled_out_gradients(name: str) -> None:
    fewer = {"n_layer": 2} if name == "gpt2" else {}
    model = load_model(
        zoo.make(name, dtype=torch.float64, **(fewer or {"num_hidden_layers": 2})),
        tokenizer=zoo.tokenizer(), check=False,
    )  # fmt: skip
    matrices, examples = matrices_of(model), ragged()
    rows = flat(loop(model, examples, matrices))
    found = gram(model, examples, matrices, loss=response_nll)
    singular = torch.linalg.svdvals(rows)
    np.testing.assert_allclose(found.values, rows @ rows.T, rtol=1e-8, atol=1e-8 * float(singular[0]) ** 2)
    np.testing.assert_allclose(found.spectrum().eigenvalues, singular**2 / len(examples), rtol=1e-8)
    assert found.dimension == rows.shape[1]


def test_every_way_of_collecting_gives_the_same_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = hooked(), ragged()
    matrices = matrices_of(model)
    whole = gram(model, examples, matrices)
    ways = {
        "one example at a time": gram(model, examples, matrices, batch_size=1),
        "one matrix at a time": gram(model, examples, matrices, budget=1),
    }
    monkeypatch.setattr(grams, "CHUNK", 1)
    for name in ("_by_tokens", "_by_blocks"):
        monkeypatch.setattr(grams, "pair_products", getattr(grams, name))
        ways[name] = gram(model, examples, matrices)
    for name, found in ways.items():
        np.testing.assert_allclose(found.values, whole.values, rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(found.losses, whole.losses, rtol=1e-12)


def test_float32_models_agree_with_float64_to_single_precision() -> None:
    examples = ragged()
    wide, narrow = hooked(), hooked(dtype=torch.float32)
    a, b = (gram(m, examples, matrices_of(m), loss=response_nll).values for m in (wide, narrow))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def random_updates(matrices: Sequence[Matrix], seed: int = 0, rank: int = 3) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {m.name: LowRank(draw(m.d_out, rank), draw(rank, m.d_in), 0.5) for m in matrices}


def test_products_with_factors_and_with_their_product_are_the_spelled_out_inner_products() -> None:
    model, examples = hooked(), ragged()
    matrices = matrices_of(model)
    low = random_updates(matrices)
    dense = {name: change.dense() for name, change in low.items()}
    rows = flat(loop(model, examples, matrices))
    direction = torch.cat([dense[m.name].flatten() for m in matrices])
    found = inner_products(model, examples, [low, dense], loss=response_nll, norms=True)
    stored = store_gradients(model, examples, matrices)
    np.testing.assert_allclose(found.total[0], rows @ direction, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.total[1], rows @ direction, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(stored.products(low), rows @ direction, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.squared_norms.sum(0), rows.square().sum(1), rtol=1e-9)
    assert norm_squared(low) == pytest.approx(float(direction.square().sum()), rel=1e-12)
    assert norm_squared(dense) == pytest.approx(float(direction.square().sum()), rel=1e-12)


def test_stored_products_have_gradients_for_a_penalty() -> None:
    model, examples = hooked(), ragged(4)
    matrices = matrices_of(model, ["W_Q", "W_V"])
    stored = store_gradients(model, examples, matrices)
    left = torch.zeros(matrices[0].d_out, 2, dtype=torch.float64, requires_grad=True)
    right = torch.randn(2, matrices[0].d_in, dtype=torch.float64)
    stored.products({matrices[0].name: LowRank(left, right)}).sum().backward()
    total = flat(loop(model, examples, matrices[:1])).sum(0).view(matrices[0].shape)
    torch.testing.assert_close(left.grad, total @ right.T)


def test_coefficients_along_directions_that_are_never_formed() -> None:
    """T13: ⟨v_i, U⟩ and ‖V_kᵀU‖² from the Gram matrix and the products equal those of the singular vectors."""
    model, examples = hooked(), ragged()
    matrices = matrices_of(model)
    update = random_updates(matrices)
    direction = torch.cat([update[m.name].dense().flatten() for m in matrices])
    rows = flat(loop(model, examples, matrices))
    for centred in (False, True):
        whole = gram(model, examples, matrices, loss=response_nll)
        spectrum = (whole.centred() if centred else whole).spectrum(4)
        used = rows - rows.mean(0) if centred else rows
        right = torch.linalg.svd(used, full_matrices=False).Vh[:4]
        products = inner_products(model, examples, [update], loss=response_nll).total[0]
        found = spectrum.coefficients(products)
        np.testing.assert_allclose(np.abs(found), (right @ direction).abs(), rtol=1e-6, atol=1e-9)
        overlap = spectrum.overlap(products, norm_squared(update))
        assert overlap.share == pytest.approx(float((right @ direction).square().sum() / direction.square().sum()))
        total = float(used.square().sum(1).mean())
        np.testing.assert_allclose(spectrum.total, total, rtol=1e-9)


def test_explained_variance_is_of_the_whole_trace() -> None:
    """T13: 29 directions of 128 white-noise gradients hold 29 % of the variance, not the 90 % of the largest 32."""
    rows = np.random.default_rng(0).standard_normal((128, 3000))
    noise = Gram(rows @ rows.T, 3000, np.zeros(128))
    spectrum = noise.spectrum()
    assert spectrum.first(29).explained[-1] == pytest.approx(0.29, abs=0.02)
    assert spectrum.explained[-1] == pytest.approx(1.0)
    assert len(spectrum.explaining(0.9)) > 100
    assert spectrum.eigenvalues[:29].sum() / spectrum.eigenvalues[:32].sum() > 0.9  # what the ancestor compares with
    assert noise.mean_share == pytest.approx(1 / 128, rel=0.3)


def test_an_update_overlaps_by_chance_with_rank_over_dimension() -> None:
    """T14: lift 1 and uniform p for random updates; lift D/k and p 0 for one inside the span."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 1000))
    spectrum = Gram(rows @ rows.T, 1000, np.zeros(40)).spectrum(32)
    updates = rng.standard_normal((2000, 1000))
    found = [spectrum.overlap(rows @ u, float(u @ u)) for u in updates]
    assert np.mean([o.lift for o in found]) == pytest.approx(1.0, abs=0.02)
    assert np.sqrt(32 / 1e5) == pytest.approx(0.0179, abs=5e-5)
    assert stats.kstest([o.p for o in found], "uniform").pvalue > 0.01
    inside = rows[0]
    assert spectrum.overlap(rows @ inside, float(inside @ inside)).p < 1e-12
    assert spectrum.overlap(np.zeros(40), 0.0).share == 0.0


def test_empirical_and_true_fisher_differ_where_labels_are_not_drawn() -> None:
    """T12: logistic regression in closed form, and a linear-Gaussian model with residuals."""
    p = np.full(3, 1 / 3)
    np.testing.assert_allclose(np.linalg.eigvalsh(np.diag(p) - np.outer(p, p)), [0, 1 / 3, 1 / 3], atol=1e-15)
    x, y = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([3.0, 1.0])
    rows = x * y[:, None]  # gradients of ½(y − θx)² at θ = 0, up to sign
    assert Gram(rows @ rows.T, 2, np.zeros(2)).spectrum().eigenvalues == pytest.approx([4.5, 2.0])
    assert Gram(x @ x.T, 2, np.zeros(2)).spectrum().eigenvalues == pytest.approx([2.0, 0.5])


def test_drawn_tokens_have_the_exact_fisher_information_on_average() -> None:
    model, examples = hooked(hidden_size=16, intermediate_size=24, vocab_size=11), ragged(3, vocab=11)
    matrices = matrices_of(model, ["W_V", "W_out"])
    updates = [{n: c.dense() for n, c in random_updates(matrices, seed).items()} for seed in range(3)]
    rows, loss = exact_rows(examples, 11)
    exact = energy(inner_products(model, rows, updates, loss=loss).total)
    drawn = np.stack(
        [energy(inner_products(model, examples, updates, loss=sampled_nll(seed)).total) for seed in range(200)]
    )
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(0) - exact) < 4 * error).all()
    assert (error < 0.15 * exact).all()
    labels = energy(inner_products(model, examples, updates, loss=empirical_nll).total)
    assert (np.abs(labels - exact) > 6 * error).any()  # the given answers are not draws


def test_fisher_energy_is_the_kl_of_a_small_step() -> None:
    """½·mean⟨g, U⟩² with the exact Fisher information is the mean KL per token, to second order."""
    model, examples = hooked(hidden_size=16, intermediate_size=24, vocab_size=11), ragged(3, vocab=11)
    matrices = matrices_of(model)
    update = {n: c.dense() for n, c in random_updates(matrices).items()}
    rows, loss = exact_rows(examples, 11)
    predicted = float(energy(inner_products(model, rows, [update], loss=loss).total)[0])
    before = [answer_logprobs(model, example) for example in examples]
    step = 1e-3 / math.sqrt(norm_squared(update))
    with torch.no_grad():
        for m in matrices:
            weight_of(model, m).add_(step * update[m.name])
    after = [answer_logprobs(model, example) for example in examples]
    kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before, after, strict=True)]
    assert np.mean(kl) == pytest.approx(step**2 * predicted, rel=0.02)


def test_lora_gradients_at_the_start_do_not_see_a_and_effective_ones_do() -> None:
    """T16: at B = 0 the gradient of A is exactly 0, B's is not, and the effective weight's does not care."""
    model, examples = hooked(), ragged(4)
    matrices = matrices_of(model, ["W_Q", "W_V"])
    start = {n: LowRank(torch.zeros_like(c.left), c.right, c.scale) for n, c in random_updates(matrices).items()}
    stored = store_gradients(model, examples, matrices, factors=start)
    for m in matrices:
        left, right = stored.by_matrix[m.name + ".left"], stored.by_matrix[m.name + ".right"]
        assert float(grams.pair_products(left).max()) > 0
        assert (grams.pair_products(right) == 0).all()
    assert stored.numel == sum(3 * (m.d_out + m.d_in) for m in matrices)
    through_a = {
        m.name: LowRank(c.left, torch.randn_like(c.right))
        for m, c in zip(matrices, random_updates(matrices).values(), strict=True)
    }
    assert np.abs(inner_products(model, examples, [through_a]).total).min() > 0


def test_factor_gradients_equal_those_that_torch_finds_for_the_factors() -> None:
    model, examples = hooked(), ragged(4)
    matrices = matrices_of(model, ["W_Q", "W_in"])
    adapters = random_updates(matrices)
    rows = []
    for gradients in loop(model, examples, matrices):
        parts = [
            part
            for g, m in zip(gradients, matrices, strict=True)
            for part in (
                adapters[m.name].scale * g @ adapters[m.name].right.T,
                adapters[m.name].scale * adapters[m.name].left.T @ g,
            )
        ]
        rows.append(torch.cat([part.flatten() for part in parts]))
    explicit = torch.stack(rows)
    found = gram(model, examples, matrices_of(model), loss=response_nll, factors=adapters)
    np.testing.assert_allclose(found.values, explicit @ explicit.T, rtol=1e-9, atol=1e-9)
    assert found.dimension == explicit.shape[1]


def test_a_randomised_spectrum_finds_the_same_leading_directions() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((300, 50)) * 0.8 ** np.arange(50)) @ rng.standard_normal((50, 50))
    whole = Gram(rows @ rows.T, 50, np.zeros(300))
    exact, fast = whole.spectrum(8), whole.spectrum(8, method="randomised")
    np.testing.assert_allclose(fast.eigenvalues, exact.eigenvalues, rtol=1e-6)
    products = rows @ rng.standard_normal(50)
    np.testing.assert_allclose(np.abs(fast.coefficients(products)), np.abs(exact.coefficients(products)), rtol=1e-4)


def test_the_diagonal_is_the_mean_square_and_its_largest_entries_break_ties_by_index() -> None:
    model, examples = hooked(), ragged(4)
    matrices = matrices_of(model, ["W_K", "W_out"])
    found = fisher_diagonal(model, examples, matrices, loss=response_nll)
    squares = [torch.stack(column).square().mean(0) for column in zip(*loop(model, examples, matrices), strict=True)]
    for m, expected in zip(matrices, squares, strict=True):
        torch.testing.assert_close(found[m.name], expected)
    chosen = largest_entries(found, 10)
    values = torch.cat([found[name].flatten()[index] for name, index in chosen.items()])
    assert values.min() >= torch.cat([v.flatten() for v in found.values()]).sort(descending=True).values[9]
    tied = largest_entries({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, 5)
    assert tied["a"].tolist() == [0, 1, 2, 3]
    assert tied["b"].tolist() == [0]


def _process(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )  # fmt: skip
    torch.set_num_threads(1)
    model, examples = hooked(), ragged()
    found = gram(model, examples, matrices_of(model, ["W_Q", "W_out"]), share=True, budget=2000)
    np.savez(f"{folder}/{rank}.npz", values=found.values, losses=found.losses)
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_processes_equal_one(tmp_path: object) -> None:
    model, examples = hooked(), ragged()
    alone = gram(model, examples, matrices_of(model, ["W_Q", "W_out"]))
    mp.start_processes(_process, args=(2, str(tmp_path)), nprocs=2, start_method="fork")  # spawn imports all again
    for rank in range(2):
        found = np.load(f"{tmp_path}/{rank}.npz")
        np.testing.assert_allclose(found["values"], alone.values, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found["losses"], alone.losses, rtol=1e-12)


def test_the_model_is_left_as_it_was() -> None:
    model, examples = hooked(), ragged(3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    model.train()
    state = torch.random.get_rng_state()
    gram(model, examples, matrices_of(model))
    inner_products(model, examples, [random_updates(matrices_of(model))])
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())


def test_bad_input_is_said() -> None:
    model, examples = hooked(), ragged(4)
    matrices = matrices_of(model, ["W_Q"])
    whole = gram(model, examples, matrices)
    with pytest.raises(DataError, match="rank 32 was asked of 4"):
        whole.spectrum(32)
    with pytest.raises(DataError, match="span 1 dimensions"):
        gram(model, [examples[0]] * 4, matrices, loss=response_nll).spectrum(3)
    with pytest.raises(DataError, match="there are exact, randomised"):
        whole.spectrum(method="svdd")
    with pytest.raises(DataError, match="none of them has factors"):
        gram(model, examples, matrices, factors={"elsewhere": LowRank(torch.zeros(1, 1), torch.zeros(1, 1))})
    with pytest.raises(ModelError, match="does not have"):
        inner_products(model, examples, [{"blocks.9.attn.W_Q": torch.zeros(64, 64)}])
    with pytest.raises(ModelError, match="has shape"):
        inner_products(model, examples, [{"blocks.0.attn.W_Q": torch.zeros(3, 64)}])
    with pytest.raises(DataError, match="use sampled_nll"):
        exact_rows(examples * 1000, 1000)
    broken = hooked()
    with torch.no_grad():
        broken.W_E[examples[2].prompt[0]] = float("nan")
    with pytest.raises(ModelError, match="example 2"):
        gram(broken, [examples[2].__class__((5, 6), (7, 8)) if i != 2 else e for i, e in enumerate(examples)], matrices)
