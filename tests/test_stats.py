"""Statistics: equal to independent implementations, honest at the edges, uniform where nothing is there."""

from itertools import product

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from safety_lens.errors import DataError
from safety_lens.stats import (
    auroc,
    auroc_difference,
    auroc_interval,
    auroc_permutation,
    d_prime,
    d_prime_interval,
    design_effect,
    exact_bound_if_perfect,
    wilson,
)

NULL_SHARE = 0.09
"""What 200 uniform p values stay below at 0.05 (the 99.5 % point of Binomial(200, 0.05) is 19 of 200)."""


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# --- shares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(11, 12, 0.646, 0.985), (8, 12, 0.391, 0.862), (6, 6, 0.610, 1.0), (2, 6, 0.097, 0.700)]
)
def test_wilson_intervals_have_their_published_values(k: int, n: int, low: float, high: float) -> None:
    found = wilson(k, n)
    assert found.value == k / n
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-4), pytest.approx(high, abs=6e-4))


def test_a_share_of_nothing_is_unknown_and_an_impossible_share_is_an_error() -> None:
    assert all(np.isnan(wilson(0, 0)))
    with pytest.raises(DataError, match="k=7, n=6"):
        wilson(7, 6)


# --- AUROC ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_auroc_equals_sklearn_with_and_without_ties(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for n, m in ((1, 1), (3, 8), (40, 25)):
        pos, neg = rng.integers(0, levels, n) + 0.2 * levels, rng.integers(0, levels, m).astype(float)
        expected = roc_auc_score([1] * n + [0] * m, np.concatenate([pos, neg]))
        assert auroc(pos, neg) == pytest.approx(expected, abs=1e-12)


def test_auroc_of_a_batch_is_that_of_each_row() -> None:
    pos, neg = normal(0, 3, 4, 9) + 0.5, normal(1, 3, 4, 7)
    found = auroc(pos, neg)
    assert found.shape == (3, 4)
    assert found[2, 1] == auroc(pos[2, 1], neg[2, 1])


def test_auroc_is_unknown_for_unknown_scores_and_an_error_without_a_class() -> None:
    assert np.isnan(auroc(np.array([1.0, np.nan]), np.array([0.0])))
    assert np.isnan(auroc_interval(np.array([1.0, np.inf]), np.array([0.0])).value)
    with pytest.raises(DataError, match="0 negative"):
        auroc(np.array([1.0]), np.array([]))


@pytest.mark.parametrize(("angle", "expected"), [(0, 0.92135), (60, 0.76025)])
def test_gaussian_clusters_give_phi_of_d_prime_over_root_two(angle: float, expected: float) -> None:
    n, gap = 20_000, 2.0
    axis = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    pos = (normal(1, n, 2) + np.array([gap, 0.0])) @ axis
    neg = normal(2, n, 2) @ axis
    found = auroc(pos, neg)
    assert found == pytest.approx(expected, abs=0.006)  # 3 standard errors of 20 000 per class
    assert d_prime(pos, neg) == pytest.approx(gap * np.cos(np.radians(angle)), abs=0.04)
    assert scipy_stats.norm.cdf(d_prime(pos, neg) / np.sqrt(2)) == pytest.approx(float(found), abs=0.004)


def test_d_prime_is_the_gap_in_pooled_deviations_and_unknown_without_spread() -> None:
    pos, neg = np.array([3.0, 5.0, 7.0]), np.array([0.0, 2.0])
    assert d_prime(pos, neg) == pytest.approx(4.0 / np.sqrt((2 * 4.0 + 1 * 2.0) / 3))
    assert np.isnan(d_prime(np.ones(4), np.zeros(4)))
    assert np.isnan(d_prime(np.ones(1), np.zeros(4)))


# --- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [20, 40])
@pytest.mark.parametrize("gap", [0.5, 2.0, 3.0])
def test_auroc_intervals_hold_the_true_value_at_least_93_percent_of_the_time(gap: float, n: int) -> None:
    truth = scipy_stats.norm.cdf(gap / np.sqrt(2))
    pos, neg = normal(10, 300, n) + gap, normal(11, 300, n)
    found = [auroc_interval(p, q) for p, q in zip(pos, neg, strict=True)]
    assert np.mean([i.low <= truth <= i.high for i in found]) >= 0.93
    assert np.mean([i.high - i.low for i in found]) < 0.4  # and not by being vacuous
    # Negative control: the usual Wald interval fails where scores separate well.
    if gap == 3.0 and n == 20:
        wald = [wald_interval(p, q) for p, q in zip(pos, neg, strict=True)]
        assert np.mean([low <= truth <= high for low, high in wald]) < 0.93


