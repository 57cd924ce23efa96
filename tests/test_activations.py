"""Reading activations: equal to plain transformers whatever the batch, prefix or padding; the model left as found."""

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
from safety_lens.errors import DataError, HookNameError, ModelError
from safety_lens.models import POINTS, hooks_at, load_model
from safety_lens.positions import all_tokens, last_k, last_token, mean_last, mean_over, post_instruction

ARCHITECTURE = pytest.mark.parametrize("name", zoo.ARCHITECTURES)
WINDOWED = ["mistral", "gemma2", "gemma3", "qwen2_window", "qwen3_bias_window", "phi3_window"]
ROPES = ["llama_llama3", "llama_linear", "llama_yarn"]


@cache
def pair(name: str) -> tuple[PreTrainedModel, HookedTransformer]:
    """A zoo model and its hooked self; shared by the tests, none of which may leave a trace in it."""
    hf = zoo.make(name)
    return hf, load_model(hf, tokenizer=zoo.tokenizer(), check=False)


def prompt(*ids: int, instruction: tuple[int, int] | None = None) -> Encoded:
    return Encoded(ids=ids, text=f"{len(ids)} tokens", instruction=instruction, answer=None)


def prompts(seed: int = 0, prefix: int = 0, count: int = 6) -> list[Encoded]:
    """Random prompts of lengths 3 to 30, behind a common prefix."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(4, zoo.VOCAB, (prefix,), generator=g).tolist()
    lengths = torch.randint(3, 31, (count,), generator=g).tolist()
    rows = [start + torch.randint(4, zoo.VOCAB, (n,), generator=g).tolist() for n in lengths]
    return [prompt(*ids, instruction=(prefix, len(ids) - 1)) for ids in rows]


def hf_residuals(hf: PreTrainedModel, ids: tuple[int, ...]) -> list[Tensor]:
    """Residual stream behind every block of one prompt run alone: hidden states, and the input of the final norm."""
    body = hf.base_model
    norm = next(getattr(body, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(body, n))
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            states = hf(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    finally:
        handle.remove()
    return [s[0] for s in (*states[1:-1], seen[0])]


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference at any hook, as a share of the largest activation there."""
    assert set(a) == set(b)
    return max(float((a[k] - b[k]).abs().max() / a[k].abs().max()) for k in a)


# --- what is read ---------------------------------------------------------------------------------------------------


@ARCHITECTURE
def test_resid_post_is_hidden_states_and_before_the_final_norm_at_the_last_block(name: str) -> None:
    hf, model = pair(name)
    rows = prompts()
    found = capture(model, rows, hooks_at(model))
    for i, row in enumerate(rows):
        for hook, expected in zip(hooks_at(model), hf_residuals(hf, row.ids), strict=True):
            assert_close(found.acts[hook][i], expected[-1], rtol=1e-4, atol=1e-4 * float(expected[-1].abs().max()))
    with torch.no_grad():  # the trap: the last of HF's hidden states is behind the norm
        post_norm = hf(input_ids=torch.tensor([rows[0].ids]), output_hidden_states=True).hidden_states[-1][0, -1]
    assert (found.acts[hooks_at(model)[-1]][0] - post_norm).norm() / post_norm.norm() > 0.1


@ARCHITECTURE
def test_a_prompt_reads_the_same_alone_as_in_a_ragged_batch_at_every_point(name: str) -> None:
    _, model = pair(name)
    rows = prompts(1)
    points = [p for p in POINTS if not (p == "resid_mid" and model.cfg.parallel_attn_mlp)]
    hooks = [h for point in points for h in hooks_at(model, point)]
    together = capture(model, rows, hooks, positions=all_tokens, batch_size=len(rows))
    alone = [capture(model, [row], hooks, positions=all_tokens) for row in rows]
    assert difference(together.acts, {h: torch.cat([a.acts[h] for a in alone]) for h in hooks}) < 1e-5
    assert together.prompt.tolist() == [i for i, row in enumerate(rows) for _ in row.ids]
    assert together.pos.tolist() == [t for row in rows for t in range(len(row.ids))]


