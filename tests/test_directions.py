"""Directions with evidence: the vector is the plain one, the numbers are held out, chance is called chance."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
import zoo
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from safety_lens.data import Concept, ContrastPair, load_concept
from safety_lens.errors import ArtifactError, DataError, HookNameError, ModelMismatchError
from safety_lens.models import hooks_at, load_model
from safety_lens.positions import all_tokens, last_token, mean_over
from safety_lens.probes.directions import Direction, Evidence
from safety_lens.probes.estimators import METHODS, diff_in_means
from safety_lens.probes.evaluate import (
    fit_direction,
    folded,
    half_split_stability,
    held_out_scores,
    plain_scores,
    random_null,
    shuffled_null,
)
from safety_lens.probes.extract import LEFT_OUT, DirectionSet, directions_from, extract_directions
from safety_lens.probes.reading import ConceptActivations, Sides, kept_bytes, kept_rows, read_concepts
from safety_lens.probes.selection import Candidates, Choice, depth, selector
from safety_lens.probes.store import load_directions, save_directions
from safety_lens.stats import auroc, auroc_permutation

NULL_SHARE = 0.09
"""What 200 uniform p values stay below at 0.05 (the 99.5 % point of Binomial(200, 0.05) is 19 of 200)."""


@pytest.fixture(scope="module")
def hf() -> PreTrainedModel:
    return zoo.make("llama")


@pytest.fixture(scope="module")
def model(hf: PreTrainedModel) -> HookedTransformer:
    return load_model(hf, tokenizer=synthetic.chat_tokenizer(), check=False)


def topical(g: torch.Generator) -> tuple[object, object]:
    """Prompts whose sides draw on different words, so that a random model has something to separate."""
    return synthetic.words(g, 5, 10, 40), synthetic.words(g, 5, 40, 70)


@pytest.fixture(scope="module")
def found(model: HookedTransformer) -> DirectionSet:
    return extract_directions(model, synthetic.concept(topical), null_repeats=20)


def drawn(model: HookedTransformer, acts: ConceptActivations, **more: Any) -> DirectionSet:
    return directions_from(model, acts, **{"null_repeats": 20, **more})


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


# --- the vector -----------------------------------------------------------------------------------------------------


def last_states(hf: PreTrainedModel, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Hidden states of plain transformers at the last token of each prompt alone, [prompt, layer, d]."""
    rows = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            rows.append(torch.stack(hf(input_ids=ids, output_hidden_states=True).hidden_states)[:, 0, -1])
    return torch.stack(rows)


def test_dim_is_the_mean_difference_of_plain_hidden_states(hf: PreTrainedModel, model: HookedTransformer) -> None:
    concept = synthetic.concept(topical)
    ours = extract_directions(model, concept, null_repeats=20)
    pos = last_states(hf, model.tokenizer, [str(p.positive) for p in concept.train])
    neg = last_states(hf, model.tokenizer, [str(p.negative) for p in concept.train])
    for layer in range(3):  # behind the last block hidden_states are normed
        expected = pos[:, layer + 1].mean(0) - neg[:, layer + 1].mean(0)
        vector = ours[f"blocks.{layer}.hook_resid_post"].vector
        assert cosine(vector, expected) >= 0.99999
        assert abs(float(vector.norm() / expected.norm()) - 1) < 1e-4


def test_a_direction_projects_signed_length_and_knows_its_key() -> None:
    direction = Direction("joy", "blocks.1.hook_resid_post", torch.tensor([3.0, 4.0]), "dim")
    assert direction.norm == 5.0
    assert_close(direction.unit, torch.tensor([0.6, 0.8]))
    assert_close(direction.project(torch.tensor([[5.0, 0.0], [-3.0, -4.0]])), torch.tensor([3.0, -5.0]))
    assert direction.project(torch.ones(2, 3, 2, dtype=torch.bfloat16)).shape == (2, 3)
    assert direction.key == "joy/dim/blocks.1.hook_resid_post"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_finds_and_judges_what_is_there(method: str, model: HookedTransformer) -> None:
    acts = synthetic.activations(synthetic.gaussian(0, 2.5), hooks=synthetic.HOOKS[4:5], n={"train": 24, "test": 24})
    best = drawn(model, acts, method=method).best
    assert best.method == method
    assert best.vector[0] > 0
    assert best.evidence is not None
    assert best.evidence.auroc.value > 0.85
    assert best.evidence.auroc.low > 0.6
    assert best.evidence.auroc.value > best.evidence.null_random
    if method != "pca":  # swapping sides turns only the sign of an uncentred principal axis: its null is two-sided
        assert best.evidence.auroc.value > best.evidence.null_shuffled
    assert best.evidence.p_max < 0.001


