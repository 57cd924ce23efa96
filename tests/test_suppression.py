"""Suppression: modes against their formulas, gates against their false-fire rates, effects against noise."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.data import ContrastPair
from safety_lens.errors import ArtifactError, DataError, HookNameError
from safety_lens.generation import generate
from safety_lens.interventions.suppression.analysis import analyse, direction_cosine, hedges_g, held_out_effect
from safety_lens.interventions.suppression.ancestor import (
    AncestorSettings,
    ancestor_edits,
    ancestor_effect,
    ancestor_layers,
    estimated_parameters,
    fit_ancestor,
    size_mode,
)
from safety_lens.interventions.suppression.apply import suppress
from safety_lens.interventions.suppression.compared import compare_modes, mode_cells
from safety_lens.interventions.suppression.data import ArtifactPairs, artifact_pairs, artifacts, naturals
from safety_lens.interventions.suppression.firing import clustered_share
from safety_lens.interventions.suppression.modes import (
    MODES,
    Settings,
    alignment_threshold,
    edits_of,
    exceeded_by,
    sphere_radius,
    subspace_basis,
)
from safety_lens.interventions.suppression.prompts import before_after, suppress_prompt
from safety_lens.interventions.suppression.reading import HookFit
from safety_lens.models import load_model
from safety_lens.organism.answers import answer_kind
from safety_lens.stats import wilson

D = 12


def fit(seed: int = 0, n: int = 400, scale: float = 1.0, d: int = D) -> HookFit:
    """A hook with a known gap of 3 along the first axis; natural tokens are standard normal around the natural mean."""
    g = torch.Generator().manual_seed(seed)
    natural = torch.randn(d, generator=g)
    artifact = natural.clone()
    artifact[0] += 3.0
    at = HookFit(
        "h", "all", natural, artifact, torch.linalg.qr(torch.randn(d, 3, generator=g))[0].T, *[natural[:0]] * 5
    )
    tokens = natural + torch.randn(n, d, generator=g)
    rows = artifact + torch.randn(40, d, generator=g)
    return HookFit(
        "h",
        "all",
        natural * scale,
        artifact * scale,
        at.components,
        at.alignment(tokens),
        (tokens - artifact).norm(dim=1) * scale,
        (rows - artifact).norm(dim=1) * scale,
        at.alignment(rows),
        at.alignment(tokens[:40]),
    )


def acts(seed: int = 1, n: int = 200) -> Tensor:
    at = fit()
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, D, generator=g) * 1.5
    return x + torch.where(torch.arange(n)[:, None] % 2 == 0, at.artifact, at.natural)


def edited(mode: str, scale: float, settings: Settings | None = None, x: Tensor | None = None) -> Tensor:
    edit = edits_of(mode, [fit()], scale, settings or Settings())[0][1]
    return edit(acts() if x is None else x)


def expected(mode: str, x: np.ndarray, s: float, settings: Settings) -> np.ndarray:
    """The formulas of the module, in numpy, one token at a time."""
    at = fit()
    mu, c = at.natural.double().numpy(), at.artifact.double().numpy()
    v = c - mu
    gap = np.linalg.norm(v)
    q, _ = np.linalg.qr(np.vstack([v, at.components.double().numpy()]).T)
    radius = sphere_radius(at, settings)
    inner = min(float(np.quantile(at.reach.double().numpy(), 1 - settings.reach)) / gap, radius / 2)
    out = []
    for o in x:
        a = (o - mu) @ v / gap / gap
        distance = np.linalg.norm(o - c) / gap
        depth = min(max((distance - inner) / (radius - inner), 0.0), 1.0)
        weight = (np.exp(-settings.decay * depth) - np.exp(-settings.decay)) / (1 - np.exp(-settings.decay))
        out.append(
            {
                "always": o - s * v,
                "proximity": o - s * v if a > alignment_threshold(at, settings) else o,
                "adaptive": o - s * max(a, 0) * v,
                "sphere": o + s * gap * weight * (o - c) / np.linalg.norm(o - c) if distance < radius else o,
                "subspace": o - s * (o - mu) @ q @ q.T,
            }[mode]
        )
    return np.array(out)


# --- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_each_mode_is_its_formula(mode: str, scale: float) -> None:
    settings = Settings(radius=1.2) if mode == "sphere" else Settings()
    found = edited(mode, scale, settings, acts().double())[0].numpy()
    np.testing.assert_allclose(found, expected(mode, acts()[0].double().numpy(), scale, settings), atol=1e-5)
    assert np.abs(found - acts()[0].numpy()).max() > 1e-2  # and there was something to change


@pytest.mark.parametrize("mode", MODES)
def test_scale_0_changes_not_one_bit(mode: str) -> None:
    assert torch.equal(edited(mode, 0.0), acts())


@pytest.mark.parametrize("mode", ["proximity", "adaptive"])
def test_a_token_that_points_away_from_the_artifact_is_never_touched(mode: str) -> None:
    at = fit()
    away = (at.natural - 2 * at.vector)[None, None]
    assert torch.equal(edited(mode, 1.0, x=away), away)
    ancestor = fit_ancestor("h", *ancestor_rows())
    mirrored = (-4 * ancestor.vector)[None, None]
    pushed = ancestor_edits(mode, [ancestor], 1.0, AncestorSettings())[0][1](mirrored)
    assert ancestor.alignment(pushed).item() < ancestor.alignment(mirrored).item() - 0.5  # the seed pushes it further


def test_adaptive_at_scale_1_takes_the_whole_excess_and_nothing_else() -> None:
    at = fit()
    before, after = at.alignment(acts()), at.alignment(edited("adaptive", 1.0))
    torch.testing.assert_close(after, before.clamp(max=0), atol=1e-5, rtol=0)


def test_the_sphere_falls_to_nothing_at_its_edge() -> None:
    at, settings = fit(), Settings(radius=1.2)
    ray = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(3)), dim=0)
    near = at.artifact + ray * (1.2 - 1e-4) * at.gap
    moved = (edited("sphere", 1.0, settings, near[None, None]) - near).norm() / at.gap
    assert 0 < moved < 1e-3
    centre = at.artifact[None, None]
    assert torch.equal(edited("sphere", 1.0, settings, centre), centre)


def test_the_subspace_holds_the_mean_difference_that_centring_would_lose() -> None:
    basis = subspace_basis(fit(), 3)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)
    assert (basis @ fit().unit).norm() > 0.9999
    twice = HookFit("h", "all", *[torch.zeros(D), fit().unit], torch.stack([fit().unit] * 2), *[torch.zeros(0)] * 5)
    assert len(subspace_basis(twice, 2)) == 1  # dependent rows are left out


def test_what_is_done_scales_with_the_activations() -> None:
    x = acts() * 7
    for mode in MODES:
        big = edits_of(mode, [fit(scale=7.0)], 1.0, Settings())[0][1](x)
        torch.testing.assert_close(big, 7 * edited(mode, 1.0), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_gates_fire_on_the_share_asked_for_of_fresh_natural_tokens(share: float) -> None:
    fired = {"proximity": [], "sphere": []}
    for seed in range(12):
        at = fit(seed, n=1500)
        fresh = at.natural + torch.randn(4000, D, generator=torch.Generator().manual_seed(1000 + seed))
        for mode, rates in fired.items():
            gate = edits_of(mode, [at], 1.0, Settings(false_fire=share, reach=1.0))[0][1].gate
            assert gate is not None
            rates.append(float(gate(fresh[None]).float().mean()))
    assert abs(np.mean(fired["proximity"]) - share) < 0.25 * share + 0.001
    assert np.mean(fired["sphere"]) < 1.25 * share + 0.001  # its radius may also be the artifacts' own


def test_equal_tokens_at_the_limit_do_not_all_cross_it_by_rounding() -> None:
    values = torch.cat([torch.linspace(-1, 0, 900), torch.full((100,), 0.5)])
    noisy = values[-100:] + 1e-6 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    for share in (0.01, 0.05):
        limit = exceeded_by(torch.cat([values[:-100], noisy]), share)
        assert limit > 0.5 + 1e-5


def test_a_rate_too_fine_for_the_tokens_gives_the_extreme_one() -> None:
    assert exceeded_by(torch.arange(10.0), 0.01) == pytest.approx(9.0009, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"false_fire": 0.0}, "false_fire"),
        ({"false_fire": float("nan")}, "false_fire"),
        ({"radius": -1.0}, "radius"),
        ({"decay": float("nan")}, "decay"),
        ({"components": 0}, "components"),
        ({"threshold": float("inf")}, "threshold"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Settings(**settings)  # type: ignore[arg-type]


# --- the seed's formulas --------------------------------------------------------------------------------------------


def ancestor_rows(n: int = 60, m: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    natural = rng.normal(size=(n, D)) * np.linspace(0.5, 3, D) + 0.3
    return natural, rng.normal(size=(m, D)) * np.linspace(0.5, 3, D) + np.linspace(0, 1, D)


@pytest.mark.parametrize("m", [60, 45])
def test_ancestor_modes_are_the_seeds_formulas(m: int) -> None:
    natural, artifact = ancestor_rows(60, m)
    x = np.random.default_rng(1).normal(size=(80, D)) * 2
    v = artifact.mean(0) - natural.mean(0)
    u, c, s = v / np.linalg.norm(v), artifact.mean(0), 0.7
    cos = x @ u / np.linalg.norm(x, axis=1)
    r = x - c
    distance = np.linalg.norm(r, axis=1, keepdims=True)
    scaler = StandardScaler().fit(np.vstack([natural, artifact]))
    zn, za = scaler.transform(natural), scaler.transform(artifact)
    differences = za - zn if m == 60 else (za[:, None] - zn[None]).reshape(-1, D)
    p = PCA(n_components=3, svd_solver="full").fit(differences).components_
    mean = scaler.transform(artifact.mean(0)[None])[0]
    want = {
        "always": x - s * v,
        "proximity": np.where(np.abs(cos)[:, None] > 0.3, x - s * v, x),
        "adaptive": x - s * np.abs(cos)[:, None] * v,
        "sphere": np.where(distance < 9.0, x + s * np.exp(-1.5 * distance / 9.0) * r / distance, x),
        "subspace": mean + (x - mean) - s * (x - mean) @ p.T @ p,
    }
    settings = AncestorSettings(threshold=0.3, radius=9.0, decay=1.5, components=3)
    at = fit_ancestor("h", natural, artifact, 3)
    for mode, expected_ in want.items():
        found = ancestor_edits(mode, [at], s, settings)[0][1](torch.tensor(x)[None])[0].numpy()
        np.testing.assert_allclose(found, expected_, atol=1e-5, err_msg=mode)
    assert ancestor_edits("always", [at], 0.0, settings) == []


def test_ancestor_defaults_and_size_rule_are_the_seeds() -> None:
    assert AncestorSettings() == AncestorSettings(0.5, 2.0, 2.0, 5)
    sizes = {0.5e9: "proximity", 1.99e9: "proximity", 2e9: "adaptive", 9e9: "adaptive", 10e9: "sphere"}
    sizes |= {49e9: "sphere", 50e9: "subspace", 400e9: "subspace"}
    assert {size: size_mode(size) for size in sizes} == sizes
    assert ancestor_layers([[9, 1, 8, 7, 6, 5, 4, 3, 2, 0, 99, 99]]) == [0, 2, 3, 4, 5, 6]


def test_the_seeds_effect_size_grows_with_the_scale_of_noise_and_ours_covers_0() -> None:
    rng = np.random.default_rng(0)
    found = []
    for scale in (0.01, 0.1, 1.0, 10.0):
        natural, artifact = scale * rng.normal(size=(2, 200, 640))
        found.append(ancestor_effect(natural, artifact))
    np.testing.assert_allclose(np.array(found[1:]) / found[:-1], np.sqrt(10), rtol=0.1)
    assert found[-1] > 5


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0])
def test_on_pure_noise_the_effect_size_covers_0_at_every_scale_of_activations(scale: float) -> None:
    covers, values = [], []
    for seed in range(200):
        sides = scale * np.random.default_rng(seed).normal(size=(4, 20, 64))
        value, low, high = held_out_effect(*sides)
        covers.append(low <= 0 <= high)
        values.append(value)
    assert np.mean(covers) >= 0.93
    assert abs(np.mean(values)) < 0.07
    assert all(covers[:5])


def test_effect_size_is_cohens_d_with_hedges_correction() -> None:
    pos, neg = np.array([3.0, 4.0, 5.0, 6.0]), np.array([1.0, 2.0, 3.5, 3.5])
    d = (pos.mean() - neg.mean()) / np.sqrt((pos.var(ddof=1) + neg.var(ddof=1)) / 2)
    assert hedges_g(pos, neg).value == pytest.approx(d * (1 - 3 / (4 * 3 - 1)))
    assert np.isnan(hedges_g(pos[:1], neg[:1]).value)
    assert np.isnan(hedges_g(np.ones(4), np.ones(4)).value)


def test_effect_size_intervals_cover_a_true_effect() -> None:
    hits = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=15)  # pairs are alike: r = 0.5
        pos, neg = (1.5 + rng.normal(size=15) + shared, rng.normal(size=15) + shared)
        _, low, high = hedges_g(pos, neg)
        hits += low <= 1.5 / np.sqrt(2) <= high
    assert 0.92 <= hits / 300 <= 0.99


def test_the_cosine_between_categories_is_not_pulled_to_0_by_noise() -> None:
    rng = np.random.default_rng(0)
    a, b = np.zeros(200), np.zeros(200)
    a[0], b[:2] = 3.0, (3 * np.cos(np.radians(40)), 3 * np.sin(np.radians(40)))
    draws = [[x + rng.normal(size=(20, 200)) * 0.7 for x in (a, b)] for _ in range(40)]
    found = [direction_cosine(*pair) for pair in draws]
    naive = np.mean([p.mean(0) @ q.mean(0) / np.linalg.norm(p.mean(0)) / np.linalg.norm(q.mean(0)) for p, q in draws])
    assert abs(np.mean([i.value for i in found]) - np.cos(np.radians(40))) < 0.03
    assert naive < 0.6  # what the plain cosine says
    assert np.mean([i.low <= np.cos(np.radians(40)) <= i.high for i in found]) >= 0.85


# --- firing rates ---------------------------------------------------------------------------------------------------


def test_a_rate_over_prompts_is_wider_than_one_over_tokens_and_never_certain() -> None:
    cluster = np.repeat(np.arange(10), 30)
    whole = np.repeat(np.arange(10) < 3, 30)  # every prompt is all or nothing
    found, tokens = clustered_share(whole, cluster), wilson(90, 300)
    assert found.high - found.low > 2 * (tokens.high - tokens.low)
    none = clustered_share(np.zeros(300, dtype=bool), cluster)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(wilson(0, 10).high)
    assert np.isnan(clustered_share(np.zeros(0, dtype=bool), np.zeros(0, dtype=int)).value)


def test_independent_tokens_have_the_interval_of_independent_draws() -> None:
    rng = np.random.default_rng(0)
    found = clustered_share(rng.random(4000) < 0.2, np.repeat(np.arange(400), 10))
    expected_ = wilson(round(4000 * found.value), 4000)
    assert found.high - found.low == pytest.approx(expected_.high - expected_.low, rel=0.2)


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_are_divided_by_category_with_no_prompt_or_template_in_two_parts() -> None:
    pairs = [
        ContrastPair(f"bad {i // 2} {c}", f"good {i} {c}", c, f"t{i // 2}{c}") for c in ("x", "y") for i in range(20)
    ]
    found = artifact_pairs(pairs, seed=3)
    parts = (found.fit, found.calibrate, found.report)
    assert [len(p) for p in parts] == [16, 8, 16]
    assert all({p.category for p in part} == {"x", "y"} for part in parts)
    templates = [{p.template for p in part} for part in parts]
    assert not templates[0] & templates[1] | templates[0] & templates[2] | templates[1] & templates[2]
    assert artifact_pairs(pairs, seed=3).sha256 == found.sha256 != artifact_pairs(pairs, seed=4).sha256


def test_categories_choose_pairs_and_an_unknown_one_is_refused_with_the_list() -> None:
    found = artifact_pairs(categories=["medical"])
    assert {p.category for p in (*found.fit, *found.calibrate, *found.report)} == {"medical"}
    with pytest.raises(DataError, match=r"no category 'medcal' in artifacts: it has financial, medical, political"):
        artifact_pairs(categories=["medcal"])
    with pytest.raises(DataError, match="no category was named"):
        artifact_pairs(categories=[])


def test_the_public_pairs_are_read_with_their_five_categories(shared: Path) -> None:
    found = artifact_pairs(shared / "data" / "artifact_pairs.jsonl")
    assert len(found.categories) == 5
    assert [len(p) for p in (found.fit, found.calibrate, found.report)] == [20, 10, 20]
    assert "Explain the mechanics of door locks" in naturals((*found.fit, *found.calibrate, *found.report))


# --- on the organism ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def organism() -> HookedTransformer:
    return load_model("organism")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits are read once for all tests here, and never from the user's own cache."""
    monkeypatch.setenv("SAFETY_LENS_CACHE", str(folder))


