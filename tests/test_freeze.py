"""Freezing: the effective weight of a group never moves, everything else learns, and what is saved says so."""

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from synthetic_groups import save_organism_groups
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from typer.testing import CliRunner
from watched import Rows, trainer

from safety_lens.artifacts import FROZEN, load_artifact
from safety_lens.cli import app
from safety_lens.errors import ArtifactError, DataError, ModelError, ModelMismatchError, WeightSyncError
from safety_lens.folding import LoraFolder, Shadow
from safety_lens.interventions.freezing import Frozen, NothingToFreeze, freeze
from safety_lens.interventions.rewind import merged, rewound
from safety_lens.loading import masked as masked_lora
from safety_lens.loading.effective import effective_weight
from safety_lens.loading.homes import homes
from safety_lens.loading.hub import put_adapter
from safety_lens.loading.live import base_model
from safety_lens.loading.masked import mask_of, mask_update
from safety_lens.models import load_hf, load_model
from safety_lens.monitors.finetune.compared import frozen_and_free
from safety_lens.monitors.finetune.config import RunConfig, read_config
from safety_lens.monitors.finetune.freezing import freeze_named
from safety_lens.monitors.finetune.run import run
from safety_lens.organism import MODEL_DIR
from safety_lens.probes.groups import NeuronGroup, group_of, load_groups
from safety_lens.probes.matrices import matrices_of, weight_of

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
ROWS = Rows(8).rows
Make = Callable[[str], NeuronGroup]


def hooked(name: str) -> Any:
    return load_model(zoo.make(name), check=False)


def scattered(name: str, share: float = 0.02, seed: int = 0, kinds: Sequence[str] | None = None) -> NeuronGroup:
    generator = torch.Generator().manual_seed(seed)
    model = hooked(name)
    index = {
        m.name: torch.randperm(m.numel, generator=generator)[: max(1, int(share * m.numel))]
        for m in matrices_of(model, kinds)
    }
    return group_of(model, "scattered", "weight", index)


def rows(name: str) -> NeuronGroup:
    found = {m.name: m for m in matrices_of(hooked(name), ["W_Q", "W_in"])}
    index = {k: (torch.tensor([[1], [4]]) * m.d_in + torch.arange(m.d_in)).flatten() for k, m in found.items()}
    return group_of(hooked(name), "rows", "weight", index)


def columns(name: str) -> NeuronGroup:
    found = {m.name: m for m in matrices_of(hooked(name), ["W_O", "W_out"])}
    index = {k: (torch.arange(m.d_out)[:, None] * m.d_in + torch.tensor([0, 3])).flatten() for k, m in found.items()}
    return group_of(hooked(name), "columns", "weight", index)


def neurons(name: str) -> NeuronGroup:
    return group_of(hooked(name), "neurons", "neuron", {f"blocks.{i}.mlp": [0, 5, 17] for i in range(4)})


def heads(name: str) -> NeuronGroup:
    return group_of(hooked(name), "heads", "head", {"blocks.1.attn": [0, 2], "blocks.2.attn": [3]})


def adapted(name: str, dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS.get(name, LINEAR), "task_type": "CAUSAL_LM", **lora}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft sets fan_in_fan_out for Conv1D itself
        torch.manual_seed(0)
        return get_peft_model(zoo.make(name, dtype=dtype), LoraConfig(**settings))


