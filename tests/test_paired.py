"""Paired statistics: closed forms, parity with scipy, coverage by simulation, and honesty about NaN and ties."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from safety_lens.bootstrap import mean_interval, quantile_interval, ratio_interval
from safety_lens.errors import DataError
from safety_lens.paired import (
    any_above,
    expected_maximum,
    holm,
    monotone,
    paired_effect,
    per_prompt,
    shares,
    sign_flip,
    slopes,
)
from safety_lens.stats import wilson

NAN = float("nan")
GRID = np.linspace(-2.0, 2.0, 9)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- effects and their intervals


def test_the_effect_is_the_mean_over_prompts_of_the_mean_over_seeds() -> None:
    base = np.array([[0.0, 0.0], [1.0, 0.5], [0.2, 0.2]])
    changed = np.array([[1.0, 0.0], [1.0, 0.5], [0.2, 0.5]])
    assert paired_effect(base, changed).value == pytest.approx((0.5 + 0.0 + 0.15) / 3)


def test_a_pair_with_nan_on_either_side_is_left_out_on_both_and_prompts_keep_equal_weight() -> None:
    base = np.array([[0.0, NAN, 0.0], [0.0, 0.0, 0.0], [NAN, NAN, NAN]])
    changed = np.array([[1.0, 9.0, NAN], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]])
    found = per_prompt(base, changed)
    np.testing.assert_array_equal(found.difference, [1.0, 0.5, NAN])
    np.testing.assert_array_equal(found.pairs, [1, 3, 0])
    assert found.n == 2
    assert paired_effect(base, changed).value == pytest.approx(0.75)


def test_the_effect_of_nothing_known_is_unknown_and_one_prompt_has_no_interval() -> None:
    assert np.isnan(paired_effect(np.full((3, 2), NAN), np.zeros((3, 2)))).all()
    one = paired_effect(np.zeros((1, 4)), np.ones((1, 4)))
    assert one.value == 1.0
    assert np.isnan([one.low, one.high]).all()


def test_scores_of_different_shapes_cannot_be_paired() -> None:
    with pytest.raises(DataError, match="one shape"):
        paired_effect(np.zeros((3, 2)), np.zeros((2, 3)))


@pytest.mark.parametrize("n", [8, 30])
def test_the_interval_covers_the_true_mean_in_about_95_of_100_runs(n: int) -> None:
    draw = rng(n)
    hits = 0
    for _ in range(400):
        prompt = draw.normal(0.3, 1.0, n)[:, None]
        base = draw.normal(0.0, 0.5, (n, 3))
        found = paired_effect(base, base + prompt + draw.normal(0, 0.5, (n, 3)), repeats=500)
        hits += found.low <= 0.3 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_an_interval_that_took_seeds_for_prompts_would_cover_far_too_seldom() -> None:
    draw, hits = rng(1), 0
    for _ in range(200):
        cells = (draw.normal(0.3, 1.0, 12)[:, None] + draw.normal(0, 0.2, (12, 5))).ravel()
        found = mean_interval(cells, repeats=500)
        hits += found.low <= 0.3 <= found.high
    assert hits / 200 < 0.75


def test_equal_changes_show_no_spread_and_leave_room_for_unseen_prompts() -> None:
    found = mean_interval(np.full(20, -1.0))
    unseen = 1 - 0.025 ** (1 / 20)
    assert (found.value, found.low) == (-1.0, -1.0)
    assert found.high == pytest.approx(-1 + 2 * unseen)
    still = mean_interval(np.zeros(20))
    assert (still.low, still.high) == (pytest.approx(-unseen), pytest.approx(unseen))
    assert mean_interval(np.zeros(20), span=0.1).high == pytest.approx(0.1 * unseen)


def test_twenty_silent_prompts_do_not_rule_out_a_rare_change() -> None:
    assert mean_interval(np.zeros(20)).high > 0.1  # at a true rate of 0.1 it happens in 12 of 100 runs


def test_a_ratio_is_weighted_by_its_counts_and_its_interval_covers() -> None:
    exact = ratio_interval(np.array([1.0, 30.0]), np.array([1.0, 10.0]))
    assert exact.value == pytest.approx(31 / 11)
    draw, hits = rng(3), 0
    for _ in range(300):
        tokens = draw.integers(5, 40, 30).astype(float)
        level = draw.gamma(2.0, 0.25, 30)
        found = ratio_interval(level * tokens, tokens, repeats=500)
        hits += found.low <= 0.5 <= found.high
    assert 0.89 <= hits / 300 <= 0.99
    assert np.isnan(ratio_interval(np.array([NAN]), np.array([3.0]))).all()


def test_the_interval_of_a_quantile_covers_whatever_the_distribution() -> None:
    draw = rng(4)
    hits = []
    for _ in range(400):
        found = quantile_interval(draw.lognormal(size=60), 0.8)
        hits.append(found.low <= np.exp(stats.norm.ppf(0.8)) <= found.high)
    assert np.mean(hits) >= 0.94
    few = quantile_interval(np.arange(5.0), 0.95)
    assert np.isnan(few.high)
    assert few.value == pytest.approx(np.quantile(np.arange(5.0), 0.95))
    with pytest.raises(DataError, match="quantile"):
        quantile_interval(np.arange(5.0), 1.0)


def test_the_interval_of_the_median_is_that_of_the_sign_test() -> None:
    values = rng(5).normal(size=41)
    found = quantile_interval(values, 0.5)
    ranks = [int((values < limit).sum()) for limit in (found.low, found.high)]
    assert ranks == [13, 27]  # X(14) and X(28), the textbook 95 % limits for n = 41


# ---- sign flips


def test_the_sign_flip_p_is_that_of_scipys_exact_permutation_test() -> None:
    d = rng(6).normal(0.4, 1.0, (3, 9))
    d[1, 2:5] = 0.0
    for row, p in zip(d, sign_flip(d).p, strict=True):
        ours = stats.permutation_test(
            (row,),
            lambda x, axis: np.abs(x.mean(axis)),
            permutation_type="samples",
            alternative="greater",
            n_resamples=10**4,
        )
        assert p == pytest.approx(ours.pvalue)


def test_the_maximum_over_rows_is_counted_by_hand() -> None:
    d = np.array([[1.0, 2.0, 3.0, 1.5], [0.1, -0.2, 0.3, 0.1]])
    t = np.abs(d / np.sqrt((d**2).sum(1, keepdims=True)) @ np.array(list(product([1, -1], repeat=4))).T)
    observed = t[:, 0]
    np.testing.assert_allclose(sign_flip(d).p_max, (t.max(0)[None] >= observed[:, None] - 1e-9).mean(1))


def test_a_small_scale_does_not_hide_a_row_from_the_maximum() -> None:
    d = rng(7).normal(1.0, 0.5, (1, 12))
    both = sign_flip(np.concatenate([d, 1e-3 * d + 0.0, rng(8).normal(0, 100, (1, 12))]))
    assert both.p_max[0] == both.p_max[1] < 0.05


def test_under_the_null_the_sign_flip_p_is_uniform_and_the_maximum_holds_its_level() -> None:
    draw = rng(9)
    alone, first = [], []
    for run in range(300):
        shared = draw.normal(size=14)
        d = shared + draw.normal(size=(4, 14))  # rows that depend on one another
        found = sign_flip(d, repeats=600, seed=run)
        alone.append(found.p[0])
        first.append(found.p_max.min())
    assert np.mean(np.array(alone) <= 0.05) <= 0.09
    assert np.mean(np.array(first) <= 0.05) <= 0.09
    assert stats.kstest(alone, "uniform").pvalue > 0.01


def test_a_real_effect_is_found_and_uncorrected_minima_would_not_hold_their_level() -> None:
    d = rng(10).normal(0, 1, (20, 30))
    assert sign_flip(d).p.min() < 0.1  # the least of twenty looks like something
    assert sign_flip(d + 1.5).p_max.max() < 0.01


def test_sign_flips_are_honest_about_nan_zeros_and_few_prompts() -> None:
    d = np.array([[NAN] * 5, [0.0] * 5, [1.0, 2.0, NAN, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    found = sign_flip(d)
    assert np.isnan(found.p[0])
    assert np.isnan(found.p_max[0])
    assert found.p[1] == found.p_max[1] == 1.0
    assert found.p[2] == pytest.approx(2 / 16)  # four known prompts
    assert found.p[3] == pytest.approx(2 / 32)
    assert np.isnan(sign_flip(np.full((2, 3), NAN)).p).all()


# ---- Holm


def test_holm_is_the_textbook_example_and_keeps_nan_apart() -> None:
    p = np.array([0.01, 0.04, NAN, 0.03, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, NAN, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).max() == 1.0
    assert holm(np.zeros(0)).size == 0
    with pytest.raises(DataError, match="p values"):
        holm(np.array([1.2]))


def test_holm_holds_the_family_wise_error() -> None:
    draw = rng(11)
    wrong = [holm(draw.random(9)).min() <= 0.05 for _ in range(1000)]
    assert np.mean(wrong) <= 0.07
    assert np.mean([draw.random(9).min() <= 0.05 for _ in range(1000)]) > 0.3


# ---- per prompt


def test_shares_count_ties_as_unchanged_and_leave_out_nan() -> None:
    found = shares(np.array([-1.0, -0.5, 0.0, 0.2, NAN]), wanted=-1.0)
    assert (found.improved.value, found.unchanged.value, found.worsened.value, found.n) == (0.5, 0.25, 0.25, 4)
    assert found.improved == wilson(2, 4)
    with pytest.raises(DataError, match="wanted"):
        shares(np.zeros(2), wanted=0.0)


def test_slopes_are_those_of_scipys_regression() -> None:
    scores = rng(12).normal(size=(9, 6)) + GRID[:, None] * np.arange(-2, 4)
    found = slopes(GRID, scores)
    np.testing.assert_allclose(found.slope, [stats.linregress(GRID, y).slope for y in scores.T])
    assert found.mean.value == pytest.approx(found.slope.mean())


def test_the_anti_steerable_share_depends_on_what_is_wanted_and_flat_prompts_are_neither() -> None:
    scores = np.stack([GRID, 2 * GRID, -GRID, np.full(9, 0.1), np.full(9, NAN)], 1)
    up, down = slopes(GRID, scores), slopes(GRID, scores, wanted=-1.0)
    assert (up.steerable.value, up.flat.value, up.anti_steerable.value, up.n) == (0.5, 0.25, 0.25, 4)
    assert down.anti_steerable.value == 0.5
    assert np.isnan(up.slope[4])
    assert not up.trusted
    assert slopes(GRID, np.tile(GRID[:, None], 12)).trusted


def test_prompts_whose_score_never_moves_are_flat_at_every_level() -> None:
    for level in (0.1, 1 / 3, 0.7, 1e6):
        found = slopes(np.array([-1.0, -0.3, 0.0, 0.4, 1.0]), np.full((5, 3), level))
        assert (found.slope == 0).all()
        assert found.flat.value == 1.0


def test_slopes_of_noise_are_trusted_seldom_and_cover_zero() -> None:
    draw = rng(13)
    found = [slopes(GRID, draw.normal(size=(9, 15))) for _ in range(200)]
    assert np.mean([f.mean.low <= 0 <= f.mean.high for f in found]) >= 0.9
    assert np.mean([f.trusted for f in found]) < 0.1


def test_a_missing_coefficient_is_left_out_of_one_prompt_only() -> None:
    scores = np.stack([3 * GRID, 3 * GRID], 1)
    scores[2, 0] = NAN
    np.testing.assert_allclose(slopes(GRID, scores).slope, 3.0)
    scores[1:, 0] = NAN
    assert np.isnan(slopes(GRID, scores).slope[0])


@pytest.mark.parametrize("coeffs", [[1.0, 1.0], [NAN, 1.0], [1.0]])
def test_a_grid_without_two_coefficients_is_refused(coeffs: list[float]) -> None:
    with pytest.raises(DataError, match=r"two different finite coefficients"):
        slopes(np.array(coeffs), np.zeros((len(coeffs), 2)))


def test_monotony_is_scipys_spearman_and_unknown_for_a_constant() -> None:
    scores = np.round(rng(14).normal(size=(9, 5)) + 0.5 * GRID[:, None], 1)
    scores[:, 4] = 0.5
    found = monotone(GRID, scores)
    np.testing.assert_allclose(found.rho[:4], [stats.spearmanr(GRID, y).statistic for y in scores.T[:4]])
    assert np.isnan(found.rho[4])
    assert found.n == 4


def test_any_rising_score_is_perfectly_monotone() -> None:
    found = monotone(GRID, np.exp(GRID)[:, None] * np.ones(6))
    np.testing.assert_allclose(found.rho, 1.0)
    assert found.mean.high == 1.0
    assert found.mean.low < 1.0


# ---- several seeds of one prompt


def test_the_expected_maximum_and_the_share_with_any_seed_above() -> None:
    scores = np.array([[0.1, 0.9], [0.2, 0.3], [NAN, 1.0]])
    assert expected_maximum(scores).value == pytest.approx(0.6)
    assert any_above(scores) == wilson(1, 2)
    assert any_above(scores, 0.3) == wilson(2, 2)


def test_scores_that_are_all_unknown_give_unknown_everywhere_without_a_warning() -> None:
    nothing = np.full((9, 3), NAN)
    found, order = slopes(GRID, nothing), monotone(GRID, nothing)
    assert np.isnan([*found.slope, *found.mean, *found.anti_steerable, *order.rho, *order.mean]).all()
    assert (found.n, order.n, found.trusted) == (0, 0, False)
    assert np.isnan([*expected_maximum(nothing), *any_above(nothing)]).all()
    assert np.isnan(holm(np.full(3, NAN))).all()
