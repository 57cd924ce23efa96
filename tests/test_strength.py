"""Strength at a target KL: what is returned was measured, follows the Fisher quadratic, and is never extrapolated."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.forced import Continuation, continuation_kl, continuation_logprobs
from safety_lens.interventions import strength
from safety_lens.interventions.edits import Edit
from safety_lens.interventions.steering import steer
from safety_lens.interventions.strength import MakeHooks, mean_kl, residual_norm, solve_strength
from safety_lens.models import load_model
from safety_lens.probes.directions import Direction
from safety_lens.types import FwdHook

HOOK = "blocks.1.hook_resid_post"


@cache
def model(dtype: torch.dtype = torch.float32) -> HookedTransformer:
    return load_model(zoo.make("llama", dtype=dtype), tokenizer=zoo.tokenizer(), check=False)


def rows(n: int = 6, seed: int = 0) -> list[Continuation]:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, zoo.VOCAB, (5 + i + 6,), generator=g).tolist() for i in range(n)]
    return [Continuation(tuple(x[:-6]), tuple(x[-6:])) for x in ids]


def direction(seed: int = 0) -> Direction:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Direction("joy", HOOK, vector / vector.norm(), "dim")


def adding(seed: int = 0) -> MakeHooks:
    return lambda s: steer(direction(seed), s)


@pytest.mark.parametrize("target", [1e-4, 0.05, 0.8])
def test_the_kl_measured_at_the_solution_is_the_target(target: float) -> None:
    solved = solve_strength(model(), rows(), adding(), target, largest=40.0, tolerance=0.01)
    assert solved.reached
    again = continuation_kl(model(), rows(), [steer(direction(), solved.strength)])[0]
    assert np.isclose(solved.kl, np.concatenate(again).mean(), rtol=1e-12)
    assert np.isclose(solved.kl, target, rtol=0.01)


def test_a_small_strength_costs_half_the_fisher_quadratic() -> None:
    """KL(p‖p_C) = ½C²·gᵀ(diag p − ppᵀ)g + O(C³) with g the derivative of the logits along the vector, by steps."""
    wide, part, step = model(torch.float64), rows(3), 0.05
    up, down, base = (continuation_logprobs(wide, part, hooks=steer(direction(), s)) for s in (step, -step, 0.0))
    quadratic = []
    for high, low, p in zip(up, down, base, strict=True):
        slope = (high.double() - low.double()) / (2 * step)  # of the log-probabilities: the logits' up to a constant
        share = p.double().exp()
        quadratic.append((share * slope**2).sum(-1) - (share * slope).sum(-1) ** 2)
    c = 0.2
    expected = 0.5 * c**2 * float(torch.cat(quadratic).mean())
    assert np.isclose(mean_kl(wide, part, [steer(direction(), c)])[0], expected, rtol=0.03)


def test_quartering_the_target_halves_the_strength() -> None:
    far, near = (solve_strength(model(torch.float64), rows(), adding(), kl, tolerance=1e-3) for kl in (4e-4, 1e-4))
    assert np.isclose(far.strength / near.strength, 2.0, rtol=0.03)


def test_a_target_out_of_reach_is_said_with_the_largest_kl_found() -> None:
    solved = solve_strength(model(), rows(), adding(), 5.0, largest=0.1)
    assert not solved.reached
    assert solved.kl == max(kl for _, kl in solved.evaluations) < 5.0
    assert solved.strength <= 0.1
    assert solved.note is not None
    assert "below the target of 5" in solved.note


def test_no_strength_above_the_largest_is_tried() -> None:
    tried: list[float] = []

    def make(s: float) -> list[FwdHook]:
        tried.append(s)
        return steer(direction(), s)

    solve_strength(model(), rows(), make, 0.5, largest=3.0)
    assert min(tried) > 0
    assert max(tried) <= 3.0
    assert len(tried) == len(set(tried))  # and none twice


class _Curve:
    """Replaces the measurement by a known curve: the search alone is under test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, curve: object) -> None:
        self.calls = 0

        def measured(_: object, __: object, edits: Sequence[Sequence[FwdHook]]) -> list[float]:
            self.calls += 1
            return [float(curve(hooks[0])) for hooks in edits]  # type: ignore[operator,arg-type]

        monkeypatch.setattr(strength, "mean_kl", measured)

    @staticmethod
    def make(s: float) -> list[FwdHook]:
        return [s]  # type: ignore[list-item]


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("target", [1e-6, 0.3, 0.99])
def test_a_power_law_is_solved_in_three_rounds(monkeypatch: pytest.MonkeyPatch, power: float, target: float) -> None:
    curve = _Curve(monkeypatch, lambda s: s**power)
    solved = solve_strength(model(), rows(), curve.make, target, tolerance=1e-3)
    assert np.isclose(solved.strength, target ** (1 / power), rtol=2e-3)
    assert curve.calls <= 4 if power == 2.0 else curve.calls <= 9