def train(model: nn.Module, frozen: Frozen | None, steps: int = 8, lr: float = 1e-2, decay: float = 0.1) -> list[float]:
    """AdamW on eight rows over and over; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=decay)
    if frozen is not None:
        frozen.attach(optimizer)
    losses = []
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout
        for _ in range(steps):
            loss = model(input_ids=ROWS, labels=ROWS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    return losses


def effective(model: nn.Module) -> dict[str, Tensor]:
    """Module → effective weight [d_out, d_in], of every module that holds a matrix."""
    base = base_model(model)
    return {h.module: effective_weight(base.get_submodule(h.module)).clone() for h in homes(model).values()}


def inside(model: nn.Module, group: NeuronGroup) -> dict[str, Tensor]:
    """Module → True at the group's entries, by way of the group's own masks."""
    out: dict[str, Tensor] = {}
    weights = effective(model)
    for name, home in homes(model).items():
        mask = out.setdefault(home.module, torch.zeros(weights[home.module].shape, dtype=torch.bool))
        if name in group.shapes:
            mask[home.rows] |= group.mask(name)
    return out


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ROWS).logits


# --- MATH T8 --------------------------------------------------------------------------------------------------------


def frozen_layer(share: float, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor, Tensor]:
    """A LoRA layer with nonzero factors and a mask; its mask as a matrix, and the frozen entries."""
    model = adapted("llama", dtype, target_modules=["up_proj"]).to(dtype)
    layer = base_model(model).model.layers[0].mlp.up_proj
    generator = torch.Generator().manual_seed(3)
    up = layer.lora_B["default"].weight
    up.data = torch.randn(up.shape, generator=generator, dtype=dtype)
    n = layer.out_features * layer.in_features
    index = torch.randperm(n, generator=generator)[: int(share * n)].sort().values
    mask = torch.zeros(n, dtype=torch.bool)
    mask[index] = True
    return layer, mask.view(layer.out_features, layer.in_features), index


@pytest.fixture(params=["masked product", "product at the entries"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both of the equal implementations; the second is otherwise for few entries of large matrices."""
    if request.param == "product at the entries":
        monkeypatch.setattr(masked_lora, "LARGE", 0)
        monkeypatch.setattr(masked_lora, "FEW", 1)
    return str(request.param)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_the_forward_pass_is_the_plain_product_less_the_product_at_the_mask(way: str, share: float) -> None:
    layer, mask, index = frozen_layer(share)
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    plain = layer(x)
    mask_update(layer, "default", index)
    assert (layer.lora_variant["default"].pattern is None) == (way == "masked product")
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    held = layer.scaling["default"] * (up @ down) * mask
    assert torch.allclose(layer(x), plain - x @ held.T, rtol=0, atol=1e-11)
    assert not torch.allclose(layer(x), plain, atol=1e-3)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_gradients_are_those_of_the_masked_effective_weight(way: str, share: float) -> None:
    """∂B = s(G⊙M̄)Aᵀ and ∂A = sBᵀ(G⊙M̄), G the gradient of the effective weight; the input's is Wᵀ's as ever."""
    layer, mask, index = frozen_layer(share)
    mask_update(layer, "default", index)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 5, layer.in_features, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 5, layer.out_features, generator=generator, dtype=torch.float64)
    down, up, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    got = torch.autograd.grad((layer(x) - target).square().sum(), [up, down, x])
    weight = effective_weight(layer).requires_grad_(True)
    full, at_input = torch.autograd.grad((x @ weight.T - target).square().sum(), [weight, x])
    kept = full * ~mask
    for ours, exact in zip(got, (scale * kept @ down.T, scale * up.T @ kept, at_input), strict=True):
        assert torch.allclose(ours, exact, rtol=1e-10, atol=1e-10 * float(exact.detach().abs().max()))


def test_zeroing_factors_cannot_hold_single_entries_so_the_product_is_masked() -> None:
    """T8: r entries of a row at zero force b_i = 0 for generic A; with r − 1 some of the row could still learn."""
    down = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.linalg.matrix_rank(down[:, [3, 9, 20, 41]]) == 4
    assert torch.linalg.matrix_rank(down[:, [3, 9, 20]]) == 3


# --- nothing frozen moves, everything else learns (must be shown) ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make", "route"),
    [
        ("llama", scattered, "product"),
        ("gpt2", scattered, "product"),
        ("phi3", scattered, "product"),
        ("neox", scattered, "product"),
        ("gemma2", scattered, "product"),
        ("llama", rows, "factors"),
        ("neox", rows, "factors"),
        ("gpt2", columns, "factors"),
        ("llama", neurons, "factors"),
        ("phi3", neurons, "factors"),
        ("gpt2", neurons, "factors"),
        ("llama", heads, "factors"),
    ],
)
def test_after_training_adapters_no_frozen_entry_has_moved_and_all_others_have(
    name: str, make: Make, route: str
) -> None:
    model, group = adapted(name), make(name)
    before, mask = effective(model), inside(model, group)
    frozen = freeze(model, group)
    assert frozen.counts() == {route: sum(int(m.sum()) for m in mask.values())}
    losses = train(model, frozen)
    after = effective(model)
    assert max(float((after[m] - before[m])[mask[m]].abs().max()) for m in mask if mask[m].any()) == 0
    assert frozen.moved() == 0
    free = torch.cat([(after[m] != before[m])[~mask[m]] for m in mask])
    assert float(free.float().mean()) > 0.99
    assert losses[-1] < 0.9 * losses[0]