# --- held out -------------------------------------------------------------------------------------------------------


def artefact(seed: int, templates: int, n: int, concept: float, wording: int = 99) -> Sides:
    """Pairs whose positive side carries a wording of its template alone (a random axis), and a concept on axis 0."""
    g = torch.Generator().manual_seed(seed)
    axes = 4.0 * torch.randn(templates, 32, generator=torch.Generator().manual_seed(wording))
    axes[:, 0] = 0.0
    which = torch.arange(n) % templates
    pos, neg = torch.randn(2, n, 32, generator=g).unbind()
    pos = pos + axes[which]
    pos[:, 0] += concept
    return Sides(pos, neg, tuple(f"t{int(t)}" for t in which))


@pytest.mark.parametrize("templates", [8, 12])
def test_leaving_the_template_out_takes_away_what_only_its_wording_gives(templates: int) -> None:
    with_wording, without = [], []
    for wording in range(12):
        train, test = artefact(1, templates, 48, 0.0, wording), artefact(2, templates, 48, 0.0, wording)
        for areas, scores in ((with_wording, plain_scores), (without, held_out_scores)):
            found = scores(diff_in_means, train, test)
            areas.append(float(auroc(found.pos, found.neg)))
    assert min(with_wording) > 0.8  # the wording is there to be exploited
    assert 0.35 < np.mean(without) < 0.65
    real = held_out_scores(diff_in_means, artefact(1, templates, 48, 12.0), artefact(2, templates, 48, 12.0))
    assert auroc(real.pos, real.neg) > 0.9  # and a concept that all templates share is still found


def test_wording_of_new_templates_is_not_taken_for_many_independent_pairs() -> None:
    def worded(seed: int) -> Sides:
        """Ten templates with wording of their own on either side, and nothing else."""
        one, other = artefact(seed, 10, 40, 0.0, seed), artefact(seed + 1, 10, 40, 0.0, seed + 1)
        return Sides(one.pos, other.pos, one.groups)

    by_pair, by_template = [], []
    for seed in range(200):
        train, test = worded(4 * seed), worded(4 * seed + 2)
        s = plain_scores(diff_in_means, train, test)
        by_pair.append(auroc_permutation(s.pos[None], s.neg[None], repeats=300).p[0])
        by_template.append(auroc_permutation(s.pos[None], s.neg[None], repeats=300, clusters=test.groups).p[0])
    assert np.mean(np.array(by_template) <= 0.05) <= NULL_SHARE
    assert np.mean(np.array(by_pair) <= 0.05) > 0.15


def test_each_pair_is_scored_by_the_fit_without_its_template_exactly() -> None:
    train, test = artefact(3, 4, 20, 2.0), artefact(4, 4, 12, 2.0)
    found = held_out_scores(diff_in_means, train, test)
    for i, group in enumerate(test.groups):
        keep = [k for k, g in enumerate(train.groups) if g != group]
        fit = train.only(keep)
        axis = torch.nn.functional.normalize((fit.pos.mean(0) - fit.neg.mean(0)).double(), dim=0)
        a, b = fit.pos.double() @ axis, fit.neg.double() @ axis
        spread = torch.cat([a - a.mean(), b - b.mean()]).pow(2).mean().sqrt()
        assert found.pos[i] == pytest.approx(float((test.pos[i].double() @ axis - (a.mean() + b.mean()) / 2) / spread))


