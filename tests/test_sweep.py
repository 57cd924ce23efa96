"""Steering sweeps: identities that must hold, controls, roles of prompts, and going on after any interruption."""

import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
import zoo
from rich.console import Console
from transformer_lens import HookedTransformer

from safety_lens.artifacts import load_artifact
from safety_lens.errors import ArtifactError, DataError, HookNameError, ModelError, ModelMismatchError
from safety_lens.generation import generate
from safety_lens.interventions.scopes import Scope, scope_named
from safety_lens.interventions.scorers import CallableScorer, Completion
from safety_lens.interventions.steering import steer
from safety_lens.interventions.strength import residual_norm
from safety_lens.interventions.sweeping import run as sweep_run
from safety_lens.interventions.sweeping.controls import random_direction, random_set, shuffled_directions
from safety_lens.interventions.sweeping.engine import adding, load_sweep, sweep
from safety_lens.interventions.sweeping.inputs import with_shuffled
from safety_lens.interventions.sweeping.plan import COEFFS, Arm, Controls, Decoding, Plan, Site, SweepPrompt
from safety_lens.interventions.sweeping.run import Estimate, Running, SweepResult
from safety_lens.interventions.sweeping.search import coarse_sites, size
from safety_lens.interventions.sweeping.store import CHECKS, GENERATIONS, PLAN, TABLE, Journal, Opened, Record
from safety_lens.interventions.sweeping.table import summarise
from safety_lens.log import Measurement
from safety_lens.models import hooks_at, load_model
from safety_lens.paired import holm, paired_effect, sign_flip
from safety_lens.probes.directions import Direction
from safety_lens.probes.extract import DirectionSet, directions_from
from safety_lens.probes.reading import ConceptActivations, read_concepts
from safety_lens.probes.selection import Choice
from safety_lens.report.steering_tables import site_table, sweep_tables
from safety_lens.types import FwdHook

HOOKS = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
SHORT = Decoding(6, ignore_eos=True, raw=True)
SAMPLED = replace(SHORT, temperature=1.0)
COEFFICIENTS = (-1.0, -0.5, 0.5, 1.0)


class LowWords:
    """Share of an answer's words below w40: a scorer that every edit of a random model moves."""

    name = "low"

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        found = [[int(w[1:]) < 40 for w in c.text.split() if w[1:].isdigit()] for c in completions]
        return np.array([float(np.mean(f)) if f else np.nan for f in found])


class FirstWord:
    """1 where an answer starts below w50."""

    name = "first"

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        return np.array([float(c.text.split()[0][1:] < "50") if c.text.split() else np.nan for c in completions])


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_model(zoo.make("llama"), tokenizer=synthetic.chat_tokenizer(), check=False)


@pytest.fixture(scope="module")
def directions() -> list[Direction]:
    g = torch.Generator().manual_seed(5)
    return [Direction("joy", hook, 2 * torch.randn(64, generator=g), "dim") for hook in HOOKS]


@pytest.fixture(scope="module")
def prompts() -> list[SweepPrompt]:
    g = torch.Generator().manual_seed(1)
    texts = [synthetic.words(g, 4 + i % 3) for i in range(8)]
    return [SweepPrompt(t, "selection" if i < 3 else "test", label="ab"[i % 2]) for i, t in enumerate(texts)]


Run = Callable[..., SweepResult]


@pytest.fixture
def run(model: HookedTransformer, directions: list[Direction], prompts: list[SweepPrompt]) -> Run:
    """A small sweep; arguments given replace these."""

    def invoke(**more: Any) -> SweepResult:
        given: dict[str, Any] = {
            "directions": directions,
            "prompts": prompts,
            "scorers": [LowWords()],
            "coeffs": COEFFICIENTS,
            "decoding": SHORT,
            "controls": Controls(2, (-1.0, 1.0)),
            "portion_rows": 16,
        }
        given |= more
        return sweep(model, given.pop("directions"), given.pop("prompts"), **given)

    return invoke


def rows_of(result: SweepResult, metric: str, **where: Any) -> list[Measurement]:
    return [r for r in result.measurements if r.metric == metric and all(getattr(r, k) == v for k, v in where.items())]


def one(result: SweepResult, metric: str, **where: Any) -> Measurement:
    found = rows_of(result, metric, **where)
    assert len(found) == 1, (metric, where, len(found))
    return found[0]


def texts(result: SweepResult, arm: Arm, seed: int = 0) -> list[str]:
    mine = {r["prompt"]: r["text"] for r in result.records if r["arm"] == arm.key and r["seed"] == seed}
    return [mine[i] for i in sorted(mine)]


# --- the engine -----------------------------------------------------------------------------------------------------


def test_every_cell_says_what_a_generate_call_of_its_own_says(
    model: HookedTransformer, directions: list[Direction], prompts: list[SweepPrompt], run: Run
) -> None:
    result = run(decoding=SAMPLED, seeds=(3, 4), controls=Controls(0))
    asked = [p.prompt for p in prompts]
    changed = 0
    for site, direction in enumerate(directions):
        for coeff in COEFFICIENTS:
            for seed in (3, 4):
                alone = generate(
                    model, asked, hooks=steer(direction, coeff), seed=seed, max_new_tokens=6, temperature=1.0,
                    ignore_eos=True, raw=True,
                )  # fmt: skip
                found = texts(result, Arm("steer", site, coeff), seed)
                assert found == [g.text for g in alone]
                changed += found != texts(result, Arm("baseline"), seed)
    assert changed > 10  # and the edits did something


