"""Edits land on the tokens asked for while generating, and in a batch with an edit per row every row has its own."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import HookedTransformer

from safety_lens.activations import capture
from safety_lens.data import Encoded
from safety_lens.errors import DataError, HookNameError, ModelMismatchError
from safety_lens.frames import Frame
from safety_lens.generation import Generation, generate
from safety_lens.interventions.edits import Edit
from safety_lens.interventions.rows import _EachOwn, _OneOp, by_row
from safety_lens.interventions.scopes import GENERATED, Scope, scope_named
from safety_lens.interventions.steering import ablate, affine, applied, clamp, steer
from safety_lens.kv import left_padded, right_padded
from safety_lens.models import hooks_at, load_model
from safety_lens.probes.directions import Direction
from safety_lens.types import FwdHook

NEW = 6
MIDDLE = "blocks.1.hook_resid_post"
LATE = "blocks.2.hook_resid_post"
SOME = ["llama", "mistral", "gemma2", "gemma3", "gpt2", "neox", "qwen2_window"]  # GQA, windows, learned positions

# Each scope a second time, as plain indices: prompt length and total length -> tokens.
ASKED: dict[str, Callable[[int, int], range]] = {
    "all": lambda n, end: range(end),
    "prompt": lambda n, end: range(n),
    "generated": lambda n, end: range(n, end),
    "answer": lambda n, end: range(n - 1, end),
    "from:0": lambda n, end: range(end),
    "from:4": lambda n, end: range(4, end),
    "from:20": lambda n, end: range(20, end),
    "from:-1": lambda n, end: range(n - 1, end),
    "from:-3": lambda n, end: range(max(n - 3, 0), end),
}


@cache
def hooked(name: str) -> HookedTransformer:
    # a tied random Gemma 2 repeats its last token whatever is added
    untied = {"tie_word_embeddings": False} if name == "gemma2" else {}
    return load_model(zoo.make(name, **untied), tokenizer=zoo.tokenizer(), check=False)


def direction(seed: int = 0, norm: float = 8.0, hook: str = MIDDLE) -> Direction:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return Direction("random", hook, vector / vector.norm() * norm, "random")


def strong(model: HookedTransformer, seed: int = 0, hook: str = MIDDLE) -> Direction:
    """A random direction three times as long as activations at the hook: it changes what is written."""
    typical = float(capture(model, prompts(), [hook]).acts[hook].norm(dim=1).median())
    return direction(seed, 3 * typical, hook)


def prompts(lengths: tuple[int, ...] = (3, 17, 9, 26, 5), seed: int = 0) -> list[Encoded]:
    g = torch.Generator().manual_seed(seed)
    rows = [tuple(torch.randint(4, zoo.VOCAB, (n,), generator=g).tolist()) for n in lengths]
    return [Encoded(ids=ids, text="", instruction=None, answer=None) for ids in rows]


def written(model: HookedTransformer, rows: list[Encoded], hooks: Any = (), **more: Any) -> list[tuple[int, ...]]:
    return [g.tokens for g in generate(model, rows, hooks=hooks, max_new_tokens=NEW, ignore_eos=True, **more)]


def by_index(
    model: HookedTransformer, ids: tuple[int, ...], new: tuple[int, ...], vector: Tensor, asked: Any, at: str = MIDDLE
) -> tuple[int, ...]:
    """The best token at every step, from one forward of all tokens where the vector is added by plain indexing."""
    tokens = [*ids, *new[:-1]]  # the last token is written and never read
    where = [i for i in asked(len(ids), len(tokens)) if i < len(tokens)]

    def add(act: Tensor, hook: object) -> Tensor:
        out = act.clone()
        out[:, where] += vector
        return out

    with torch.no_grad(), model.hooks(fwd_hooks=[(at, add)]):
        return tuple(model(torch.tensor([tokens]))[0, len(ids) - 1 :].argmax(-1).tolist())


# --- scopes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_edits_under_a_padded_cached_batch_land_on_the_tokens_a_plain_index_would_hit(name: str) -> None:
    model = hooked(name)
    d = strong(model)
    rows = prompts((3, 17, 9, 26))
    texts = {}
    for scope, asked in ASKED.items():
        found = written(model, rows, steer(d, scope=scope))
        for row, tokens in zip(rows, found, strict=True):
            assert tokens == by_index(model, row.ids, tokens, d.vector, asked), scope
        texts[scope] = found
    assert texts["all"] == texts["from:0"]
    assert texts["answer"] == texts["from:-1"]
    distinct = [texts[s] for s in ("all", "prompt", "generated", "answer", "from:4")]
    assert all(a != b for i, a in enumerate(distinct) for b in distinct[:i])  # the scopes can be told apart


def touched_tokens(model: HookedTransformer, rows: list[Encoded], hooks: list[FwdHook]) -> list[set[int]]:
    seen: list[set[int]] = [set() for _ in rows]

    def watch(frame: Frame, x: Tensor, touched: Tensor) -> None:
        for b, row in enumerate(frame.row.tolist()):
            new = set(frame.position[b][touched[b]].tolist())
            assert not new & seen[row]  # no token is edited twice
            seen[row] |= new

    watched = [(at, fn.watched(watch)) for at, fn in hooks if isinstance(fn, Edit)]
    written(model, rows, watched)
    return seen


@pytest.mark.parametrize("scope", list(ASKED))
def test_the_tokens_an_edit_reports_are_the_tokens_asked_for_and_never_padding(scope: str) -> None:
    model, rows = hooked("llama"), prompts()
    seen = touched_tokens(model, rows, steer(direction(), scope=scope))
    for row, tokens in zip(rows, seen, strict=True):
        end = len(row.ids) + NEW - 1  # the last token is written and never read
        assert tokens == set(ASKED[scope](len(row.ids), end))


def test_a_scope_that_spares_the_prompt_touches_no_prompt_token_but_the_last() -> None:
    frame = Frame(torch.arange(12)[None], torch.tensor([[7]]), torch.tensor([0]))
    for name in ASKED:
        scope = scope_named(name)
        early = bool(scope(frame)[0, :6].any())
        if scope.spares_prompt:
            assert not early, name
    assert [name for name in ASKED if scope_named(name).spares_prompt] == ["generated", "answer", "from:-1"]


def test_edits_do_not_see_padding_on_either_side() -> None:
    model, d = hooked("llama"), direction()
    rows = prompts((4, 11, 7))
    ids = [e.ids for e in rows]
    (_, edit), *_ = steer(d)
    alone = [model(torch.tensor([r]), return_type="logits") for r in ids]
    with applied(model, [(MIDDLE, edit)]):
        alone = [model(torch.tensor([r])).detach()[0] for r in ids]
        for padded in (left_padded, right_padded):
            tokens, mask = padded(ids, "cpu")
            logits = model(tokens, attention_mask=mask).detach()
            for b, expected in enumerate(alone):
                assert_close(logits[b][mask[b].bool()], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("scope", ["all", "prompt", "from:-2"])
def test_capture_and_generation_agree_on_what_a_prompt_token_is(scope: str) -> None:
    model, d = hooked("llama"), direction()
    rows = prompts()
    last = hooks_at(model)[-1]
    found = capture(model, rows, [last], edits=steer(d, scope=scope)).acts[last]
    seen: dict[int, Tensor] = {}

    def read(act: Tensor, hook: object) -> None:
        if act.shape[1] > 1:
            seen.update(dict(enumerate(act[:, -1])))  # left padding: the last column is every row's last token

    generate(model, rows, hooks=[*steer(d, scope=scope), (last, read)], max_new_tokens=1)
    # generate batches by length: compare as sets of rows
    order = torch.cdist(torch.stack(list(seen.values())), found).argmin(1)
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert_close(torch.stack(list(seen.values())), found[order], atol=1e-4, rtol=0)


# --- rows -----------------------------------------------------------------------------------------------------------


def kinds(model: HookedTransformer) -> list[list[FwdHook]]:
    d, r = strong(model), strong(model, 1, LATE)
    return [
        steer(d),
        [],
        ablate(d),
        steer(d, -1.0, scope="generated"),
        [*steer(d, 0.5), *steer(r), *ablate(r, at=MIDDLE)],
        clamp(d, 0.8 * d.norm, d.norm, scope="answer"),
        affine(r, 0.5, r.norm, scope="prompt"),
        steer(r, 1.0, scope="from:2"),
        [(MIDDLE, lambda act, hook: act * 1.5)],
    ]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_rows_with_mixed_edits_write_what_each_writes_alone(name: str) -> None:
    model = hooked(name)
    lists = kinds(model)
    rows = prompts((3, 17, 9, 26, 5, 9, 9, 4, 12))
    together = written(model, rows, by_row(model, lists))
    alone = [written(model, [row], hooks)[0] for row, hooks in zip(rows, lists, strict=True)]
    assert together == alone
    plain = written(model, rows)
    assert [a != b for a, b in zip(together, plain, strict=True)].count(True) >= 6  # they did something
    assert together[1] == plain[1]


def test_rows_that_only_add_take_the_gather_and_equal_the_general_way_bit_for_bit() -> None:
    model = hooked("llama")
    d, r = direction(), direction(seed=1)
    lists = [steer(d), [], steer(r, -2.0), steer(d, 0.0)]
    rows = prompts((6, 6, 6, 6))
    fast = by_row(model, lists)
    assert isinstance(fast[0][1], _OneOp)
    chains = [tuple(fn for _, fn in hooks) for hooks in lists]
    slow = [(MIDDLE, _EachOwn(chains))]
    a, b = (capture(model, rows, [MIDDLE, LATE], edits=e).acts for e in (fast, slow))
    assert torch.equal(a[MIDDLE], b[MIDDLE])
    assert torch.equal(a[LATE], b[LATE])
    plain = capture(model, rows, [MIDDLE], edits=by_row(model, [[]] * 4) or [(MIDDLE, lambda act, hook: act)]).acts
    assert torch.equal(a[MIDDLE][1], plain[MIDDLE][1])
    assert torch.equal(a[MIDDLE][3], plain[MIDDLE][3])


def test_rows_keep_their_edits_when_others_end_and_when_batches_are_cut_differently() -> None:
    model = hooked("llama")
    lists = kinds(model)
    rows = prompts((6,) * len(lists), seed=3)
    hooks = by_row(model, lists)

    def run(size: int | str) -> list[Generation]:
        return generate(model, rows, hooks=hooks, max_new_tokens=12, temperature=3.0, seed=1, batch_size=size)

    found = run("auto")
    assert 0 < sum(g.stopped for g in found) < len(found)  # some rows left the batch early
    for size in (1, 4):
        assert [g.tokens for g in run(size)] == [g.tokens for g in found]


def test_a_prompt_shared_by_rows_is_run_once_only_where_no_edit_touches_it_and_nothing_changes() -> None:
    model = hooked("mistral")
    d, r = direction(), direction(seed=1)
    rows = [p for p in prompts((11, 7), seed=5) for _ in range(3)]
    sparing = [steer(d, scope="generated"), [], steer(r, scope="answer")] * 2
    touching = [steer(d, scope="generated"), [], steer(r, scope="from:-2")] * 2

    def widths(lists: list[list[FwdHook]]) -> tuple[int, list[tuple[int, ...]]]:
        ran: list[int] = []

        def count(act: Tensor, hook: object) -> None:
            ran.append(act.shape[0] * act.shape[1])

        count.spares_prompt = True  # type: ignore[attr-defined]  # reads only
        texts = written(model, rows, [("blocks.0.hook_resid_pre", count), *by_row(model, lists)])
        return sum(ran), texts

    shared, texts = widths(sparing)
    full, others = widths(touching)
    assert shared == 2 * 10 + 6 + 6 * (NEW - 1)  # two prefixes once, the last prompt tokens, the written ones
    assert full == 6 * 11 + 6 * (NEW - 1)
    for lists, found in ((sparing, texts), (touching, others)):
        assert found == [written(model, [row], hooks)[0] for row, hooks in zip(rows, lists, strict=True)]


def test_a_one_token_prompt_cannot_be_shared_and_works() -> None:
    model = hooked("llama")
    rows = prompts((1,)) * 3
    lists = [steer(direction(), c, scope="generated") for c in (1.0, 0.0, -1.0)]
    alone = [written(model, [row], hooks)[0] for row, hooks in zip(rows, lists, strict=True)]
    assert written(model, rows, by_row(model, lists)) == alone


def test_hooks_already_on_the_model_that_touch_prompts_stop_the_sharing() -> None:
    model, d = hooked("llama"), direction()
    rows = prompts((9,)) * 2
    plain = written(model, rows, steer(d, scope="generated"))
    with applied(model, steer(direction(seed=2), scope="prompt")):
        both = written(model, rows, steer(d, scope="generated"))
        assert both[0] == written(model, rows[:1], steer(d, scope="generated"))[0]
    assert both != plain


def test_edits_for_fewer_rows_than_prompts_are_refused() -> None:
    model = hooked("llama")
    for lists in ([steer(direction())], [ablate(direction()), []]):
        with pytest.raises(DataError, match=r"by_row was given edits for \d prompts, and prompt \d is being run"):
            written(model, prompts(), by_row(model, lists))


def test_rows_with_mistyped_hooks_or_vectors_of_two_widths_are_refused() -> None:
    model = hooked("llama")
    with pytest.raises(HookNameError):
        by_row(model, [[], steer(direction(), at="blocks.1.hook_resid_pots")])
    narrow = steer(Direction("x", MIDDLE, torch.ones(32), "dim"))
    for lists in ([steer(direction()), narrow], [narrow, narrow]):
        with pytest.raises(ModelMismatchError, match="width 32"):
            written(model, prompts((5, 5)), by_row(model, lists))


def test_a_filter_in_a_row_reaches_the_same_hooks_as_alone() -> None:
    model, d = hooked("llama"), direction()
    names = [name for name, _ in by_row(model, [ablate(d), steer(d, at="blocks.3.hook_resid_mid")])]
    assert len(names) == len(set(names))
    assert "blocks.0.hook_resid_pre" in names
    assert "blocks.3.hook_resid_mid" in names


def test_a_scope_of_ones_own_works_in_rows() -> None:
    model, d = hooked("llama"), direction()

    def even(frame: Frame) -> Tensor:
        return (frame.position >= 0) & (frame.position % 2 == 0)

    rows = prompts((6, 9))
    own = Scope("even", even)
    found = written(model, rows, by_row(model, [steer(d, scope=own), steer(d, scope=GENERATED)]))
    assert found[0] == by_index(model, rows[0].ids, found[0], d.vector, lambda n, end: range(0, end, 2))
    assert found[1] == by_index(model, rows[1].ids, found[1], d.vector, ASKED["generated"])
