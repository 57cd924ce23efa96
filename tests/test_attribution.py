"""Attribution: every score against a plain loop, an identity of the maths, or a closed form; and what must not work."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import zoo
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from safety_lens.errors import DataError, HookNameError, ModelError, ModelMismatchError
from safety_lens.forced import Continuation
from safety_lens.loading.components import _Normed
from safety_lens.loading.homes import homes
from safety_lens.models import load_model
from safety_lens.probes.attribution import (
    Scores,
    aggregated,
    attribute_neurons,
    change_scores,
    merge_scores,
    scored_across_processes,
    snip_scores,
    wanda_scores,
)
from safety_lens.probes.attribution.ranks import (
    input_moments,
    output_directions,
    safety_directions,
    without_bottom,
    without_top,
)
from safety_lens.probes.attribution.weights import add_absolute
from safety_lens.probes.matrices import as_map as in_linear_layout
from safety_lens.probes.matrices import matrices_of, parameter_of, weight_of

FAMILIES = ("llama", "gpt2", "gemma2")  # llama: two query heads on each key-value head


def ragged(n: int = 7, seed: int = 0, vocab: int = zoo.VOCAB) -> list[Continuation]:
    """Examples whose prompts and responses all differ in length, so that every batch is padded."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, vocab, (length,), generator=generator).tolist())

    return [Continuation(ids(3 + 2 * i % 9), ids(1 + 3 * i % 7)) for i in range(n)]


def hooked(name: str = "llama", dtype: torch.dtype = torch.float64, **more: Any) -> HookedTransformer:
    return load_model(zoo.make(name, dtype=dtype, **more), check=False)


def per_example(model: HookedTransformer, examples: Sequence[Continuation]) -> list[dict[str, Tensor]]:
    """Gradients by autograd, one example and one backward pass at a time, on the model's own parameters."""
    found = []
    for row in examples:
        parameters = {m.name: parameter_of(model, m).requires_grad_() for m in matrices_of(model)}
        tokens = torch.tensor([[*row.prompt, *row.tokens]])
        logits = model(tokens[:, :-1])[0, len(row.prompt) - 1 :]
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, len(row.prompt) :])
        grads = torch.autograd.grad(loss, list(parameters.values()))
        found.append({m.name: in_linear_layout(g, m) for m, g in zip(matrices_of(model), grads, strict=True)})
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return found


def loop_snip(model: HookedTransformer, examples: Sequence[Continuation]) -> dict[str, Tensor]:
    grads = per_example(model, examples)
    return {
        m.name: torch.stack([(weight_of(model, m) * g[m.name]).abs() for g in grads]).mean(0)
        for m in matrices_of(model)
    }