def test_templates_that_training_never_saw_are_scored_by_the_whole_fit(model: HookedTransformer) -> None:
    train = artefact(5, 4, 20, 2.0)
    test = replace(artefact(6, 4, 12, 2.0), groups=tuple(f"new {i % 3}" for i in range(12)))
    assert (
        held_out_scores(diff_in_means, train, test).pos.tolist()
        == plain_scores(diff_in_means, train, test).pos.tolist()
    )
    apart = drawn(model, synthetic.activations(synthetic.gaussian(1, 1.0), hooks=synthetic.HOOKS[:1]))
    shared = drawn(
        model, synthetic.activations(synthetic.gaussian(1, 1.0), hooks=synthetic.HOOKS[:1], templates="abcdef")
    )
    one, other = apart.best.evidence, shared.best.evidence
    assert one is not None
    assert other is not None
    assert (one.scheme, other.scheme) == ("held-out split", LEFT_OUT)
    assert np.isnan(one.auroc_known_templates.value)
    assert np.isfinite(other.auroc_known_templates.value)


def test_one_template_for_everything_is_an_error_that_says_so(model: HookedTransformer) -> None:
    acts = synthetic.activations(synthetic.gaussian(1, 1.0), hooks=synthetic.HOOKS[:2], templates=["only"])
    with pytest.raises(DataError, match="several templates, or none"):
        drawn(model, acts)


def test_folds_never_split_a_template_and_spread_pairs_without_one() -> None:
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    by_template = folded(Sides(rows, rows, tuple(f"t{i % 7}" for i in range(40))))
    fold_of = {}
    for template, fold in zip((f"t{i % 7}" for i in range(40)), by_template.groups, strict=True):
        assert fold_of.setdefault(template, fold) == fold
    assert len(set(by_template.groups)) == 5
    single = folded(Sides(rows, rows, (None,) * 40))
    assert sorted(np.unique(single.groups, return_counts=True)[1].tolist()) == [8] * 5


def test_stability_of_isotropic_halves_is_what_theory_says() -> None:
    found = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        pos, neg = torch.randn(2, 40, 4096, generator=g).unbind()
        pos[:, 0] += 8.0
        found.append(half_split_stability(diff_in_means, Sides(pos, neg, (None,) * 40)))
    assert np.mean(found) == pytest.approx(0.140, abs=0.02)  # d' 8 in 4096 dimensions: halves of 20 against 20
    assert np.isnan(half_split_stability(diff_in_means, Sides(pos[:3], neg[:3], (None,) * 3)))


def test_nulls_reach_as_far_as_chance_does_and_no_farther() -> None:
    g = torch.Generator().manual_seed(0)
    train, test = (Sides(*torch.randn(2, 60, 16, generator=g).unbind(), (None,) * 60) for _ in range(2))
    assert 0.52 < shuffled_null(diff_in_means, train, test, repeats=100) < 0.65
    assert 0.52 < random_null(train, test) < 0.65
    one = torch.tensor([[1.0]] * 20) + 0.01 * torch.randn(20, 1, generator=g)
    assert random_null(Sides(one, -one, (None,) * 20), Sides(one, -one, (None,) * 20)) == 1.0  # one axis: any works


# --- negative controls ----------------------------------------------------------------------------------------------


def test_shuffled_labels_are_called_chance_and_choosing_a_hook_does_not_inflate_it() -> None:
    """200 seeds of pure noise at 12 hooks; the hook is chosen on val by its d', p comes from test."""
    chosen, best_looking = [], []
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        rows = torch.randn(12, 3, 2, 24, 8, generator=g)  # hook, split, side, pair, d
        none = (None,) * 24
        scores = [
            [held_out_scores(diff_in_means, Sides(*h[0].unbind(), none), Sides(*h[s].unbind(), none)) for s in (1, 2)]
            for h in rows
        ]
        val = [float(auroc(v.pos, v.neg)) for v, _ in scores]
        tested = auroc_permutation(
            np.stack([t.pos for _, t in scores]), np.stack([t.neg for _, t in scores]), repeats=300, seed=seed
        )
        chosen.append(tested.p_max[int(np.argmax(val))])
        best_looking.append(tested.p.min())
    assert np.mean(np.array(chosen) <= 0.05) <= NULL_SHARE
    assert np.mean(np.array(best_looking) <= 0.05) > 0.3  # choosing on the reported pairs would find something


