"""Conditional steering: an edit that acts only in rows whose prompt meets a condition.

Conditional activation steering (CAST, Lee et al. 2024, arXiv:2409.05907) compares a prompt's mean activation with a
condition vector once, while the prompt is read. Here every row of a batch decides for itself, the comparison keeps its
sign, and the threshold is fitted to a wanted share of false alarms on prompts that fitted nothing else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.activations import capture, encode_for
from safety_lens.data import Concept, Encoded
from safety_lens.errors import DataError, ModelError
from safety_lens.frames import Frame, frame_of
from safety_lens.interventions.edits import Edit, unit_of
from safety_lens.interventions.scopes import EVERYWHERE, Scope
from safety_lens.positions import Positions, last_token
from safety_lens.probes.directions import Direction
from safety_lens.probes.estimators import diff_in_means
from safety_lens.probes.evaluate import fit_direction
from safety_lens.probes.reading import Sides
from safety_lens.stats import Interval, wilson
from safety_lens.types import FwdHook, Prompt


class _Decisions:
    """Which rows of the running batch fire. Rows of another batch are forgotten, so no decision outlives its prompt."""

    def __init__(self) -> None:
        self.run: object | None = None
        self.fires: dict[int, bool] = {}

    def record(self, run: object, rows: Sequence[int], fires: Sequence[bool]) -> None:
        if run is not self.run:
            self.run, self.fires = run, {}
        self.fires |= dict(zip(rows, fires, strict=True))

    def of(self, frame: Frame) -> list[bool] | None:
        """The decision of each row of the frame; None where one has not been taken in this run."""
        rows = frame.row.tolist()
        taken = frame.run is not None and frame.run is self.run and all(row in self.fires for row in rows)
        return [self.fires[row] for row in rows] if taken else None


@dataclass(frozen=True)
class ConditionEvidence:
    """How a condition does on prompts that fitted neither its direction nor its threshold.

    hit: share of prompts that should fire and do. false_fire: share of the others that fire. Wilson intervals.
    target: the false-fire share asked for. n_threshold: prompts the threshold was fitted on. notes: what a reader must
    know.
    """

    hit: Interval
    false_fire: Interval
    n_hit: int
    n_false: int
    target: float
    n_threshold: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Condition:
    """A prompt fires where its score at `hook` is above `threshold`.

    The score is the cosine, in [−1, 1], between the direction and the prompt's activation: its mean over the prompt's
    tokens without the first one (whose length dwarfs all others in many models), or its last token. signed=False
    compares the cosine's size, as CAST does; a prompt that points the other way then fires too.
    """

    direction: Direction
    threshold: float
    hook: str
    reads: str = "mean"
    signed: bool = True
    evidence: ConditionEvidence | None = field(default=None, repr=False)
    on_decide: Callable[[int, float, bool], None] | None = field(default=None, repr=False)
    _decisions: _Decisions = field(default_factory=_Decisions, init=False, repr=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise DataError(f"a condition needs a finite threshold, got {self.threshold}")
        if self.reads not in READS:
            raise DataError(f"a condition reads {' or '.join(READS)}, not {self.reads!r}")

    @property
    def hooks(self) -> list[FwdHook]:
        """What decides: put it into the same list of hooks as the edits, `[*condition.hooks, *steer(...)]`."""
        return [(self.hook, self._read)]

    def scores(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, " row"]:
        """Scores of activations that are already reduced to one row per prompt; 0 for a row of zeros."""
        wide = rows.double()
        cosine = torch.nn.functional.cosine_similarity(wide, unit_of(self.direction.vector).to(wide)[None], dim=1)
        return cosine if self.signed else cosine.abs()

    def watched(self, on_decide: Callable[[int, float, bool], None]) -> "Condition":
        """The same condition, telling (row, score, fires) of every decision."""
        return replace(self, on_decide=on_decide)

    def _read(self, act: Tensor, hook: Any = None) -> None:
        """The hook function: changes nothing, decides for the rows whose prompt this forward holds."""
        frame = frame_of(act)
        last = (frame.position == frame.prompt - 1).any(1)
        if not bool(last.any()):
            return  # a generated token: its row has decided
        if frame.run is None:
            raise ModelError(
                "a condition must know which tokens are prompt: use it inside generate, capture or continuation_kl"
            )
        complete = (frame.position == 0).any(1)
        if not bool(complete.all()):
            raise ModelError(f"the condition at {self.hook} met a part of a prompt: whole prompts are needed to decide")
        read = READS[self.reads](frame)
        mean = (act.flatten(2).double() * read[..., None]).sum(1) / read.sum(1)[:, None]
        scores = self.scores(mean)
        rows, fires = frame.row.tolist(), (scores > self.threshold).tolist()
        self._decisions.record(frame.run, rows, fires)
        if self.on_decide is not None:
            for row, score, fire in zip(rows, scores.tolist(), fires, strict=True):
                self.on_decide(row, score, fire)


def _mean_tokens(frame: Frame) -> Bool[Tensor, "batch pos"]:
    first_read = (frame.prompt > 1).long()
    return (frame.position >= first_read) & (frame.position < frame.prompt)


def _last_tokens(frame: Frame) -> Bool[Tensor, "batch pos"]:
    return frame.position == frame.prompt - 1


READS: dict[str, Callable[[Frame], Bool[Tensor, "batch pos"]]] = {"mean": _mean_tokens, "last": _last_tokens}


def when(condition: Condition, scope: Scope = EVERYWHERE) -> Scope:
    """The tokens of `scope`, in rows whose prompt meets the condition. `condition.hooks` must be active too.

    A scope that touches prompt tokens needs the decision before the edit: the condition's hook must lie before the
    edited hooks in the forward pass (or stand before them in the list, at the same hook). Generated tokens are always
    behind it.
    """

    def touches(frame: Frame) -> Bool[Tensor, "batch pos"]:
        asked = scope(frame)
        if not bool(asked.any()):
            return asked
        fires = condition._decisions.of(frame)
        if fires is None:
            raise ModelError(
                f"an edit depends on a condition read at {condition.hook}, which has not decided yet: put"
                " condition.hooks into the list of hooks before the edit, and edit at hooks behind that one, or"
                ' generated tokens alone (scope "generated")'
            )
        return asked & torch.tensor(fires, device=asked.device)[:, None]

    return Scope(f"{scope.name} when {condition.direction.concept} at {condition.hook}", touches)


def conditional(condition: Condition, hooks: Sequence[FwdHook]) -> list[FwdHook]:
    """An intervention that acts only where the condition holds, its reading hook included.

    Raises:
        DataError: a hook function that is no Edit has no scope to restrict.
    """
    out: list[FwdHook] = list(condition.hooks)
    known: dict[Scope, Scope] = {}
    for name, fn in hooks:
        if not isinstance(fn, Edit):
            raise DataError(f"only edits can be made conditional, not {fn!r} at {name}")
        out.append((name, replace(fn, scope=known.setdefault(fn.scope, when(condition, fn.scope)))))
    return out


# --- fitting --------------------------------------------------------------------------------------------------------


def fit_condition(
    model: HookedTransformer,
    concept: Concept,
    natural: Sequence[Prompt] = (),
    *,
    direction: Direction | None = None,
    hook: str | None = None,
    reads: str = "mean",
    signed: bool = True,
    false_fire: float = 0.01,
    seed: int = 0,
) -> Condition:
    """A condition that fires on a concept's positive prompts and rarely on others, with its rates on unseen prompts.

    Args:
        concept: positives should fire. Train pairs fit the direction (difference in means of what the condition reads),
            val pairs the threshold, test pairs the rates.
        natural: further prompts that should not fire; half of them, drawn by `seed`, join each of the last two.
        direction: use this one instead. hook: where prompts are read, by default the direction's own hook.
        false_fire: the threshold is the smallest score of a val negative that a further negative exceeds with at most
            this probability (split conformal: rank over n + 1). Where they are too few for that, it is the largest
            score, and the evidence says what can be promised.

    Raises:
        DataError: no hook, an impossible share, no val pairs, or no direction between the sides.
        HookNameError: a hook the model does not have.
    """
    at = hook or (direction.hook if direction else None)
    if at is None:
        raise DataError("fit_condition needs a hook to read at, or a direction that has one")
    if not 0 < false_fire < 1:
        raise DataError(f"the share of false alarms must lie between 0 and 1, got {false_fire}")
    if not concept.val:
        raise DataError(f"{concept.name}: a condition needs val pairs, to fit its threshold on")
    reading = _Reading(model, at, reads, concept.raw)
    positive = {split: reading([p.positive for p in getattr(concept, split)]) for split in SPLITS}
    negative = {split: reading([p.negative for p in getattr(concept, split)]) for split in SPLITS}
    vector = direction.vector if direction else _fitted(concept, at, positive["train"], negative["train"])
    extra = reading.unseen(natural)
    drawn = extra[torch.from_numpy(np.random.default_rng(seed).permutation(len(extra)))]
    held = torch.cat([negative["val"], drawn[: len(drawn) // 2]])
    report = torch.cat([negative["test"], drawn[len(drawn) // 2 :]])
    unset = Condition(Direction(concept.name, at, vector, "condition"), 0.0, at, reads, signed)
    found = replace(unset, threshold=_threshold(unset.scores(held), false_fire))
    return replace(found, evidence=_judged(found, positive["test"], report, len(held), false_fire))


SPLITS = ("train", "val", "test")


class _Reading:
    """Prompts as rows, one each, read as a condition reads them while generating."""

    def __init__(self, model: HookedTransformer, hook: str, reads: str, raw: bool) -> None:
        self.model, self.hook, self.raw = model, hook, raw
        if reads not in READS:
            raise DataError(f"a condition reads {' or '.join(READS)}, not {reads!r}")
        self.positions = {"mean": Positions("mean:prompt", _all_but_first, mean=True), "last": last_token}[reads]
        self.known: set[tuple[int, ...]] = set()

    def __call__(self, prompts: Sequence[Prompt]) -> Float[Tensor, "row d"]:
        return self._rows(encode_for(self.model, prompts, raw=self.raw))

    def unseen(self, prompts: Sequence[Prompt]) -> Float[Tensor, "row d"]:
        """Rows of the prompts that have not been read yet, each once: none may stand on two sides of a split."""
        encoded = {e.ids: e for e in encode_for(self.model, prompts, raw=self.raw)} if prompts else {}
        fresh = [e for ids, e in encoded.items() if ids not in self.known]
        return self._rows(fresh) if fresh else torch.zeros(0, self.width)

    def _rows(self, encoded: Sequence[Encoded]) -> Float[Tensor, "row d"]:
        self.known |= {e.ids for e in encoded}
        rows = capture(self.model, encoded, [self.hook], positions=self.positions).acts[self.hook]
        self.width = rows.shape[1]
        return rows


def _all_but_first(encoded: Encoded) -> Sequence[int]:
    return range(min(1, len(encoded.ids) - 1), len(encoded.ids))


def _fitted(
    concept: Concept, hook: str, pos: Float[Tensor, "n_pos d"], neg: Float[Tensor, "n_neg d"]
) -> Float[Tensor, " d"]:
    vector = fit_direction(diff_in_means, Sides(pos, neg, (None,) * len(pos)))
    if vector is None:
        raise DataError(f"{concept.name}: both sides give the same activations at {hook}: choose another hook")
    return vector


def _threshold(scores: Float[Tensor, " n"], false_fire: float) -> float:
    exceeding = max(0, math.floor(false_fire * (len(scores) + 1) + 1e-9) - 1)
    return float(scores.sort(descending=True).values[exceeding])


def _judged(
    condition: Condition,
    positive: Float[Tensor, "n_pos d"],
    negative: Float[Tensor, "n_neg d"],
    n_threshold: int,
    target: float,
) -> ConditionEvidence:
    hits, falses = (int((condition.scores(rows) > condition.threshold).sum()) for rows in (positive, negative))
    notes = []
    if 1 / (n_threshold + 1) > target:
        notes.append(
            f"the threshold was fitted on {n_threshold} prompts: a false-fire share below {1 / (n_threshold + 1):.2g}"
            f" cannot be promised, {target:g} was asked for (needs {math.ceil(1 / target) - 1})"
        )
    hit, false = wilson(hits, len(positive)), wilson(falses, len(negative))
    if not hit.low > false.high:
        notes.append("it does not fire more often where it should than where it should not, beyond chance")
    return ConditionEvidence(hit, false, len(positive), len(negative), target, n_threshold, tuple(notes))