FEW = {"layers": [4], "report": False}


def few_pairs() -> ArtifactPairs:
    whole = artifact_pairs(categories=["medical"])
    return ArtifactPairs(whole.fit[:8], whole.calibrate[:6], whole.report[:10], "a few")


def test_proximity_removes_the_hedging_of_unseen_prompts_and_leaves_natural_ones(organism: HookedTransformer) -> None:
    found = suppress(organism, mode="proximity", scale=2.0, **FEW)
    asked, plain = artifacts(found.pairs.report)[::6], naturals(found.pairs.report)[::6]
    before, after = (
        [answer_kind(g.text) for g in generate(organism, asked, hooks=h, max_new_tokens=32)] for h in ([], found.hooks)
    )
    hedged = [sum(k.startswith("hedge/") for k in kinds) / len(kinds) for kinds in (before, after)]
    assert hedged[0] >= 0.9
    assert hedged[1] <= 0.2
    assert sum(k != "other" for k in after) >= 0.9 * len(after)
    same = [g.text for g in generate(organism, plain, hooks=found.hooks, max_new_tokens=32)]
    assert sum(a == g.text for a, g in zip(same, generate(organism, plain, max_new_tokens=32), strict=True)) >= 28


def test_the_log_says_what_generation_saw_and_touched(organism: HookedTransformer) -> None:
    found = suppress(organism, mode="proximity", scale=2.0, **FEW)
    asked = [artifacts(found.pairs.report)[0], naturals(found.pairs.report)[0]]
    answers = before_after(organism, asked, found, max_new_tokens=24)
    assert any(answers[0].touched)
    assert not any(answers[1].touched)
    assert answers[1].before == answers[1].after
    for a in answers:
        assert {s.position for s in a.seen} == set(range(len(a.tokens)))  # every token, prompt and answer, once an edit
        assert len(a.seen) == len(a.tokens) * len(found.hooks)
        assert all(s.touched == (s.margin > 0) for s in a.seen)
        assert all((s.moved > 0) == s.touched for s in a.seen)
        assert all(s.moved == pytest.approx(2.0, abs=1e-3) for s in a.seen if s.touched)


