"""Where a concept lies now, against where it lay before training: measurement rows M1 to M8 of one concept.

Every hook gets the profile (cosines, lengths, separability); the common hooks, which are the same for all concepts, get
intervals and the costlier measures. Concepts are only ever compared at one hook: drift grows with depth, so each
concept at a depth of its own would rank depths, not concepts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from safety_lens.log import Measurement
from safety_lens.monitors import measures
from safety_lens.monitors.measures import Grams, Limits
from safety_lens.monitors.readings import Read, as_tensor
from safety_lens.probes.estimators import diff_in_means, estimator
from safety_lens.probes.evaluate import NEGLIGIBLE, held_out_scores, separation
from safety_lens.probes.reading import Sides
from safety_lens.stats import Interval, auroc, auroc_interval, d_prime, d_prime_interval, wilson

NAN = float("nan")
REPEATS = 1000
SUBSPACE = 3
"""Dimensions of a concept's subspace: the largest components of its pairs' differences."""


@dataclass(frozen=True, eq=False)
class Place:
    """One concept before training.

    differences: positive − negative activation of every training pair, [hook, pair, d]. vectors: the direction at each
    hook, zero where there is none. thresholds: midpoint of the two class means along it, on training pairs. groups:
    template of each training pair. faults: hook → why its direction is no result (its own evidence fails).
    """

    concept: str
    method: str
    hooks: tuple[str, ...]
    differences: Float[np.ndarray, "hook n d"]
    vectors: Float[np.ndarray, "hook d"]
    thresholds: Float[np.ndarray, " hook"]
    groups: tuple[str | None, ...]
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        return f"{self.concept}/{self.method}"

    @cached_property
    def apart(self) -> Bool[np.ndarray, "n n"]:
        return measures.strangers(self.groups)


def place(
    concept: str,
    method: str,
    hooks: Sequence[str],
    read: Read,
    groups: tuple[str | None, ...],
    held: tuple[str | None, ...],
) -> Place:
    """The baseline of one concept. groups, held: templates of its training and its reporting pairs."""
    vectors = directions(method, read)
    units = _units(vectors)
    thresholds = (_along(units, read.train_pos).mean(1) + _along(units, read.train_neg).mean(1)) / 2
    faults = {}
    for i, hook in enumerate(hooks):
        fit = Sides(as_tensor(read.train_pos[i]), as_tensor(read.train_neg[i]), groups)
        test = Sides(as_tensor(read.test_pos[i]), as_tensor(read.test_neg[i]), held)
        if fault := _fault(vectors[i], method, fit, test):
            faults[hook] = fault
    return Place(concept, method, tuple(hooks), read.differences, vectors, thresholds, groups, faults)


def _fault(vector: Float[np.ndarray, " d"], method: str, fit: Sides, test: Sides) -> str | None:
    if not vector.any():
        return "no direction at this hook before training"
    scores = held_out_scores(estimator(method), fit, test)
    if not scores.measurable:
        return "too few pairs to score the direction before training"
    area = separation(scores, test.groups)
    if area.low > 0.5:
        return None
    return (
        "before training this direction did not tell held-out pairs apart: AUROC"
        f" {area.value:.2f} [{area.low:.2f}, {area.high:.2f}]"
    )


def directions(method: str, read: Read) -> Float[np.ndarray, "hook d"]:
    """The direction at every hook; zero where the two sides differ by rounding only."""
    fit = estimator(method)
    out = np.zeros((len(read.train_pos), read.train_pos.shape[-1]))
    for i, (pos, neg) in enumerate(zip(read.train_pos, read.train_neg, strict=True)):
        size = np.linalg.norm(np.concatenate([pos, neg]), axis=1).mean()
        if np.linalg.norm(pos.mean(0) - neg.mean(0)) > NEGLIGIBLE * size:
            out[i] = fit(as_tensor(pos), as_tensor(neg)).numpy()
    return out


def _units(vectors: Float[np.ndarray, "hook d"]) -> Float[np.ndarray, "hook d"]:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    out: np.ndarray = np.divide(vectors, norms, out=np.full_like(vectors, NAN), where=norms > 0)
    return out


def _along(units: Float[np.ndarray, "hook d"], rows: Float[np.ndarray, "hook n d"]) -> Float[np.ndarray, "hook n"]:
    out: np.ndarray = (rows @ units[:, :, None])[..., 0]
    return out


@dataclass(frozen=True, eq=False)
class Now:
    """One concept at one step, ready to be measured."""

    place: Place
    read: Read
    step: int
    seed: int

    @cached_property
    def vectors(self) -> Float[np.ndarray, "hook d"]:
        return directions(self.place.method, self.read)

    @cached_property
    def grams(self) -> Grams:
        return measures.grams(self.place.differences, self.read.differences)

    def row(self, metric: str, hook: int, value: Interval, n: int, split: str, note: str | None = None) -> Measurement:
        name = self.place.hooks[hook]
        said = "; ".join(text for text in (note, self.place.faults.get(name)) if text) or None
        at: dict[str, Any] = {"n": n, "hook": name, "split": split, "step": self.step, "seed": self.seed, "note": said}
        return Measurement(self.place.subject, metric, *value, **at)

    def rows(self, metric: str, found: Limits, split: str = "train", note: str | None = None) -> list[Measurement]:
        n = self.read.train_pos.shape[1] if split == "train" else self.read.test_pos.shape[1]
        return [self.row(metric, i, Interval(*trio), n, split, note) for i, trio in enumerate(zip(*found, strict=True))]


def points(values: Float[np.ndarray, " hook"]) -> Limits:
    """Values whose interval is not estimated."""
    return Limits(values, np.full_like(values, NAN), np.full_like(values, NAN))


def profile(now: Now) -> list[Measurement]:
    """What every hook gets: both cosines, reliability, lengths, d' and AUROC along the old and the new direction."""
    g, linear = now.grams, now.place.method in LINEAR
    old, new = _units(now.place.vectors), _units(now.vectors)
    if linear:
        plain = measures.paired_cosine(g, repeats=REPEATS, seed=now.seed)
        corrected = measures.cross_validated_cosine(g, now.place.apart, repeats=REPEATS, seed=now.seed)
        sizes = measures.lengths(g)
    else:
        plain = points((old * new).sum(1).clip(-1.0, 1.0))
        corrected = points(np.full(len(old), NAN))
        sizes = _lengths(now.place.vectors, now.vectors)
    unknown = None if linear else f"intervals and the corrected cosine are defined for {', '.join(LINEAR)}"
    rows = now.rows("cosine_to_baseline", plain, note=unknown) + now.rows("cosine_cv", corrected, note=unknown)
    rows += now.rows("reliability", measures.reliability(g.now, now.place.apart, seed=now.seed))
    rows += now.rows("direction_norm", points(sizes.norm))
    rows += now.rows("retained_signal", points(sizes.retained))
    rows += now.rows("orthogonal_growth", points(sizes.growth))
    return rows


