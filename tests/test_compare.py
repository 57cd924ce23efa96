"""Equal cost: every method stands at the same benign KL, measured again on other prompts, beside its baselines."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
import zoo
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.errors import DataError
from safety_lens.generation import generate
from safety_lens.interventions.compare import EqualCost, Method, equal_cost
from safety_lens.interventions.comparison import non_dominated
from safety_lens.interventions.edits import Add, Edit
from safety_lens.interventions.scorers.completion import Completion
from safety_lens.interventions.scorers.patterns import CallableScorer
from safety_lens.interventions.side_effects import benign_kl, benign_rows
from safety_lens.interventions.steering import ablate, steer
from safety_lens.interventions.strength import MakeHooks, mean_kl
from safety_lens.interventions.sweeping.controls import random_direction
from safety_lens.log import Measurement
from safety_lens.models import load_model
from safety_lens.probes.directions import Direction
from safety_lens.report.pareto import pareto
from safety_lens.report.plots import save_figure

HOOK = "blocks.1.hook_resid_post"
TARGET = 0.3


@cache
def model() -> HookedTransformer:
    return load_model(zoo.make("llama"), tokenizer=synthetic.chat_tokenizer(), check=False)


def texts(n: int, seed: int) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    return [synthetic.words(g, 4 + i % 5) for i in range(n)]


def _high(completion: Completion) -> float | None:
    return float(np.mean(completion.tokens)) / zoo.VOCAB if completion.tokens else None


HIGH = CallableScorer(_high, "high")


@cache
def direction() -> Direction:
    """The unembedding of high token numbers minus that of low ones: adding it raises the score."""
    u = model().W_U
    return Direction("high", HOOK, (u[:, 60:].mean(1) - u[:, :30].mean(1)).detach(), "dim")


def adding(d: Direction) -> MakeHooks:
    return lambda s: steer(d, s)


def _gated(strength: float) -> list[tuple[str, Edit]]:
    def gate(x: Float[torch.Tensor, "batch pos d"]) -> torch.Tensor:
        return x[..., 0] > 0

    return [(HOOK, Edit(Add(strength * direction().vector), gate=gate))]


METHODS: dict[str, Method | MakeHooks] = {
    "add": Method(adding(direction()), 60.0),
    "gated": Method(_gated, 60.0),
    "weak": Method(adding(direction()), 0.05),
    "ablate": lambda s: ablate(direction(), s, at=HOOK),
}
ASKED, TUNING, BENIGN = texts(10, 0), texts(6, 1), texts(6, 2)


@cache
def compared() -> EqualCost:
    return equal_cost(
        model(), METHODS, ASKED, HIGH, tuning=TUNING, benign=BENIGN, target_kl=TARGET, wanted=1.0,
        random=[Method(adding(random_direction(direction(), k)), 60.0) for k in range(4)],
        instruction="w70 w71", also=[CallableScorer(lambda c: float(len(c.tokens)), "length")], max_new_tokens=6,
    )  # fmt: skip


def test_methods_that_can_reach_the_target_stand_at_it() -> None:
    rows = benign_rows(model(), TUNING, max_new_tokens=6)
    for name in ("add", "gated"):
        solved = compared()[name].solved
        assert solved is not None
        assert solved.reached
        method = METHODS[name]
        assert isinstance(method, Method)
        assert np.isclose(mean_kl(model(), rows, [method.make(solved.strength)])[0], TARGET, rtol=0.03)


def test_the_cost_is_measured_again_on_other_prompts() -> None:
    point, rows = compared()["add"].point, benign_rows(model(), BENIGN, max_new_tokens=6)
    assert point is not None
    again = benign_kl(model(), rows, [steer(direction(), point.strength)])[0]
    assert point.kl == again
    assert np.isclose(again.mean.value, mean_kl(model(), rows, [steer(direction(), point.strength)])[0], rtol=1e-9)


def test_a_method_that_cannot_reach_the_target_is_listed_with_its_largest_kl() -> None:
    weak = compared()["weak"]
    assert weak.solved is not None
    assert not weak.solved.reached
    assert weak.solved.strength == 0.05
    said = [r for r in compared().measurements if r.subject == "weak" and r.metric == "equal_cost"]
    assert [r.value for r in said] == [0.0]
    assert said[0].note is not None
    assert "below the target of 0.3" in said[0].note


def test_the_effect_is_the_paired_change_of_the_score() -> None:
    point = compared()["add"].point
    assert point is not None
    scores = []
    for hooks in ([], steer(direction(), point.strength)):
        said = generate(model(), ASKED, hooks=hooks, max_new_tokens=6)
        scores.append(HIGH([Completion(str(g.prompt), g.text, g.tokens) for g in said]))
    np.testing.assert_allclose(point.change, scores[1] - scores[0])
    assert np.isclose(point.effect.value, np.nanmean(scores[1] - scores[0]))
    assert np.isclose(compared().baseline["high"].value, np.nanmean(scores[0]))
    assert point.effect.low > 0  # adding the unembedding of high tokens raises them


def test_random_directions_at_the_same_cost_do_less_and_are_counted() -> None:
    add, pooled = compared()["add"], compared()["random directions (4)"]
    assert add.point is not None
    assert pooled.point is not None
    assert add.p_random == 1 / 5
    assert pooled.point.effect.value < add.point.effect.value
    assert abs(pooled.point.kl.mean.value / TARGET - 1) < 0.7


def test_the_prompt_only_baseline_costs_what_the_two_prompts_differ_by() -> None:
    point = compared()["prompt only"].point
    assert point is not None
    rows, per_token = benign_rows(model(), BENIGN, max_new_tokens=6), []
    told = [[{"role": "system", "content": "w70 w71"}, {"role": "user", "content": text}] for text in BENIGN]
    for row, prompt in zip(rows, encode_for(model(), told), strict=True):
        found = []
        for ids in (row.prompt, prompt.ids):
            with torch.no_grad():
                logits = model()(torch.tensor([[*ids, *row.tokens[:-1]]]))[0]
            found.append(logits[-len(row.tokens) :].double().log_softmax(-1))
        per_token.append((found[0].exp() * (found[0] - found[1])).sum(-1))
    assert np.isclose(point.kl.mean.value, float(torch.cat(per_token).mean()), rtol=1e-3)
    assert np.isnan(point.strength)


def test_firing_is_reported_for_gated_methods_alone_and_is_the_share_of_tokens() -> None:
    gated, add = compared()["gated"].point, compared()["add"].point
    assert gated is not None
    assert add is not None
    assert 0.05 < gated.firing < 0.95
    assert np.isnan(add.firing)


def test_the_front_is_that_of_a_search_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    cost, gain = rng.integers(0, 6, 40).astype(float), rng.integers(0, 6, 40).astype(float)
    beaten = [
        any(c <= cost[i] and g >= gain[i] and (c < cost[i] or g > gain[i]) for c, g in zip(cost, gain, strict=True))
        for i in range(40)
    ]
    assert non_dominated(cost, gain).tolist() == [not b for b in beaten]
    assert any(p.on_front for r in compared().results for p in r.points)


def test_every_number_is_a_row_and_survives_the_disk() -> None:
    rows = compared().measurements
    metrics = {r.metric for r in rows if r.subject == "add"}
    assert {"effect/high", "benign_kl", "benign_kl_p95", "degenerate", "length", "p", "p_max", "p_random"} <= metrics
    back = [Measurement.from_row(json.loads(r.to_json())) for r in rows]
    assert [(r.subject, r.metric, r.coeff) for r in back] == [(r.subject, r.metric, r.coeff) for r in rows]


def test_the_plot_is_drawn_from_rows_alone_with_every_method_named(tmp_path: Path) -> None:
    figure = pareto(compared().measurements, title="high", target_kl=TARGET)
    named = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert all(name in named for name in ("add", "gated", "weak (target not reached)", "prompt only", "random"))
    assert save_figure(figure, tmp_path / "pareto.png").stat().st_size > 10_000


def test_equal_arguments_give_equal_rows_and_nothing_is_left_on_the_model() -> None:
    def short() -> EqualCost:
        return equal_cost(
            model(), {"add": METHODS["add"]}, ASKED[:4], HIGH, tuning=TUNING[:3], benign=BENIGN[:3], target_kl=TARGET,
            grid=(1.0,), seeds=(0, 1), temperature=1.0, max_new_tokens=4,
        )  # fmt: skip

    assert [r.to_json() for r in short().measurements] == [r.to_json() for r in short().measurements]
    assert not any(point.fwd_hooks for point in model().hook_dict.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benign": TUNING[:2]}, "tuning and benign share 2 prompts"),
        ({"tuning": ASKED}, "prompts and tuning share 10"),
        ({"tuning": []}, "needs tuning="),
        ({"seeds": (1, 1)}, "different numbers"),
        ({"grid": (0.0,)}, "above 0"),
        ({"target_kl": -1.0}, "above 0"),
    ],
)
def test_what_would_make_the_comparison_dishonest_is_refused(change: dict[str, object], message: str) -> None:
    given = {"tuning": TUNING, "benign": BENIGN, "max_new_tokens": 4, **change}
    with pytest.raises(DataError, match=message):
        equal_cost(model(), {"add": METHODS["add"]}, ASKED, HIGH, **given)  # type: ignore[arg-type]