@pytest.mark.parametrize("name", sorted({*zoo.ARCHITECTURES, *WINDOWED, *ROPES}))
def test_a_shared_prefix_run_once_changes_nothing(name: str) -> None:
    _, model = pair(name)
    rows = [*prompts(2, prefix=70), *prompts(3, prefix=66), *prompts(4)]  # two groups and some that share nothing
    hooks = [*hooks_at(model), *hooks_at(model, "z"), "hook_embed"]
    reused = capture(model, rows, hooks, positions=last_k(2))
    whole = capture(model, rows, hooks, positions=last_k(2), reuse_prefix=False)
    assert reused.token_forwards < 0.7 * whole.token_forwards  # there was something to reuse
    assert difference(reused.acts, whole.acts) < 1e-5


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_longrope"])
def test_prompts_longer_than_a_rotary_table_that_depends_on_length_read_as_they_do_alone(name: str) -> None:
    hf, model = pair(name)
    rows = [row for row in (*prompts(2, prefix=40), *prompts(3)) if len(row.ids) <= model.cfg.n_ctx]
    found = capture(model, rows, hooks_at(model))
    for i, row in enumerate(rows):
        for hook, expected in zip(hooks_at(model), hf_residuals(hf, row.ids), strict=True):
            assert_close(found.acts[hook][i], expected[-1], rtol=1e-4, atol=1e-4 * float(expected[-1].abs().max()))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_batch_size_changes_nothing(name: str) -> None:
    _, model = pair(name)
    rows = prompts(5, prefix=20, count=9)
    auto = capture(model, rows, hooks_at(model), positions=mean_last(3))
    for size in (1, 4):
        small = capture(model, rows, hooks_at(model), positions=mean_last(3), batch_size=size)
        assert difference(auto.acts, small.acts) < 1e-5
        assert small.pos.tolist() == auto.pos.tolist()


@pytest.mark.parametrize("rule", [mean_over("instruction"), mean_over("all"), mean_last(3)])
def test_a_mean_is_the_mean_of_its_tokens(rule: Any) -> None:
    _, model = pair("llama")
    rows, hooks = prompts(6, prefix=70), [*hooks_at(model), "hook_embed"]
    every = capture(model, rows, hooks, positions=all_tokens)
    mean = capture(model, rows, hooks, positions=rule)
    for i, row in enumerate(rows):
        for hook in hooks:
            tokens = every.acts[hook][every.prompt == i][list(rule.pick(row))]
            assert_close(mean.acts[hook][i], tokens.mean(0), rtol=1e-4, atol=1e-5)
    assert mean.prompt.tolist() == list(range(len(rows)))


def test_positions_count_from_the_start_of_the_unpadded_prompt() -> None:
    hf, model = pair("llama")
    rows = prompts(7)
    found = capture(model, rows, hooks_at(model, layers=[1]), positions=post_instruction)
    every = [hf_residuals(hf, row.ids)[1] for row in rows]
    assert found.pos.tolist() == [len(row.ids) - 1 for row in rows]
    found = capture(model, rows, hooks_at(model, layers=[1]), positions=last_k(3))
    for act, i, pos in zip(found.acts["blocks.1.hook_resid_post"], found.prompt, found.pos, strict=True):
        assert_close(act, every[int(i)][int(pos)], rtol=1e-4, atol=1e-4)


def test_every_kind_of_hook_has_its_own_width_with_heads_flattened() -> None:
    _, model = pair("qwen3")
    cfg = model.cfg
    hooks = [h for point in POINTS for h in hooks_at(model, point, [2])]
    found = capture(model, prompts(8), hooks)
    width = {point: found.acts[hook].shape[1] for point, hook in zip(POINTS, hooks, strict=True)}
    assert width.pop("mlp_post") == cfg.d_mlp
    assert width.pop("z") == cfg.n_heads * cfg.d_head != cfg.d_model
    assert set(width.values()) == {cfg.d_model}
    assert all(act.dtype == torch.float32 and act.device.type == "cpu" for act in found.acts.values())


