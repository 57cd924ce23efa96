"""The formulas of alignment-artifacts (github.com/JoeLuker/alignment-artifacts at 41e2aca), kept for comparison.

o is an MLP output, v = mean(artifact) − mean(natural), u = v/‖v‖, c = mean(artifact); nothing is done unless s > 0.

always      o − s·v
proximity   o − s·v                                   where |cos(o, u)| > τ, τ = 0.5
adaptive    o − s·|cos(o, u)|·v
sphere      o + s·e^(−kD/R)·(o − c)/D, D = ‖o − c‖    where D < R, R = 2, k = 2
subspace    m' + (o − m') − s·(o − m')PᵀP

P: principal components (5) of the differences of standardised rows; m': the standardised artifact mean.

What is wrong with them, and why the modes of `modes` differ:
- |cos| fires on tokens that point *away* from the artifact, and pushes them further.
- τ, R and the push of the sphere are absolute numbers: what they mean changes with layer and model, and in wide models
  they may never, or always, hold. The sphere jumps by s·e^(−k) at its edge.
- P and m' are in standardised units and are applied to raw activations; PCA centres the differences, so the mean
  difference, the artifact direction itself, is the one direction that is missing from P.
- v comes from 20 generated tokens of each prompt, every token a sample: 20 times too large an n.
- the effect size has a d-dimensional norm over the root of a standard deviation: it grows with the width of the model
  and the scale of its activations, on noise as well, and it is in-sample. The layers chosen by it are the first ten's.
Not kept: padding that was attended to, mixed-up batch offsets, a cache by model name, and "auto" that could never be
anything but proximity (here it is the size rule that was meant).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.activations import capture
from safety_lens.data import ContrastPair
from safety_lens.errors import DataError
from safety_lens.interventions.edits import Edit, wide
from safety_lens.interventions.scopes import EVERYWHERE, Scope
from safety_lens.interventions.suppression.data import artifacts, category_of, naturals
from safety_lens.interventions.suppression.modes import Acts, PerToken, check_scale
from safety_lens.interventions.suppression.reading import ANSWER_TOKENS, with_answers
from safety_lens.positions import mean_over

FIRST_LAYERS, BEST_LAYERS = 10, 6
answer_tokens = mean_over("answer")


@dataclass(frozen=True)
class AncestorSettings:
    """Defaults of the seed: absolute cosines and activation units."""

    threshold: float = 0.5
    radius: float = 2.0
    decay: float = 2.0
    components: int = 5

    def __post_init__(self) -> None:
        if not all(map(isfinite, (self.threshold, self.radius, self.decay))) or self.radius <= 0:
            raise DataError(f"threshold, radius and decay must be finite numbers, radius above 0; got {self}")
        if self.components < 1:
            raise DataError(f"components must be 1 or more, got {self.components}")


@dataclass(frozen=True, eq=False)
class AncestorFit:
    """vector: v. natural, artifact: class means over token rows. components: P. mean: m' (standardised units)."""

    hook: str
    natural: Float[Tensor, " d"]
    artifact: Float[Tensor, " d"]
    components: Float[Tensor, "k d"]
    mean: Float[Tensor, " d"]
    category: str = "all"

    @property
    def vector(self) -> Float[Tensor, " d"]:
        return self.artifact - self.natural

    @property
    def gap(self) -> float:
        """‖v‖."""
        return float(self.vector.double().norm())

    def cosine(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """cos(o, u)."""
        found: Tensor = (wide(x) @ (self.vector / self.vector.norm()).to(wide(x))) / wide(x).norm(dim=-1)
        return found

    def alignment(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Signed alignment in gaps, for the log; the formulas do not use it."""
        return (wide(x) - self.natural.to(wide(x))) @ self.vector.to(wide(x)) / self.gap**2


def fit_ancestor(
    hook: str,
    natural: Float[np.ndarray, "natural d"],
    artifact: Float[np.ndarray, "artifact d"],
    components: int = 5,
) -> AncestorFit:
    """The seed's fit on token rows; PCA is by the eigenvectors of the covariance.

    Rows are paired in their order where both sides have equally many, else all with all.

    Raises:
        DataError: fewer rows or dimensions than components.
    """
    scaler = StandardScaler().fit(np.concatenate([natural, artifact]))
    z_natural, z_artifact = scaler.transform(natural), scaler.transform(artifact)
    if len(natural) == len(artifact):
        spread = np.cov(z_artifact - z_natural, rowvar=False, ddof=0)
    else:  # the covariance of all differences a_i − n_j, without making them
        spread = np.cov(z_artifact, rowvar=False, ddof=0) + np.cov(z_natural, rowvar=False, ddof=0)
    if components > min(len(natural), len(artifact), len(spread)):
        raise DataError(
            f"{components} components were asked of {len(natural)} and {len(artifact)} rows of {len(spread)}"
        )
    leading = np.linalg.eigh(spread)[1].T[::-1][:components]
    centre = artifact.mean(0)
    arrays = (natural.mean(0), centre, leading, scaler.transform(centre[None])[0])
    low, high, rows, mean = (torch.tensor(np.ascontiguousarray(x), dtype=torch.float32) for x in arrays)
    return AncestorFit(hook, low, high, rows, mean)


@dataclass(frozen=True, eq=False)
class Translate:
    """o − s·weight(o)·v."""

    at: AncestorFit
    scale: float
    weight: Callable[[Acts], PerToken]

    def __call__(self, x: Acts) -> Acts:
        return (wide(x) - self.scale * self.weight(x)[..., None] * self.at.vector.to(wide(x))).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Aligned:
    """A gate: |cos(o, u)| > threshold."""

    at: AncestorFit
    threshold: float

    def margin(self, x: Acts) -> PerToken:
        found: Tensor = self.at.cosine(x).abs() - self.threshold
        return found

    def __call__(self, x: Acts) -> Bool[Tensor, "batch pos"]:
        return self.margin(x) > 0


@dataclass(frozen=True, eq=False)
class Near:
    """A gate: ‖o − c‖ < radius."""

    at: AncestorFit
    radius: float

    def margin(self, x: Acts) -> PerToken:
        found: Tensor = self.radius - (wide(x) - self.at.artifact.to(wide(x))).norm(dim=-1)
        return found

    def __call__(self, x: Acts) -> Bool[Tensor, "batch pos"]:
        return self.margin(x) > 0


@dataclass(frozen=True, eq=False)
class Push:
    """o + s·e^(−kD/R)·(o − c)/D."""

    at: AncestorFit
    scale: float
    radius: float
    decay: float

    def __call__(self, x: Acts) -> Acts:
        away = wide(x) - self.at.artifact.to(wide(x))
        distance = away.norm(dim=-1, keepdim=True)
        found: Tensor = (wide(x) + self.scale * torch.exp(-self.decay * distance / self.radius) * away / distance).to(
            x.dtype
        )
        return found


@dataclass(frozen=True, eq=False)
class Project:
    """m' + (o − m') − s·(o − m')PᵀP."""

    at: AncestorFit
    scale: float

    def __call__(self, x: Acts) -> Acts:
        p, mean = self.at.components.to(wide(x)), self.at.mean.to(wide(x))
        centred = wide(x) - mean
        return (mean + centred - self.scale * (centred @ p.T @ p)).to(x.dtype)


def _ones(x: Acts) -> PerToken:
    return torch.ones_like(wide(x)[..., 0])


Builder = Callable[[AncestorFit, float, AncestorSettings, Scope], Edit]

ANCESTOR_MODES: Mapping[str, Builder] = {
    "always": lambda at, s, p, scope: Edit(Translate(at, s, _ones), scope),
    "proximity": lambda at, s, p, scope: Edit(Translate(at, s, _ones), scope, gate=Aligned(at, p.threshold)),
    "adaptive": lambda at, s, p, scope: Edit(Translate(at, s, lambda x: at.cosine(x).abs()), scope),
    "sphere": lambda at, s, p, scope: Edit(Push(at, s, p.radius, p.decay), scope, gate=Near(at, p.radius)),
    "subspace": lambda at, s, p, scope: Edit(Project(at, s), scope),
}


def ancestor_edits(
    mode: str, fits: Sequence[AncestorFit], scale: float, settings: AncestorSettings, scope: Scope = EVERYWHERE
) -> list[tuple[str, Edit]]:
    """The seed's edits at every hook; none at scale 0.

    Raises:
        DataError: an unknown mode or a bad scale.
    """
    if mode not in ANCESTOR_MODES:
        raise DataError(f"no mode {mode!r}: choose auto, auto-size, {', '.join(ANCESTOR_MODES)}")
    check_scale(scale)
    if scale == 0:
        return []
    return [(at.hook, ANCESTOR_MODES[mode](at, scale, settings, scope)) for at in fits]


def ancestor_effect(natural: Float[np.ndarray, "natural d"], artifact: Float[np.ndarray, "artifact d"]) -> float:
    """The seed's "Cohen's d": ‖difference of means‖ / √((mean_j σ_natural,j + mean_j σ_artifact,j)/2), in-sample."""
    gap = float(np.linalg.norm(artifact.mean(0) - natural.mean(0)))
    return gap / sqrt((float(natural.std(0).mean()) + float(artifact.std(0).mean())) / 2)


def ancestor_layers(effects: Sequence[Sequence[float | int]]) -> list[int]:
    """The seed's layers: the 6 with the largest mean effect over categories ([category][layer]) among the first 10."""
    means = np.asarray(effects, dtype=float).mean(0)[:FIRST_LAYERS]
    return sorted(np.argsort(-means, kind="stable")[:BEST_LAYERS].tolist())


def read_tokens(
    model: HookedTransformer, pairs: Sequence[ContrastPair], hooks: Sequence[str], *, raw: bool = False
) -> dict[str, dict[str, list[np.ndarray]]]:
    """What the seed read: hook → side → one array of answer tokens per prompt (20 at most, greedy)."""
    out: dict[str, dict[str, list[np.ndarray]]] = {hook: {} for hook in hooks}
    for side, prompts in (("natural", naturals(pairs)), ("artifact", artifacts(pairs))):
        texts = with_answers(model, prompts, ANSWER_TOKENS, raw=raw)
        found = capture(model, texts, hooks, positions=_each_answer_token)
        for hook in hooks:
            rows = found.acts[hook].double().numpy()
            out[hook][side] = [rows[(found.prompt == i).numpy()] for i in range(len(texts))]
    return out


_each_answer_token = type(answer_tokens)("each answer token", answer_tokens.pick)


def fit_ancestors(
    model: HookedTransformer,
    pairs: Sequence[ContrastPair],
    hooks: Sequence[str],
    *,
    choose_layers: bool,
    components: int = 5,
    raw: bool = False,
) -> list[AncestorFit]:
    """Fits at every hook, or with `choose_layers` at the hooks of the seed's layer rule."""
    rows = read_tokens(model, pairs, hooks, raw=raw)
    if choose_layers:
        names = sorted({category_of(p) for p in pairs})
        members = {n: [i for i, p in enumerate(pairs) if category_of(p) == n] for n in names}
        effects = [
            [
                ancestor_effect(*[np.concatenate([rows[h][side][i] for i in members[n]]) for side in SIDES])
                for h in hooks
            ]
            for n in names
        ]
        hooks = [hooks[layer] for layer in ancestor_layers(effects)]
    sides = {h: [np.concatenate(rows[h][side]) for side in SIDES] for h in hooks}
    return [fit_ancestor(h, natural, artifact, components) for h, (natural, artifact) in sides.items()]


SIDES = ("natural", "artifact")


def size_mode(parameters: int | float) -> str:
    """The seed's rule: below 2 billion parameters proximity, below 10 adaptive, below 50 sphere, else subspace."""
    rule = ((2e9, "proximity"), (10e9, "adaptive"), (50e9, "sphere"))
    return next((mode for limit, mode in rule if parameters < limit), "subspace")


def estimated_parameters(model: HookedTransformer) -> int:
    """The seed's estimate from vocabulary V, width h, layers L and MLP width i: Vh + 4Lh² + 2Lhi + 2Lh."""
    cfg = model.cfg
    v, h, n, i = cfg.d_vocab, cfg.d_model, cfg.n_layers, cfg.d_mlp or 4 * cfg.d_model
    return int(v * h + 4 * n * h**2 + 2 * n * h * i + 2 * n * h)