def test_cells_draw_the_same_random_numbers_and_seeds_do_not(run: Run) -> None:
    result = run(decoding=SAMPLED, seeds=(0, 1), coeffs=(-1e-9, 1e-9), controls=Controls(0))
    for seed in (0, 1):
        base = texts(result, Arm("baseline"), seed)
        for site in (0, 1):
            for coeff in (-1e-9, 1e-9):
                assert texts(result, Arm("steer", site, coeff), seed) == base
    assert texts(result, Arm("baseline"), 0) != texts(result, Arm("baseline"), 1)


def test_coefficient_zero_is_checked_at_every_site_and_counted(run: Run) -> None:
    found = rows_of(run(controls=Controls(0)), "identity")
    assert [r.hook for r in found] == HOOKS
    assert all(r.value == 1.0 and r.n == 8 * 6 for r in found)


def test_an_edit_that_is_not_nothing_at_zero_is_refused(run: Run, tmp_path: Path) -> None:
    def leaking(direction: Direction, coeff: float, scope: Scope, unit: float | None) -> list[FwdHook]:
        return steer(direction, coeff + 0.5, scope=scope)

    with pytest.raises(ModelError, match=r"coefficient 0 changes the text.* nothing is reported"):
        run(edit=leaking, out=tmp_path / "run")
    assert not (tmp_path / "run" / GENERATIONS).exists()
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_set_together_is_steered_at_all_its_hooks_at_once(
    model: HookedTransformer, directions: list[Direction], prompts: list[SweepPrompt], run: Run
) -> None:
    one_set = DirectionSet("joy", "dim", {d.hook: d for d in directions}, {}, None, ())
    result = run(directions=one_set, together=True, coeffs=(0.5,), controls=Controls(1))
    hooks = [hook for d in directions for hook in steer(d, 0.5)]
    alone = generate(model, [p.prompt for p in prompts], hooks=hooks, max_new_tokens=6, ignore_eos=True, raw=True)
    assert texts(result, Arm("steer", 0, 0.5)) == [g.text for g in alone]
    assert one(result, "identity").hook == "2 hooks together"


def test_units_of_activation_length_are_those_of_the_prompts(
    model: HookedTransformer, directions: list[Direction], prompts: list[SweepPrompt], run: Run
) -> None:
    result = run(directions=directions[0], units="rms", coeffs=(0.3,), controls=Controls(0))
    asked = [p.prompt for p in prompts]
    length = residual_norm(model, asked, HOOKS[0])
    hooks = steer(directions[0], 0.3, units=length)
    alone = generate(model, asked, hooks=hooks, max_new_tokens=6, ignore_eos=True, raw=True)
    assert texts(result, Arm("steer", 0, 0.3)) == [g.text for g in alone]


def test_the_default_grids_are_nine_symmetric_coefficients() -> None:
    for grid in COEFFS.values():
        assert len(grid) >= 9
        assert grid == tuple(sorted(-c for c in grid))
        assert 0.0 in grid


def test_the_prompt_only_baseline_asks_in_the_system_prompt_and_edits_nothing(
    model: HookedTransformer, prompts: list[SweepPrompt], run: Run
) -> None:
    result = run(system="w20 w21", decoding=replace(SHORT, raw=False), controls=Controls(0))
    turns = [[{"role": "system", "content": "w20 w21"}, {"role": "user", "content": p.prompt}] for p in prompts]
    alone = generate(model, turns, max_new_tokens=6, ignore_eos=True)
    assert texts(result, Arm("system")) == [g.text for g in alone]
    assert "w20 w21" in str(one(result, "low/effect", subject="system").note)


# --- controls -------------------------------------------------------------------------------------------------------


def test_random_sets_keep_lengths_and_angles_and_leave_the_space_of_the_real_ones() -> None:
    """Drawn one by one, parts that agree would get controls that cancel."""
    stream = torch.Generator().manual_seed(0)
    shared = torch.randn(64, generator=stream)
    real = [
        Direction(
            "joy", f"blocks.{k}.hook_resid_post", shared * (k + 1) + 0.3 * torch.randn(64, generator=stream), "dim"
        )
        for k in range(4)
    ]
    vectors = torch.stack([d.vector for d in real]).double()
    for number in range(3):
        drawn = torch.stack([d.vector for d in random_set(real, number)]).double()
        torch.testing.assert_close(drawn @ drawn.T, vectors @ vectors.T, rtol=1e-5, atol=1e-4)
        assert (drawn @ vectors.T).abs().max() < 1e-3
    again = random_set(real, 2)
    assert torch.equal(torch.stack([d.vector for d in again]).double(), drawn)
    assert [d.hook for d in again] == [d.hook for d in real]
    assert torch.equal(random_set(real[:1], 1)[0].vector, random_direction(real[0], 1).vector)
    alone = torch.stack([random_direction(d, 0).vector for d in real])
    assert alone.sum(0).norm() < 0.8 * vectors.sum(0).norm()  # what the set's control must not do


def test_random_directions_are_as_long_orthogonal_and_repeatable(directions: list[Direction]) -> None:
    real = directions[0]
    drawn = [random_direction(real, k, 7) for k in range(20)]
    for d in drawn:
        assert d.norm == pytest.approx(real.norm, rel=1e-5)
        assert abs(float(d.unit @ real.unit)) < 1e-5
    pairs = torch.stack([d.unit for d in drawn])
    assert float(((pairs @ pairs.T) - torch.eye(20)).abs().max()) < 0.6  # and all different
    assert torch.equal(random_direction(real, 3, 7).vector, drawn[3].vector)
    assert not torch.equal(random_direction(real, 3, 8).vector, drawn[3].vector)