LINEAR = {"dim": diff_in_means}
"""Methods whose direction is a mean over pairs: resampling them needs no new fit."""


def _lengths(before: Float[np.ndarray, "hook d"], now: Float[np.ndarray, "hook d"]) -> measures.Lengths:
    return measures.lengths(measures.grams(before[:, None], now[:, None]))


def separability(now: Now, common: Sequence[int]) -> list[Measurement]:
    """d' and AUROC on the reporting pairs at every hook (M5), with intervals at the common ones; operating point (M6).

    The operating point keeps the threshold of before training, and so sees a shift that no AUROC can see.
    """
    rows: list[Measurement] = []
    m = now.read.test_pos.shape[1]
    for name, vectors in (("fixed", now.place.vectors), ("current", now.vectors)):
        units = _units(vectors)
        pos, neg = _along(units, now.read.test_pos), _along(units, now.read.test_neg)
        areas, gaps = auroc(pos, neg), d_prime(pos, neg)
        for i in range(len(units)):
            area, gap = Interval(float(areas[i]), NAN, NAN), Interval(float(gaps[i]), NAN, NAN)
            if i in common:
                area = auroc_interval(pos[i], neg[i])
                gap = d_prime_interval(pos[i], neg[i], repeats=REPEATS, seed=now.seed)
            rows.append(now.row(f"auroc_{name}", i, area, m, "test"))
            rows.append(now.row(f"d_prime_{name}", i, gap, m, "test"))
        if name == "fixed":
            for i in common:
                rows += _operating_point(now, i, pos[i], neg[i])
    return rows


def _operating_point(now: Now, i: int, pos: Float[np.ndarray, " m"], neg: Float[np.ndarray, " m"]) -> list[Measurement]:
    m, threshold = len(pos), now.place.thresholds[i]
    if not np.isfinite(threshold):
        return []
    hit, false = wilson(int((pos > threshold).sum()), m), wilson(int((neg > threshold).sum()), m)
    balanced = Interval((hit.value + 1 - false.value) / 2, NAN, NAN)
    trio = (("tpr_at_baseline", hit), ("fpr_at_baseline", false), ("balanced_accuracy", balanced))
    return [now.row(metric, i, value, m, "test") for metric, value in trio]


def subspace(now: Now, common: Sequence[int]) -> list[Measurement]:
    """The largest angle, in degrees, between the concept's subspace before and now (M7), and at step 0 its chance."""
    n, d = now.read.differences.shape[1:]
    k = min(SUBSPACE, n, d)
    rows = []
    for i in common:
        spans = [measures.top_subspace(x[i], k) for x in (now.place.differences, now.read.differences)]
        angles = np.degrees(measures.principal_angles(*spans))
        said = "angles " + ", ".join(f"{angle:.1f}" for angle in angles)
        rows.append(now.row("subspace_angle", i, Interval(float(angles[-1]), NAN, NAN), n, "train", said))
        if now.step == 0:
            chance = Interval(float(np.degrees(measures.chance_angle(d, k, seed=now.seed))), NAN, NAN)
            rows.append(now.row("subspace_angle_chance", i, chance, n, "train"))
    return rows


def entanglement(nows: Sequence[Now], common: Sequence[int]) -> list[Measurement]:
    """Cosines of every two concepts' directions at the same hook (M8): plain, and corrected for noise."""
    rows = []
    for x, a in enumerate(nows):
        for b in nows[x + 1 :]:
            if a.place.method not in LINEAR:
                plain = (_units(a.vectors) * _units(b.vectors)).sum(1)
                rows += [
                    a.row(_cross(a, b), i, Interval(float(plain[i]), NAN, NAN), len(a.place.groups), "train")
                    for i in common
                ]
                continue
            index = list(common)
            found = measures.crossing(
                a.read.differences[index], b.read.differences[index], (a.place.apart, b.place.apart),
                repeats=REPEATS, seed=a.seed,
            )  # fmt: skip
            n = min(len(a.place.groups), len(b.place.groups))
            for metric, limits in ((_cross(a, b), found.plain), (f"{_cross(a, b)}_cv", found.corrected)):
                for i, trio in zip(index, zip(*limits, strict=True), strict=True):
                    rows.append(a.row(metric, i, Interval(*trio), n, "train"))
    return rows


def _cross(a: Now, b: Now) -> str:
    return f"cross_{a.place.concept}_{b.place.concept}_cosine"
