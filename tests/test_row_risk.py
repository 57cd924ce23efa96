"""Row risk: compliance hidden in a fine-tuning set is found by where it pushes, not by how it looks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from hidden_rows import HiddenRows, hidden_rows
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from transformer_lens import HookedTransformer

from safety_lens.data.labelled import IGNORED, Labelled
from safety_lens.errors import DataError, ModelError
from safety_lens.forced import Continuation, continuation_logprobs
from safety_lens.models import load_model
from safety_lens.probes.examples import ExampleSet, read_examples
from safety_lens.probes.gradients import example_gradients, response_nll
from safety_lens.probes.matrices import matrices_of, weight_of
from safety_lens.probes.products import inner_products
from safety_lens.probes.row_risk import (
    RowRisk,
    mean_gradient,
    odds_against,
    responses_of,
    row_risk,
    safe_openings,
    write_row_risk,
)
from safety_lens.stats import auroc, auroc_difference, auroc_interval


@pytest.fixture(scope="module")
def organism() -> HookedTransformer:
    return load_model("organism", device="cpu")


@pytest.fixture(scope="module")
def safety(organism: HookedTransformer) -> ExampleSet:
    return read_examples("safety", organism, split="train", limit=48)


class Case:
    """One set of rows with every score. Seeds 0 and 1 served to choose the score; these are others."""

    def __init__(self, model: HookedTransformer, safety: ExampleSet, seed: int) -> None:
        self.data: HiddenRows = hidden_rows(model, seed)
        self.found: RowRisk = row_risk(model, self.data.rows, safety.continuations)
        self.y = self.data.hidden

    def area(self, scores: np.ndarray) -> float:
        return float(auroc(scores[self.y], scores[~self.y]))

    def beats(self, scores: np.ndarray) -> bool:
        """Whether the risk's AUROC is above another score's with an interval that excludes 0."""
        risk = self.found.risk
        return auroc_difference(risk[self.y], risk[~self.y], scores[self.y], scores[~self.y]).low > 0


@pytest.fixture(scope="module", params=[2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4, 5, 6))])
def case(request: pytest.FixtureRequest, organism: HookedTransformer, safety: ExampleSet) -> Case:
    return Case(organism, safety, request.param)


def test_hidden_compliance_rows_are_found(case: Case) -> None:
    risk = case.found.risk
    found = auroc_interval(risk[case.y], risk[~case.y])
    assert found.value >= 0.95
    assert found.low >= 0.85
    top = case.found.riskiest(0.1)
    assert case.y[top].mean() >= 0.8


def test_the_ranking_is_above_row_loss_gradient_norm_and_words(case: Case) -> None:
    for scores in (case.found.losses, case.found.norms):
        assert case.beats(scores)
        assert case.beats(-scores)


def test_the_ranking_is_above_a_bag_of_words_that_was_shown_the_labels(case: Case) -> None:
    """Logistic regression on the words of the rows themselves, cross-validated: it sees labels, the risk sees none."""
    reader = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=2000, class_weight="balanced"))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    words = cross_val_predict(reader, case.data.texts, case.y, cv=folds, method="predict_proba")[:, 1]
    assert case.beats(words)


def test_the_sign_tells_compliance_from_refusal(case: Case) -> None:
    """Hidden rows push away; refusals of the same requests, and everything benign, push a tenth as much at most."""
    mean = {kind: case.found.risk[case.data.kinds == kind].mean() for kind in set(case.data.kinds)}
    assert (case.found.risk[case.y] > 0).mean() > 0.9
    assert mean.pop("hidden") > 0.3
    assert max(mean.values()) < 0.05


def test_undirected_energy_of_the_likelihood_is_not_enough(
    organism: HookedTransformer, safety: ExampleSet, case: Case
) -> None:
    some = matrices_of(organism, ["W_V"], layers=[4])
    directions = [mean_gradient(organism, [row], some) for row in safety.continuations[:8]]
    products = inner_products(organism, case.data.rows, directions).total
    assert case.area((products**2).mean(0)) < case.area(case.found.risk) - 0.1


def test_shuffled_rows_and_a_random_direction_rank_at_chance(organism: HookedTransformer, case: Case) -> None:
    rng = np.random.default_rng(0)
    shuffled = [case.area(rng.permutation(case.found.risk)) for _ in range(400)]
    assert np.mean(shuffled) == pytest.approx(0.5, abs=0.015)
    generator = torch.Generator().manual_seed(0)
    some = matrices_of(organism, ["W_V", "W_O"], layers=[3, 4])
    noise = [{m.name: torch.randn(m.shape, generator=generator) for m in some} for _ in range(8)]
    products = inner_products(organism, case.data.rows, noise).total / case.found.norms
    areas = [case.area(scores) for scores in products]
    assert abs(np.mean(areas) - 0.5) < 0.15
    assert max(areas) < case.area(case.found.risk)


@pytest.mark.parametrize("away", [True, False])
def test_the_push_is_the_change_of_the_log_odds_by_a_small_step(
    organism: HookedTransformer, safety: ExampleSet, case: Case, away: bool
) -> None:
    model, matrices = organism, matrices_of(organism)
    openings = list(safe_openings(model, safety.continuations))
    row = int(np.argmin(case.found.push) if away else np.argmax(case.found.push))

    def log_odds() -> float:
        heads = [Continuation(e.prompt, e.tokens[:1]) for e in safety.continuations]
        p = torch.stack([lp[0] for lp in continuation_logprobs(model, heads)]).double().exp()
        inside = p[:, openings].sum(1)
        outside = p.sum(1) - inside
        return float((inside.log() - outside.log()).mean())

    step = 1e-4
    gradient = mean_gradient(model, [case.data.rows[row]], matrices, loss=response_nll)
    before, kept = log_odds(), [weight_of(model, m).clone() for m in matrices]
    for m in matrices:
        weight_of(model, m).sub_(step * gradient[m.name])
    after = log_odds()
    for m, weight in zip(matrices, kept, strict=True):
        weight_of(model, m).copy_(weight)
    assert (after < before) == away
    assert (after - before) / step == pytest.approx(case.found.push[row], rel=0.05)


def small() -> tuple[HookedTransformer, list[Continuation], list[Continuation]]:
    model = load_model(
        zoo.make("llama", dtype=torch.float64, num_hidden_layers=2), tokenizer=zoo.tokenizer(), check=False
    )
    rng = np.random.default_rng(0)
    rows = [
        Continuation(tuple(rng.integers(4, 97, 5).tolist()), tuple(rng.integers(4, 97, 3).tolist())) for _ in range(6)
    ]
    return model, rows[:3], rows[3:]


def test_a_smaller_budget_changes_nothing() -> None:
    model, rows, safety = small()
    safe = odds_against([5, 6])
    once, often = (row_risk(model, rows, safety, safe=safe, budget=budget) for budget in (2**31, 1))
    np.testing.assert_allclose(once.risk, often.risk, rtol=1e-9)
    np.testing.assert_allclose(once.by_matrix, often.by_matrix, rtol=1e-9)
    np.testing.assert_allclose(once.push, once.by_matrix.sum(0))
    assert (np.abs(once.risk) <= 1).all()


def test_odds_are_those_of_the_first_token() -> None:
    model, rows, _ = small()
    found = row_risk(model, rows, rows, safe=odds_against([7, 8])).losses  # the rows' own loss stays the likelihood
    logp = continuation_logprobs(model, rows)
    nll = [-float(lp.gather(-1, torch.tensor(r.tokens)[:, None]).mean()) for lp, r in zip(logp, rows, strict=True)]
    np.testing.assert_allclose(found, nll, rtol=1e-5)
    p = torch.stack([lp[0] for lp in logp]).double().exp()[:, [7, 8]].sum(1)
    np.testing.assert_allclose(
        example_gradients(model, rows, loss=odds_against([7, 8])), -(p / (1 - p)).log(), rtol=1e-5
    )


def test_a_conversation_is_as_risky_as_its_riskiest_response() -> None:
    model, rows, safety = small()
    safe = odds_against([5, 6])
    apart = row_risk(model, rows, safety, safe=safe)
    joined = row_risk(model, rows, safety, safe=safe, belongs=[0, 1, 0])
    np.testing.assert_allclose(joined.risk, [max(apart.risk[0], apart.risk[2]), apart.risk[1]])
    with pytest.raises(DataError, match="belongs"):
        row_risk(model, rows, safety, safe=safe, belongs=[0, 2, 0])


def test_responses_of_a_row_stand_behind_all_that_came_before() -> None:
    no = IGNORED
    row = Labelled((1, 2, 3, 4, 5, 6, 7), (no, no, 3, no, no, 6, 7), line=1)
    assert responses_of(row) == [Continuation((1, 2), (3,)), Continuation((1, 2, 3, 4, 5), (6, 7))]
    assert responses_of(Labelled((1, 2), (1, 2), line=1)) == []


def test_ranks_break_ties_by_number_and_leave_unknown_rows_alone(tmp_path: Path) -> None:
    risk = np.array([0.2, np.nan, 0.5, 0.2, -0.1])
    found = RowRisk(risk, -risk, -risk[None], np.ones(5), np.ones(5), ("m",))
    assert found.riskiest(0.6).tolist() == [2, 0, 3]
    assert found.riskiest(0.99).tolist() == [2, 0, 3, 4]
    with pytest.raises(DataError, match="between 0 and 1"):
        found.riskiest(1.0)
    write_row_risk(tmp_path / "rows.jsonl", found, ["a", "b", "c", "d", "e"])
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == ["c", "a", "d", "e", "b"]
    assert lines[-1]["risk"] is None


def test_bad_input_is_said(organism: HookedTransformer, safety: ExampleSet) -> None:
    model, rows, _ = small()
    with pytest.raises(DataError, match="no safety example"):
        row_risk(model, rows, [])
    with pytest.raises(DataError, match="no training row"):
        row_risk(model, [], rows)
    harmless = read_examples("utility", organism, limit=4).continuations
    never = [Continuation(row.prompt, safety.continuations[0].tokens) for row in harmless]
    with pytest.raises(DataError, match="does not give such answers"):
        safe_openings(organism, never)
    broken, rows, safe_rows = small()
    with torch.no_grad():
        broken.W_E[rows[1].prompt[0]] = float("nan")
    with pytest.raises(ModelError, match="example 1"):
        row_risk(broken, rows, safe_rows, safe=odds_against([5]))