@pytest.fixture(scope="module")
def acts(model: HookedTransformer) -> ConceptActivations:
    concept = synthetic.concept(lambda g: (synthetic.words(g, 6, 10, 40), synthetic.words(g, 6, 40, 70)))
    return read_concepts(model, [concept], hooks_at(model))[0]


def test_shuffled_refits_lose_the_concept_and_keep_the_length(
    model: HookedTransformer, acts: ConceptActivations
) -> None:
    found = directions_from(model, acts, null_repeats=20)
    refits = shuffled_directions(acts, n=6)
    hook = acts.hooks[-1]
    assert all(set(refit) == set(acts.hooks) for refit in refits)
    cosines = [abs(float(refit[hook].unit.double() @ found[hook].unit.double())) for refit in refits]
    again = directions_from(model, acts, null_repeats=20)
    assert float(again[hook].unit.double() @ found[hook].unit.double()) == pytest.approx(1.0)
    assert np.mean(cosines) < 0.6
    site = sweep_run_sites(found, hook)
    scaled = with_shuffled([site], refits)[0].shuffled
    assert [parts[0].norm for parts in scaled] == pytest.approx([found[hook].norm] * 6, rel=1e-5)


def sweep_run_sites(found: DirectionSet, hook: str) -> Any:
    from safety_lens.interventions.sweeping.inputs import sites_of

    return sites_of(found, [hook], together=False)[0]


def test_controls_run_on_the_declared_part_of_the_grid_with_the_declared_seeds(run: Run) -> None:
    result = run(decoding=SAMPLED, seeds=(0, 1), controls=Controls(3, (-1.0, 1.0), seeds=1))
    random = [r for r in result.records if r["arm"].startswith("random/")]
    assert len(random) == 2 * 3 * 2 * 5  # sites × directions × coefficients × test prompts
    assert {r["seed"] for r in random} == {0}
    assert {r.coeff for r in rows_of(result, "low/random")} == {-1.0, 1.0}
    assert all(r.n == 3 for r in rows_of(result, "low/random"))
    band = one(result, "low/random", hook=HOOKS[0], coeff=1.0)
    assert band.low <= band.value <= band.high


# --- roles of prompts -----------------------------------------------------------------------------------------------


def test_a_prompt_in_two_roles_is_an_error_that_names_it(run: Run, prompts: list[SweepPrompt]) -> None:
    test = prompts[-1].prompt
    with pytest.raises(DataError, match=f"{test}.* also a pair that the direction was fitted on"):
        run(trained_on=[f"  {str(test).upper()} "])
    with pytest.raises(DataError, match=f"test prompt '{test}' is also a selection prompt"):
        run(prompts=[SweepPrompt(test, "selection"), SweepPrompt(test)])
    turns = [{"role": "system", "content": "w9"}, {"role": "user", "content": test}]
    with pytest.raises(DataError, match="also in a pair that the hook was chosen on"):
        run(chosen_on=[test])
    assert run(chosen_on=[prompts[0].prompt], controls=Controls(0)).chosen is not None  # selecting twice is one role
    with pytest.raises(DataError, match="is also a test prompt"):
        run(prompts=[test, SweepPrompt(turns)])


def test_the_choice_never_looks_at_test_prompts(run: Run) -> None:
    result = run()
    chosen = result.chosen
    assert chosen is not None
    moved = [
        {**r, "scores": {"low": 1 - r["scores"]["low"]}} if result.plan.prompts[r["prompt"]].split == "test" else r
        for r in result.records
    ]
    rows = summarise(result.plan, moved, [])
    again = next(r for r in rows if r.metric == "chosen")
    assert (again.hook, again.coeff, again.note) == (chosen.hook, chosen.coeff, chosen.note)
    tested = [r for r in rows if r.metric == "low/effect" and r.split == "test"]
    before = [r for r in result.measurements if r.metric == "low/effect" and r.split == "test"]
    assert [r.value for r in before] == pytest.approx([-r.value for r in tested])  # though the test rows did change


def test_reported_effects_are_those_of_the_test_prompts_alone(run: Run) -> None:
    result = run()
    chosen = result.chosen
    assert chosen is not None
    effects = {
        split: one(result, "low/effect", hook=chosen.hook, coeff=chosen.coeff, split=split)
        for split in ("selection", "test")
    }
    assert (effects["selection"].n, effects["test"].n) == (3, 5)
    penalty = one(result, "low/selection_penalty").value
    sign = np.sign(effects["selection"].value)
    assert penalty == pytest.approx(abs(effects["selection"].value) - sign * effects["test"].value)
    assert {r.split for r in rows_of(result, "low/effect")} == {"selection", "test", "test:a", "test:b"}


def test_without_selection_prompts_nothing_is_chosen(run: Run, prompts: list[SweepPrompt]) -> None:
    result = run(prompts=[p.prompt for p in prompts])
    assert result.chosen is None
    assert one(result, "low/effect", hook=HOOKS[0], coeff=1.0, split="test").n == 8


