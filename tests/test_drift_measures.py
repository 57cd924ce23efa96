"""The drift measures against closed forms, simulations and independent implementations."""

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.linalg import subspace_angles

from safety_lens import stats
from safety_lens.monitors import measures
from safety_lens.monitors.measures import Grams, grams, strangers


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noisy(mean: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Differences of n pairs, each side with unit noise in every dimension: [1, n, d]."""
    return (mean + rng(seed).standard_normal((n, len(mean))) * np.sqrt(2))[None]


def directions(d: int, length: float, cosine: float) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.zeros(d), np.zeros(d)
    a[0], b[0], b[1] = length, length * cosine, length * np.sqrt(1 - cosine**2)
    return a, b


# --- M1 -------------------------------------------------------------------------------------------------------------


def test_equal_activations_give_exactly_one_with_a_closed_interval() -> None:
    x = rng().standard_normal((3, 10, 40))
    g = grams(x, x)
    for found in (measures.paired_cosine(g), measures.cross_validated_cosine(g, strangers([None] * 10))):
        for part in found:
            known = part[np.isfinite(part)]
            assert np.abs(known - 1).max(initial=0.0) < 1e-12
    assert np.isfinite(measures.paired_cosine(g).low).all()


def test_the_cosine_is_that_of_the_mean_differences() -> None:
    x, y = rng(1).standard_normal((2, 4, 12, 30)) + 0.3
    a, b = x.mean(1), y.mean(1)
    expected = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(measures.paired_cosine(grams(x, y)).value, expected, rtol=1e-12)


def test_a_direction_of_length_zero_has_no_cosine() -> None:
    x = rng().standard_normal((1, 6, 5))
    found = measures.paired_cosine(grams(np.zeros_like(x), x))
    assert np.isnan(found.value).all()
    assert np.isnan(found.low).all()


def test_bca_limits_agree_with_scipy_on_the_same_problem() -> None:
    x, y = noisy(np.ones(8), 30, 3)[0], noisy(np.ones(8), 30, 4)[0]

    def statistic(index: np.ndarray, axis: int = -1) -> np.ndarray:
        a, b = (side[index.astype(int)].mean(-2) for side in (x, y))
        out: np.ndarray = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        return out

    theirs = scipy_stats.bootstrap(
        (np.arange(30.0),), statistic, n_resamples=9000, method="BCa", rng=rng(5), vectorized=True
    ).confidence_interval
    mine = measures.paired_cosine(grams(x[None], y[None]), repeats=9000)
    assert float(mine.low[0]) == pytest.approx(theirs.low, abs=0.01)
    assert float(mine.high[0]) == pytest.approx(theirs.high, abs=0.01)


# --- M2: reliability (T10) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "n", "d"), [(8.0, 40, 4096), (6.0, 24, 200), (20.0, 24, 400)])
def test_reliability_is_the_expected_cosine_of_directions_from_disjoint_samples(gap: float, n: int, d: int) -> None:
    mean = np.zeros(d)
    mean[0] = gap
    apart, inside, values = strangers([None] * n), [], []
    expected = 1 / (1 + d * (2 / n) / gap**2)
    for seed in range(60):
        x = noisy(mean, n, seed)
        value, low, high = (float(part[0]) for part in measures.reliability(x @ x.mT, apart, seed=seed))
        values.append(value)
        inside.append(low <= expected <= high)
    assert float(np.mean(values)) == pytest.approx(expected, abs=0.02)
    assert np.mean(inside) >= 0.9
    pairs = [(noisy(mean, n, 100 + s)[0].mean(0), noisy(mean, n, 400 + s)[0].mean(0)) for s in range(100)]
    simulated = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    assert float(np.mean(values)) == pytest.approx(float(simulated), abs=0.02)


def test_reliability_is_unknown_for_too_few_templates_or_no_direction() -> None:
    x = noisy(np.ones(9), 12, 0)
    few = measures.reliability(x @ x.mT, strangers(["a", "b", "c"] * 4 + [None] * 0))
    assert np.isfinite(few.value).all(), "fewer than four templates count as pairs"
    assert np.isnan(measures.reliability(x[:, :3] @ x[:, :3].mT, strangers([None] * 3)).value).all()
    assert np.isnan(measures.reliability(np.zeros((1, 12, 12)), strangers([None] * 12)).value).all()


# --- M3: the cross-validated cosine (T11) ---------------------------------------------------------------------------


def test_the_cross_validated_cosine_is_unbiased_where_the_plain_one_is_not() -> None:
    d, n = 500, 40
    a, b = directions(d, 3.0, float(np.cos(np.radians(40))))
    apart, over, before, now, plain = strangers([None] * n), [], [], [], []
    one = np.ones((1, n))
    for seed in range(400):
        g = grams(noisy(a, n, seed), noisy(b, n, 10_000 + seed))
        over.append(measures._unbiased(g.across, one, apart)[0, 0])
        before.append(measures._unbiased(g.base, one, apart)[0, 0])
        now.append(measures._unbiased(g.now, one, apart)[0, 0])
        plain.append(float(measures._cosines(g, one)[0, 0]))
    corrected = np.mean(over) / np.sqrt(np.mean(before) * np.mean(now))
    assert corrected == pytest.approx(0.766, abs=0.015)
    assert float(np.mean(plain)) == pytest.approx(0.204, abs=0.02)


def test_averaging_all_halves_is_the_mean_product_of_different_pairs() -> None:
    x, y = rng(2).standard_normal((2, 1, 6, 9)) + 0.5
    from itertools import combinations

    halves = [(list(a), [i for i in range(6) if i not in a]) for a in combinations(range(6), 3)]
    by_halves = np.mean([x[0, a].mean(0) @ y[0, b].mean(0) for a, b in halves])
    mine = measures._unbiased(x @ y.mT, np.ones((1, 6)), strangers([None] * 6))[0, 0]
    assert mine == pytest.approx(by_halves, rel=1e-12)


def test_what_only_a_template_shares_is_not_signal() -> None:
    d, templates = 300, 8
    offsets = rng(7).standard_normal((templates, d)) * 4  # one per template, none in common
    groups = [f"t{i % templates}" for i in range(32)]
    x = (offsets[np.arange(32) % templates] + rng(8).standard_normal((32, d)))[None]
    gram = x @ x.mT
    assert float(measures.reliability(gram, strangers(groups)).value[0]) < 0.3
    blind = measures.reliability(gram, strangers([None] * 32))
    assert float(blind.value[0]) > 0.6, "the wording counts"


def test_noise_alone_has_no_cross_validated_cosine_or_a_wide_one() -> None:
    silent = []
    for seed in range(40):
        g = grams(noisy(np.zeros(200), 24, seed), noisy(np.zeros(200), 24, 500 + seed))
        found = measures.cross_validated_cosine(g, strangers([None] * 24), repeats=200)
        silent.append(bool(np.isnan(found.high[0]) or found.high[0] > 0.95))
    assert np.mean(silent) > 0.95


def test_the_interval_of_the_cross_validated_cosine_covers_the_truth() -> None:
    a, b = directions(60, 6.0, 0.8)
    hits = []
    for seed in range(100):
        g = grams(noisy(a, 30, seed), noisy(b, 30, 700 + seed))
        found = measures.cross_validated_cosine(g, strangers([None] * 30), repeats=300)
        hits.append(bool(found.low[0] <= 0.8 <= found.high[0]))
    assert np.mean(hits) > 0.85


# --- M4, M5, M7, M8 -------------------------------------------------------------------------------------------------


def test_retained_signal_is_norm_ratio_times_cosine_and_growth_is_the_rest() -> None:
    a, b = directions(20, 2.0, 0.6)
    found = measures.lengths(grams(a[None, None], 1.5 * b[None, None]))
    assert float(found.retained[0]) == pytest.approx(1.5 * 0.6)
    assert float(found.growth[0]) == pytest.approx(1.5 * 0.8)
    assert float(found.norm[0]) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("gap", "cosine", "expected"), [(2, 1.0, 0.92135), (2, 0.5, 0.76025), (8, 0.35, 0.97614), (10, 0.35, 0.99334)]
)
def test_auroc_hides_what_d_prime_and_the_operating_point_show(gap: float, cosine: float, expected: float) -> None:
    axis = np.array([cosine, np.sqrt(1 - cosine**2)])
    pos, neg = rng(1).standard_normal((2, 200_000, 2))
    pos[:, 0] += gap
    area, seen = float(stats.auroc(pos @ axis, neg @ axis)), float(stats.d_prime(pos @ axis, neg @ axis))
    assert area == pytest.approx(expected, abs=2e-3)
    assert seen == pytest.approx(gap * cosine, abs=0.02)
    assert float(scipy_stats.norm.cdf(seen / np.sqrt(2))) == pytest.approx(area, abs=1e-3)


@pytest.mark.parametrize("angle", [0.0, 1e-7, 0.3, 1.2, np.pi / 2])
def test_principal_angles_of_known_planes(angle: float) -> None:
    a = np.eye(2, 6)
    b = np.array([[1.0, 0, 0, 0, 0, 0], [0, np.cos(angle), np.sin(angle), 0, 0, 0]])
    np.testing.assert_allclose(measures.principal_angles(a, b), [0.0, angle], atol=1e-9)


def test_principal_angles_agree_with_scipy() -> None:
    a, b = (np.linalg.qr(rng(s).standard_normal((30, k)))[0].T for s, k in ((1, 3), (2, 5)))
    np.testing.assert_allclose(measures.principal_angles(a, b), np.sort(subspace_angles(a.T, b.T)), atol=1e-9)
    assert np.degrees(measures.chance_angle(30, 3)) < np.degrees(measures.principal_angles(a, a + 0)[-1]) + 90


def test_two_concepts_share_a_cosine_after_correction_for_noise() -> None:
    a, b = directions(400, 5.0, 0.5)
    found = [
        measures.crossing(
            noisy(a, 30, s), noisy(b, 30, 50 + s), (strangers([None] * 30), strangers([None] * 30)), repeats=50
        )
        for s in range(30)
    ]
    assert float(np.mean([f.corrected.value[0] for f in found])) == pytest.approx(0.5, abs=0.06)
    assert float(np.mean([f.plain.value[0] for f in found])) < 0.3


# --- T26 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(11, 12, 0.646, 0.985), (8, 12, 0.391, 0.862), (6, 6, 0.610, 1.0), (2, 6, 0.097, 0.700)]
)
def test_wilson_of_the_known_rates(k: int, n: int, low: float, high: float) -> None:
    found = stats.wilson(k, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-4)


def test_grams_hold_all_pairs() -> None:
    x, y = rng().standard_normal((2, 2, 3, 5))
    g = grams(x, y)
    assert isinstance(g, Grams)
    np.testing.assert_allclose(g.across[1], x[1] @ y[1].T)
