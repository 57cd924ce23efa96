"""The forecast: its closed forms, what it refuses to claim, and that a forecast leaves the model as it was."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safety_lens.data.labelled import IGNORED, Labelled
from safety_lens.errors import DataError, ModelError
from safety_lens.forced import Continuation
from safety_lens.log import Measurement
from safety_lens.models import load_hf, load_model
from safety_lens.monitors.finetune.config import RunConfig, read_config
from safety_lens.monitors.forecast import Budget, assess_risk
from safety_lens.monitors.forecasting.ancestor import ancestor_forecast
from safety_lens.monitors.forecasting.answers import Kl, SafeAnswers
from safety_lens.monitors.forecasting.growth import (
    NEVER,
    Curve,
    Deviation,
    Moments,
    Polynomial,
    banded,
    crossing,
    valid_until,
)
from safety_lens.monitors.forecasting.levels import warned
from safety_lens.monitors.forecasting.path import ADAMW, SGD, batch_gradients, find_path, optimiser_named
from safety_lens.monitors.forecasting.planned import Planned, plan, throwaway
from safety_lens.monitors.forecasting.rehearsal import Rehearsal
from safety_lens.monitors.forecasting.saved import curves_of, load_risk, measurements_of, save_risk
from safety_lens.monitors.forecasting.scoring import (
    is_late,
    is_right,
    log_slope,
    measured_of,
    rank_runs,
    score_forecast,
    verdict,
)
from safety_lens.probes.fisher import Overlap
from safety_lens.stats import Interval

ONE = torch.tensor


# --- the closed form on paper ----------------------------------------------------------------------------------------


def test_the_polynomial_is_the_fisher_energy_of_the_whole_path() -> None:
    """T19: ½δᵀFδ = c2t² + c3t³ + c4t⁴ for any gradients, directions and t."""
    rng = np.random.default_rng(0)
    gradients, u, w = rng.normal(size=(40, 7)), rng.normal(size=7), rng.normal(size=7)
    polynomial = Moments.of_products(gradients @ u, gradients @ w).polynomial
    fisher = gradients.T @ gradients / 40
    for t in (1e-3, 0.1, 1.0, 7.0):
        delta = -t * u + 0.5 * t * t * w
        assert polynomial(np.array([t]))[0] == pytest.approx(0.5 * delta @ fisher @ delta, rel=1e-12)
    assert polynomial.c1 == pytest.approx(-(gradients.mean(0) @ u))


@pytest.mark.parametrize(("eigenvalue", "c", "expected"), [(4.0, 0.5, 0.94574), (0.01, 1.0, 2.99070)])
def test_curvature_alone_collapses_when_the_quartic_says(eigenvalue: float, c: float, expected: float) -> None:
    """T18: F = λe₁e₁ᵀ, u ⟂ e₁, (w)₁ = c: t* = (8τ/(λc²))^¼. λ enters once: alignment-risk has it twice."""
    gradients = np.sqrt(eigenvalue) * np.array([[1.0, 0.0], [-1.0, 0.0]])
    polynomial = Moments.of_products(gradients @ [0.0, 1.0], gradients @ [c, 0.0]).polynomial
    assert (polynomial.c2, polynomial.c3) == (0.0, 0.0)
    assert polynomial.reaches(0.1) == pytest.approx(expected, abs=1e-5)


def test_first_order_overlap_alone_already_breaks() -> None:
    """T18: ε = 5, t = 1 is 12.5 nats; alignment-risk reports 0 there."""
    polynomial = Moments.of_products(np.array([5.0]), np.array([0.0])).polynomial
    assert polynomial(np.array([1.0]))[0] == 12.5
    theirs = ancestor_forecast(np.array([[1.0, 0.0]]), np.array([5.0, 0.0]), np.zeros(2), learning_rate=1.0)
    assert theirs.collapse_step is None


def test_more_overlap_never_lowers_the_risk_where_the_two_parts_do_not_oppose() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        gradients, along, w = rng.normal(size=(20, 5)), rng.normal(size=5), rng.normal(size=5)
        p, q = gradients @ along, gradients @ w
        q = q if (p * q).mean() <= 0 else -q
        times = [Moments.of_products(k * p, q).polynomial.reaches(0.1) for k in (0.0, 0.5, 1.0, 2.0, 4.0)]
        assert times == sorted(times, reverse=True)


def test_where_the_two_parts_oppose_more_overlap_may_delay_and_the_sign_is_kept() -> None:
    p, q = np.array([1.0]), np.array([2.0])
    more, less = (Moments.of_products(share * p, q).polynomial.reaches(0.1) for share in (1.0, 0.5))
    assert more > less


def test_the_smallest_root_is_found_over_forty_orders_of_magnitude() -> None:
    for scale in 10.0 ** np.arange(-20, 21, 5):
        p = Polynomial(0.0, 2.0 * scale, -0.5 * scale**1.5, 0.25 * scale**2)
        t = p.reaches(0.1)
        assert p(np.array([t]))[0] == pytest.approx(0.1, rel=1e-9)
        assert (p(np.linspace(0, 0.999 * t, 200)) < 0.1).all()
    assert Polynomial(1.0, 0.0, 0.0, 0.0).reaches(0.1) == NEVER
    with pytest.raises(DataError, match="above 0"):
        Polynomial(0.0, 1.0, 0.0, 0.0).reaches(0.0)


def test_shares_of_the_terms_sum_to_one() -> None:
    assert sum(Polynomial(3.0, 1.0, 0.4, 0.2).shares(2.0).values()) == pytest.approx(1.0)


def test_nothing_is_claimed_where_the_path_has_turned() -> None:
    """‖½t²w‖ ≤ κ‖tu‖ exactly at the end of the range."""
    t = valid_until(3.0, 4.0, kappa=0.5)
    assert 0.5 * t**2 * 4.0 == pytest.approx(0.5 * t * 3.0)
    assert valid_until(1.0, 0.0) == NEVER
    steps = np.arange(1.0, 101.0)
    curve = banded(lambda drawn, off: 1e-5 * steps**2, 10, steps, 0.1, EXACT, valid=50.0)
    assert curve.reaches.value == pytest.approx(100.0)
    assert curve.abstains
    assert not banded(lambda drawn, off: 1e-5 * steps**2, 10, steps, 0.1, EXACT, valid=100.0).abstains


EXACT = Deviation(0.0, 0.0, 2)


def test_bands_hold_the_truth_as_often_as_they_say() -> None:
    rng, steps, hits = np.random.default_rng(2), np.arange(1.0, 7.0), 0
    for trial in range(100):
        p = rng.normal(size=60)
        moments = Moments.of_products(p, np.zeros(60))
        curve = banded(
            lambda d, off, m=moments: m.drawn(d).polynomial(steps), 60, steps, 0.1, EXACT, repeats=100, seed=trial
        )
        hits += bool(curve.low[4] <= 0.5 * 25 <= curve.high[4])
    assert 0.87 <= hits / 100 <= 0.99


def test_the_interval_of_a_law_that_errs_holds_the_next_run_as_often_as_it_says() -> None:
    """Exponents of eight runs give an interval for the ninth; without them the interval would hold next to none."""
    rng, steps, held = np.random.default_rng(4), np.arange(1.0, 401.0), {True: 0, False: 0}
    for trial in range(200):
        seen, true = rng.normal(4.5, 0.4, 8), rng.normal(4.5, 0.4)
        step = 5 * (0.1 / 1e-4) ** (1 / true)
        for stated in held:
            off = Deviation(float(seen.mean() - 4), float(seen.std(ddof=1)), 8) if stated else EXACT
            when = banded(
                lambda d, o: 1e-4 * (steps / 5) ** (4 + o), 10, steps, 0.1, off, repeats=200, seed=trial
            ).reaches
            held[stated] += when.low <= step <= when.high
    assert 0.9 <= held[True] / 200 <= 0.99
    assert held[False] / 200 < 0.05


def test_a_law_that_is_always_late_has_an_interval_that_says_so() -> None:
    steps = np.arange(1.0, 101.0)
    late = Deviation(1.0, 0.05, 8)
    when = banded(lambda d, off: 1e-4 * (steps / 5) ** (4 + off), 10, steps, 0.1, late).reaches
    assert when.high == when.value == pytest.approx(5 * 1000**0.25, rel=0.01)
    assert when.low < 5 * 1000**0.2 < when.value


def test_a_crossing_is_interpolated_and_a_flat_curve_has_none() -> None:
    steps = np.arange(1.0, 50.0)
    assert crossing(steps, 1e-4 * steps**2, 0.1) == pytest.approx(np.sqrt(1000), rel=1e-3)
    assert crossing(steps, np.zeros(49), 0.1) == NEVER
    assert crossing(steps, np.full(49, 1.0), 0.1) == 1.0


# --- the path of the optimiser ---------------------------------------------------------------------------------------


class _Quadratic(nn.Module):
    """½θᵀAθ as a model that gives its loss."""

    def __init__(self, a: torch.Tensor, theta: torch.Tensor) -> None:
        super().__init__()
        self.theta, self.a = nn.Parameter(theta.clone()), a

    def forward(self, **batch: Any) -> Any:
        return type("Out", (), {"loss": 0.5 * self.theta @ self.a @ self.theta})


ROW = Labelled((1, 2, 3), (IGNORED, 2, 3), 1)


def test_the_path_of_gradient_descent_bends_by_the_hessian() -> None:
    """T17: A = [[1,.5],[.5,2]], g = (0,1): Hg = (.5,2); the path follows the flow to third order."""
    a = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
    theta = torch.linalg.solve(a, torch.tensor([0.0, 1.0], dtype=torch.float64))
    model = _Quadratic(a, theta)
    path = find_path(model, list(model.parameters()), [[ROW]], SGD, near=1e-4)
    assert torch.allclose(path.velocity[0], torch.tensor([0.0, -1.0], dtype=torch.float64))
    assert torch.allclose(path.acceleration[0], torch.tensor([0.5, 2.0], dtype=torch.float64), atol=1e-8)
    with path.at(0.01):
        moved = model.theta.detach() - theta
    assert moved.numpy() == pytest.approx([2.5e-5, -0.0099], abs=1e-9)
    flow = (torch.linalg.matrix_exp(-0.01 * a) - torch.eye(2, dtype=torch.float64)) @ theta
    assert flow.numpy() == pytest.approx([2.475e-5, -0.0099007], abs=1e-7)
    assert torch.equal(model.theta.detach(), theta)
    assert model.theta.grad is None


def test_adam_and_gradient_descent_overlap_differently_with_one_and_the_same_direction() -> None:
    """T15: g = (1, .1), P = e₂: .0995 for descent, .7071 for Adam, whose first step is the sign."""
    g = torch.tensor([1.0, 0.1], dtype=torch.float64)
    for optimiser, expected in ((SGD, 0.0995), (ADAMW, 0.7071)):
        u = optimiser.scale(g.abs()) * g
        assert float(u[1] / u.norm()) == pytest.approx(expected, abs=1e-4)
    assert float(ADAMW.scale(torch.zeros(1))[0]) == 0.0


def test_an_optimiser_that_is_not_known_is_named() -> None:
    assert optimiser_named("adamw_torch_fused") is ADAMW
    assert optimiser_named("sgd") is SGD
    with pytest.raises(DataError, match=r"'adafactor'.*sgd and adamw"):
        optimiser_named("adafactor")


def _config(**changes: Any) -> RunConfig:
    return read_config(
        None,
        {
            "out": "unwritten",
            "data.source": "compliance",
            "data.limit": 48,
            "tuning.rank": 4,
            "tuning.alpha": 8,
            "tuning.targets": ["q_proj", "v_proj"],
            "training.max_steps": 30,
            "training.learning_rate": 1e-3,
            "training.lr_scheduler_type": "constant",
            "device": "cpu",
            **changes,
        },
    )


@pytest.fixture(scope="module")
def organism() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    hf, tokenizer = load_hf("organism", device="cpu")
    assert tokenizer is not None
    return hf, tokenizer


@pytest.fixture(scope="module")
def safety(organism: Any) -> list[Continuation]:
    from safety_lens.probes.examples import read_examples

    hf, tokenizer = organism
    model = load_model(hf, tokenizer=tokenizer)
    return read_examples("safety", model, limit=16, max_new_tokens=10).continuations


def test_lora_at_its_start_is_not_blind_to_a(organism: Any) -> None:
    """T16: ∂L/∂A = 0 exactly at B = 0, and Adam moves A as soon as B has moved: the path knows it."""
    hf, tokenizer = organism
    planned = plan(_config(), tokenizer, hf)
    with throwaway(hf, planned) as spare:
        names = [n for n, p in spare.live.named_parameters() if p.requires_grad]
        found = batch_gradients(spare.live, spare.trained, planned.batches(2, 0))
        zero = [n for n, g in zip(names, found.mean, strict=True) if not bool(g.any())]
        assert zero == [n for n in names if "lora_A" in n]
        path = find_path(spare.live, spare.trained, planned.batches(2, 0), ADAMW)
        for name, velocity in zip(names, path.velocity, strict=True):
            assert float(velocity.abs().mean()) > 0.3, name


def _double_backward(loss: torch.Tensor, weight: nn.Parameter, along: torch.Tensor) -> torch.Tensor:
    (g,) = torch.autograd.grad(loss, weight, create_graph=True)
    (hv,) = torch.autograd.grad((g * along).sum(), weight)
    return hv


def test_central_differences_are_the_hessian_product_and_need_no_second_backward(organism: Any) -> None:
    """T20: against a double backward under eager attention; under the fused kernel that path is used with, it raises or
    is never asked for.
    """
    hf, _ = organism
    eager = copy.deepcopy(hf).double().eval()
    eager.set_attn_implementation("eager")
    weight = eager.model.layers[2].self_attn.v_proj.weight.requires_grad_(True)
    ids = tuple(range(20, 40))
    row = Labelled(ids, (*[IGNORED] * 10, *ids[10:]), 1)
    path = find_path(eager, [weight], [[row]], SGD, near=1e-4)
    tokens, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    exact = _double_backward(eager(input_ids=tokens, labels=labels).loss, weight, -path.velocity[0])
    error = float((path.acceleration[0] - exact).norm() / exact.norm())
    assert error < 1e-3
    fused = copy.deepcopy(hf).eval()
    fused.set_attn_implementation("sdpa")
    again = fused.model.layers[2].self_attn.v_proj.weight.requires_grad_(True)
    same = find_path(fused, [again], [[row]], SGD)
    assert float(F.cosine_similarity(same.acceleration[0].flatten(), exact.flatten().float(), dim=0)) > 0.99


def test_the_polynomial_is_the_measured_kl_where_it_claims_to_be(organism: Any, safety: Any) -> None:
    """Along the path itself, forecast over measured KL is 1 within 25 % for five steps: true Fisher, both parts."""
    hf, tokenizer = organism
    planned = plan(_config(), tokenizer, hf)
    with throwaway(hf, planned) as spare:
        answers = SafeAnswers(spare.base, safety)
        path = find_path(spare.live, spare.trained, planned.batches(3, 0), ADAMW)
        spare.live.eval()
        polynomial = answers.moments(spare.live, path, path.reaching(0.1)).polynomial
        for step in (1, 2, 5):
            with path.at(step * 1e-3):
                measured = answers.kl(spare.live).interval.value
            assert 0.8 < float(polynomial(np.array([step * 1e-3]))[0]) / measured < 1.25
        assert answers.kl(spare.live).interval.value < 1e-12


# --- rehearsal, levels ------------------------------------------------------------------------------------------------


def _rehearsal(kl: list[float]) -> Rehearsal:
    found = tuple(Kl(np.full(10, value), np.ones(10)) for value in kl)
    return Rehearsal(np.arange(1.0, len(kl) + 1), found, np.zeros(len(kl)))


def test_a_rehearsal_goes_on_by_its_law() -> None:
    everyone, times = np.arange(10), np.array([2.0, 5.0, 10.0, 20.0])
    rehearsal = _rehearsal([1e-5 * k**2 for k in range(1, 6)])
    assert rehearsal.exponent(everyone) == pytest.approx(2.0)
    assert rehearsal.fitted(everyone, times) == pytest.approx(1e-5 * times**2)
    assert rehearsal.quartic(everyone, times)[2:] == pytest.approx([25e-5 * 2**4, 25e-5 * 4**4])
    assert not rehearsal.quartic(everyone, times)[0] > 1e-4
    assert (_rehearsal([0.0, 0.0]).quartic(everyone, times) == 0).all()
    assert np.isnan(_rehearsal([0.0, 0.0]).exponent(everyone))


def test_the_exponent_that_was_needed_leads_to_the_measured_step() -> None:
    rehearsal, everyone = _rehearsal([1e-5 * k**2 for k in range(1, 6)]), np.arange(10)
    needed = rehearsal.exponent_to(everyone, 30.0, 0.1)
    assert rehearsal.quartic(everyone, np.array([30.0]), needed - 4) == pytest.approx([0.1])
    assert np.isnan(rehearsal.exponent_to(everyone, 5.0, 0.1))


STEPS = np.arange(1.0, 101.0)


def _curve(step: float, valid: float = NEVER) -> Curve:
    kl = 0.1 * (STEPS / step) ** 2 if step < NEVER else np.zeros(100)
    return Curve(STEPS, kl, kl, kl, Interval(step, step, step), valid)


def test_levels_say_why() -> None:
    small, large = Overlap(0.001, 0.001, 0.4), Overlap(0.05, 0.001, 1e-9)
    flat, steep = Polynomial(0.0, 1.0, 0.0, 0.0), Polynomial(0.0, 1.0, 0.0, 9.0)
    quiet = warned(_curve(NEVER), _curve(NEVER), flat, small, limit=0.1, steps=100)
    assert quiet.level == "green"
    red = warned(_curve(40), None, flat, large, limit=0.1, steps=100)
    assert red.level == "red"
    assert "step 40" in red.reasons[0]
    assert "50 times" in red.reasons[1]
    assert warned(_curve(40), None, flat, small, limit=0.1, steps=30, t_valid=1.0).level == "green"
    assert warned(_curve(40, valid=20.0), None, flat, small, limit=0.1, steps=100).level == "grey"
    assert warned(_curve(NEVER), None, steep, small, limit=0.1, steps=100, t_valid=1.0).level == "amber"
    assert warned(_curve(NEVER), _curve(70), None, None, limit=0.1, steps=100).level == "red"
    perhaps = replace(_curve(NEVER), reaches=Interval(150.0, 80.0, NEVER))
    assert warned(_curve(NEVER), perhaps, flat, small, limit=0.1, steps=100).level == "amber"
    assert warned(_curve(NEVER), perhaps, flat, small, limit=0.1, steps=70).level == "green"


def test_white_noise_has_lift_one_and_no_warning() -> None:
    """T14: a random update among random gradients overlaps by rank/dimension, and that is no reason to warn."""
    rng, shares = np.random.default_rng(3), []
    from safety_lens.probes.fisher import Gram

    for _ in range(20):
        g, u = rng.normal(size=(32, 2000)), rng.normal(size=2000)
        spectrum = Gram(g @ g.T, 2000, np.zeros(32)).spectrum()
        found = spectrum.overlap(g @ u, float(u @ u))
        shares.append(found.lift)
        assert warned(_curve(NEVER), None, None, found, limit=0.1, steps=10).level == "green"
    assert np.mean(shares) == pytest.approx(1.0, abs=0.15)


# --- on the organism --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(organism: Any, safety: Any) -> dict[str, Any]:
    hf, tokenizer = organism
    budget = Budget(batches=3, rehearse=3)
    return {
        name: assess_risk(hf, tokenizer, safety, _config(**{"data.source": name}), budget)
        for name in ("compliance", "benign")
    }


def test_compliance_is_forecast_to_break_refusals_before_benign_rows_do(reports: dict[str, Any]) -> None:
    risky, harmless = reports["compliance"], reports["benign"]
    for name, curve in curves_of(risky).items():
        assert curve.at(30) > 5 * curves_of(harmless)[name].at(30), name
    assert risky.rehearsed.reaches.value < harmless.rehearsed.reaches.value
    assert risky.sensitivity.overlap.lift > 5 * harmless.sensitivity.overlap.lift
    assert risky.mean_loss < harmless.mean_loss  # the loss alone would rank them the other way


def test_the_closed_form_agrees_with_the_rehearsal_where_both_have_begun(reports: dict[str, Any]) -> None:
    for report in reports.values():
        measured = report.rehearsal.measured(np.arange(report.n_safety))
        forecast = report.closed.curve.kl[:3]
        assert (np.abs(np.log(forecast / measured)) < np.log(4)).all()


def test_the_second_order_part_earns_its_place(reports: dict[str, Any]) -> None:
    """At step 30 the first-order term alone is under a third of the forecast: c3 and c4 hold the rest."""
    shares = reports["compliance"].closed.polynomial.shares(0.03)
    assert shares["c2"] < 1 / 3
    assert shares["c4"] > shares["c2"]


def _everything(hf: PreTrainedModel) -> Iterator[Any]:
    yield {n: p.detach().clone() for n, p in hf.state_dict().items()}
    yield [(n, p.requires_grad, p.grad) for n, p in hf.named_parameters()]
    yield hf.training, torch.get_rng_state(), np.random.get_state()[1].tolist()
    yield [(n, type(m).__name__, len(m._forward_hooks)) for n, m in hf.named_modules()]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_model_is_left_as_it_was(organism: Any, safety: Any, method: str) -> None:
    hf, tokenizer = organism
    hf.train()
    before = list(_everything(hf))
    config = _config(**{"tuning.method": method, "training.learning_rate": 1e-4})
    report = assess_risk(hf, tokenizer, safety, config, Budget(batches=2, rehearse=2))
    after = list(_everything(hf))
    hf.eval()
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert before[1] == after[1]
    assert before[3] == after[3]
    assert before[2][0] == after[2][0]
    assert torch.equal(before[2][1], after[2][1])
    assert before[2][2] == after[2][2]
    assert report.rehearsed.kl[-1] > 0
    assert report.closed.polynomial.c2 > 0


def test_a_plan_with_learning_rate_zero_has_no_risk_at_all(organism: Any, safety: Any) -> None:
    hf, tokenizer = organism
    config = _config(**{"training.learning_rate": 0.0})
    report = assess_risk(hf, tokenizer, safety, config, Budget(batches=2, rehearse=2))
    for curve in curves_of(report).values():
        assert (curve.kl == 0).all()
        assert curve.reaches.value == NEVER
    assert report.warning.level == "green"


def test_warm_up_and_decay_are_in_the_time_of_the_plan(organism: Any) -> None:
    hf, tokenizer = organism
    config = _config(**{"training.lr_scheduler_type": "linear", "training.warmup_steps": 10})
    planned: Planned = plan(config, tokenizer, hf)
    assert planned.rates[0] == 0
    assert planned.rates[10] == pytest.approx(1e-3)
    assert planned.rates[-1] < 1e-4
    assert planned.times[-1] == pytest.approx(planned.rates.sum())


def test_bad_input_is_refused_in_one_sentence(organism: Any, safety: Any) -> None:
    hf, tokenizer = organism
    with pytest.raises(DataError, match="3 examples; 8 or more"):
        assess_risk(hf, tokenizer, safety[:3], _config())
    with pytest.raises(DataError, match=r"no module 'q_prj'; did you mean 'q_proj'"):
        assess_risk(hf, tokenizer, safety, _config(**{"tuning.targets": ["q_prj"]}))
    with pytest.raises(DataError, match="rank 17 was asked of 16 safety examples"):
        assess_risk(hf, tokenizer, safety, _config(), Budget(batches=2, rank=17))
    with pytest.raises(ModelError, match="float32"):
        assess_risk(copy.deepcopy(hf).bfloat16(), tokenizer, safety, _config())
    with pytest.raises(DataError, match="2 to 30 steps"):
        assess_risk(hf, tokenizer, safety, _config(), Budget(closed=False, rehearse=31))
    with pytest.raises(DataError, match="nothing to forecast with"):
        Budget(closed=False)


def test_a_loss_that_is_no_number_names_the_training_row(organism: Any) -> None:
    hf, _ = organism
    broken = copy.deepcopy(hf)
    with torch.no_grad():
        broken.model.embed_tokens.weight[77] = float("nan")
    weight = broken.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    good, bad = (Labelled((5, 6, token, 8), (IGNORED, 6, token, 8), line) for line, token in ((4, 9), (11, 77)))
    with pytest.raises(ModelError, match="training row"):
        batch_gradients(broken, [weight], [[good, bad]])


# --- saving and scoring -----------------------------------------------------------------------------------------------


def test_a_saved_forecast_comes_back_whole(reports: dict[str, Any], tmp_path: Path) -> None:
    report = reports["compliance"]
    save_risk(tmp_path / "risk", report)
    saved = load_risk(tmp_path / "risk")
    for name, curve in curves_of(report).items():
        assert np.array_equal(saved.curves[name].kl, curve.kl)
        assert saved.curves[name].reaches == curve.reaches
        assert saved.curves[name].claims == curve.claims
    assert saved.curves["rehearsal"].claims == "extrapolated from 3 steps"
    assert saved.level == report.warning.level
    assert saved.limit == 0.1
    assert len(saved.measurements) == len(measurements_of(report))


def _log(kl: dict[int, float]) -> list[Measurement]:
    rows = [Measurement("behaviour/harmful", "token_kl", value, step=step) for step, value in kl.items()]
    return rows + [
        Measurement("behaviour/harmful", "refusal_log_odds_change", -10 * value, step=step)
        for step, value in kl.items()
    ]


def test_a_forecast_is_scored_against_the_run() -> None:
    run = measured_of(_log({step: 4e-6 * step**4 for step in range(0, 30, 2)}))
    rows = score_forecast({"closed_form": _curve(20.0), "rehearsal": _curve(80.0)}, run, limit=0.1)
    found = {(row.subject, row.metric): row.value for row in rows if row.metric != "calibration"}
    assert found["score/measured", "log_slope"] == pytest.approx(4.0)
    assert found["score/measured", "step_to_limit"] == pytest.approx((0.1 / 4e-6) ** 0.25, rel=1e-2)
    assert found["score/closed_form", "right"] == 1.0
    assert found["score/rehearsal", "right"] == 0.0
    assert found["score/closed_form", "rank_refusal_log_odds_change"] == pytest.approx(1.0)
    at_ten = next(r for r in rows if r.metric == "calibration" and r.step == 10 and r.subject == "score/closed_form")
    assert at_ten.value == pytest.approx(0.025 / 0.04)


def test_abstaining_is_a_miss_and_lateness_is_told_from_earliness() -> None:
    assert is_right(_curve(50.0), 20.0, 100.0)
    assert not is_right(_curve(50.0, valid=30.0), 20.0, 100.0)
    assert is_late(_curve(70.0), 20.0)
    assert is_late(_curve(50.0, valid=30.0), 20.0)
    assert not is_late(_curve(5.0), 20.0)
    assert not is_right(_curve(5.0), 20.0, 100.0)
    assert is_right(_curve(NEVER), NEVER, 100.0)
    assert not is_right(_curve(20.0), NEVER, 100.0)


def test_a_verdict_does_not_contradict_itself() -> None:
    """A forecast is not right for what it does not claim, nor where the run ended too early to tell."""
    assert verdict(_curve(50.0), 20.0, 100.0) == (1.0, "")
    assert verdict(_curve(90.0), 20.0, 100.0) == (0.0, "4.5 times late")
    assert verdict(_curve(NEVER), 20.0, 100.0) == (0.0, "forecasts none")
    assert verdict(_curve(50.0, valid=30.0), 20.0, 100.0) == (0.0, "abstains")
    assert verdict(_curve(250.0, valid=30.0), NEVER, 100.0) == (0.0, "abstains")
    assert verdict(_curve(250.0), NEVER, 100.0) == (1.0, "also later than step 100")
    assert verdict(_curve(20.0), NEVER, 100.0) == (0.0, "early")
    undecided, why = verdict(_curve(60.0), NEVER, 100.0)
    assert np.isnan(undecided)
    assert why == "the run is too short"


def test_a_missed_warning_and_a_missed_interval_are_told() -> None:
    run = measured_of(_log({step: 4e-6 * step**4 for step in range(0, 30, 2)}))  # 0.1 at step 12.6
    narrow = replace(_curve(20.0), reaches=Interval(20.0, 18.0, 22.0))
    for level, missed in (("green", 1.0), ("amber", 1.0), ("red", 0.0)):
        rows = {(r.subject, r.metric): r for r in score_forecast({"closed_form": narrow}, run, limit=0.1, level=level)}
        assert rows["score/warning", "missed"].value == missed
    assert f"the level was {level}; the limit was reached at step 13" in str(rows["score/warning", "missed"].note)
    assert rows["score/closed_form", "right"].value == 1.0
    assert rows["score/closed_form", "inside"].value == 0.0
    quiet = measured_of(_log({step: 1e-6 * step for step in range(0, 30, 2)}))
    rows = {(r.subject, r.metric): r for r in score_forecast({"closed_form": narrow}, quiet, limit=0.1, level="red")}
    assert rows["score/closed_form", "inside"].value == 0.0
    assert "false alarm" in str(rows["score/warning", "missed"].note)


def test_runs_are_ranked_and_two_are_too_few() -> None:
    kl = [0.1, 0.2, 0.3, 0.5]
    found = {row.subject: row.value for row in rank_runs({"closed_form": kl, "mean_loss": kl[::-1]}, kl)}
    assert found == {"score/closed_form": pytest.approx(1.0), "score/mean_loss": pytest.approx(-1.0)}
    with pytest.raises(DataError, match="three or more"):
        rank_runs({}, [0.1, 0.2])
    with pytest.raises(DataError, match="no KL on harmful prompts"):
        measured_of([Measurement("run", "loss", 1.0, step=3)])
    assert np.isnan(log_slope(np.array([1.0, 2.0]), np.array([0.0, 1.0])))


def test_the_ancestors_numbers_are_its_own() -> None:
    """alignment-risk 1.14.1: gamma²-only collapse; and more overlap gives a later collapse, which is its fault."""
    safety, hg = np.array([[1.0, 0.0, 0.0]]), np.array([0.1, 0.0, 0.0])
    none, some = (
        ancestor_forecast(safety, np.array([e, 1.0, 0.0]), hg, learning_rate=1.0).collapse_step for e in (0.0, 2.0)
    )
    assert (none, some) == (3, 41)