def gap(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference in a matrix, relative to the largest score in it."""
    assert mine.keys() == theirs.keys()
    return max(float((mine[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in theirs)


# --- SNIP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_hooked_snip_of_padded_batches_equals_a_loop_over_examples(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, examples = hooked(name, dtype), ragged()
    assert gap(snip_scores(model, examples, batch_size=4).values, loop_snip(model, examples)) <= tolerance


@pytest.mark.parametrize("name", [*FAMILIES, "phi3", "neox", "qwen3"])
def test_snip_equals_gradients_of_the_hugging_face_model(name: str) -> None:
    """Independent of TransformerLens: fused, interleaved and transposed projections included."""
    hf, examples = zoo.make(name, dtype=torch.float64), ragged(4)
    where = homes(hf)
    total: dict[str, Tensor] = {}
    for row in examples:
        tokens = torch.tensor([[*row.prompt, *row.tokens]])
        labels = tokens.clone()
        labels[0, : len(row.prompt)] = -100
        hf.zero_grad()
        hf(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        for key, home in where.items():
            weight = dict(hf.named_modules())[home.module].weight
            term = (home.take(weight) * home.take(weight.grad)).abs().detach() / len(examples)
            total[key] = total[key] + term if key in total else term
    hf.zero_grad()
    assert gap(snip_scores(load_model(hf, check=False), examples).values, total) <= 1e-5  # HF's norms are float32


def test_snip_of_a_linear_map_by_hand_and_the_wrong_order_of_mean_and_size() -> None:
    """L = ½‖Wx‖²: δ = Wx (MATH T1)."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    x = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]], dtype=torch.float64)
    total = torch.zeros(2, 2, dtype=torch.float64)
    add_absolute(total, x @ weight.T, x, [(0, 1)] * 2)
    torch.testing.assert_close(total / 2 * weight.abs(), torch.tensor([[2.0, 4.0], [12.0, 16.0]]).double())
    mean = ((x @ weight.T).transpose(1, 2) @ x).mean(0)
    torch.testing.assert_close((weight * mean).abs(), torch.tensor([[1.0, 4.0], [9.0, 16.0]]).double())


def test_a_sum_in_bfloat16_would_stop_at_256_and_ours_does_not() -> None:
    ones, half = torch.ones(1000, 1, 1), torch.zeros(1, 1, dtype=torch.bfloat16)
    total = torch.zeros(1, 1)
    add_absolute(total, ones, ones, [(0, 1)] * 1000)
    for _ in range(1000):
        half += 1.0
    assert total.item() == 1000
    assert half.item() == 256
    scores = snip_scores(hooked(dtype=torch.bfloat16), ragged(3), layers=[0])
    assert {v.dtype for v in scores.values.values()} == {torch.float32}


def test_tiles_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    delta, x = (torch.randn(3, 5, width, generator=generator).double() for width in (700, 900))
    total = torch.zeros(700, 900).double()
    add_absolute(total, delta, x, [(0, 5)] * 3)  # more than one tile
    torch.testing.assert_close(total, (delta.transpose(1, 2) @ x).abs().sum(0))


def test_the_size_is_taken_per_example_and_that_matters() -> None:
    model, examples = hooked(), ragged(24)
    right = snip_scores(model, examples)
    wrong = snip_scores(model, examples, signed=True).absolute()

    def top(scores: Scores) -> set[int]:
        flat = torch.cat([v.flatten() for v in scores.values.values()])
        return set(flat.topk(len(flat) // 100).indices.tolist())

    assert all(bool((r >= w - 1e-12).all()) for r, w in zip(right.values.values(), wrong.values.values(), strict=True))
    assert len(top(right) & top(wrong)) / len(top(right) | top(wrong)) < 0.7


def test_signed_snip_is_the_first_order_change_of_the_loss() -> None:
    model, examples = hooked(), ragged(3)
    scores = snip_scores(model, examples, signed=True)
    matrix = matrices_of(model, ["W_in"], [1])[0]
    parameter, step = parameter_of(model, matrix), 1e-6

    def loss() -> float:
        total = 0.0
        for row in examples:
            tokens = torch.tensor([[*row.prompt, *row.tokens]])
            logits = model(tokens[:, :-1])[0, len(row.prompt) - 1 :]
            total += float(torch.nn.functional.cross_entropy(logits, tokens[0, len(row.prompt) :]))
        return total / len(examples)

    before, entry = loss(), int(scores.values[matrix.name].abs().argmax())
    row, column = divmod(entry, matrix.d_in)
    with torch.no_grad():
        parameter[column, row] *= 1 - step  # TransformerLens keeps W_in as [d_in, d_out]
    found = (loss() - before) / step
    assert found == pytest.approx(-float(scores.values[matrix.name][row, column]), rel=1e-4)


def test_scores_do_not_depend_on_batches_or_layer_groups() -> None:
    model, examples = hooked(), ragged()
    whole = snip_scores(model, examples)
    for settings in ({"batch_size": 1}, {"batch_size": 7}, {"layers_per_pass": 1}, {"layers_per_pass": 3}):
        assert gap(snip_scores(model, examples, **settings).values, whole.values) < 1e-12
    some = snip_scores(model, examples, layers=[-1])
    assert {name.split(".")[1] for name in some.values} == {"3"}
    assert gap(some.values, {k: whole.values[k] for k in some.values}) < 1e-12


def test_grouped_queries_count_each_key_and_value_weight_once() -> None:
    """The gradient on a shared key head is the sum over its repeats (MATH T3): signed scores add up."""
    grouped = zoo.make("llama", dtype=torch.float64)
    spread = zoo.make("llama_mha", dtype=torch.float64)
    state = copy.deepcopy(grouped.state_dict())
    for key in state:
        if "k_proj" in key or "v_proj" in key:
            state[key] = state[key].unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1)
    spread.load_state_dict(state)
    one, many = (snip_scores(load_model(hf, check=False), ragged(), signed=True) for hf in (grouped, spread))
    for kind in ("W_K", "W_V"):
        name = f"blocks.1.attn.{kind}"
        assert one.values[name].shape == (32, 64)
        repeats = many.values[name].view(2, 2, 16, 64).sum(1).flatten(0, 1)
        torch.testing.assert_close(one.values[name], repeats, rtol=1e-6, atol=1e-9)
    assert gap({"q": one.values["blocks.1.attn.W_Q"]}, {"q": many.values["blocks.1.attn.W_Q"]}) < 1e-6


def test_folding_norm_gains_into_the_weights_changes_no_score() -> None:
    """MATH E6: W → diag(gain) W with the gain set to one."""
    plain = zoo.make("llama", dtype=torch.float64)
    folded = copy.deepcopy(plain)
    with torch.no_grad():
        for layer in folded.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                for reader in readers:
                    reader.weight.mul_(norm.weight)
                norm.weight.fill_(1.0)
    one, two = (load_model(hf, check=False) for hf in (plain, folded))
    changed = matrices_of(one, ["W_Q"])[0]
    assert (weight_of(one, changed) - weight_of(two, changed)).abs().max() > 0.01
    assert gap(snip_scores(one, ragged()).values, snip_scores(two, ragged()).values) < 1e-9
    assert gap(wanda_scores(one, ragged()).values, wanda_scores(two, ragged()).values) < 1e-9


def test_the_fused_norm_has_the_gradient_of_the_plain_one_and_can_be_differentiated_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, generator=generator).double().requires_grad_()
    gain = torch.randn(8, generator=generator).double()

    def fused(x: Tensor) -> Tensor:
        return _Normed.apply(x, gain, 1e-6)

    torch.testing.assert_close(fused(x), torch.nn.functional.rms_norm(x, (8,), gain, 1e-6))
    assert torch.autograd.gradcheck(fused, (x,))
    assert torch.autograd.gradgradcheck(fused, (x,))


# --- gradient × activation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_times_activation_is_the_signed_snip_of_the_weights_that_read_it(name: str) -> None:
    """MATH E1 and E3, for every model."""
    model, examples = hooked(name), ragged()
    snip = snip_scores(model, examples, signed=True).values
    neurons = attribute_neurons(model, examples, signed=True)
    heads = attribute_neurons(model, examples, unit="head", signed=True)
    for layer in range(4):
        out = snip[f"blocks.{layer}.mlp.W_out"].sum(0)
        torch.testing.assert_close(neurons.values[f"blocks.{layer}.mlp"], out, rtol=1e-7, atol=1e-10)
        by_head = snip[f"blocks.{layer}.attn.W_O"].sum(0).view(model.cfg.n_heads, -1).sum(1)
        torch.testing.assert_close(heads.values[f"blocks.{layer}.attn"], by_head, rtol=1e-7, atol=1e-10)


def test_the_up_projection_adds_up_to_the_neuron_and_the_gate_does_not() -> None:
    """MATH E2: the activation function stands between the gate and the neuron."""
    model, examples = hooked(), ragged()
    snip = snip_scores(model, examples, signed=True).values
    neuron = attribute_neurons(model, examples, signed=True).values["blocks.2.mlp"]
    torch.testing.assert_close(snip["blocks.2.mlp.W_in"].sum(1), neuron, rtol=1e-7, atol=1e-10)
    assert (snip["blocks.2.mlp.W_gate"].sum(1) - neuron).abs().max() > 0.1 * neuron.abs().max()


def test_sizes_per_token_bound_sizes_per_example_which_bound_the_signed_mean() -> None:
    model, examples = hooked(), ragged()
    each, size = (attribute_neurons(model, examples, tokens=t).values["blocks.0.mlp"] for t in ("each", "sum"))
    signed = attribute_neurons(model, examples, signed=True).values["blocks.0.mlp"]
    assert bool((each >= size - 1e-12).all())
    assert bool((size >= signed.abs() - 1e-12).all())
    assert (size - signed.abs()).max() > 0


def test_weight_scores_add_up_to_neurons_and_heads() -> None:
    model = hooked()
    scores = snip_scores(model, ragged())
    values = scores.values
    neuron = sum(values[f"blocks.1.mlp.{kind}"].sum(1) for kind in ("W_gate", "W_in")) + values[
        "blocks.1.mlp.W_out"
    ].sum(0)
    torch.testing.assert_close(aggregated(scores, model, "neuron").values["blocks.1.mlp"], neuron)
    head = values["blocks.1.attn.W_Q"].view(4, -1).sum(1) + values["blocks.1.attn.W_O"].sum(0).view(4, -1).sum(1)
    torch.testing.assert_close(aggregated(scores, model, "head").values["blocks.1.attn"], head)  # shared keys: nobody's
    own = hooked("llama_mha")
    scores = snip_scores(own, ragged())
    head = sum(scores.values[f"blocks.1.attn.W_{letter}"].view(4, -1).sum(1) for letter in "QKV")
    head = head + scores.values["blocks.1.attn.W_O"].sum(0).view(4, -1).sum(1)
    torch.testing.assert_close(aggregated(scores, own, "head").values["blocks.1.attn"], head)


# --- Wanda and change -----------------------------------------------------------------------------------------------


def hf_inputs(hf: PreTrainedModel, row: Continuation, module: str) -> Tensor:
    """[pos, d_in] inputs of a module for one unpadded row."""
    found: list[Tensor] = []
    handle = dict(hf.named_modules())[module].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        hf(input_ids=torch.tensor([[*row.prompt, *row.tokens]]), use_cache=False)
    handle.remove()
    return found[0][0].double()


@pytest.mark.parametrize(
    ("positions", "begin", "end"),
    [("response", 0, 0), ("predicting", -1, -1), ("prompt", None, 0), ("all", None, None)],
)
def test_wanda_reads_the_inputs_of_exactly_the_tokens_asked_for(
    positions: str, begin: int | None, end: int | None
) -> None:
    hf, examples = zoo.make("llama", dtype=torch.float64), ragged()
    model = load_model(hf, check=False)
    scores = wanda_scores(model, examples, positions=positions, batch_size=3)
    for name, module in (
        ("attn.W_K", "self_attn.k_proj"),
        ("attn.W_O", "self_attn.o_proj"),
        ("mlp.W_out", "mlp.down_proj"),
    ):
        squares = []
        for row in examples:
            x = hf_inputs(hf, row, f"model.layers.2.{module}")
            first = 0 if begin is None else len(row.prompt) + begin
            last = len(row.prompt) if positions == "prompt" else len(x) + (end or 0)
            squares.append(x[first:last].square().sum(0))
        norm = torch.stack(squares).mean(0).sqrt()
        expected = weight_of(model, f"blocks.2.{name}").abs() * norm
        torch.testing.assert_close(scores.values[f"blocks.2.{name}"], expected, rtol=1e-5, atol=1e-8)


def test_change_scores_are_the_root_mean_square_over_response_tokens() -> None:
    one, two = zoo.make("llama", dtype=torch.float64), zoo.make("llama", seed=5, dtype=torch.float64)
    examples = ragged()
    scores = change_scores(load_model(one, check=False), load_model(two, check=False), examples, batch_size=3)
    assert sorted(scores.values) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]  # the last block is left out
    gaps = []
    for row in examples:
        x, y = (hf_inputs(hf, row, "model.layers.1.mlp.down_proj") for hf in (one, two))
        gaps.append((x - y)[len(row.prompt) :].square())
    torch.testing.assert_close(scores.values["blocks.1.mlp"], torch.cat(gaps).mean(0).sqrt(), rtol=1e-5, atol=1e-8)
    heads = change_scores(load_model(one, check=False), load_model(two, check=False), examples, unit="head", layers=[3])
    assert heads.shapes == {"blocks.3.attn": (4,)}


