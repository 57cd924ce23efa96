"""Batching: every row once, within budget, shared prefixes only where they are shared and pay."""

from itertools import combinations, pairwise
from random import Random

import pytest

from safety_lens.batching import GROUP_OVERHEAD, length_batches, prefix_groups


def work(ids: list[tuple[int, ...]], limits: list[int]) -> int:
    """Tokens that the groups of `prefix_groups` run."""
    return sum(g.prefix + sum(len(ids[i]) - g.prefix for i in g.rows) for g in prefix_groups(ids, limits))


def random_prompts(seed: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Prompts under one of three system prompts, some with a second shared part, some equal, some alone."""
    rng = Random(seed)
    systems = [tuple(rng.choices(range(50), k=rng.randint(20, 90))) for _ in range(3)]
    shots = tuple(rng.choices(range(50), k=70))
    ids = [
        rng.choice(systems)
        + (shots if rng.random() < 0.5 else ())
        + tuple(rng.choices(range(50), k=rng.randint(1, 12)))
        for _ in range(20)
    ]
    return [*ids, ids[0], (7,)], [rng.randint(0, len(p) - 1) for p in [*ids, ids[0], (7,)]]


@pytest.mark.parametrize("seed", range(10))
def test_groups_hold_every_row_once_and_share_what_they_say(seed: int) -> None:
    ids, limits = random_prompts(seed)
    groups = prefix_groups(ids, limits)
    assert sorted(i for g in groups for i in g.rows) == list(range(len(ids)))
    for prefix, rows in groups:
        assert len({ids[i][:prefix] for i in rows}) == 1
        assert all(prefix <= limits[i] < len(ids[i]) for i in rows)  # nothing that is read is skipped


@pytest.mark.parametrize("seed", range(5))
def test_sharing_never_costs_more_tokens_and_pays_where_prefixes_are_long(seed: int) -> None:
    ids, _ = random_prompts(seed)
    free = [len(p) - 1 for p in ids]
    assert work(ids, free) < 0.7 * sum(map(len, ids))
    assert work(ids, [0] * len(ids)) == sum(map(len, ids))


def test_short_prefixes_are_not_worth_groups_of_their_own() -> None:
    ids = [(k, k, 9, r) for k in range(4) for r in range(3)]
    assert [g.prefix for g in prefix_groups(ids, [3] * 12)] == [0]


def test_two_system_prompts_become_two_groups() -> None:
    ids = [(k,) * 300 + (r,) for k in (1, 2) for r in range(4)]
    groups = prefix_groups(ids, [300] * 8)
    assert sorted((g.prefix, sorted(g.rows)) for g in groups) == [(300, [0, 1, 2, 3]), (300, [4, 5, 6, 7])]


def test_one_short_prompt_does_not_keep_the_others_from_sharing() -> None:
    ids = [(1, 5), *((1, *[2] * 200, r) for r in range(8))]
    groups = prefix_groups(ids, [len(p) - 1 for p in ids])
    assert sorted((g.prefix, len(g.rows)) for g in groups) == [(0, 1), (201, 8)]


def test_no_rows_give_no_groups_and_one_row_has_nobody_to_share_with() -> None:
    assert prefix_groups([], []) == []
    assert prefix_groups([(1, 2, 3)], [2]) == [(0, [0])]


@pytest.mark.parametrize("seed", range(10))
def test_batches_hold_every_row_once_within_the_budget(seed: int) -> None:
    rng = Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
    for budget, max_rows in ((50, None), (200, None), (10**9, 7)):
        batches = length_batches(lengths, budget, max_rows=max_rows)
        assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) * max(lengths[i] for i in batch) <= budget or len(batch) == 1
            assert max_rows is None or len(batch) <= max_rows


def test_batches_cut_where_padding_and_overhead_are_fewest() -> None:
    rng = Random(3)
    lengths = sorted(rng.randint(1, 120) for _ in range(9))

    def cost(cuts: tuple[int, ...]) -> int:
        edges = [0, *cuts, len(lengths)]
        return sum(GROUP_OVERHEAD + (b - a) * lengths[b - 1] for a, b in pairwise(edges))

    best = min(cost(cuts) for k in range(len(lengths)) for cuts in combinations(range(1, len(lengths)), k))
    found = length_batches(lengths, 10**9)
    assert sum(GROUP_OVERHEAD + len(b) * max(lengths[i] for i in b) for b in found) == best


def test_no_rows_make_no_batches() -> None:
    assert length_batches([], 100) == []
