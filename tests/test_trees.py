"""Prompts run as trees: every token on its own path, at its own position, behind its own past and nobody else's."""

from typing import Any

import pytest
import torch
import zoo
from test_activations import ROPES, WINDOWED, difference, hf_residuals, pair, prompt
from torch.testing import assert_close

from safety_lens.activations import Captured, capture
from safety_lens.data import Encoded
from safety_lens.models import hooks_at, load_model
from safety_lens.positions import all_tokens, last_k, last_token, mean_last
from safety_lens.trees import NODES, can_run_trees, grow_trees

EVERY = sorted({*zoo.ARCHITECTURES, *WINDOWED, *ROPES})
SOFT_CAPPED = {"gemma2"}


def branching(seed: int = 0, stems: int = 4, ends: int = 5, stem: int = 12) -> list[Encoded]:
    """Prompts of which every few share a random beginning, and some of those a longer one; in shuffled order."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return list(map(int, torch.randint(4, zoo.VOCAB, (n,), generator=g)))

    rows = []
    for _ in range(stems):
        begins = draw(stem)
        fork = draw(4)
        rows += [begins + (fork if k % 2 else []) + draw(1 + k) for k in range(ends)]
        rows.append(begins)  # one prompt is the beginning of others
    return [prompt(*rows[i]) for i in torch.randperm(len(rows), generator=g)]


def prefixes(rows: list[Encoded]) -> int:
    """Distinct beginnings: what a single tree of all prompts holds."""
    return len({row.ids[: n + 1] for row in rows for n in range(len(row.ids))})


def both(model: Any, rows: list[Encoded], hooks: list[str], positions: Any) -> tuple[Captured, Captured]:
    return (
        capture(model, rows, hooks, positions=positions),
        capture(model, rows, hooks, positions=positions, reuse_prefix=False),
    )


@pytest.mark.parametrize("most", [5, 20, NODES, 10**6])
def test_every_prompt_is_a_path_of_one_tree(most: int) -> None:
    rows = branching()
    trees = grow_trees([row.ids for row in rows], most)
    assert sorted(i for tree in trees for i in tree.rows) == list(range(len(rows)))
    for tree in trees:
        assert len(tree.tokens) <= most or len(tree.rows) == 1
        assert all(parent < node for node, parent in enumerate(tree.parent))
        for row, path in zip(tree.rows, tree.nodes, strict=True):
            assert tuple(tree.tokens[node] for node in path) == rows[row].ids
            assert [tree.depth[node] for node in path] == list(range(len(path)))
            assert [tree.parent[node] for node in path] == [-1, *path[:-1]]
    if most > 1000:
        assert len(trees[0].tokens) == prefixes(rows)  # nothing that is shared stands twice


@pytest.mark.parametrize("name", EVERY)
def test_prompts_in_trees_read_as_they_do_alone_in_transformers(name: str) -> None:
    hf, model = pair(name)
    rows, hooks = branching(1), hooks_at(model)
    found, whole = both(model, rows, hooks, last_token)
    if name in SOFT_CAPPED:
        assert not can_run_trees(model, hooks)
    else:
        assert can_run_trees(model, hooks)
        assert found.token_forwards < 0.7 * whole.token_forwards  # trees were run
    for i, row in enumerate(rows):
        for hook, expected in zip(hooks, hf_residuals(hf, row.ids), strict=True):
            assert_close(found.acts[hook][i], expected[-1], rtol=1e-4, atol=1e-4 * float(expected[-1].abs().max()))


@pytest.mark.parametrize("positions", [all_tokens, last_k(2), mean_last(2)], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "neox", "phi3_window"])
def test_trees_change_nothing_at_any_hook(name: str, positions: Any) -> None:
    """In float64: what is left is the order of sums."""
    model = load_model(zoo.make(name).double(), check=False)
    rows = [row for row in branching(2) if len(row.ids) > 2]
    points = ("resid_pre", "z", "hook_q", "hook_k", "mlp_out", "resid_post")
    hooks = [h for point in points for h in hooks_at(model, point)] + ["hook_embed", "ln_final.hook_normalized"]
    for wanted in (hooks, hooks_at(model, "resid_post", [1]), hooks_at(model, "hook_k", [2])):
        found, whole = both(model, rows, wanted, positions)
        assert found.token_forwards < 0.8 * whole.token_forwards
        assert difference(found.acts, whole.acts) < 1e-12
        assert found.prompt.tolist() == whole.prompt.tolist()
        assert found.pos.tolist() == whole.pos.tolist()


def test_a_sibling_is_never_seen() -> None:
    """Other ends of the same beginning change nothing; in float64, for they may change the order of columns."""
    model = load_model(zoo.make("llama").double(), check=False)
    rows, hooks = branching(3, stems=1), hooks_at(model)
    changed = [prompt(*row.ids[:12], *(t + 1 if t + 1 < zoo.VOCAB else 4 for t in row.ids[12:])) for row in rows[1:]]
    first, second = capture(model, rows, hooks), capture(model, [rows[0], *changed], hooks)
    assert first.token_forwards < sum(len(row.ids) for row in rows)
    for hook in hooks:
        assert_close(first.acts[hook][0], second.acts[hook][0], rtol=1e-12, atol=1e-12)
        longer = [i for i, row in enumerate(rows) if i and len(row.ids) > 12]
        assert not torch.allclose(first.acts[hook][longer], second.acts[hook][longer], rtol=1e-2)


def test_edits_and_scores_are_not_run_in_trees() -> None:
    """An edit may treat a beginning differently in every prompt, and attention patterns have no paths."""
    model = load_model(zoo.make("llama"), check=False)
    rows, (hook,) = branching(4), hooks_at(model, layers=[2])
    found = capture(model, rows, [hook], edits=[("blocks.0.hook_resid_post", lambda act, hook: act * 1.0)])
    assert found.token_forwards >= sum(len(row.ids) for row in rows)
    assert_close(found.acts[hook], capture(model, rows, [hook]).acts[hook], rtol=1e-4, atol=1e-5)
    assert not can_run_trees(model, ["blocks.0.attn.hook_rot_q"])