def test_nothing_changes_between_a_model_and_itself() -> None:
    model = hooked()
    assert all(bool((v == 0).all()) for v in change_scores(model, model, ragged()).values.values())


# --- merging --------------------------------------------------------------------------------------------------------


def _changed(model: HookedTransformer, examples: Sequence[Continuation]) -> Scores:
    return change_scores(model, hooked(seed=5), examples)


def _signed(model: HookedTransformer, examples: Sequence[Continuation]) -> Scores:
    return snip_scores(model, examples, signed=True)


SCORES = (snip_scores, _signed, wanda_scores, attribute_neurons, _changed)


@pytest.mark.parametrize("score", SCORES)
def test_any_split_into_parts_merges_to_the_scores_of_all(score: Callable[..., Scores]) -> None:
    model, examples = hooked(), ragged()
    whole = score(model, examples)
    for shards in (1, 2, 3, 7):
        merged = merge_scores([score(model, examples[i::shards]) for i in range(shards)])
        assert gap(merged.values, whole.values) <= 1e-10
        assert (merged.n, merged.weight) == (whole.n, whole.weight)


def test_a_mean_of_means_would_not_merge() -> None:
    model, examples = hooked(), ragged()
    whole, parts = snip_scores(model, examples), [snip_scores(model, part) for part in (examples[:1], examples[1:])]
    plain = {k: (parts[0].values[k] + parts[1].values[k]) / 2 for k in whole.values}
    assert gap(plain, whole.values) > 0.01