def wald_interval(pos: np.ndarray, neg: np.ndarray) -> tuple[float, float]:
    area, n, m = float(auroc(pos, neg)), len(pos), len(neg)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    var = (area * (1 - area) + (n - 1) * (q1 - area**2) + (m - 1) * (q2 - area**2)) / (n * m)
    return area - 1.96 * np.sqrt(var), area + 1.96 * np.sqrt(var)


def test_perfect_separation_of_forty_pairs_is_bounded_exactly_and_never_certain() -> None:
    scores = np.linspace(0, 1, 40)
    found = auroc_interval(scores + 5, scores)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.9119, abs=5e-5)
    assert exact_bound_if_perfect(40.0) == pytest.approx(0.025 ** (1 / 40))
    mirrored = auroc_interval(scores, scores + 5)
    assert mirrored == (0.0, 0.0, pytest.approx(1 - found.low))


def test_one_error_among_forty_does_not_raise_the_lower_limit_above_that_of_no_error() -> None:
    scores = np.linspace(0, 1, 40)
    one_error = np.append(scores[1:] + 5, -1.0)
    assert 0.9 < auroc(one_error, scores) < 1.0
    assert auroc_interval(one_error, scores).low <= auroc_interval(scores + 5, scores).low


def test_an_interval_contains_its_value_and_mirrors_when_the_classes_change_places() -> None:
    for seed in range(30):
        pos, neg = normal(seed, 15) + 0.1 * seed, normal(seed + 100, 22)
        here, there = auroc_interval(pos, neg), auroc_interval(neg, pos)
        assert 0.0 <= here.low <= here.value <= here.high <= 1.0
        assert here == pytest.approx((1 - there.value, 1 - there.high, 1 - there.low), abs=1e-6)


def test_copies_of_a_pair_do_not_count_as_evidence_when_their_cluster_is_named() -> None:
    pos, neg = normal(3, 30) + 1.2, normal(4, 30)
    alone = auroc_interval(pos, neg)
    copies = np.repeat(pos, 4), np.repeat(neg, 4)
    clusters = [f"pair {i}" for i in np.repeat(np.arange(30), 4)] * 2
    honest, fooled = auroc_interval(*copies, clusters=clusters), auroc_interval(*copies)
    assert honest.value == pytest.approx(alone.value)
    assert honest.high - honest.low == pytest.approx(alone.high - alone.low, rel=0.2)
    assert fooled.high - fooled.low < 0.65 * (alone.high - alone.low)


def test_clusters_of_one_change_nothing_and_clustering_never_narrows() -> None:
    pos, neg = normal(5, 25) + 1, normal(6, 25)
    assert auroc_interval(pos, neg, clusters=range(50)) == pytest.approx(auroc_interval(pos, neg), rel=0.02)
    for seed in range(20):
        labels = np.random.default_rng(seed).integers(0, 6, 50).tolist()
        assert design_effect(pos, neg, labels) >= 1.0


def test_design_effect_of_clustered_scores_makes_intervals_cover() -> None:
    truth, hits, naive = scipy_stats.norm.cdf(1.0 / np.sqrt(2)), 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        shift = np.repeat(rng.normal(0, np.sqrt(0.5), 2 * 20), 4).reshape(
            2, -1
        )  # half of the variance is the cluster's
        pos, neg = rng.normal(0, np.sqrt(0.5), (2, 80)) + shift
        labels = [f"{side}{c}" for side in "pn" for c in np.repeat(np.arange(20), 4)]
        wide, narrow = auroc_interval(pos + 1.0, neg, clusters=labels), auroc_interval(pos + 1.0, neg)
        hits += wide.low <= truth <= wide.high
        naive += narrow.low <= truth <= narrow.high
    assert hits / 200 >= 0.92
    assert naive / 200 < 0.90  # without the labels the interval claims too much