def test_logging_changes_nothing_and_batches_do_not_matter(organism: HookedTransformer) -> None:
    found = suppress(organism, mode="adaptive", scale=0.8, **FEW)
    asked = artifacts(found.pairs.report)[:6]
    plain = [g.text for g in generate(organism, asked, hooks=found.hooks, max_new_tokens=16)]
    hooks, log = found.watched()
    assert [g.text for g in generate(organism, asked, hooks=hooks, max_new_tokens=16, batch_size=1)] == plain
    again, other = found.watched()
    generate(organism, asked, hooks=again, max_new_tokens=16)
    assert [(s.row, s.position, s.touched) for s in log.rows] == [(s.row, s.position, s.touched) for s in other.rows]


@pytest.mark.parametrize("mode", MODES)
def test_scale_0_leaves_every_answer_as_it_is(organism: HookedTransformer, mode: str) -> None:
    found = suppress(organism, mode=mode, scale=0.0, **FEW)
    asked = artifacts(found.pairs.report)[:4]
    assert [g.tokens for g in generate(organism, asked, hooks=found.hooks)] == [
        g.tokens for g in generate(organism, asked)
    ]


@pytest.mark.parametrize("site", ["resid", "mlp", "attn"])
def test_every_site_is_edited_where_it_says(organism: HookedTransformer, site: str) -> None:
    found = suppress(organism, few_pairs(), mode="always", site=site, layers=[2, 5], report=False)
    suffix = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out"}[site]
    assert [hook for hook, _ in found.hooks] == [f"blocks.{layer}.{suffix}" for layer in (2, 5)]