def test_scores_of_different_kinds_or_models_do_not_merge() -> None:
    model, examples = hooked(), ragged(3)
    one = snip_scores(model, examples, layers=[0])
    with pytest.raises(DataError, match="differ in method"):
        merge_scores([one, wanda_scores(model, examples, layers=[0])])
    with pytest.raises(DataError, match="other matrices"):
        merge_scores([one, snip_scores(model, examples, layers=[1])])
    with pytest.raises(ModelMismatchError, match="weights differ"):
        merge_scores([one, snip_scores(hooked(seed=9), examples, layers=[0])])
    with pytest.raises(DataError, match="sums of roots"):
        merge_scores([aggregated(wanda_scores(model, examples), model, "neuron")] * 2)


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = hooked()
    found = [scored_across_processes(score, model, ragged()) for score in (snip_scores, wanda_scores)]
    with pytest.raises(DataError, match="1 examples"):
        scored_across_processes(snip_scores, model, ragged(1))
    spoilt = ragged(4)
    spoilt[2] = Continuation((), (5,))  # the first process fails, and the second must not wait for it
    with pytest.raises(DataError if rank == 0 else ModelError, match="example 1 has 0 prompt"):
        scored_across_processes(snip_scores, model, spoilt)
    torch.save([scores.values for scores in found], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    mp.start_processes(_process, args=(2, str(tmp_path)), nprocs=2, start_method="fork")  # spawn imports all again
    alone = [score(hooked(), ragged()).values for score in (snip_scores, wanda_scores)]
    for rank in range(2):
        for mine, theirs in zip(torch.load(f"{tmp_path}/{rank}.pt"), alone, strict=True):
            assert gap(mine, theirs) <= 1e-10


def test_without_a_process_group_the_examples_are_all_scored_here() -> None:
    model, examples = hooked(), ragged(3)
    assert scored_across_processes(snip_scores, model, examples, layers=[0]).n == 3


# --- directions (ActSVD) --------------------------------------------------------------------------------------------


def test_the_best_low_rank_matrix_on_the_data_loses_the_smaller_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 9, generator=generator).double(), torch.randn(9, 40, generator=generator).double()
    moment = x @ x.T
    sigma = torch.linalg.svdvals(weight @ x)
    torch.testing.assert_close(output_directions(weight, moment)[1], sigma**2)
    for rank in range(7):
        lost = ((weight - without_bottom(weight, moment, 6 - rank)) @ x).square().sum()
        torch.testing.assert_close(lost, sigma[rank:].square().sum(), atol=1e-9, rtol=1e-9)
    diagonal = torch.diag(torch.tensor([3.0, 2.0, 1.0])).double()
    torch.testing.assert_close(
        without_top(diagonal, torch.eye(3).double(), 1), torch.diag(torch.tensor([0, 2, 1.0])).double()
    )