def test_no_cell_above_the_limit_on_benign_kl_is_chosen(run: Run, prompts: list[SweepPrompt]) -> None:
    benign = [f"w{20 + i} w{30 + i}" for i in range(4)]
    free = run(benign=benign)
    costs = {(r.hook, r.coeff): r.value for r in rows_of(free, "benign_kl")}
    assert len(costs) == 8
    assert all(c > 0 for c in costs.values())
    limit = float(np.median(list(costs.values())))
    chosen = run(benign=benign, max_kl=limit).chosen
    assert chosen is not None
    assert costs[chosen.hook, chosen.coeff] <= limit
    none = run(benign=benign, max_kl=min(costs.values()) / 2).chosen
    assert none is not None
    assert np.isnan(none.value)
    assert "no cell moved low" in str(none.note)
    assert "0 of 8 cells are within the limits" in str(none.note)


def test_cells_within_the_limits_are_counted_whether_they_moved_the_score_or_not(run: Run) -> None:
    result = run(scorers=[FirstWord()])
    moved = sum(abs(row.value) > 1e-12 for row in rows_of(result, "first/effect", split="selection"))
    assert 0 < moved < 8, "all cells move: no test"
    assert result.chosen is not None
    assert f"8 of 8 cells are within the limits, {moved} of them" in str(result.chosen.note)


def test_a_score_at_its_floor_is_reported_at_once_and_chooses_nothing(run: Run) -> None:
    notes: list[str] = []
    result = run(scorers=[CallableScorer(lambda c: False, "never")], goal="lower", on_note=notes.append)
    assert "never is 0 in every unsteered answer: no edit can lower it, so the goal 'lower' cannot be met" in notes[-1]
    assert result.chosen is not None
    assert result.chosen.hook is None
    assert "8 of 8 cells are within the limits; never is 0 in every unsteered answer" in str(result.chosen.note)
    slope = one(result, "never/slope", hook=HOOKS[0])
    assert slope.low < slope.value == 0 < slope.high, "five prompts at a floor do not prove a slope of 0"
    table = Console(width=200, file=io.StringIO(), record=True)
    table.print(site_table(result.measurements, "joy/dim", "never"))
    shown = table.export_text()
    assert "→ 1" not in shown
    assert "the goal 'lower' cannot be met on these prompts" in " ".join(shown.split())
    cells = next(line for line in shown.splitlines() if "1.resid_post" in line).split()
    assert cells[1] == "–", "a slope of 0 at a floor would read as a finding"
    free: list[str] = []
    run(scorers=[CallableScorer(lambda c: False, "never")], goal="higher", on_note=free.append)
    assert not any("cannot be met" in note for note in free)


def test_the_size_of_a_sweep_and_too_few_controls_are_reported_before_it_starts(run: Run) -> None:
    notes: list[str] = []
    result = run(on_note=lambda note: notes.append(note), benign=["w20 w21"])
    total, steered, random = len(result.records), 2 * 4 * 8, 2 * 2 * 2 * 5
    assert notes[0].startswith(f"{total:,} answers of up to {SHORT.max_new_tokens} tokens: 8 unsteered, {steered}")
    assert f"{random} of random directions" in notes[0]
    assert "the KL of 8 cells on 1 benign prompts" in notes[0]
    assert "2 random directions: p of a cell against them is 0.33 at least" in notes[1]
    assert "3 selection prompts choose among 8 cells" in notes[2]


# --- from coarse to fine --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(model: HookedTransformer) -> DirectionSet:
    """One direction at twelve hooks, the ninth of which extraction chose."""
    g = torch.Generator().manual_seed(5)
    points = ("resid_pre", "resid_mid", "resid_post")
    hooks = [f"blocks.{i}.hook_{point}" for i in range(4) for point in points]
    found = {hook: Direction("joy", hook, 2 * torch.randn(64, generator=g), "dim") for hook in hooks}
    return DirectionSet("joy", "dim", found, {}, Choice(hooks[8], "by causal"), ())


def test_a_search_over_24_blocks_needs_at_most_600_answers_and_a_grid_thousands() -> None:
    hooks = [f"blocks.{i}.hook_resid_post" for i in range(24)]
    parts = [Direction("joy", hook, torch.ones(2), "dim") for hook in hooks]
    for shuffled in (0, 5):
        sites = tuple(
            Site("joy/dim", d.hook, (d,), None, ((d,),) * shuffled, favoured=d.hook == hooks[16]) for d in parts
        )
        asked = tuple(SweepPrompt(f"w{i}", "selection" if i < 12 else "test") for i in range(36))
        plan = Plan(
            sites, COEFFS["raw"], asked, (0,), Decoding(), Controls(), scope_named("all"), "raw", "adding", None,
            ("refusal",), ("w1",), "either", None, 24, "coarse",
        )  # fmt: skip
        assert 400 < size(plan).answers <= 600
        assert coarse_sites(plan, "joy/dim") == [3, 7, 10, 13, 16, 20]
        assert size(replace(plan, search="grid")).answers > 20_000