def test_fits_and_reports_are_recalled_and_belong_to_one_model(
    organism: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFETY_LENS_CACHE", str(tmp_path / "cache"))
    arguments = {"concept_or_pairs": few_pairs(), "mode": "proximity", "layers": [4]}
    first = suppress(organism, **arguments)  # type: ignore[arg-type]
    folders = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert [name.rsplit("-", 1)[0] for name in folders] == ["suppression-fits", "suppression-report"]
    monkeypatch.setattr("safety_lens.interventions.suppression.reading.capture", None)  # reading again would fail
    second = suppress(organism, **arguments)  # type: ignore[arg-type]
    assert [r.to_json() for r in second.report] == [r.to_json() for r in first.report]
    manifest = json.loads((tmp_path / "cache" / folders[0] / "manifest.json").read_text())
    assert manifest["tokenizer"]["chat_template_sha256"]
    (tmp_path / "cache" / folders[0] / "suppression-fits.safetensors").write_bytes(b"damage")
    with pytest.raises(ArtifactError, match="a cache: remove"):
        suppress(organism, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": float("nan")}, DataError, "scale must be a finite number"),
        ({"scale": -1.0}, DataError, "scale must be a finite number"),
        ({"mode": "gentle"}, DataError, "no mode 'gentle': choose auto, auto-size, always"),
        ({"site": "residual"}, DataError, "no site 'residual': choose resid, mlp, attn"),
        ({"layers": [8]}, HookNameError, "block 8 was asked for, but this model has 8"),
        ({"mode": "always", "radios": 2.0}, DataError, "no parameter 'radios': choose false_fire"),
        ({"mode": "always", "read": "first"}, DataError, "read 'first' is not known"),
        ({"scope": "everywhere"}, DataError, "no token scope 'everywhere'"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(
    organism: HookedTransformer, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        suppress(organism, **arguments)  # type: ignore[arg-type]


def test_ancestor_runs_on_mlp_outputs_of_the_seeds_layers(organism: HookedTransformer) -> None:
    found = suppress(organism, few_pairs(), ancestor=True)
    assert found.mode == "proximity"  # 1.7 million parameters, by the size rule
    assert len(found.hooks) == 6
    assert all(hook.endswith("hook_mlp_out") for hook, _ in found.hooks)
    assert "not measured" in found.explain
    assert estimated_parameters(organism) < 2e9


def test_directions_can_be_read_at_generated_tokens_with_n_prompts(organism: HookedTransformer) -> None:
    found = suppress(organism, few_pairs(), mode="always", read="answer:20", layers=[4])
    assert {row.n for row in found.report} == {10}


def test_the_analysis_has_every_category_and_block_and_counts_prompts(organism: HookedTransformer) -> None:
    found = analyse(organism, artifact_pairs(), cache=False)
    effects = [row for row in found.measurements if row.metric == "effect_size"]
    assert len(effects) == 4 * 8
    assert {row.n for row in effects} == {360, 120}
    assert all(row.low > 0.8 for row in effects)
    cosines = [row for row in found.measurements if row.metric == "cosine"]
    assert len(cosines) == 3 * 8
    assert all(-1 <= row.low <= row.value <= row.high <= 1 for row in cosines)


def test_one_line_in_python_gives_before_and_after() -> None:
    asked = artifacts(artifact_pairs().report)[0]
    found = suppress_prompt(asked, mode="proximity", scale=2.0, **FEW)
    assert answer_kind(found.before or "").startswith("hedge/")
    assert str(found).count("\n") == 2


@pytest.mark.slow
def test_all_modes_at_one_equal_kl_on_the_organism(organism: HookedTransformer) -> None:
    results = {r.mode: r for r in compare_modes(organism, cache=False)}
    for r in results.values():
        assert r.kl.value <= 0.25  # 0.1 on other prompts
        assert set(r.by_category) == {"financial", "medical", "political"}
        assert mode_cells(r)["mode"] == r.mode
    for mode in ("proximity", "sphere"):
        assert results[mode].false_fire.low <= 0.01
        assert results[mode].firing.low > results[mode].false_fire.high or mode == "sphere"
    best = max(results.values(), key=lambda r: r.effect.value)
    assert best.effect.low > 0.5


@pytest.mark.slow
def test_auto_takes_the_measured_best_says_so_and_is_recalled(organism: HookedTransformer) -> None:
    found = suppress(organism)
    assert found.explain.startswith(f"auto: {found.mode} at ")
    assert "\n" not in found.explain
    assert all(mode in found.explain for mode in MODES)
    drop = next(row for row in found.report if row.metric == "no_plain_answer_change")
    assert drop.high < -0.5
    twice = suppress(organism, scale=2.0, report=False)
    assert (twice.mode, twice.scale) == (found.mode, 2 * found.scale)