def test_what_serves_safety_beyond_utility_is_nothing_where_both_are_the_same() -> None:
    model, examples = hooked(), ragged()
    matrix = matrices_of(model, ["W_out"], [1])
    moment, other = (input_moments(model, rows, matrices=matrix)[matrix[0].name] for rows in (examples, ragged(seed=4)))
    weight = weight_of(model, matrix[0])
    same = safety_directions(weight, moment, moment, r_safety=50, r_utility=50)
    assert same.abs().max() < 1e-9
    found = safety_directions(weight, moment, other, r_safety=50, r_utility=50)
    assert found.abs().max() > 1e-3
    with pytest.raises(DataError, match="ranks 0 to 64"):
        safety_directions(weight, moment, other, r_safety=65, r_utility=0)


def test_moments_add_up_and_their_diagonal_is_wandas() -> None:
    model, examples = hooked(), ragged()
    name = "blocks.1.attn.W_Q"
    matrix = [m for m in matrices_of(model) if m.name == name]
    whole = input_moments(model, examples, matrices=matrix)[name]
    parts = sum(input_moments(model, examples[i::3], matrices=matrix)[name] for i in range(3))
    torch.testing.assert_close(whole, parts)
    wanda = wanda_scores(model, examples, matrices=matrix).values[name]
    torch.testing.assert_close(wanda, weight_of(model, name).abs() * (whole.diagonal() / len(examples)).sqrt())