def test_the_search_reports_the_best_tried_cell_on_test_prompts_at_its_site_alone(run: Run, many: DirectionSet) -> None:
    result = run(directions=many, controls=Controls(3), benign=["w20 w21"])
    plan, chosen = result.plan, result.chosen
    assert plan.search == "coarse"
    assert chosen is not None
    assert len(result.records) <= size(plan).answers
    role = {i: p.split for i, p in enumerate(plan.prompts)}
    base = {r["prompt"]: r["scores"]["low"] for r in result.records if r["arm"] == "baseline"}
    gaps: dict[str, list[float]] = {}
    for r in result.records:
        if r["arm"].startswith("steer/") and role[r["prompt"]] == "selection":
            gaps.setdefault(r["arm"], []).append(r["scores"]["low"] - base[r["prompt"]])
    assert all(len(gap) == 3 for gap in gaps.values())
    assert len({arm.split("/")[1] for arm in gaps}) > 6, "no site between the first ones was tried: no test"
    broken = {r["arm"] for r in result.records if r["degenerate"]}
    best = max((arm for arm in gaps if arm not in broken), key=lambda arm: abs(np.mean(gaps[arm])))
    _, site, coeff, _ = best.split("/")
    assert (chosen.hook, chosen.coeff) == (plan.sites[int(site)].name, float(coeff))
    tested = {r["arm"].split("/")[1] for r in result.records if "/" in r["arm"] and role[r["prompt"]] == "test"}
    assert tested == {site}
    controls = {r["arm"].split("/")[2] for r in result.records if r["arm"].startswith("random/")}
    assert controls == {coeff}
    assert {r.hook for r in rows_of(result, "low/p_all")} == {chosen.hook}
    assert one(result, "low/effect", hook=chosen.hook, coeff=chosen.coeff, split="test").n == 5
    assert {r.hook for r in rows_of(result, "benign_kl")} >= {plan.sites[int(a.split("/")[1])].name for a in gaps}


def test_the_search_never_looks_at_test_prompts(run: Run, many: DirectionSet, prompts: list[SweepPrompt]) -> None:
    first = run(directions=many, controls=Controls(1))
    others = [replace(p, prompt=f"w{60 + i} w{70 + i}") if p.split == "test" else p for i, p in enumerate(prompts)]
    second = run(directions=many, controls=Controls(1), prompts=others)
    both = [
        [r["text"] for r in x.records if r["prompt"] < 3 and r["arm"].startswith("steer/")] for x in (first, second)
    ]
    assert both[0] == both[1]
    assert texts(first, Arm("baseline")) != texts(second, Arm("baseline"))
    assert first.chosen is not None
    assert second.chosen is not None
    assert (first.chosen.hook, first.chosen.coeff) == (second.chosen.hook, second.chosen.coeff)