def test_held_entries_of_few_and_of_many_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice between the two products changes no result: float64 runs agree to rounding."""
    runs = []
    for large in (1 << 18, 0):
        monkeypatch.setattr(masked_lora, "LARGE", large)
        model = adapted("llama", torch.float64).to(torch.float64)
        frozen = freeze(model, scattered("llama"))
        runs.append((train(model, frozen, decay=0.0), effective(model)))
        assert frozen.moved() == 0
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)  # transformers computes losses in float32
    assert all(torch.allclose(runs[0][1][m], runs[1][1][m], rtol=0, atol=1e-5) for m in runs[0][1])


def test_without_freezing_the_same_entries_move() -> None:
    model, group = adapted("llama"), scattered("llama")
    before, mask = effective(model), inside(model, group)
    train(model, None)
    after = effective(model)
    assert min(float(((after[m] != before[m])[mask[m]]).float().mean()) for m in mask) > 0.99


@pytest.mark.parametrize(
    ("name", "make"), [("llama", scattered), ("gpt2", scattered), ("phi3", scattered), ("gpt2", neurons)]
)
def test_full_fine_tuning_with_weight_decay_and_momentum_leaves_frozen_entries_bit_for_bit(
    name: str, make: Make
) -> None:
    model, group = zoo.make(name).requires_grad_(True), make(name)
    before, mask = effective(model), inside(model, group)
    frozen = freeze(model, group)
    losses = train(model, frozen, lr=1e-3, decay=0.5)
    after = effective(model)
    for module, at in mask.items():
        assert torch.equal(after[module][at], before[module][at])
    assert float(torch.cat([(after[m] != before[m])[~mask[m]] for m in mask]).float().mean()) > 0.99
    assert losses[-1] < losses[0]
    assert set(frozen.counts()) == {"weight"}


def test_a_masked_gradient_alone_does_not_hold_weights_against_decay() -> None:
    """The control for the test above: what restoring is for."""
    model = zoo.make("llama").requires_grad_(True)
    frozen = freeze(model, scattered("llama"))
    train(model, None, steps=2, lr=1e-3, decay=0.5)
    assert frozen.moved() > 1e-4
    with pytest.raises(WeightSyncError, match=r"scattered were frozen and moved by up to 0\.00"):
        frozen.check()


@pytest.mark.parametrize("full", [False, True])
def test_what_writes_gradients_past_autograd_moves_nothing_frozen(full: bool) -> None:
    """As penalties added behind the backward pass do, and optimizers that move weights without a gradient."""
    model: nn.Module = zoo.make("llama").requires_grad_(True) if full else adapted("llama")
    frozen = freeze(model, neurons("llama"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    frozen.attach(optimizer)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    assert frozen.moved() == 0
    before, after = effective(zoo.make("llama")), effective(model)
    assert all(bool((after[module] != before[module]).any()) for module in after)


def test_rows_frozen_by_factors_train_as_rows_frozen_by_the_product() -> None:
    """Two exact ways for the same thing: in float64 the same losses and weights."""
    group = rows("llama")
    one, other = (adapted("llama", torch.float64).to(torch.float64) for _ in range(2))
    frozen = freeze(one, group)
    for module, mask in inside(other, group).items():
        if mask.any():
            mask_update(base_model(other).get_submodule(module), "default", mask.flatten().nonzero().flatten())
    first, second = train(one, frozen, decay=0.0), train(other, None, decay=0.0)
    assert frozen.counts().keys() == {"factors"}
    assert first == pytest.approx(second, rel=1e-9)
    for module, weight in effective(one).items():
        assert torch.allclose(weight, effective(other)[module], rtol=0, atol=1e-9)


def test_freezing_entries_of_a_row_leaves_the_rest_of_the_row_free() -> None:
    """Zeroing the B rows that a group touches would hold whole rows: on a toy, 27 % of them for 0.8 % of entries."""
    model, group = adapted("llama"), scattered("llama", share=0.01)
    before, mask = effective(model), inside(model, group)
    frozen = freeze(model, group)
    train(model, frozen)
    after = effective(model)
    for module, at in mask.items():
        touched = at.any(1)
        assert bool((after[module] != before[module])[touched].any(1).all())


def test_mixed_rows_columns_and_entries_of_one_matrix_are_all_held() -> None:
    model = hooked("llama")
    (matrix,) = matrices_of(model, ["W_in"], [0])
    mask = torch.zeros(matrix.shape, dtype=torch.bool)
    mask[3], mask[:, 7], mask[10, 11] = True, True, True
    group = group_of(model, "mixed", "weight", {matrix.name: mask.flatten().nonzero().flatten()})
    live = adapted("llama")
    frozen = freeze(live, group)
    layer = base_model(live).model.layers[0].mlp.up_proj
    assert mask_of(layer, "default").tolist() == [10 * matrix.d_in + 11]
    train(live, frozen)
    assert frozen.moved() == 0


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.3}, {"use_rslora": True}, {"bias": "all"}])
def test_dropout_rank_stabilised_scaling_and_trained_biases_change_nothing_about_it(settings: dict[str, Any]) -> None:
    model = adapted("qwen2", **settings)
    frozen = freeze(model, scattered("qwen2"))
    losses = train(model, frozen)
    assert frozen.moved() == 0
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_in_half_precision_with_autocast_and_gradient_checkpointing_frozen_entries_stay(
    way: str, tmp_path: Path
) -> None:
    model = adapted("llama", torch.bfloat16)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    frozen = freeze(model, scattered("llama"))
    trainer(model, tmp_path, [frozen.callback()], bf16=True, data=Rows(8), max_steps=2).train()
    assert frozen.moved() == 0
    before = zoo.make("llama", dtype=torch.bfloat16)
    folded = Shadow(model).model
    for part in frozen.parts:  # in the model's own dtype, too: nothing was rounded there
        now, then = (m.get_submodule(part.module).weight.reshape(-1)[part.index] for m in (folded, before))
        assert torch.equal(now, then)


def test_a_matrix_that_is_saved_whole_is_frozen_like_a_trained_weight() -> None:
    model = adapted("llama", target_modules=["v_proj"], modules_to_save=["q_proj"])
    group = scattered("llama", kinds=["W_Q", "W_V", "W_O"])
    frozen = freeze(model, group)
    assert set(frozen.counts()) == {"product", "untrained", "weight"}
    assert frozen.untrained == pytest.approx(0.4, abs=0.01)  # W_O of 64 × 64, W_Q the same, W_V half of it
    train(model, frozen)
    assert frozen.moved() == 0


# --- what is saved, merged, folded, rewound -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi3"])
def trained(request: pytest.FixtureRequest) -> tuple[str, PeftModel, Frozen]:
    model = adapted(request.param)
    frozen = freeze(model, scattered(request.param))
    train(model, frozen)
    return request.param, model, frozen


def test_the_saved_adapter_reproduces_the_logits_and_goes_on_frozen(
    trained: tuple[str, PeftModel, Frozen], tmp_path: Path
) -> None:
    name, model, _ = trained
    model.save_pretrained(tmp_path)
    assert (tmp_path / FROZEN).is_file()
    back, _, _ = put_adapter(zoo.make(name), tmp_path, owned=True)
    assert torch.equal(logits(back), logits(model))
    for key, parameter in back.named_parameters():
        parameter.requires_grad_("lora_" in key)
    again = freeze(back, scattered(name))  # nothing has moved, so it can be frozen again and trained on
    train(back, again, steps=2)
    assert again.moved() == 0


def test_the_saved_adapter_is_plain_lora_plus_a_sparse_delta(
    trained: tuple[str, PeftModel, Frozen], tmp_path: Path
) -> None:
    """From the files alone, as other software would: W' = W0 + s·B·A + sparse."""
    name, model, _ = trained
    model.save_pretrained(tmp_path)
    factors, sparse = load_file(tmp_path / "adapter_model.safetensors"), load_file(tmp_path / FROZEN)
    before, after = effective(adapted(name)), effective(model)
    assert {key.rpartition(".")[0] for key in sparse} == set(after)
    for module, weight in after.items():
        up, down = (factors[f"base_model.model.{module}.lora_{ab}.weight"] for ab in "BA")
        total = 2.0 * up @ down
        total.view(-1)[sparse[f"{module}.index"]] += sparse[f"{module}.delta"]
        assert torch.allclose(before[module] + total, weight, rtol=0, atol=1e-6)