# --- differences and bootstrap --------------------------------------------------------------------------------------


def delong_standard_error(pos: np.ndarray, neg: np.ndarray) -> float:
    """DeLong et al. 1988 for two scores of the same examples, [score, example], written out from the paper."""
    below = (pos[:, :, None] > neg[:, None, :]) + 0.5 * (pos[:, :, None] == neg[:, None, :])
    s10, s01 = np.cov(below.mean(2)), np.cov(below.mean(1))
    s = s10 / pos.shape[1] + s01 / neg.shape[1]
    return float(np.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1]))


def test_the_difference_of_two_scores_has_delongs_standard_error() -> None:
    rng = np.random.default_rng(7)
    common = rng.normal(size=(2, 60))
    pos = np.stack([common[0] + rng.normal(0, 0.5, 60) + 1.5, common[0] + rng.normal(0, 1.0, 60) + 0.7])
    neg = np.stack([common[1] + rng.normal(0, 0.5, 60), common[1] + rng.normal(0, 1.0, 60)])
    found = auroc_difference(pos[0], neg[0], pos[1], neg[1])
    assert found.value == pytest.approx(float(auroc(pos[0], neg[0]) - auroc(pos[1], neg[1])))
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(delong_standard_error(pos, neg), rel=0.02)


def test_a_score_does_not_differ_from_itself_and_has_no_interval_there() -> None:
    pos, neg = normal(8, 20) + 1, normal(9, 20)
    found = auroc_difference(pos, neg, pos, neg)
    assert found.value == 0.0
    assert np.isnan(found.low)
    assert np.isnan(found.high)


def test_difference_intervals_cover_and_widen_with_clusters() -> None:
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        pos, neg = rng.normal(1.0, 1.0, (2, 40)), rng.normal(0.0, 1.0, (2, 40))
        i = auroc_difference(pos[0], neg[0], pos[1], neg[1])
        covered += i.low <= 0.0 <= i.high
    assert covered / 200 >= 0.92
    labels = [str(k) for k in np.repeat(np.arange(40), 4)] * 2
    four = [np.repeat(x, 4) for x in (pos[0], neg[0], pos[1], neg[1])]
    honest, fooled = auroc_difference(*four, clusters=labels), auroc_difference(*four)
    assert honest.high - honest.low > 1.7 * (fooled.high - fooled.low)