def test_a_search_that_was_cut_off_takes_the_same_way(run: Run, many: DirectionSet, tmp_path: Path) -> None:
    how: dict[str, Any] = {"directions": many, "controls": Controls(2), "benign": ["w20 w21"]}
    whole = run(out=tmp_path / "whole", **how)
    lines = (tmp_path / "whole" / GENERATIONS).read_bytes().splitlines(keepends=True)
    checks = (tmp_path / "whole" / CHECKS).read_bytes()
    for cut in (8, len(lines) // 2, len(lines) - 3):
        out = tmp_path / f"cut-{cut}"
        out.mkdir()
        for name in (PLAN, "sweep.safetensors"):
            (out / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        (out / GENERATIONS).write_bytes(b"".join(lines[:cut]))
        (out / CHECKS).write_bytes(checks if cut > 8 else b"")
        assert run(out=out, **how).table == whole.table
        assert sorted((out / GENERATIONS).read_bytes().splitlines()) == sorted(line.rstrip() for line in lines)


def test_where_no_cell_moves_the_score_another_strength_is_tried_and_no_test_prompt_is_steered(
    run: Run, many: DirectionSet
) -> None:
    result = run(
        directions=many,
        scorers=[CallableScorer(lambda c: False, "never")],
        goal="higher",
        coeffs=(-2.0, -1.0, -0.5, 0.5, 1.0, 2.0),
        controls=Controls(1),
    )
    strengths = {abs(float(r["arm"].split("/")[2])) for r in result.records if r["arm"].startswith("steer/")}
    assert strengths == {1.0, 2.0}
    role = {i: p.split for i, p in enumerate(result.plan.prompts)}
    assert {role[r["prompt"]] for r in result.records if "/" in r["arm"]} == {"selection"}
    assert result.chosen is not None
    assert result.chosen.hook is None
    tables = sweep_tables(result.measurements, "joy/dim", "never")
    assert len(tables) == 1


def test_a_goal_that_cannot_be_met_ends_the_search_before_anything_is_steered(run: Run, many: DirectionSet) -> None:
    result = run(
        directions=many, scorers=[CallableScorer(lambda c: True, "always")], goal="higher", controls=Controls(1)
    )
    assert len(result.records) == 8
    assert result.chosen is not None
    assert "no edit can raise it, so the goal 'higher' cannot be met on these prompts" in str(result.chosen.note)


def test_a_search_needs_prompts_that_choose_and_names_no_control_coefficients(
    run: Run, many: DirectionSet, prompts: list[SweepPrompt]
) -> None:
    test = [p for p in prompts if p.split == "test"]
    with pytest.raises(DataError, match="needs selection prompts"):
        run(directions=many, prompts=test, search="coarse", controls=Controls(1))
    with pytest.raises(DataError, match="at the coefficient that it chooses"):
        run(directions=many, search="coarse")
    with pytest.raises(DataError, match="choose auto, grid, coarse"):
        run(search="fine")
    assert run(directions=many, prompts=test[:1], coeffs=(1.0,), controls=Controls(0)).plan.search == "grid"


# --- size, time and portions ----------------------------------------------------------------------------------------


def test_portions_that_took_too_long_are_halved_and_the_table_stays(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run()
    monkeypatch.setattr(sweep_run, "SLOW", -1.0)
    assert run(out=tmp_path / "run").table == whole.table
    lines = [json.loads(line) for line in (tmp_path / "run" / GENERATIONS).read_text(encoding="utf-8").splitlines()]
    sizes = list({line["portion"]: line["of"] for line in lines}.values())
    assert sizes[:5] == [8, 8, 4, 2, 1]
    assert set(sizes[5:]) == {1}


def test_large_models_are_stored_in_small_portions(model: HookedTransformer, run: Run) -> None:
    rows = []
    for new in (6, 200_000, 2_000_000):
        plan = replace(run(controls=Controls(0)).plan, decoding=replace(SHORT, max_new_tokens=new))
        rows.append(
            Running(model, plan, [LowWords()], adding, Opened(None, Journal(None), Journal(None), ())).portion_rows
        )
    assert rows[0] == 64
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] == 8


def test_the_time_is_estimated_before_anything_is_stored_and_who_asks_may_refuse(run: Run, tmp_path: Path) -> None:
    seen: list[Estimate] = []

    def refuse(estimate: Estimate) -> None:
        seen.append(estimate)
        raise DataError("too long")

    out = tmp_path / "run"
    with pytest.raises(DataError, match="too long"):
        run(out=out, on_estimate=refuse, benign=["w20 w21"])
    assert not (out / GENERATIONS).exists()
    result = run(
        out=out, coeffs=(1.0,), controls=Controls(0), on_estimate=seen.append
    )  # another plan: nothing was lost
    assert [e.answers for e in seen] == [8 + 2 * 4 * 8 + 2 * 2 * 2 * 5, len(result.records)]
    assert all(e.seconds > 0 and e.tokens == SHORT.max_new_tokens for e in seen)
    (out / "manifest.json").unlink()
    run(out=out, coeffs=(1.0,), controls=Controls(0), on_estimate=seen.append)
    assert seen[-1].answers == 0


# --- the numbers ----------------------------------------------------------------------------------------------------


def scores(result: SweepResult, arm: Arm, metric: str = "low") -> np.ndarray:
    test = [i for i, p in enumerate(result.plan.prompts) if p.split == "test"]
    out = np.full((len(test), len(result.plan.seeds)), np.nan)
    for r in result.records:
        if r["arm"] == arm.key and r["prompt"] in test:
            out[test.index(r["prompt"]), result.plan.seeds.index(r["seed"])] = r["scores"][metric]
    return out


def test_numbers_are_paired_by_prompt_and_seed_and_corrected_over_the_grid(run: Run) -> None:
    result = run(decoding=SAMPLED, seeds=(0, 1, 2), scorers=[LowWords(), FirstWord()])
    p_max = np.zeros((4, 2))
    alone = np.zeros((4, 2))
    for k, coeff in enumerate(COEFFICIENTS):
        base = scores(result, Arm("baseline"))
        gaps = []
        for site, hook in enumerate(HOOKS):
            found = scores(result, Arm("steer", site, coeff))
            row = one(result, "low/effect", hook=hook, coeff=coeff, split="test")
            assert (row.value, row.low, row.high) == pytest.approx(tuple(paired_effect(base, found)))
            gaps.append(np.nanmean(found - base, axis=1))
        alone[k], p_max[k] = sign_flip(np.stack(gaps))
    for site, hook in enumerate(HOOKS):
        for k, coeff in enumerate(COEFFICIENTS):
            where = {"hook": hook, "coeff": coeff}
            assert one(result, "low/p", **where).value == pytest.approx(alone[k, site])
            assert one(result, "low/p_holm", **where).value == pytest.approx(holm(alone[:, site])[k])
            assert one(result, "low/p_max", **where).value == pytest.approx(p_max[k, site])
            assert one(result, "low/p_all", **where).value == pytest.approx(holm(p_max[:, site])[k])
    assert len(rows_of(result, "first/expected_maximum")) == 9  # 8 cells and the baseline, since there are seeds
    assert one(result, "low/slope", hook=HOOKS[0]).n == 5


def test_scores_of_broken_answers_do_not_enter_the_fluent_effect(run: Run) -> None:
    result = run(controls=Controls(0))
    broken = [{**r, "degenerate": r["arm"].startswith("steer/0/1/") and r["prompt"] == 4} for r in result.records]
    rows = summarise(result.plan, broken, [])
    found = {(r.metric, r.coeff): r for r in rows if r.hook == HOOKS[0] and r.split == "test"}
    assert found["low/effect", 1.0].n == 5
    assert found["low/effect_fluent", 1.0].n == 4
    assert found["low/effect_fluent", 0.5].n == 5
    assert found["degenerate", 1.0].value == pytest.approx(1 / 5)


def test_a_score_that_is_unknown_stays_unknown(run: Run, tmp_path: Path) -> None:
    class Silent:
        name = "silent"

        def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
            return np.full(len(completions), np.nan)

    result = run(scorers=[LowWords(), Silent()], out=tmp_path / "run", controls=Controls(1, (1.0,)))
    row = one(result, "silent/effect", hook=HOOKS[0], coeff=1.0, split="test")
    assert np.isnan(row.value)
    assert row.n == 0
    assert '"silent": null' in (tmp_path / "run" / GENERATIONS).read_text(encoding="utf-8")


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_answers_to_harmful_prompts_are_scored_whole_and_not_stored_unless_they_refuse(
    model: HookedTransformer, run: Run, prompts: list[SweepPrompt], tmp_path: Path
) -> None:
    asked = [replace(p, harmful=i % 2 == 0) for i, p in enumerate(prompts)]
    long = replace(SHORT, max_new_tokens=20)
    plain = run(prompts=prompts, decoding=long, controls=Controls(0))
    result = run(prompts=asked, decoding=long, controls=Controls(0), out=tmp_path / "run")
    for mine, whole in zip(result.records, plain.records, strict=True):
        assert (mine["scores"], mine["tokens"], mine["sha256"]) == (whole["scores"], 20, whole["sha256"])
        assert mine["text"] == (None if mine["prompt"] % 2 == 0 else whole["text"])  # random words refuse nothing
    stored = (tmp_path / "run" / GENERATIONS).read_text(encoding="utf-8")
    assert not any(r["text"] in stored for r in plain.records if r["prompt"] % 2 == 0)


def test_a_finished_sweep_is_an_artifact_and_is_not_run_again(
    model: HookedTransformer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    result = run(out=out, arguments={"why": "test"})
    artifact = load_artifact(out, model, kind="sweep")
    assert artifact.manifest["arguments"] == {"why": "test"}
    assert set(artifact.manifest["files"]) == {
        PLAN, GENERATIONS, CHECKS, TABLE, "sweep.safetensors", "measurements.jsonl",
    }  # fmt: skip
    assert [r.to_json() for r in load_sweep(out)] == [r.to_json() for r in result.measurements]
    assert (out / TABLE).read_text(encoding="utf-8") == result.table
    monkeypatch.setattr(sweep_run, "generate", lambda *a, **k: pytest.fail("it was generated again"))
    again = run(out=out)
    assert again.table == result.table


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    real = sweep_run.generate

    def counting(model: HookedTransformer, prompts: Sequence[Any], **more: Any) -> Any:
        made.append(len(prompts))
        return real(model, prompts, **more)

    monkeypatch.setattr(sweep_run, "generate", counting)
    return made


def test_cut_at_any_byte_it_goes_on_to_the_same_table_without_repeating_a_portion(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benign = ["w20 w21 w22"]
    whole = run(out=tmp_path / "whole", benign=benign)
    wanted = {name: (tmp_path / "whole" / name).read_bytes() for name in (TABLE, "measurements.jsonl", GENERATIONS)}
    content, checks = wanted[GENERATIONS], (tmp_path / "whole" / CHECKS).read_bytes()
    total = len(whole.records)
    cuts = np.random.default_rng(0).integers(0, len(content), 4).tolist()
    for cut in [0, *cuts, content.index(b"\n") + 1, len(content)]:
        out = tmp_path / f"cut-{cut}"
        out.mkdir()
        for name in (PLAN, "sweep.safetensors"):
            (out / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        (out / GENERATIONS).write_bytes(content[:cut])
        (out / CHECKS).write_bytes(checks[: checks.index(b"\n") + 1 + cut % 7])
        made = counted(monkeypatch)
        again = run(out=out, benign=benign)
        kept = whole_portions(content[:cut])
        identity = 3 * 8  # the check, which was torn: two sites and none, on eight prompts
        assert sum(made) == total - kept + identity, cut
        assert {name: (out / name).read_bytes() for name in wanted} == wanted
        assert again.table == whole.table
        monkeypatch.undo()


def whole_portions(content: bytes) -> int:
    """Answers of the portions that are stored whole, counted without the engine."""
    lines = [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    sizes = Counter(line["portion"] for line in lines)
    return sum(n for portion, n in sizes.items() if n == next(x["of"] for x in lines if x["portion"] == portion))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_sweep as t, zoo, synthetic, torch
from pathlib import Path
torch.set_num_threads(1)
model = t.load_model(zoo.make("llama"), tokenizer=synthetic.chat_tokenizer(), check=False)
print("loaded", flush=True)
t.killed_sweep(model, Path({out!r}), lambda done, total: print(done, flush=True))
"""


def killed_sweep(model: HookedTransformer, out: Path | None, on_rows: Callable[[int, int], None] | None) -> SweepResult:
    g = torch.Generator().manual_seed(5)
    one = Direction("joy", HOOKS[0], 2 * torch.randn(64, generator=g), "dim")
    asked = [synthetic.words(g, 5) for _ in range(10)]
    decoding = replace(SAMPLED, max_new_tokens=8)
    given: dict[str, Any] = {"scorers": [LowWords()], "decoding": decoding, "controls": Controls(2)}
    return sweep(model, one, asked, seeds=(0, 1), out=out, on_rows=on_rows, **given)


def test_killed_with_sigkill_and_started_again_it_gives_the_same_table(
    model: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    code = SCRIPT.format(tests=str(Path(__file__).parent), out=str(out))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdigit() and int(line) >= 128:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    done = whole_portions((out / GENERATIONS).read_bytes())
    assert 128 <= done < 340  # in all: small sweeps keep what they have, too
    made = counted(monkeypatch)
    again = killed_sweep(model, out, None)
    assert sum(made) == len(again.records) - done
    monkeypatch.undo()
    assert again.table == killed_sweep(model, None, None).table
    assert (out / TABLE).read_text(encoding="utf-8") == again.table


def test_another_plan_in_the_folder_is_an_error_that_says_what_differs(
    run: Run, tmp_path: Path, directions: list[Direction]
) -> None:
    out = tmp_path / "run"
    first = run(out=out, controls=Controls(0))
    with pytest.raises(ArtifactError, match=r"another sweep: coeffs \[-1.0.* there, \[0.0, 2.0\] here.*--overwrite"):
        run(out=out, controls=Controls(0), coeffs=(2.0,))
    with pytest.raises(ArtifactError, match=r"sites .* decoding "):
        run(out=out, controls=Controls(0), decoding=SAMPLED, directions=directions[0])
    turned = [replace(d, vector=d.vector.flip(0)) for d in directions]
    with pytest.raises(ArtifactError, match=f"another direction at {HOOKS[0]}"):
        run(out=out, controls=Controls(0), directions=turned)
    rounded = [replace(d, vector=d.vector * (1 + 1e-6)) for d in directions]
    assert run(out=out, controls=Controls(0), directions=rounded).table == first.table
    assert run(out=out, controls=Controls(0), coeffs=(2.0,), overwrite=True).plan.coeffs == (0.0, 2.0)


def test_another_model_cannot_go_on_with_a_sweep(run: Run, tmp_path: Path, prompts: list[SweepPrompt]) -> None:
    run(out=tmp_path / "run", controls=Controls(0))
    other = load_model(zoo.make("llama", seed=1), tokenizer=synthetic.chat_tokenizer(), check=False)
    g = torch.Generator().manual_seed(5)
    same = [Direction("joy", hook, 2 * torch.randn(64, generator=g), "dim") for hook in HOOKS]
    with pytest.raises(ArtifactError, match="another sweep: model"):
        sweep(
            other, same, prompts, scorers=[LowWords()], coeffs=COEFFICIENTS, decoding=SHORT, controls=Controls(0),
            portion_rows=16, out=tmp_path / "run",
        )  # fmt: skip


def test_a_folder_that_is_no_sweep_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="exists and is not"):
            run(out=tmp_path, overwrite=overwrite)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_beginning_anew_names_what_no_sweep_wrote_and_deletes_nothing(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out=out, controls=Controls(0))
    (out / "thesis").mkdir()
    (out / "thesis" / "chapter.tex").write_text("mine", encoding="utf-8")
    before = sorted(out.rglob("*"))
    with pytest.raises(ArtifactError, match=r"did not write .*: thesis/chapter\.tex;"):
        run(out=out, controls=Controls(0), coeffs=(2.0,), overwrite=True)
    (out / "manifest.json").write_text('{"name": "extension"}', encoding="utf-8")
    with pytest.raises(ArtifactError, match="schema"):
        run(out=out, controls=Controls(0), coeffs=(2.0,), overwrite=True)
    assert sorted(out.rglob("*")) == before


def test_a_damaged_line_is_an_error_and_a_torn_last_one_is_not(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out=out, controls=Controls(0))
    (out / "manifest.json").unlink()
    lines = (out / GENERATIONS).read_text(encoding="utf-8").splitlines(keepends=True)
    lines[3] = lines[3][:20] + "\n"
    (out / GENERATIONS).write_text("".join(lines), encoding="utf-8")
    with pytest.raises(ArtifactError, match="line 4: not a record of a sweep"):
        run(out=out, controls=Controls(0))


# --- what is refused ------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"coeffs": (0.0,)}, DataError, "other than 0"),
    ({"coeffs": (float("nan"),)}, DataError, "finite numbers, got nan"),
    ({"scorers": []}, DataError, "scorers with different names"),
    ({"scorers": [LowWords(), LowWords()]}, DataError, "scorers with different names"),
    ({"seeds": (0, 1)}, DataError, "temperature 0"),
    ({"seeds": (1, 1), "decoding": SAMPLED}, DataError, "different seeds"),
    ({"units": "inches"}, DataError, "choose raw or rms"),
    ({"goal": "up"}, DataError, "choose lower, higher, either"),
    ({"max_kl": 0.1}, DataError, "needs benign prompts"),
    ({"scope": "middle"}, DataError, "no token scope 'middle'"),
    ({"controls": Controls(2, (3.0,))}, DataError, "3 is not on the grid"),
    ({"controls": Controls(-1)}, DataError, "0 or more directions"),
    ({"prompts": []}, DataError, "needs test prompts"),
    ({"prompts": ["w5", " "]}, DataError, "prompt 1 of the sweep is empty"),
    ({"directions": []}, DataError, "no direction was given"),
    ({"hooks": ["blocks.9.hook_resid_post"], "directions": Direction("a", HOOKS[0], torch.ones(64), "dim")},
     HookNameError, "no hook named"),
    ({"directions": Direction("a", HOOKS[0], torch.ones(32), "dim")}, ModelMismatchError, "width 32"),
    ({"directions": [Direction("a", HOOKS[0], torch.ones(64), "dim")] * 2}, DataError, "given twice"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "says"), WRONG, ids=[w[2] for w in WRONG])
def test_a_wrong_request_is_one_error_before_anything_runs(
    run: Run, wrong: dict[str, Any], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)
    with pytest.raises(error, match=says):
        run(**wrong)
    assert not made


def test_plans_are_equal_however_often_they_are_written(run: Run) -> None:
    plan: Plan = run(controls=Controls(0)).plan
    assert json.loads(json.dumps(plan.to_json())) == plan.to_json()
    assert len(plan.cells(plan.arms)) == (1 + 2 * 4) * 8
    record: Record = plan.to_json()["prompts"][0]
    assert record["split"] == "selection"
    assert adding.__name__ == plan.edit