def test_peft_alone_says_that_it_does_not_know_the_masks(
    trained: tuple[str, PeftModel, Frozen], tmp_path: Path
) -> None:
    name, model, _ = trained
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="frozen_entries"):
        plain = PeftModel.from_pretrained(zoo.make(name), tmp_path).eval()
    assert float((logits(plain) - logits(model)).abs().max()) > 0.01  # the control: masks matter


def test_merged_models_reproduce_the_logits_and_hold_the_frozen_entries(
    trained: tuple[str, PeftModel, Frozen], tmp_path: Path
) -> None:
    name, model, frozen = trained
    expected = logits(model)
    merged(model).save_pretrained(tmp_path)
    saved = type(zoo.make(name)).from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(saved), expected, atol=2e-5)
    before, after = effective(zoo.make(name)), effective(saved)
    for part in frozen.parts:
        assert torch.equal(after[part.module].reshape(-1)[part.index], before[part.module].reshape(-1)[part.index])
    model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=2e-5)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), expected, atol=2e-5)


def test_the_hooked_model_has_the_masked_weights_after_every_fold() -> None:
    model = adapted("llama")
    watched = load_model(model)
    folder = LoraFolder(watched, model)
    frozen = freeze(model, scattered("llama", share=0.1))
    train(model, frozen, steps=3)
    folder.fold()
    assert torch.allclose(watched(ROWS), logits(model), atol=2e-5)
    for layer in base_model(model).modules():  # the control: without the masks the live model is another one
        getattr(layer, "lora_variant", {}).clear()
    assert not torch.allclose(watched(ROWS), logits(model), atol=1e-3)