def test_z_is_what_the_output_projection_turns_into_attn_out() -> None:
    _, model = pair("llama")
    found = capture(model, prompts(9), ["blocks.1.attn.hook_z", "blocks.1.hook_attn_out"])
    projected = found.acts["blocks.1.attn.hook_z"] @ model.blocks[1].attn.W_O.flatten(0, 1)
    assert_close(found.acts["blocks.1.hook_attn_out"], projected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "neox"])
def test_every_hook_of_a_model_is_read_or_refused_by_name(name: str) -> None:
    _, model = pair(name)
    rows, read = prompts(10, prefix=70, count=3), []
    for hook in model.hook_dict:
        try:
            found = capture(model, rows, [hook])
        except (ModelError, HookNameError) as error:
            assert hook in str(error)  # noqa: PT017
        else:
            assert found.acts[hook].shape[0] == len(rows)
            read.append(hook)
    assert {"hook_embed", "blocks.3.hook_resid_post", "blocks.0.attn.hook_q", "ln_final.hook_normalized"} <= set(read)
    assert not any("pattern" in hook or "scores" in hook for hook in read)


def test_hooks_behind_the_blocks_are_read_and_blocks_behind_the_hooks_are_not_run() -> None:
    _, model = pair("llama")
    ran = []
    handles = [b.register_forward_hook(lambda m, *_, i=i: ran.append(i)) for i, b in enumerate(model.blocks)]
    try:
        capture(model, prompts(11), hooks_at(model, layers=[1]))
        assert set(ran) == {0, 1}
        ran.clear()
        capture(model, prompts(11), ["hook_embed"])
        assert not ran
        found = capture(model, prompts(11), ["ln_final.hook_normalized", "blocks.3.hook_resid_post"])
    finally:
        for handle in handles:
            handle.remove()
    assert set(ran) == {0, 1, 2, 3}
    assert_close(found.acts["ln_final.hook_normalized"], normalised(model, found.acts["blocks.3.hook_resid_post"]))