# --- the model is left as found, and bad inputs ---------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model, examples = hooked(), ragged(3)
    model.train()
    before, state = {k: p.clone() for k, p in model.named_parameters()}, torch.random.get_rng_state()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    count = hooks()
    for score in SCORES:
        score(model, examples)
    input_moments(model, examples)
    assert model.training
    assert hooks() == count
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(
        torch.equal(before[k], p) and p.grad is None and not p.requires_grad for k, p in model.named_parameters()
    )


def test_hooks_are_gone_when_a_pass_fails() -> None:
    model = hooked()
    with pytest.raises(DataError, match="the model takes 128"):
        wanda_scores(model, [Continuation((5,) * 100, (5,) * 29)])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_gradients_that_are_not_finite_name_the_example() -> None:
    model, examples = hooked(), ragged(5, vocab=50)
    with torch.no_grad():
        model.embed.W_E[50] = float("nan")
    examples[3] = Continuation((7, 50, 8), (9,))
    for score in (snip_scores, wanda_scores, attribute_neurons):
        with pytest.raises(ModelError, match="example 3 has"):
            score(model, examples)


def test_negated_or_empty_scores_are_refused() -> None:
    scores = snip_scores(hooked(), ragged(2), layers=[0])
    with pytest.raises(DataError, match="least important"):
        Scores({k: -v for k, v in scores.values.items()}, "weight", "snip", 2)
    Scores({k: -v for k, v in scores.values.items()}, "weight", "snip", 2, signed=True)
    with pytest.raises(DataError, match="not finite"):
        Scores({"blocks.0.attn.W_Q": torch.tensor([[float("nan")]])}, "weight", "snip", 2)
    with pytest.raises(DataError, match="no matrix"):
        Scores({}, "weight", "snip", 2)


def test_what_is_undefined_is_refused_in_words() -> None:
    model, examples = hooked(), ragged(2)
    with pytest.raises(DataError, match="no example"):
        snip_scores(model, [])
    with pytest.raises(DataError, match="score weights with snip_scores"):
        attribute_neurons(model, examples, unit="weight")
    with pytest.raises(DataError, match="sizes have no sign"):
        attribute_neurons(model, examples, tokens="each", signed=True)
    with pytest.raises(DataError, match="no token rule 'answer': choose response"):
        wanda_scores(model, examples, positions="answer")
    with pytest.raises(DataError, match="layers_per_pass must be 1"):
        snip_scores(model, examples, layers_per_pass=0)
    with pytest.raises(HookNameError, match="block 9"):
        snip_scores(model, examples, layers=[9])
    with pytest.raises(DataError, match="W_gate was not scored"):
        aggregated(snip_scores(model, examples, matrices=matrices_of(model, ["W_in", "W_out"])), model, "neuron")
    with pytest.raises(DataError, match="cannot be made scores of weights"):
        aggregated(attribute_neurons(model, examples), model, "weight")
    with pytest.raises(ModelMismatchError, match="have the shapes"):
        change_scores(model, hooked("llama", num_hidden_layers=3), examples)


def test_quantiles_summarise_scores() -> None:
    scores = Scores({"a": torch.arange(101.0)}, "neuron", "change", 1)
    assert scores.quantiles((0.0, 0.5, 1.0)) == {"a": [0.0, 50.0, 100.0]}
    with pytest.raises(DataError, match="between 0 and 1"):
        scores.quantiles((2.0,))