@pytest.mark.parametrize("full", [False, True])
def test_rewinding_puts_a_group_back_and_nothing_else(full: bool) -> None:
    model: nn.Module = zoo.make("gpt2").requires_grad_(True) if full else adapted("gpt2")
    group, before = scattered("gpt2"), effective(model)
    base = zoo.make("gpt2")
    train(model, None, lr=1e-3)
    after, mask, live = effective(model), inside(model, group), logits(model)
    back = rewound(model, group, base if full else None)
    for module, weight in effective(back).items():
        assert torch.equal(weight[mask[module]], before[module][mask[module]])
        assert torch.equal(weight[~mask[module]], after[module][~mask[module]])
    assert torch.equal(logits(model), live)  # the trained model is left as it was
    assert all(p.requires_grad for p in model.parameters()) == full
    if full:
        with pytest.raises(ModelError, match="give the model before training as base="):
            rewound(model, group)


def test_a_checkpoint_that_was_trained_with_another_group_is_refused(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "data": Rows(24)}
    one, other = adapted("llama"), adapted("llama")
    trainer(one, tmp_path, [freeze(one, neurons("llama")).callback()], **settings).train()
    teacher = trainer(other, tmp_path, [freeze(other, rows("llama")).callback()], **{**settings, "max_steps": 6})
    with pytest.raises(WeightSyncError, match="rows were frozen and moved"):
        teacher.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# --- bad inputs -----------------------------------------------------------------------------------------------------


def test_a_group_of_another_model_or_an_empty_one_is_refused() -> None:
    with pytest.raises(ModelMismatchError, match="made with another model"):
        freeze(adapted("qwen3"), scattered("llama"))  # heads of another width
    empty = group_of(hooked("llama"), "none", "weight", {"blocks.0.attn.W_Q": []})
    with pytest.raises(DataError, match="'none' is empty"):
        freeze(adapted("llama"), empty)


def test_an_adapter_without_the_frozen_matrices_warns_that_there_is_nothing_to_freeze() -> None:
    model = adapted("llama", target_modules=["q_proj"])
    with pytest.warns(NothingToFreeze, match="no matrix of scattered is trained here"):
        frozen = freeze(model, scattered("llama", kinds=["W_out"]))
    assert frozen.untrained == 1
    train(model, frozen, steps=2)
    assert frozen.moved() == 0


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_whose_update_is_no_plain_product_or_not_zero_yet_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"another adapter|has moved entries"):
        freeze(adapted("llama", **settings), scattered("llama"))


def test_an_adapter_that_was_trained_without_freezing_is_refused() -> None:
    model = adapted("llama")
    train(model, None, steps=1)
    with pytest.raises(ModelError, match=r"q_proj: the adapter has moved entries that are to be frozen, by up to"):
        freeze(model, scattered("llama"))