def normalised(model: HookedTransformer, residual: Tensor) -> Tensor:
    rms = (residual.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    return residual / rms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_come_back_as_float32_or_as_float64_of_a_float64_model(dtype: torch.dtype) -> None:
    hf = zoo.make("llama", dtype=dtype)
    model = load_model(hf, check=False)
    rows = prompts(12, prefix=70)
    found = capture(model, rows, hooks_at(model))
    assert found.acts[hooks_at(model)[0]].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    whole = capture(model, rows, hooks_at(model), reuse_prefix=False)
    assert difference(found.acts, whole.acts) < (1e-12 if dtype == torch.float64 else 0.1)


def test_text_is_tokenised_as_the_model_expects_and_equal_to_the_same_prompt_encoded() -> None:
    _, model = pair("llama")
    found = capture(model, ["w5 w6 w7", "w9"], hooks_at(model), raw=True)
    # The tokenizer's own special tokens are part of the prompt.
    again = capture(model, found.encoded, hooks_at(model))
    assert difference(found.acts, again.acts) == 0.0
    assert [e.ids[-1] for e in found.encoded] == [7, 9]


def test_rows_of_chosen_prompts_come_in_the_order_asked() -> None:
    _, model = pair("llama")
    hook = hooks_at(model)[0]
    found = capture(model, prompts(13), [hook])
    assert torch.equal(found.of([4, 0, 4], hook), found.acts[hook][[4, 0, 4]])
    several = capture(model, prompts(13), [hook], positions=last_k(2))
    with pytest.raises(DataError, match="one to one"):
        several.of([0], hook)


# --- edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["resid_pre", "resid_post", "mlp_out", "mlp_post"])
def test_what_is_written_at_a_hook_is_what_is_read_there(point: str) -> None:
    _, model = pair("llama")
    rows, (hook,) = prompts(14, prefix=70), hooks_at(model, point, [1])
    before = capture(model, rows, [hook, "blocks.3.hook_resid_post"], positions=last_k(2))
    vector = torch.randn(before.acts[hook].shape[1], generator=torch.Generator().manual_seed(0))
    after = capture(
        model,
        rows,
        [hook, "blocks.3.hook_resid_post"],
        positions=last_k(2),
        edits=[(hook, lambda act, hook: act + vector)],
    )
    assert_close(after.acts[hook] - before.acts[hook], vector.expand(len(after.pos), -1), rtol=1e-3, atol=1e-4)
    assert (after.acts["blocks.3.hook_resid_post"] - before.acts["blocks.3.hook_resid_post"]).norm(dim=1).min() > 0.1


def test_an_edit_above_the_hooks_read_does_not_change_them_and_below_does() -> None:
    _, model = pair("llama")
    rows, hooks = prompts(15), hooks_at(model)
    before = capture(model, rows, hooks)
    after = capture(model, rows, hooks, edits=[(hooks[2], lambda act, hook: 0.5 * act)])
    assert difference({h: before.acts[h] for h in hooks[:2]}, {h: after.acts[h] for h in hooks[:2]}) < 1e-5
    assert_close(after.acts[hooks[2]], 0.5 * before.acts[hooks[2]], rtol=1e-3, atol=1e-4)
    assert difference({"": before.acts[hooks[3]]}, {"": after.acts[hooks[3]]}) > 0.01


def test_an_edit_sees_the_tokens_of_a_shared_prefix_too() -> None:
    _, model = pair("llama")
    rows, hook = prompts(16, prefix=70), "blocks.2.hook_resid_post"

    def only_first_tokens(act: Tensor, hook: object) -> Tensor:
        real = torch.zeros(act.shape[1], dtype=torch.bool)
        real[: act.shape[1] // 2] = True
        return torch.where(real[:, None], act + 3.0, act)

    before = capture(model, rows, [hook])
    after = capture(model, rows, [hook], edits=[("blocks.0.hook_resid_post", only_first_tokens)])
    assert (after.acts[hook] - before.acts[hook]).norm(dim=1).min() > 1e-2


# --- the model as found ---------------------------------------------------------------------------------------------


def state(model: HookedTransformer) -> list[Any]:
    hooks = [(n, len(h.fwd_hooks), len(h._forward_hooks), len(h.bwd_hooks)) for n, h in model.hook_dict.items()]
    weights = sum(float(p.double().sum()) for p in model.parameters())
    return [
        hooks,
        model.context_level,
        model.training,
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        weights,
    ]


def test_a_hook_already_on_the_model_acts_as_the_same_edit_does() -> None:
    _, model = pair("llama")
    rows, hook = prompts(seed=3, prefix=40, count=12), hooks_at(model)[-1]

    def double_start(act: Tensor, hook: object) -> Tensor:
        return torch.cat([act[:, :30] * 2, act[:, 30:]], 1)  # reaches into the prefix that rows share

    edit = ("blocks.1.hook_resid_post", double_start)
    passed = capture(model, rows, [hook], edits=[edit]).acts[hook]
    with model.hooks(fwd_hooks=[edit]):
        attached = capture(model, rows, [hook]).acts[hook]
    assert_close(attached, passed)
    assert (capture(model, rows, [hook]).acts[hook] - passed).abs().max() > 0.1  # and the edit does something


@ARCHITECTURE
def test_reading_the_last_token_alone_equals_reading_it_among_all(name: str) -> None:
    """The last wanted block runs for the tokens read only; reading every token runs it whole."""
    _, model = pair(name)
    rows = prompts(seed=4)
    points = [h for p in ("resid_pre", "attn_out", "mlp_post", "z", "resid_post") for h in hooks_at(model, p, [-1])]
    alone, whole = capture(model, rows, points), capture(model, rows, points, positions=all_tokens)
    last = [int((whole.prompt == i).nonzero()[-1]) for i in range(len(rows))]
    for point in points:
        assert_close(alone.acts[point], whole.acts[point][last], rtol=1e-4, atol=1e-4)
    keys = [f"blocks.{model.cfg.n_layers - 1}.attn.hook_k"]
    assert_close(
        capture(model, rows, keys).acts[keys[0]],
        capture(model, rows, keys, positions=all_tokens).acts[keys[0]][last],
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("training", [False, True])
def test_hooks_mode_gradients_and_rng_are_left_as_found(training: bool) -> None:
    model = load_model(zoo.make("llama"), check=False)
    model.train(training)
    seen = []
    model.add_hook("blocks.0.hook_resid_post", lambda act, hook: seen.append(act.shape))
    model.add_perma_hook("blocks.1.hook_resid_post", lambda act, hook: seen.append(act.shape))
    before = state(model)
    capture(model, prompts(17, prefix=70), hooks_at(model))
    assert state(model) == before
    assert seen  # the user's own hooks went on working

    def broken(act: Tensor, hook: object) -> Tensor:
        raise RuntimeError("an edit failed")

    with pytest.raises(RuntimeError, match="an edit failed"):
        capture(model, prompts(17), hooks_at(model), edits=[(hooks_at(model)[1], broken)])
    assert state(model) == before
    with torch.inference_mode(False):
        assert all(p.grad is None for p in model.parameters())


def test_what_was_read_is_not_a_view_that_later_forwards_change() -> None:
    _, model = pair("llama")
    rows = prompts(18)
    first = capture(model, rows, hooks_at(model))
    kept = {h: a.clone() for h, a in first.acts.items()}
    capture(model, prompts(19), hooks_at(model))
    assert all(torch.equal(kept[h], first.acts[h]) for h in kept)
    assert not any(a.requires_grad for a in first.acts.values())


def test_progress_adds_up_to_the_number_of_prompts() -> None:
    _, model = pair("llama")
    done: list[int] = []
    capture(model, prompts(20, prefix=70, count=11), hooks_at(model), batch_size=3, on_batch=done.append)
    assert sum(done) == 11
    assert len(done) >= 4


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_mistyped_hook_is_refused_with_the_nearest_name_and_the_layer_count() -> None:
    _, model = pair("llama")
    with pytest.raises(HookNameError, match=r"'blocks.1.hook_resid_pots'.*'blocks.1.hook_resid_post'.*4 blocks"):
        capture(model, prompts(), ["blocks.1.hook_resid_pots"])
    with pytest.raises(HookNameError, match=r"blocks.9.hook_resid_post"):
        capture(model, prompts(), hooks_at(model), edits=[("blocks.9.hook_resid_post", lambda act, hook: act)])


def test_a_prompt_longer_than_the_context_is_refused_by_its_number() -> None:
    _, model = pair("llama")
    with pytest.raises(DataError, match="prompt 1 has 129 tokens; the model takes 1 to 128"):
        capture(model, [prompt(5, 6), prompt(*[5] * 129)], hooks_at(model))
    with pytest.raises(DataError, match=r"prompt 0 .*the limit is 128.*truncate"):
        capture(model, ["w5 " * 140], hooks_at(model))
    (cut,) = capture(model, ["w5 " * 140], hooks_at(model), truncate=True).encoded
    assert 120 < len(cut.ids) <= 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"hooks": []}, "no hooks"),
        ({"batch_size": 0}, "positive number, got 0"),
        ({"batch_size": "big"}, "got 'big'"),
        ({"positions": last_k(4)}, "last 4 tokens"),
        ({"prompts": ["w5", prompt(5, 6)]}, "partly encoded"),
        ({"prompts": [prompt()]}, "prompt 0 has 0 tokens"),
    ],
)
def test_requests_that_cannot_be_met_say_why(arguments: dict[str, Any], message: str) -> None:
    _, model = pair("llama")
    defaults: dict[str, Any] = {"prompts": [prompt(5, 6)], "hooks": hooks_at(model), "positions": last_token}
    with pytest.raises(DataError, match=message):
        capture(model, **{**defaults, **arguments})


def test_text_for_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        capture(load_model(zoo.make("llama"), check=False), ["w5"], ["hook_embed"])


def test_a_name_where_a_list_of_hooks_belongs_is_said() -> None:
    _, model = pair("llama")
    with pytest.raises(DataError, match="hooks is a list of names"):
        capture(model, prompts(), "blocks.0.hook_resid_post")
