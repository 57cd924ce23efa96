"""Estimators: each equals an independent implementation, shares one length and sign convention, and never gives NaN."""

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.testing import assert_close

from safety_lens.errors import DataError
from safety_lens.probes.estimators import (
    METHODS,
    diff_in_means,
    estimator,
    logistic_direction,
    pca_direction,
    robust_direction,
    whitened_direction,
)

ALL = pytest.mark.parametrize("method", sorted(METHODS))


def rows(seed: int, n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(n: int = 40, d: int = 16, gap: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated Gaussian classes whose means differ along the first axis."""
    mix = rows(seed + 50, d, d) / d**0.5 + torch.eye(d, dtype=torch.float64)
    pos, neg = rows(seed, n, d) @ mix, rows(seed + 1, n, d) @ mix
    pos[:, 0] += gap
    return pos + 3.0, neg + 3.0


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


def centred_pca(pos: Tensor, neg: Tensor) -> Tensor:
    """What several libraries do: the first principal axis of the paired differences after centring them."""
    differences = pos - neg
    return torch.linalg.svd(differences - differences.mean(0), full_matrices=False).Vh[0]


# --- each method is what it says ------------------------------------------------------------------------------------


def test_dim_is_the_difference_of_the_class_means_of_unequal_classes() -> None:
    pos, neg = rows(0, 13, 8), rows(1, 29, 8)
    assert_close(diff_in_means(pos, neg), torch.from_numpy(pos.numpy().mean(0) - neg.numpy().mean(0)))


def test_dim_of_half_precision_rows_is_summed_in_double() -> None:
    pos, neg = 100 + rows(2, 500, 4), 100 + rows(3, 500, 4)
    found = diff_in_means(pos.bfloat16(), neg.bfloat16())
    expected = pos.bfloat16().double().mean(0) - neg.bfloat16().double().mean(0)
    assert found.dtype == torch.bfloat16
    assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("d", [8, 200])
def test_whitened_is_ledoit_wolf_covariance_solved_for_the_mean_gap(d: int) -> None:
    pos, neg = classes(n=30, d=d)
    centred = torch.cat([pos - pos.mean(0), neg - neg.mean(0)]).numpy()
    covariance = LedoitWolf(assume_centered=True).fit(centred).covariance_
    expected = np.linalg.solve(covariance, (pos.mean(0) - neg.mean(0)).numpy())
    assert cosine(whitened_direction(pos, neg), torch.from_numpy(expected)) > 1 - 1e-8


def test_whitened_separates_what_dim_cannot_where_one_loud_axis_carries_no_concept() -> None:
    pos, neg = rows(4, 400, 10), rows(5, 400, 10)
    pos[:, 0] += 2.0
    pos[:, :2] += 6.0 * rows(6, 400, 1)
    neg[:, :2] += 6.0 * rows(7, 400, 1)

    def held_out(direction: Tensor) -> float:
        return float(((pos[200:] @ direction)[:, None] > neg[200:] @ direction).double().mean())

    assert held_out(whitened_direction(pos[:200], neg[:200])) > 0.8  # Φ(1) = .84 is possible
    assert held_out(diff_in_means(pos[:200], neg[:200])) < 0.65


def test_logistic_weights_are_those_of_sklearn_carried_back_to_raw_units() -> None:
    pos, neg = classes()
    pos, neg = pos * torch.logspace(-2, 2, 16), neg * torch.logspace(-2, 2, 16)
    x, y = torch.cat([pos, neg]).numpy(), [1] * len(pos) + [0] * len(neg)
    scaler = StandardScaler().fit(x)
    weights = LogisticRegression(C=1.0, max_iter=2000).fit(scaler.transform(x), y).coef_[0]
    expected = torch.from_numpy(weights / scaler.scale_)
    found = logistic_direction(pos, neg)
    assert cosine(found, expected) > 1 - 1e-6
    assert cosine(found, torch.from_numpy(weights)) < 0.9  # the weights in standardised units are another direction


@pytest.mark.parametrize("topic", [3.0, 8.0])
def test_uncentred_pca_finds_the_concept_where_centred_pca_finds_the_topic(topic: float) -> None:
    n, d = 200, 32
    concept, other = torch.eye(d, dtype=torch.float64)[:2]
    found, centred = [], []
    for seed in range(3):
        gap = 10.0 * concept + topic * rows(seed, n, 1) * other  # topics differ from pair to pair, the concept does not
        pos, neg = rows(seed + 10, n, d) + gap, rows(seed + 20, n, d)
        found.append(cosine(pca_direction(pos, neg), concept))
        centred.append(abs(cosine(centred_pca(pos, neg), concept)))
    assert min(found) > 0.9
    assert max(centred) < 0.1


def test_pca_is_the_first_right_singular_vector_of_the_differences_and_deterministic() -> None:
    for n, d in ((12, 40), (40, 12)):
        pos, neg = classes(n=n, d=d)
        expected = torch.linalg.svd(pos - neg).Vh[0]
        assert abs(cosine(pca_direction(pos, neg), expected)) > 1 - 1e-9
        assert torch.equal(pca_direction(pos, neg), pca_direction(pos, neg))


def test_pca_needs_pairs() -> None:
    with pytest.raises(DataError, match="5 positive and 4 negative"):
        pca_direction(rows(0, 5, 3), rows(1, 4, 3))


def test_one_massive_row_turns_dim_and_leaves_robust_where_it_was() -> None:
    pos, neg = 0.1 * rows(0, 60, 16), 0.1 * rows(1, 60, 16)
    pos[:, 0] += 5.0
    spoiled = pos.clone()
    spoiled[7] = 1e4 * torch.nn.functional.normalize(rows(2, 1, 16)[0], dim=0)
    clean = robust_direction(pos, neg)
    assert (robust_direction(spoiled, neg) - clean).norm() / clean.norm() < 0.01
    assert (diff_in_means(spoiled, neg) - diff_in_means(pos, neg)).norm() / clean.norm() > 10


def test_robust_minimises_the_summed_distance_to_the_rows() -> None:
    def cost(centre: Tensor, points: Tensor) -> float:
        return float((points - centre).norm(dim=1).sum())

    points = rows(3, 25, 4) ** 3
    median = robust_direction(points, torch.zeros(5, 4, dtype=torch.float64))
    best = cost(median, points)
    assert best < cost(points.mean(0), points)
    for seed in range(50):
        assert best <= cost(median + 1e-3 * rows(seed, 1, 4)[0], points)


def test_robust_reaches_a_median_that_is_one_of_the_rows() -> None:
    centre = torch.tensor([2.0, -1.0], dtype=torch.float64)
    around = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    points = torch.cat([centre + around * torch.tensor([[1.0], [9.0], [2.0], [5.0]]), centre[None].repeat(3, 1)])
    assert_close(robust_direction(points, torch.zeros(3, 2, dtype=torch.float64)), centre)


# --- what all share -------------------------------------------------------------------------------------------------


@ALL
def test_adding_the_vector_moves_the_negatives_level_with_the_positives_along_it(method: str) -> None:
    pos, neg = classes(n=50, d=8, gap=3.0)
    if method == "robust":  # its length is the gap of medians: symmetrical classes have their means there
        pos, neg = torch.cat([pos, 2 * pos.mean(0) - pos]), torch.cat([neg, 2 * neg.mean(0) - neg])
    vector = estimator(method)(pos, neg)
    unit = vector / vector.norm()
    assert_close((neg.mean(0) + vector) @ unit, pos.mean(0) @ unit)
    assert vector @ (pos.mean(0) - neg.mean(0)) > 0  # it points to the positives
    assert_close(estimator(method)(neg, pos), -vector)


@ALL
def test_scores_on_fresh_rows_of_the_same_classes_are_separated(method: str) -> None:
    pos, neg = classes(n=60, gap=4.0)
    vector = estimator(method)(pos[:30], neg[:30])
    held = (pos[30:] @ vector)[:, None] > (neg[30:] @ vector)[None]
    assert held.double().mean() > 0.9
    noise = (rows(9, 30, 16) @ vector)[:, None] > (rows(10, 30, 16) @ vector)[None]
    assert 0.3 < noise.double().mean() < 0.7  # rows without a difference are not


@ALL
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_equal_sides_give_the_zero_vector_and_never_nan(method: str, spread: float) -> None:
    same = 2.0 + spread * rows(0, 12, 6)
    assert torch.equal(estimator(method)(same, same.clone()), torch.zeros(6, dtype=torch.float64))


@ALL
def test_classes_without_any_spread_give_a_finite_direction_between_them(method: str) -> None:
    pos, neg = torch.tensor([[1.0, 2.0, 0.0]]).repeat(5, 1), torch.tensor([[0.0, 0.0, 0.0]]).repeat(5, 1)
    found = estimator(method)(pos, neg)
    assert torch.isfinite(found).all()
    assert cosine(found, torch.tensor([1.0, 2.0, 0.0])) > 0.75


@ALL
def test_a_side_without_rows_is_an_error_that_counts_both(method: str) -> None:
    with pytest.raises(DataError, match="3 positive and 0 negative"):
        estimator(method)(rows(0, 3, 4), rows(1, 0, 4))


@ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_never_become_a_vector_with_nan(method: str, bad: float) -> None:
    pos, neg = classes(n=10, d=5)
    pos[3, 2] = bad
    with pytest.raises(DataError, match="finite"):
        estimator(method)(pos, neg)


@ALL
def test_direction_keeps_the_dtype_of_the_rows_and_leaves_them_alone(method: str) -> None:
    pos, neg = (side.float() for side in classes())
    before = pos.clone(), neg.clone()
    found = estimator(method)(pos, neg)
    assert found.dtype == torch.float32
    assert torch.equal(pos, before[0])
    assert torch.equal(neg, before[1])
    assert cosine(found, estimator(method)(pos.double(), neg.double())) > 1 - 1e-6


def test_an_unknown_method_is_refused_with_the_list() -> None:
    with pytest.raises(DataError, match=r"'caa' is not known; choose from dim, whitened, pca, logistic, robust"):
        estimator("caa")