@pytest.mark.parametrize("fault", ["missing", "other factors", "other module"])
def test_masks_that_do_not_belong_to_the_adapter_beside_them_are_refused(fault: str, tmp_path: Path) -> None:
    model = adapted("llama")
    train(model, freeze(model, scattered("llama")), steps=2)
    model.save_pretrained(tmp_path)
    sparse = load_file(tmp_path / FROZEN)
    if fault == "missing":
        (tmp_path / FROZEN).unlink()
    elif fault == "other factors":
        save_file({k: v * 1.5 if k.endswith("delta") else v for k, v in sparse.items()}, tmp_path / FROZEN)
    else:
        save_file({k.replace("q_proj", "p_proj"): v for k, v in sparse.items()}, tmp_path / FROZEN)
    with pytest.raises(ModelError, match=FROZEN):
        put_adapter(zoo.make("llama"), tmp_path, owned=True)


# --- safety-lens finetune --freeze ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_organism_groups(tmp_path_factory.mktemp("groups") / "g")


def adapted_organism() -> PeftModel:
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(load_hf("organism", device="cpu")[0], settings)


class Killed(TrainerCallback):
    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def config(out: Path, freeze: list[str], **changes: Any) -> RunConfig:
    settings = {
        "model": "organism", "device": "cpu", "data.source": "benign", "tuning.targets": ["q_proj", "v_proj"],
        "tuning.rank": 4, "training.max_steps": 4, "training.per_device_train_batch_size": 4,
        "training.learning_rate": 1e-3, "training.save_steps": 2, "out": out, "tuning.freeze": freeze,
    }  # fmt: skip
    return read_config(None, {**settings, **{key.replace("__", "."): value for key, value in changes.items()}})


def test_a_run_keeps_its_groups_frozen_through_a_kill_and_its_folder_loads_as_it_was_trained(
    groups: Path, tmp_path: Path
) -> None:
    whole = run(config(tmp_path / "a", [f"{groups}:entries"]))
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path / "b", [f"{groups}:entries"]), callbacks=[Killed()])
    assert (tmp_path / "b" / "checkpoints" / "checkpoint-2" / FROZEN).is_file()
    result = run(config(tmp_path / "b", [f"{groups}:entries"]), resume=True)
    for name in ("adapter_model.safetensors", FROZEN):
        ours, theirs = (load_file(place / name) for place in (result.out, whole.out))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    manifest = load_artifact(whole.out).manifest["frozen"]
    assert manifest["largest_move"] == 0
    assert manifest["entries_by_route"] == {"product": manifest["entries"]}
    assert FROZEN in load_artifact(whole.out).manifest["files"]
    base, tuned = load_model("organism", check=False), load_model(whole.out)
    (group,) = (g for g in load_groups(groups, base) if g.name == "entries")
    for matrix in matrices_of(base, ["W_Q", "W_V"]):
        before, after, mask = weight_of(base, matrix), weight_of(tuned, matrix), group.mask(matrix)
        assert torch.equal(before[mask], after[mask])
        assert float((before != after)[~mask].float().mean()) > 0.95