def test_of_several_crossings_the_first_is_taken_and_the_fall_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = _Curve(monkeypatch, lambda s: np.sin(6 * s) ** 2)
    solved = solve_strength(model(), rows(), curve.make, 0.4, largest=1.0)
    assert solved.reached
    assert np.isclose(solved.strength, np.arcsin(0.4**0.5) / 6, rtol=0.03)
    assert solved.note is not None
    assert "not monotone" in solved.note


def test_a_jump_across_the_target_is_not_reached_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = _Curve(monkeypatch, lambda s: 0.0 if s < 0.3 else 2.0)
    solved = solve_strength(model(), rows(), curve.make, 0.5)
    assert not solved.reached
    assert solved.kl == 0.0
    assert solved.note is not None
    assert "jumps from 0 to 2 at strength 0.3" in solved.note


def test_an_edit_that_costs_nothing_is_returned_at_its_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = _Curve(monkeypatch, lambda s: 0.0)
    solved = solve_strength(model(), rows(), curve.make, 0.5, largest=8.0)
    assert (solved.strength, solved.kl, solved.reached) == (8.0, 0.0, False)


def test_an_infinite_kl_counts_as_too_much_and_nan_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = _Curve(monkeypatch, lambda s: s**2 if s < 0.6 else np.inf)
    assert np.isclose(solve_strength(model(), rows(), curve.make, 0.3).strength, 0.3**0.5, rtol=0.02)
    curve = _Curve(monkeypatch, lambda s: np.nan if s > 0.6 else s)
    with pytest.raises(DataError, match="gives NaN; lower"):
        solve_strength(model(), rows(), curve.make, 0.3)


@pytest.mark.parametrize(
    "bad", [{"target_kl": 0.0}, {"target_kl": float("nan")}, {"largest": -1.0}, {"tolerance": 0.0}]
)
def test_numbers_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(DataError, match="above 0"):
        solve_strength(model(), rows(), adding(), **{"target_kl": 0.1, **bad})
    with pytest.raises(DataError, match="at least one prompt"):
        solve_strength(model(), [], adding(), 0.1)


def test_the_residual_norm_is_the_root_mean_square_length_without_first_tokens() -> None:
    prompts = ["w10 w11 w12", "w20 w21 w22 w23 w24"]
    lengths: list[Tensor] = []
    for text in prompts:
        tokens = torch.tensor([zoo.tokenizer().encode(text)])
        _, cache_ = model().run_with_cache(tokens, names_filter=HOOK)
        lengths.append(cache_[HOOK][0, 1:].double().norm(dim=1))
    assert np.isclose(residual_norm(model(), prompts, HOOK), float(torch.cat(lengths).pow(2).mean().sqrt()), rtol=1e-5)


def test_solving_leaves_no_hook_behind() -> None:
    solve_strength(model(), rows(), adding(), 0.1, largest=10.0)
    assert not any(point.fwd_hooks for point in model().hook_dict.values())
    assert isinstance(steer(direction(), 1.0)[0][1], Edit)