@pytest.mark.parametrize(("n", "per_cluster"), [(40, 1), (80, 4)])
def test_d_prime_intervals_cover_with_pairs_and_with_clusters(n: int, per_cluster: int) -> None:
    hits, narrow, share = 0, 0, 0.5 if per_cluster > 1 else 0.0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        common = np.repeat(rng.normal(0, np.sqrt(share), (2, n // per_cluster)), per_cluster, axis=1)
        pos, neg = rng.normal(0, np.sqrt(1 - share), (2, n)) + common
        labels = np.repeat(np.arange(n // per_cluster), per_cluster).tolist()
        found = d_prime_interval(pos + 1.0, neg, clusters=labels, repeats=400, seed=seed)
        alone = d_prime_interval(pos + 1.0, neg, repeats=400, seed=seed)
        hits += found.low <= 1.0 <= found.high
        narrow += alone.low <= 1.0 <= alone.high
    assert hits / 200 >= 0.90
    if per_cluster > 1:
        assert narrow / 200 < 0.88  # without the labels the interval claims too much


def test_d_prime_intervals_resample_pairs_whole_and_repeat_with_their_seed() -> None:
    common = normal(1, 40)
    pos, neg = common + 1.0 + 0.05 * normal(2, 40), common + 0.05 * normal(3, 40)
    paired, broken = d_prime_interval(pos, neg), d_prime_interval(pos, neg[np.random.default_rng(0).permutation(40)])
    assert paired.value == pytest.approx(broken.value)
    assert paired.high - paired.low < 0.8 * (broken.high - broken.low)
    assert d_prime_interval(pos, neg, seed=1) == d_prime_interval(pos, neg, seed=1)
    assert d_prime_interval(pos, neg, seed=1) != d_prime_interval(pos, neg, seed=2)


def test_d_prime_without_spread_or_from_one_cluster_has_no_limits() -> None:
    assert np.isnan(d_prime_interval(np.ones(5), np.zeros(5))).all()
    found = d_prime_interval(normal(1, 9) + 1, normal(2, 9), clusters=["one"] * 9)
    assert np.isfinite(found.value)
    assert np.isnan([found.low, found.high]).all()


# --- permutation ----------------------------------------------------------------------------------------------------


def test_permutation_p_equals_full_enumeration_by_hand() -> None:
    pos, neg = normal(12, 1, 7) + 0.6, normal(13, 1, 7)
    observed = roc_auc_score([1] * 7 + [0] * 7, np.concatenate([pos[0], neg[0]]))
    areas = []
    for flips in product([False, True], repeat=7):
        swap = np.array(flips)
        sides = np.where(swap, neg[0], pos[0]), np.where(swap, pos[0], neg[0])
        areas.append(roc_auc_score([1] * 7 + [0] * 7, np.concatenate(sides)))
    expected = np.mean(np.array(areas) >= observed - 1e-12)
    assert auroc_permutation(pos, neg).p[0] == pytest.approx(expected, abs=1e-12)


def test_permutation_p_is_never_zero() -> None:
    scores = normal(14, 1, 40)
    sampled = auroc_permutation(scores + 100, scores, repeats=999)
    assert sampled.p[0] == sampled.p_max[0] == 1 / 1000
    assert auroc_permutation(scores[:, :5] + 100, scores[:, :5]).p[0] == 1 / 32


def test_p_is_uniform_under_the_null_and_looking_at_many_hooks_does_not_inflate_p_max() -> None:
    single, corrected, uncorrected = [], [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = auroc_permutation(rng.normal(size=(12, 30)), rng.normal(size=(12, 30)), repeats=400, seed=seed)
        single.append(found.p[0])
        corrected.append(found.p_max.min())
        uncorrected.append(found.p.min())
        assert (found.p_max >= found.p).all()
    assert np.mean(np.array(single) <= 0.05) <= NULL_SHARE
    assert np.mean(np.array(corrected) <= 0.05) <= NULL_SHARE
    assert np.mean(np.array(uncorrected) <= 0.05) > 0.3  # picking the best hook without correction finds "effects"
    assert 0.4 < np.mean(single) < 0.6


def test_permutation_finds_a_real_difference_and_only_in_its_own_direction() -> None:
    pos, neg = normal(15, 2, 40), normal(16, 2, 40)
    pos[0] += 1.0
    found = auroc_permutation(pos, neg, repeats=2000)
    assert found.p_max[0] < 0.01
    assert found.p[1] > 0.05
    assert auroc_permutation(neg, pos, repeats=2000).p[0] > 0.95


def test_hooks_without_scores_get_no_p_and_do_not_touch_the_others() -> None:
    pos, neg = normal(17, 3, 20) + 0.4, normal(18, 3, 20)
    broken = pos.copy()
    broken[1, 3] = np.nan
    found, expected = auroc_permutation(broken, neg, seed=1), auroc_permutation(pos[[0, 2]], neg[[0, 2]], seed=1)
    assert np.isnan([found.p[1], found.p_max[1]]).all()
    assert found.p_max[[0, 2]].tolist() == expected.p_max.tolist()
    nothing = auroc_permutation(np.full((2, 4), np.nan), np.zeros((2, 4)))
    assert np.isnan(nothing.p).all()


def test_pairs_of_one_cluster_are_swapped_together() -> None:
    signs = np.array(
        [1.0, 1.0, 1.0, 1.0, 1.0, -1.0]
    )  # six templates with wording of their own, mostly one way by chance
    gap = np.repeat(signs, 8)
    noise = 0.1 * normal(19, 2, 48)
    pos, neg, labels = (noise[0] + gap)[None], noise[1][None], np.repeat(np.arange(6), 8).tolist()
    assert auroc_permutation(pos, neg).p[0] < 0.001  # 48 independent pairs would be strong evidence
    assert auroc_permutation(pos, neg, clusters=labels).p[0] >= 2 / 64  # six templates are not
    single = auroc_permutation(pos, neg, clusters=range(48), seed=3)
    assert single.p.tolist() == auroc_permutation(pos, neg, seed=3).p.tolist()
