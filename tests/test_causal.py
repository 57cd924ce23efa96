"""Causal selection: a planted direction that the model uses beats one that only separates; chance passes nothing."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
import zoo
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from safety_lens import cli
from safety_lens.activations import encode_for
from safety_lens.data import Concept, load_concept
from safety_lens.forced import Continuation, continuation_kl
from safety_lens.generation import generate, stop_tokens
from safety_lens.interventions.behaviours import Behaviour, Opening, Openings
from safety_lens.interventions.causality.controls import shuffled_labels, variance_matched
from safety_lens.interventions.causality.limits import Limits
from safety_lens.interventions.causality.selector import causal_selector
from safety_lens.interventions.causality.use import CausalUse, clustered_mean, resume_layer
from safety_lens.interventions.steering import ablate, steer
from safety_lens.interventions.sweeping.controls import random_direction, shuffled_directions
from safety_lens.models import hooks_at, load_model
from safety_lens.probes.directions import Direction
from safety_lens.probes.extract import DirectionSet, directions_from
from safety_lens.probes.reading import read_concepts
from safety_lens.probes.selection import Candidates, Choice, by_separability
from safety_lens.probes.store import load_directions

YES, NO = 90, 91  # answer tokens of the planted model
LIGHT = Limits(draws=19, scope="all")  # the fewest draws that can give p = 0.05
SEEN, CLEAN, USED, IDLE, CONSTANT = 0, 1, 2, 3, 4  # dimensions of its residual stream


@cache
def planted() -> HookedTransformer:
    """The planted model, hooked."""
    return load_model(planted_hf(), tokenizer=synthetic.chat_tokenizer(), check=False)


@cache
def planted_hf() -> PreTrainedModel:
    """A llama that answers YES where block 1 has copied a noisy mark of the prompt's words into dimension USED.

    Block 0 has by then copied a noiseless mark of the same words into dimension IDLE, which nothing reads: behind it
    the sides lie far apart along a direction that does nothing.
    """
    hf = zoo.make("llama", num_key_value_heads=4)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        words = hf.model.embed_tokens.weight
        words[:, 8:] = 0.3 * torch.randn(words.shape[0], words.shape[1] - 8, generator=g)
        words[10:40, SEEN] = 1.0 + 0.6 * torch.randn(30, generator=g)
        words[10:40, CLEAN] = 1.5
        words[:, CONSTANT] = 1.0
        for block, source, target, gain in ((0, CLEAN, IDLE, 1.0), (1, SEEN, USED, 30.0)):
            attn = hf.model.layers[block].self_attn  # queries and keys are 0: every token is looked at alike
            attn.v_proj.weight[0, source] = 1.0
            attn.o_proj.weight[target, 0] = gain
        hf.lm_head.weight[YES, USED] = 6.0
        hf.lm_head.weight[NO, CONSTANT] = 6.0
    return hf


@cache
def planted_concept() -> Concept:
    return synthetic.concept(
        lambda g: (synthetic.words(g, 8, 10, 40), synthetic.words(g, 8, 40, 70)), templates=("a", "b", "c", "d")
    )


def chosen(select: object, **more: Any) -> DirectionSet:
    model = planted()
    acts = read_concepts(model, [planted_concept()], hooks_at(model))[0]
    return directions_from(model, acts, select=select, null_repeats=20, **more)  # type: ignore[arg-type]


def values(choice: Choice, metric: str) -> Mapping[str | None, float]:
    return {r.hook: r.value for r in choice.measurements if r.metric == metric}


@cache
def as_found() -> Candidates:
    """The candidates of the planted model, as a selector sees them."""
    kept: list[Candidates] = []

    def keep(found: Candidates) -> Choice:
        kept.append(found)
        return by_separability(found)

    chosen(keep)
    return kept[0]


def candidates(change: Callable[[Direction], Direction] = lambda d: d) -> Candidates:
    """The same with every direction changed."""
    return replace(as_found(), directions={h: change(d) for h, d in as_found().directions.items()})


# --- the claim ------------------------------------------------------------------------------------------------------


def test_the_direction_the_model_uses_is_chosen_although_another_separates_better() -> None:
    found = chosen(causal_selector(limits=LIGHT))
    assert found.choice is not None
    assert found.choice.hook == "blocks.1.hook_resid_post"
    apart = by_separability(candidates())
    assert apart.hook != found.choice.hook
    gap = values(apart, "select_d_prime")
    assert gap[apart.hook] > 2 * gap[found.choice.hook]
    assert f"separability alone would take {apart.hook}" in found.choice.reason
    bypass, before = values(found.choice, "bypass"), values(found.choice, "behaviour_positive")[None]
    assert before > 0 > bypass["blocks.1.hook_resid_post"]
    assert values(found.choice, "induce")["blocks.1.hook_resid_post"] > 0


def test_the_one_that_only_separates_is_measured_too_and_does_nothing() -> None:
    found = chosen(causal_selector(limits=LIGHT))
    assert found.choice is not None
    apart = by_separability(candidates()).hook
    before = values(found.choice, "behaviour_positive")[None]
    assert values(found.choice, "bypass")[apart] > 0.5 * before > 0
    assert values(found.choice, "chosen_by_separability") == {apart: 1.0}


def test_effects_do_not_depend_on_how_many_prompts_the_first_pass_took() -> None:
    """Nor do those next to the controls, where the controls are measured on all prompts."""
    whole, parts = (
        causal_selector(limits=replace(LIGHT, coarse=coarse, control_prompts=10**6))(candidates()) for coarse in (64, 5)
    )
    assert whole.hook == parts.hook
    for metric in ("bypass", "induce", "kl"):
        expected = values(whole, metric)[whole.hook]
        assert values(parts, metric)[whole.hook] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        if metric != "kl":
            assert values(parts, f"{metric}_same")[whole.hook] == pytest.approx(expected, rel=1e-4)


def test_a_coefficient_that_is_enough_for_all_prompts_is_not_raised_because_few_ask_for_more() -> None:
    once, look = (
        causal_selector(limits=replace(LIGHT, coarse=coarse, finalists=finalists, coeffs=(1.0,)))(candidates())
        for coarse, finalists in ((64, 3), (3, 0))
    )
    few, share = (values(choice, "induce_share")[once.hook] for choice in (look, once))
    assert few < share, "few prompts by themselves would ask for more"
    limits = replace(LIGHT, coarse=3, min_induce=(few + share) / 2, coeffs=(1.0, 1.5))
    choice = causal_selector(limits=limits)(candidates())
    assert {r.hook: r.coeff for r in choice.measurements if r.metric == "induce"}[once.hook] == 1.0


def test_changes_are_of_the_same_prompts_and_the_shares_are_their_part_of_the_way() -> None:
    choice = causal_selector(limits=LIGHT)(candidates())
    way = values(choice, "behaviour_positive")[None] - values(choice, "behaviour_negative")[None]
    for metric, sign in (("bypass", -1), ("induce", 1)):
        change = values(choice, f"{metric}_change")[choice.hook]
        assert values(choice, f"{metric}_share")[choice.hook] == pytest.approx(sign * change / way, rel=1e-6)
        side = "positive" if metric == "bypass" else "negative"
        level = values(choice, f"behaviour_{side}")[None]
        assert change == pytest.approx(values(choice, metric)[choice.hook] - level, abs=1e-6)


def test_hooks_that_hardly_bypass_are_neither_added_nor_charged_and_it_is_said() -> None:
    choice = causal_selector(limits=replace(LIGHT, min_bypass=10.0))(candidates())
    apart = by_separability(candidates()).hook
    notes = {r.hook: r.note for r in choice.measurements if r.metric == "causal_eligible" and r.hook != apart}
    looked_at = values(choice, "bypass").keys() - {apart}
    assert looked_at
    assert all(str(notes[hook]).startswith("does not bypass") for hook in looked_at)
    assert values(choice, "induce").keys() == values(choice, "kl").keys() == {apart}
    assert looked_at & values(causal_selector(limits=LIGHT)(candidates()), "induce").keys(), "the usual limit adds some"


def test_random_directions_pass_nowhere_and_the_choice_says_so() -> None:
    for seed in range(2):
        choice = causal_selector(limits=LIGHT)(candidates(lambda d, s=seed: random_direction(d, s, seed=99)))
        assert choice.reason.startswith("NO hook of 4 passes the causal test")
        assert values(choice, "causal_passed") == {None: 0.0}
        assert choice.hook == by_separability(candidates()).hook  # said to be taken by separability


def test_a_separating_direction_that_is_not_used_loses_to_random_ones_where_no_other_is_left() -> None:
    lonely = candidates()
    hook = "blocks.0.hook_resid_post"
    idle = torch.zeros(64)
    idle[IDLE] = 30.0
    alone = replace(
        lonely, directions={hook: Direction("joy", hook, idle, "planted")}, scores={hook: lonely.scores[hook]}
    )
    choice = causal_selector(limits=Limits(min_induce=-100.0, min_bypass=-100.0, draws=19, scope="all"))(alone)
    assert "1 no better than random" in choice.reason
    assert values(choice, "bypass_random_p") == {hook: 1.0}  # nothing across it varies there, so that none was drawn


# --- how it looks ---------------------------------------------------------------------------------------------------


def test_the_reporting_split_is_not_looked_at() -> None:
    twisted = candidates()
    worse = replace(twisted.acts.concept, test=planted_concept().train[:3])
    changed = replace(twisted, acts=replace(twisted.acts, concept=worse))
    assert causal_selector(limits=LIGHT)(twisted) == causal_selector(limits=LIGHT)(changed)


def test_equal_seeds_give_equal_choices_and_the_model_is_left_as_found() -> None:
    model, before = planted(), {n: p.clone() for n, p in planted().named_parameters()}
    state = torch.random.get_rng_state()
    first, second = (
        causal_selector(limits=LIGHT, seed=1)(candidates()),
        causal_selector(limits=LIGHT, seed=1)(candidates()),
    )
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_what_is_left_out_beforehand_is_said_and_costs_no_forward() -> None:
    choice = causal_selector(limits=Limits(latest=0.5, draws=19))(candidates())
    notes = {r.hook: r.note for r in choice.measurements if r.metric == "causal_eligible"}
    assert notes["blocks.3.hook_resid_post"] is not None
    assert notes["blocks.3.hook_resid_post"].startswith("too late")
    apart = values(choice, "chosen_by_separability").keys()
    late = {h for h, note in notes.items() if note is not None and note.startswith("too late")}
    assert not (late - apart) & values(choice, "kl").keys()


def test_a_near_duplicate_of_a_passing_direction_is_not_scored() -> None:
    made = candidates()
    first = made.directions["blocks.1.hook_resid_post"]
    twin = replace(first, hook="blocks.2.hook_resid_pre", vector=first.vector * 1.5)
    both = replace(
        made,
        directions={first.hook: first, twin.hook: twin},
        scores={first.hook: made.scores[first.hook], twin.hook: made.scores[first.hook]},
    )
    notes = {r.hook: r.note for r in causal_selector(limits=LIGHT)(both).measurements if r.metric == "causal_eligible"}
    assert sorted(note is None for note in notes.values()) == [False, True]
    assert any(note is not None and note.startswith("near-duplicate") for note in notes.values())


@pytest.mark.parametrize("name", list(zoo.ARCHITECTURES))
@pytest.mark.parametrize("point", ["resid_pre", "resid_post"])
def test_resuming_from_the_kept_stream_equals_adding_by_a_hook(name: str, point: str) -> None:
    model = load_model(zoo.make(name), tokenizer=zoo.tokenizer(), check=False)
    g = torch.Generator().manual_seed(0)
    prompts = encode_for(model, [synthetic.words(g, n) for n in (5, 19, 11)])
    score = Openings((Opening((12, 7)), Opening((12, 8)), Opening((9,))))
    directions = [
        Direction("joy", hook, 3 * torch.randn(64, generator=g), "dim") for hook in hooks_at(model, point, [0, 2, -1])
    ]
    assert all(resume_layer(d.hook) is not None for d in directions)
    for scope in ("all", "prompt"):
        quick = CausalUse(model, prompts, prompts, score).induce(directions, 0.7, scope)
        for d, found in zip(directions, quick, strict=True):
            slow = score.log_odds(model, prompts, steer(d, 0.7, scope=scope))
            np.testing.assert_allclose(found, slow, atol=2e-4)


@pytest.mark.parametrize("name", list(zoo.ARCHITECTURES))
def test_the_kl_of_an_ablation_is_that_of_the_first_four_tokens_of_own_answers(name: str) -> None:
    """Trees against padded rows, and few prompts against all."""
    model = load_model(zoo.make(name), tokenizer=zoo.tokenizer(), check=False)
    g = torch.Generator().manual_seed(0)
    prompts = encode_for(model, [synthetic.words(g, n) for n in (5, 19, 11)])
    direction = Direction("joy", "blocks.0.hook_resid_post", torch.randn(64, generator=g), "dim")
    use = CausalUse(model, prompts, prompts, Openings((Opening((9,)),)))
    stop, answers = sorted(stop_tokens(model))[:1], generate(model, prompts, max_new_tokens=4)
    own = [(*answer.tokens, *stop) if answer.stopped else answer.tokens for answer in answers]
    rows = [Continuation(tuple(p.ids), tuple(ids)) for p, ids in zip(prompts, own, strict=True)]
    expected = [kl.mean() for kl in continuation_kl(model, rows, [ablate(direction)])[0]]
    np.testing.assert_allclose(use.kl(direction), expected, rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(use.part(stop=2).kl(direction), expected[:2], rtol=2e-3, atol=1e-6)
    assert min(expected) > 1e-5


# --- the behaviour --------------------------------------------------------------------------------------------------


def test_without_a_reader_the_openings_come_from_answers_labelled_by_side() -> None:
    selector = causal_selector(limits=LIGHT)
    choice = selector(candidates())
    found = selector.behaviours["joy"]
    assert found.name == "sides"
    assert found.openings is not None
    assert [set(o.ids) for o in found.openings.shown] == [{YES}]
    assert choice.behaviour == found.entry()


def test_sides_that_are_answered_alike_keep_the_directions_and_say_why() -> None:
    made = candidates()
    low = tuple(replace(p, positive=f"{p.negative} w41") for p in planted_concept().train)
    same = replace(made.acts.concept, train=low)
    choice = causal_selector(limits=LIGHT)(replace(made, acts=replace(made.acts, concept=same)))
    assert choice.reason.startswith("NO causal choice: no behaviour can be read")
    assert "taken by separability" in choice.reason
    assert choice.hook == by_separability(made).hook
    assert not choice.causal
    assert choice.behaviour is not None
    assert choice.behaviour["fault"] is not None


def test_a_behaviour_can_be_handed_in_and_must_hold_on_the_selection_pairs() -> None:
    yes, no = (Behaviour(name, Unlabelled(), Openings((Opening((token,)),))) for name, token in (("y", YES), ("n", NO)))
    assert causal_selector(yes, limits=LIGHT)(candidates()).hook == "blocks.1.hook_resid_post"
    wrong = causal_selector(no, limits=LIGHT)(candidates())
    assert "are not above those of the negative ones" in wrong.reason
    assert not wrong.causal


class Unlabelled:
    """A reader that cannot read anything."""

    name = "unlabelled"

    def __call__(self, completions: Sequence[Any]) -> np.ndarray:
        return np.full(len(completions), np.nan)


class FromTheEnd:
    """A reader that calls only prompts with an even last word refused."""

    name = "even"

    def __call__(self, completions: Sequence[Any]) -> np.ndarray:
        words = [c.prompt.split()[-1] for c in completions]
        return np.array(
            [float(c.text.startswith("w90") and int(w[1:]) % 2 == 0) for c, w in zip(completions, words, strict=True)]
        )


def test_only_prompts_whose_answers_fit_their_side_are_searched_and_their_number_remains() -> None:
    behaviour = Behaviour("even", FromTheEnd(), Openings((Opening((YES,)),)))
    choice = causal_selector(behaviour, limits=LIGHT)(candidates())
    left = {r.metric: (r.value, r.n) for r in choice.measurements if r.metric.startswith("selection_prompts")}
    pairs = candidates().acts.pairs(candidates().split)
    even = sum(int(str(p.positive).split()[-1][1:]) % 2 == 0 for p in pairs)
    assert 0 < even < len(pairs)
    found = re.search(rf"on the val pairs: (\d+) of {len(pairs)} positive val prompts and (\d+) of", choice.reason)
    assert found is not None
    kept, told = found.groups()
    assert 0 < int(kept) <= even
    assert left["selection_prompts_positive"][0] == int(kept) + int(told)
    assert ("REMARK: fewer than 24" in choice.reason) == (min(v for v, _ in left.values()) < 24)


# --- controls -------------------------------------------------------------------------------------------------------


def test_an_orthogonal_direction_changes_no_log_odds() -> None:
    model, pairs = planted(), planted_concept().val
    prompts = encode_for(model, [p.positive for p in pairs])
    unused = torch.zeros(64)
    unused[IDLE] = 5.0  # nothing reads this dimension; the norm before the head sees it, so the planted gain is large
    use = CausalUse(model, prompts, prompts, Openings((Opening((YES,)),)))
    nothing = Direction("joy", "blocks.3.hook_resid_post", unused, "unused")
    used = torch.zeros(64)
    used[USED] = 5.0
    moved = np.abs(use.bypass(replace(nothing, vector=used)) - use.base_positive).mean()
    assert moved > 10 * np.abs(use.bypass(nothing) - use.base_positive).mean()


def test_controls_have_the_length_of_the_direction_and_differ_from_it() -> None:
    real = candidates().directions["blocks.1.hook_resid_post"]
    for make in (variance_matched, shuffled_labels):
        drawn = list(make(candidates(), real, 5, 0))
        again = list(make(candidates(), real, 5, 0))
        assert len({tuple(d.vector.tolist()) for d in drawn}) > 1
        assert all(d.norm == pytest.approx(real.norm, rel=1e-5) for d in drawn)
        assert all(torch.equal(d.vector, e.vector) for d, e in zip(drawn, again, strict=True))


def test_variance_matched_draws_have_the_covariance_of_the_activations_across_the_direction() -> None:
    made, hook = candidates(), "blocks.1.hook_resid_post"
    real, sides = made.directions[hook], made.acts.sides["train"][hook]
    rows = torch.cat([side - side.mean(0) for side in (sides.pos, sides.neg)]).double()
    unit = real.unit.double()
    rows = rows - (rows @ unit)[:, None] * unit
    drawn = torch.stack([d.vector for d in variance_matched(made, real, 400, 0)]).double()
    assert (drawn @ unit).abs().max() < 1e-4 * real.norm
    share, expected = (x.pow(2).sum(0) / x.pow(2).sum() for x in (drawn, rows))
    assert torch.corrcoef(torch.stack([share, expected]))[0, 1] > 0.9


def test_shuffled_labels_do_not_pass() -> None:
    made = candidates()
    turned = shuffled_directions(made.acts, n=1, seed=3)[0]
    choice = causal_selector(limits=LIGHT)(
        replace(made, directions={h: d for h, d in turned.items() if h in made.directions})
    )
    assert not choice.causal
    assert choice.reason.startswith("NO hook")


def test_an_addition_that_is_too_weak_is_repeated_with_the_next_coefficient_and_that_is_kept() -> None:
    behaviour = Behaviour("y", Unlabelled(), Openings((Opening((YES,)),)))
    choice = causal_selector(behaviour, limits=replace(LIGHT, coeffs=(0.001, 1.5, 3.0)))(candidates())
    assert choice.hook == "blocks.1.hook_resid_post"
    assert {r.hook: r.coeff for r in choice.measurements if r.metric == "induce"}[choice.hook] == 1.5
    assert "adding it 1.5 times" in choice.reason


def test_the_chosen_one_beats_all_draws_and_p_is_one_in_a_hundred() -> None:
    choice = causal_selector(Behaviour("y", Unlabelled(), Openings((Opening((YES,)),))), limits=Limits(scope="all"))(
        candidates()
    )
    p = {r.metric: r.value for r in choice.measurements if r.metric.endswith("_p")}
    assert p == {
        f"{effect}_{kind}_p": pytest.approx(0.01) for effect in ("bypass", "induce") for kind in ("random", "shuffled")
    }


def test_pairs_that_hold_their_answers_keep_the_directions_and_say_why() -> None:
    made = candidates()
    turn = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}]
    pairs = tuple(replace(p, positive=turn) for p in made.acts.pairs(made.split))
    concept = replace(planted_concept(), **{made.split: pairs})
    behaviour = Behaviour("y", Unlabelled(), Openings((Opening((YES,)),)))
    choice = causal_selector(behaviour, limits=LIGHT)(replace(made, acts=replace(made.acts, concept=concept)))
    assert "hold the answers already" in choice.reason
    assert not choice.causal


def test_the_interval_of_a_mean_is_wider_where_templates_agree_within() -> None:
    scores = np.repeat([0.0, 1.0, 2.0, 3.0], 25) + np.linspace(0, 0.01, 100)
    alone = clustered_mean(scores, [str(i) for i in range(100)])
    together = clustered_mean(scores, [str(i // 25) for i in range(100)])
    assert alone.value == pytest.approx(together.value)
    assert together.high - together.low > 2 * (alone.high - alone.low)
    assert np.isnan(clustered_mean(scores, ["one"] * 100).low)


# --- the command line ------------------------------------------------------------------------------------------------


def test_extract_shows_both_choices_side_by_side_and_keeps_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted_hf().save_pretrained(tmp_path / "model")
    synthetic.chat_tokenizer().save_pretrained(tmp_path / "model")
    concept = planted_concept()
    rows = [
        {"positive_query": p.positive, "negative_query": p.negative, "split": split, "template": p.template}
        for split in ("train", "val", "test")
        for p in getattr(concept, split)
    ]
    (tmp_path / "joy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = ["extract", "--model", tmp_path / "model", "--pairs", tmp_path / "joy.jsonl", "--out", tmp_path / "run"]
    asked = map(
        str,
        ["safety-lens", *told, "--select", "causal", "--null-repeats", 20, "--draws", 19, "--behaviour", "tokens:w90"],
    )
    monkeypatch.setattr(sys, "argv", list(asked))
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "→ by causal" in out
    assert "→ by AUROC" in out
    assert "separability alone would take blocks.0.hook_resid_post" in out
    kept = [json.loads(line) for line in (tmp_path / "run" / "measurements.jsonl").read_text().splitlines()]
    assert {"bypass", "induce", "kl", "causal_passed"} <= {row["metric"] for row in kept}
    chosen_rows = [row["hook"] for row in kept if row["metric"] == "chosen"]
    assert chosen_rows == ["blocks.1.hook_resid_post"]
    assert {"rate_before_positive", "log_odds_ablated_positive", "agreement_added_negative"} <= {
        r["metric"] for r in kept
    }
    assert (tmp_path / "run" / "joy-dim-causal.png").is_file()
    (read,) = load_directions(tmp_path / "run")
    assert read.choice is not None
    assert read.choice.causal
    assert {"bypass", "induce", "kl", "causal_passed"} <= {row.metric for row in read.choice.measurements}
    assert read.choice.behaviour is not None
    behaviour = Behaviour.from_entry(dict(read.choice.behaviour))
    assert behaviour.openings is not None
    assert [(o.ids, o.text) for o in behaviour.openings.shown] == [((YES,), "w90")]


# --- the organism ---------------------------------------------------------------------------------------------------


def test_on_the_organism_the_causal_hook_of_toxicity_stops_what_it_is_about() -> None:
    model, whole = load_model("organism"), load_concept("toxicity", model="organism")
    part = replace(whole, train=whole.train[:48], val=whole.val[:24], test=whole.test[:24])
    acts = read_concepts(model, [part], hooks_at(model))[0]
    found = directions_from(model, acts, select=causal_selector(limits=Limits(draws=19)), null_repeats=20)
    assert found.choice is not None
    assert values(found.choice, "causal_passed")[None] >= 1
    assert values(found.choice, "behaviour_positive")[None] > 0 > values(found.choice, "bypass")[found.choice.hook]
    assert values(found.choice, "kl")[found.choice.hook] <= 0.1