@pytest.mark.slow
def test_the_whole_extraction_calls_shuffled_labels_chance(model: HookedTransformer) -> None:
    single, corrected = [], []
    for seed in range(200):
        acts = synthetic.activations(synthetic.gaussian(seed), n={"train": 16, "val": 12, "test": 20}, seed=seed)
        evidence = drawn(model, acts, seed=seed).best.evidence
        assert evidence is not None
        single.append(evidence.p)
        corrected.append(evidence.p_max)
    assert np.mean(np.array(single) <= 0.05) <= NULL_SHARE
    assert np.mean(np.array(corrected) <= 0.05) <= NULL_SHARE


def test_noise_carries_the_remark_that_it_is_noise(model: HookedTransformer) -> None:
    evidence = drawn(model, synthetic.activations(synthetic.gaussian(7), seed=7)).best.evidence
    assert evidence is not None
    assert any("not distinguishable from chance" in note for note in evidence.notes)
    assert evidence.auroc.low < 0.5 < evidence.auroc.high


def test_identical_sides_have_no_direction_and_nan_stays_in_the_evidence(
    model: HookedTransformer, tmp_path: Path
) -> None:
    def same(g: torch.Generator) -> tuple[object, object]:
        text = synthetic.words(g, 6)
        return text, text

    found = extract_directions(model, synthetic.concept(same), null_repeats=20)
    assert (len(found), found.choice) == (0, None)
    for evidence in found.evidence.values():
        assert np.isnan([*evidence.auroc, evidence.p, evidence.p_max, evidence.stability]).all()
        assert any("no direction" in note for note in evidence.notes)
    with pytest.raises(DataError, match="no direction at any of 4 hooks"):
        _ = found.best
    with pytest.raises(DataError, match="has no direction at"):
        found["blocks.0.hook_resid_post"]
    path = save_directions(tmp_path / "run", [found], model)
    rows = [json.loads(line) for line in (path / "measurements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["value"] is None for row in rows if row["metric"] in ("auroc", "p", "norm"))
    (again,) = load_directions(path, model)
    assert (len(again), again.choice) == (0, None)


def test_a_hook_without_a_gap_is_left_out_and_the_others_are_not(model: HookedTransformer) -> None:
    noise = synthetic.gaussian(3, 2.0)

    def draw(split: str, hook: str, n: int) -> tuple[Tensor, Tensor]:
        pos, neg = noise(split, hook, n)
        return (pos, pos.clone()) if hook == synthetic.HOOKS[0] else (pos, neg)

    found = drawn(model, synthetic.activations(draw, hooks=synthetic.HOOKS[:3]))
    assert [d.hook for d in found] == list(synthetic.HOOKS[1:3])
    assert all(torch.isfinite(d.vector).all() and d.norm > 0 for d in found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_give_no_direction(bad: float, model: HookedTransformer) -> None:
    noise = synthetic.gaussian(4, 2.0)

    def draw(split: str, hook: str, n: int) -> tuple[Tensor, Tensor]:
        pos, neg = noise(split, hook, n)
        if hook == synthetic.HOOKS[0]:
            pos[1, 2] = bad
        return pos, neg

    found = drawn(model, synthetic.activations(draw, hooks=synthetic.HOOKS[:2]))
    assert [d.hook for d in found] == [synthetic.HOOKS[1]]


def test_a_gap_of_rounding_size_is_no_direction() -> None:
    rows = 100 + torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert fit_direction(diff_in_means, Sides(rows, rows + 1e-6, (None,) * 20)) is None
    assert fit_direction(diff_in_means, Sides(rows, rows + 1e-1, (None,) * 20)) is not None


# --- selection ------------------------------------------------------------------------------------------------------


def test_the_hook_that_separates_best_is_chosen(model: HookedTransformer) -> None:
    gaps = dict.fromkeys(synthetic.HOOKS, 0.5) | {"blocks.2.hook_resid_mid": 4.0}
    found = drawn(model, synthetic.activations(synthetic.gaussian(5, gaps), seed=5))
    assert found.best.hook == "blocks.2.hook_resid_mid"
    assert found.choice is not None
    assert "largest d'" in found.choice.reason


@pytest.mark.parametrize("val", [16, 0])
def test_the_choice_does_not_look_at_the_reporting_pairs(val: int, model: HookedTransformer) -> None:
    counts = {"train": 24, "val": val, "test": 24}
    gaps = {hook: 0.2 * i for i, hook in enumerate(synthetic.HOOKS)}
    acts = synthetic.activations(synthetic.gaussian(6, gaps), n=counts, seed=6)
    seen: list[Candidates] = []

    def looking(candidates: Candidates) -> Choice:
        seen.append(candidates)
        choose = selector("separability", [])
        return choose(candidates)

    before = drawn(model, acts, select=looking)
    other = synthetic.activations(synthetic.gaussian(60, {synthetic.HOOKS[0]: 9.0}), n=counts, seed=60)
    tampered = replace(acts, sides={**acts.sides, "test": other.sides["test"]})
    after = drawn(model, tampered, select=looking)
    assert before.choice == after.choice
    assert before.best.evidence != after.best.evidence
    assert {c.split for c in seen} == {"val" if val else "train"}
    assert all(d.evidence is None for c in seen for d in c.directions.values())
    assert len(next(iter(seen[0].scores.values())).pos) == (val or 24)


def test_equal_hooks_are_settled_by_the_stated_depth_and_not_by_their_order(model: HookedTransformer) -> None:
    noise = synthetic.gaussian(8, 2.0)
    once = {(split, n): noise(split, "", n) for split, n in (("train", 24), ("val", 16), ("test", 24))}

    def same(split: str, hook: str, n: int) -> tuple[Tensor, Tensor]:
        return once[split, n]

    forward = drawn(model, synthetic.activations(same, hooks=synthetic.HOOKS))
    backward = drawn(model, synthetic.activations(same, hooks=synthetic.HOOKS[::-1]))
    assert forward.best.hook == backward.best.hook
    nearest = min(abs(depth(hook, 4) - 0.6) for hook in synthetic.HOOKS)
    assert abs(depth(forward.best.hook, 4) - 0.6) == nearest
    assert forward.choice is not None
    assert "nearest to depth 0.6" in forward.choice.reason


def test_hooks_without_any_spread_do_not_make_the_choice_a_matter_of_order(model: HookedTransformer) -> None:
    noise = synthetic.gaussian(9, 3.0)

    def constant_at_first(split: str, hook: str, n: int) -> tuple[Tensor, Tensor]:
        if hook == synthetic.HOOKS[0]:
            return torch.ones(n, 16), torch.zeros(n, 16)
        return noise(split, hook, n)

    acts = synthetic.activations(constant_at_first, hooks=synthetic.HOOKS[:4])
    back = acts.at(synthetic.HOOKS[3::-1])
    assert drawn(model, acts).best.hook == drawn(model, back).best.hook != synthetic.HOOKS[0]


def test_a_named_hook_is_taken_and_a_function_may_choose(model: HookedTransformer, found: DirectionSet) -> None:
    acts = synthetic.activations(synthetic.gaussian(10, 1.0))
    assert drawn(model, acts, select="blocks.3.hook_resid_pre").best.hook == "blocks.3.hook_resid_pre"
    last = drawn(model, acts, select=lambda candidates: Choice(list(candidates.directions)[-1], "the last"))
    assert (last.best.hook, last.choice) == (synthetic.HOOKS[-1], Choice(synthetic.HOOKS[-1], "the last"))
    with pytest.raises(DataError, match=r"blocks\.9\.hook_resid_pre.*is not among"):
        drawn(model, acts, select="blocks.9.hook_resid_pre")
    with pytest.raises(DataError, match="'best' is not known; choose separability"):
        drawn(model, acts, select="best")


def test_everything_repeats_with_its_seed(model: HookedTransformer, found: DirectionSet) -> None:
    again = extract_directions(model, synthetic.concept(topical), null_repeats=20)
    assert again.measurements == found.measurements
    assert all(torch.equal(again[d.hook].vector, d.vector) for d in found)


def test_every_number_is_a_row_with_its_hook_split_and_count(found: DirectionSet) -> None:
    rows = {(row.metric, row.hook): row for row in found.measurements}
    for hook, evidence in found.evidence.items():
        row = rows["auroc", hook]
        assert (row.value, row.low, row.high) == evidence.auroc
        assert (row.subject, row.split, row.n) == ("joy/dim", "test", 24)
        assert rows["norm", hook].value == pytest.approx(found[hook].norm)
        assert rows["select_auroc", hook].split == "val"
    assert rows["chosen", found.best.hook].note == (found.choice and found.choice.reason)


# --- reading concepts -----------------------------------------------------------------------------------------------


def test_prompts_that_recur_are_run_once_and_read_everywhere(model: HookedTransformer) -> None:
    shared = synthetic.concept(topical)
    turned = replace(shared, name="grief", train=tuple(ContrastPair(p.negative, p.positive) for p in shared.train))
    runs: list[int] = []
    both = read_concepts(model, [shared, turned], hooks_at(model), on_batch=runs.append)
    assert sum(runs) == 2 * len(shared.pairs)
    hook = hooks_at(model)[1]
    assert torch.equal(both[0].sides["train"][hook].pos, both[1].sides["train"][hook].neg)
    alone = read_concepts(model, [shared], hooks_at(model))[0]
    assert_close(alone.sides["test"][hook].pos, both[0].sides["test"][hook].pos)


def test_equal_tokens_with_other_spans_are_read_at_their_own_tokens(hf: PreTrainedModel) -> None:
    plain = load_model(hf, tokenizer=zoo.tokenizer(), check=False)  # no template: a question and its answer are joined

    def prefilled(g: torch.Generator) -> tuple[object, object]:
        q = synthetic.words(g, 4)
        return [{"role": "user", "content": q}, {"role": "assistant", "content": "w5 w6"}], [
            {"role": "user", "content": q},
            {"role": "assistant", "content": "w7 w8"},
        ]

    def joined(g: torch.Generator) -> tuple[object, object]:
        q = synthetic.words(g, 4)
        return f"{q} w5 w6", f"{q} w7 w8"

    hook = "blocks.1.hook_resid_post"
    concepts = [synthetic.concept(joined, name="plain"), synthetic.concept(prefilled, name="prefilled")]
    together = read_concepts(plain, concepts, [hook], positions=mean_over("instruction"))
    alone = [read_concepts(plain, [c], [hook], positions=mean_over("instruction"))[0] for c in concepts]
    for a, b in zip(together, alone, strict=True):
        assert_close(a.sides["train"][hook].pos, b.sides["train"][hook].pos)
    assert not torch.allclose(alone[0].sides["train"][hook].pos, alone[1].sides["train"][hook].pos)


def test_rows_to_keep_are_announced_to_the_byte_and_named_by_concept_split_and_side(model: HookedTransformer) -> None:
    acts = read_concepts(model, [synthetic.concept(topical)], hooks_at(model))[0]
    for dtype in ("float16", "float32"):
        kept = kept_rows(acts, acts.hooks[:2], dtype)
        assert sum(t.nbytes for t in kept.values()) == kept_bytes(acts, acts.hooks[:2], dtype)
    assert kept["joy/val/negative/blocks.1.hook_resid_post"].shape == (16, 64)
    with pytest.raises(DataError, match="float16 or float32, not 'int8'"):
        kept_bytes(acts, acts.hooks, "int8")
    loud = synthetic.activations(lambda s, h, n: (torch.full((n, 2), 1e6), torch.zeros(n, 2)), hooks=["hook_embed"])
    with pytest.raises(DataError, match="beyond float16; keep activations as float32"):
        kept_rows(loud, ["hook_embed"], "float16")


def few(train: int, test: int) -> Concept:
    return synthetic.concept(topical, n={"train": train, "val": 0, "test": test})


@pytest.mark.parametrize(
    ("concept", "more", "error", "message"),
    [
        (few(3, 5), {}, DataError, "'joy' has 3 training pairs"),
        (few(5, 1), {}, DataError, "'joy' has 1 pairs to report on"),
        (few(6, 4), {"positions": all_tokens}, DataError, "several rows per prompt"),
        (few(6, 4), {"method": "magic"}, DataError, "'magic' is not known"),
        (few(6, 4), {"hooks": ["blocks.0.hook_resid"]}, HookNameError, "blocks.0.hook_resid"),
        (few(6, 4), {"positions": mean_over("answer")}, DataError, "answer tokens"),
    ],
)
def test_extractions_that_cannot_be_done_say_why(
    concept: Concept, more: dict[str, Any], error: type[Exception], message: str, model: HookedTransformer
) -> None:
    with pytest.raises(error, match=message):
        extract_directions(model, concept, null_repeats=20, **more)


def test_a_prompt_too_long_is_named_by_concept_split_side_and_number(model: HookedTransformer) -> None:
    good = synthetic.concept(topical)
    long = replace(good, test=(*good.test, ContrastPair("w5", "w6 " * 200)))
    with pytest.raises(DataError, match=r"joy, test split, negative side: prompt 24 .*limit is 128"):
        extract_directions(model, long)
    assert len(extract_directions(model, long, truncate=True, null_repeats=20)) == 4


# --- store ----------------------------------------------------------------------------------------------------------


def same_evidence(a: Evidence, b: Evidence) -> bool:
    return repr(a) == repr(b)  # NaN equals NaN here


def test_directions_come_back_with_equal_vectors_and_evidence(
    found: DirectionSet, model: HookedTransformer, tmp_path: Path
) -> None:
    concept = synthetic.concept(topical)
    sets = [found, extract_directions(model, concept, method="robust", null_repeats=20)]
    path = save_directions(tmp_path / "run", sets, model, concepts=[concept])
    again = load_directions(path, model)
    assert [f"{s.concept}/{s.method}" for s in again] == ["joy/dim", "joy/robust"]
    for new, old in zip(again, sets, strict=True):
        assert new.best.hook == old.best.hook
        for hook, evidence in old.evidence.items():
            assert same_evidence(new.evidence[hook], evidence)
            assert torch.equal(new[hook].vector, old[hook].vector)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["chosen"]["joy/dim"]["hook"] == found.best.hook
    assert manifest["data"]["joy"]["sha256"] == "0" * 64


def test_directions_of_another_model_are_refused(found: DirectionSet, model: HookedTransformer, tmp_path: Path) -> None:
    path = save_directions(tmp_path / "run", [found], model)
    with pytest.raises(ModelMismatchError, match="same shape, other weights"):
        load_directions(path, load_model(zoo.make("llama", seed=1), check=False))


def test_two_sets_under_one_key_are_refused(found: DirectionSet, model: HookedTransformer, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="share a key"):
        save_directions(tmp_path / "run", [found, found], model)


# --- a real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[Path, Concept]:
    return shared / "models" / "stories260K-hf", load_concept(shared / "data" / "stories_happy_sad_pairs.jsonl")


def test_a_trained_model_separates_stories_across_templates_and_words_are_reported_beside_it(
    stories: tuple[Path, Concept], tmp_path: Path
) -> None:
    folder, concept = stories
    model = load_model(folder)
    found = extract_directions(model, concept, null_repeats=20)
    evidence = found.best.evidence
    assert evidence is not None
    assert evidence.scheme == LEFT_OUT
    assert evidence.auroc.value >= 0.80
    assert evidence.auroc.low > 0.5
    assert evidence.p_max < 0.01
    assert evidence.lexical_known_templates.value == 1.0
    assert any("a bag of words separates these pairs perfectly" in note for note in evidence.notes)
    (again,) = load_directions(save_directions(tmp_path / "run", [found], model), model)
    assert same_evidence(again.evidence[found.best.hook], evidence)
    with pytest.raises(ModelMismatchError):
        load_directions(tmp_path / "run", load_model(zoo.make("llama"), check=False))


def test_dim_of_a_trained_model_is_the_mean_difference_of_plain_hidden_states(stories: tuple[Path, Concept]) -> None:
    folder, concept = stories
    model, hf = load_model(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    acts = read_concepts(model, [concept], hooks_at(model), positions=last_token)[0]
    states: dict[str, list[Tensor]] = {"positive": [], "negative": []}
    for side, rows in states.items():
        for pair in concept.train:
            ids = tokenizer(str(getattr(pair, side)), return_tensors="pt").input_ids
            with torch.no_grad():
                rows.append(torch.stack(hf(input_ids=ids, output_hidden_states=True).hidden_states)[:, 0, -1].double())
    gap = torch.stack(states["positive"]).mean(0) - torch.stack(states["negative"]).mean(0)
    for layer in range(model.cfg.n_layers - 1):
        ours = fit_direction(diff_in_means, acts.sides["train"][f"blocks.{layer}.hook_resid_post"])
        assert ours is not None
        assert cosine(ours, gap[layer + 1]) >= 0.99999
        assert abs(float(ours.norm() / gap[layer + 1].norm()) - 1) < 1e-4