def test_a_run_says_in_a_line_what_it_freezes_and_watches(groups: Path, tmp_path: Path) -> None:
    told: list[str] = []
    chosen = config(
        tmp_path / "b", [f"{groups}:entries"], training__max_steps=1, monitor__groups=[f"{groups}:units"],
        monitor__concepts=["refusal"], monitor__probes=False, monitor__budget=None, monitor__layers=[3],
    )  # fmt: skip
    run(chosen, on_group=told.append)
    live = adapted_organism()
    sizes = {
        name: module.in_features * module.out_features
        for name, module in live.named_modules()
        if name.endswith(("q_proj", "v_proj"))
    }
    trained = sum(sizes.values())
    entries = sum(size // 50 for size in sizes.values())
    assert told == [
        f"frozen: entries: {entries:,} weights; {entries / trained:.3%} of the {trained:,} weights that are trained;"
        f" from {groups}/manifest.json",
        f"watched: units: 3 neurons, {3 * 3 * 128:,} weights; 0.000% of the {trained:,} weights that are trained;"
        f" from {groups}/manifest.json",
    ]


def test_a_typo_is_the_only_thing_said_and_known_before_torch_is_imported(groups: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from safety_lens.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    for flags, said in (
        (["--data", "benin"], "error: no training data 'benin'; did you mean 'benign'?"),
        (["--data", "benign", "--freeze", f"{groups}:entrys"], f"did you mean {groups}:entries?"),
        (["--data", "benign", "--freeze", str(tmp_path / "none")], "is not a folder"),
        (["--data", "benign", "--concept", "refusl"], "did you mean 'refusal'?"),
        (["--data", "benign", "--concept", "refusal", "--watch", f"{groups}"], "holds several groups"),
        (["--data", "benign", "--penalty", "kl", "--safety", "saftey"], "error: "),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, "finetune", "--out", str(tmp_path / "x"), *flags],
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert said in done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_what_of_a_group_cannot_move_anyway_is_noted(groups: Path, tmp_path: Path) -> None:
    live = adapted_organism()
    _, notes = freeze_named(live, load_groups(groups))
    assert any("frozen entries lie in matrices that are not trained and could not move" in note for note in notes)
    result = run(config(tmp_path / "b", [f"{groups}:units"], training__max_steps=1))
    assert any("nothing to freeze: no matrix of units" in note for note in result.notes)


@pytest.mark.parametrize(
    ("freeze", "changes", "error", "message"),
    [
        ([""], {}, ArtifactError, "holds several groups: name one of entries, units"),
        ([":nope"], {}, ArtifactError, "holds no group 'nope'"),
        (["/nowhere:entries"], {}, ArtifactError, "is not a folder"),
        ([":entries"], {"tuning__dora": True}, DataError, "freeze needs plain LoRA"),
    ],
)
def test_groups_that_cannot_be_frozen_are_refused_before_the_model_loads(
    freeze: list[str], changes: dict[str, Any], error: type[Exception], message: str, groups: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(config(tmp_path / "a", [f"{groups}{end}" for end in freeze], **changes))
    assert not (tmp_path / "a").exists()


def test_a_group_of_a_model_of_the_same_shape_is_refused_by_its_weights(groups: Path, tmp_path: Path) -> None:
    other = zoo_organism(tmp_path / "other")
    with pytest.raises(ModelMismatchError, match="same shape, other weights"):
        run(config(tmp_path / "a", [f"{groups}:entries"], model=str(other)))


def test_the_command_line_takes_groups_and_says_what_froze(groups: Path, tmp_path: Path) -> None:
    flags = ["--data", "benign", "--max-steps", "1", "--batch-size", "2", "--method", "full", "--device", "cpu"]
    found = CliRunner().invoke(
        app,
        [
            "finetune",
            "--out",
            str(tmp_path / "a"),
            *flags,
            "--freeze",
            f"{groups}:entries",
            "--freeze",
            f"{groups}:units",
        ],
    )
    assert found.exit_code == 0, found.output
    manifest = load_artifact(tmp_path / "a").manifest["frozen"]
    assert set(manifest["groups"]) == {f"{groups}:entries", f"{groups}:units"}
    assert manifest["largest_move"] == 0
    assert set(manifest["entries_by_route"]) == {"weight"}


def zoo_organism(folder: Path) -> Path:
    """The organism with one weight changed."""
    shutil.copytree(MODEL_DIR, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_same_run_free_and_frozen_differs_by_what_is_frozen_alone(groups: Path, tmp_path: Path) -> None:
    asked = config(tmp_path / "a", [], training__max_steps=2, training__learning_rate=0.0)
    results = frozen_and_free(asked, {"held": [f"{groups}:entries"]})
    free, held = (load_file(results[name].out / "adapter_model.safetensors") for name in ("free", "held"))
    assert all(torch.equal(free[key], held[key]) for key in free)  # the same first values
    losses = [[r.value for r in results[n].measurements if r.metric == "loss"] for n in ("free", "held")]
    assert losses[0] == losses[1]  # and the same rows
    assert (results["held"].out / FROZEN).is_file()
    assert not (results["free"].out / FROZEN).exists()
    with pytest.raises(DataError, match="none of them named 'free'"):
        frozen_and_free(asked, {"free": [f"{groups}:entries"]})


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:.*copy of dequantize:UserWarning")
def test_under_qlora_frozen_entries_keep_the_dequantised_value(kind: str, groups: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    changes = {"tuning__method": "qlora", "tuning__quantization": kind, "training__max_steps": 2}
    result = run(config(tmp_path / "a", [f"{groups}:entries"], **changes))
    assert any("compared by shapes" in note for note in result.notes)
    assert load_artifact(result.out).manifest["frozen"]["largest_move"] == 0
