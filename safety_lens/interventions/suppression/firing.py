"""What was touched: every token an edit saw, its projection, how far the gate was passed, how far it was moved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from safety_lens.frames import Frame
from safety_lens.interventions.edits import Edit, wide
from safety_lens.stats import UNKNOWN, Interval
from safety_lens.types import NamedHook


class Seen(NamedTuple):
    """One token at one edit.

    row: which prompt of the caller's list. position: index of the token in it. written: by the model, not in the
    prompt. hook, category: which edit. projection: signed alignment before the edit, in gaps. margin: by how much the
    gate was passed (negative: not), in gaps; NaN for a mode without gate. touched: whether the token was changed.
    moved: length of the change, in gaps.
    """

    row: int
    position: int
    written: bool
    hook: str
    category: str
    projection: float
    margin: float
    touched: bool
    moved: float


@dataclass(eq=False)
class FiringLog:
    """Collects what watched edits say; one log per call of an engine."""

    _parts: list[tuple[str, str, dict[str, Tensor]]] = field(default_factory=list)

    def watching(self, hooks: Sequence[tuple[str, Edit]], categories: Sequence[str]) -> list[NamedHook]:
        """The same edits, with this log told what they do."""
        return [
            (hook, edit.watched(self._watch(hook, category, edit)))
            for (hook, edit), category in zip(hooks, categories, strict=True)
        ]

    def _watch(self, hook: str, category: str, edit: Edit) -> Callable[[Frame, Tensor, Tensor], None]:
        at: Any = getattr(edit.gate, "at", None) or getattr(edit.op, "at", None)

        def watch(frame: Frame, x: Float[Tensor, "batch pos d"], touched: Bool[Tensor, "batch pos"]) -> None:
            real = frame.position >= 0
            moved = (wide(edit.op(x)) - wide(x)).norm(dim=-1) / at.gap
            margin = edit.gate.margin(x) if edit.gate is not None else torch.full_like(moved, torch.nan)  # type: ignore[attr-defined]
            columns = {
                "row": frame.row[:, None].expand_as(frame.position),
                "position": frame.position,
                "written": frame.position >= frame.prompt,
                "projection": at.alignment(x),
                "margin": margin,
                "touched": touched,
                "moved": torch.where(touched, moved, 0.0),
            }
            self._parts.append((hook, category, {name: c[real].detach().cpu() for name, c in columns.items()}))

        return watch

    @property
    def rows(self) -> list[Seen]:
        """Every token at every edit, by prompt, position and edit."""
        found = []
        for hook, category, columns in self._parts:
            row, position, written = (columns[n].tolist() for n in ("row", "position", "written"))
            numbers = [columns[n].tolist() for n in ("projection", "margin", "touched", "moved")]
            for r, p, w, a, m, t, d in zip(row, position, written, *numbers, strict=True):
                found.append(Seen(r, p, w, hook, category, a, m, t, d))
        return sorted(found, key=lambda s: (s.row, s.position))

    def tokens(self, *, first: bool = True) -> "Tokens":
        """Per token, whether any edit touched it. first: count first tokens of prompts too."""
        touched: dict[tuple[int, int], bool] = {}
        for _, _, columns in self._parts:
            for r, p, t in zip(*(columns[n].tolist() for n in ("row", "position", "touched")), strict=True):
                if first or p > 0:
                    touched[r, p] = touched.get((r, p), False) or t
        keys = sorted(touched)
        return Tokens(
            np.array([k[0] for k in keys], dtype=int),
            np.array([k[1] for k in keys], dtype=int),
            np.array([touched[k] for k in keys], dtype=bool),
        )

    def by_hook(self, *, first: bool = True) -> dict[str, Interval]:
        """Share of tokens touched at each hook alone."""
        hooks = list(dict.fromkeys(hook for hook, _, _ in self._parts))
        return {h: FiringLog([p for p in self._parts if p[0] == h]).tokens(first=first).rate() for h in hooks}


class Tokens(NamedTuple):
    """Tokens that edits saw, one entry each: prompt, position, and whether any edit touched it."""

    row: Int[np.ndarray, " token"]
    position: Int[np.ndarray, " token"]
    touched: Bool[np.ndarray, " token"]

    def rate(self, rows: Sequence[int] | None = None) -> Interval:
        """Share of tokens touched, with an interval that counts prompts, not tokens: see `clustered_share`."""
        wanted = np.ones(len(self.row), dtype=bool) if rows is None else np.isin(self.row, list(rows))
        return clustered_share(self.touched[wanted], self.row[wanted])


def clustered_share(hit: Bool[np.ndarray, " n"], cluster: Int[np.ndarray, " n"], confidence: float = 0.95) -> Interval:
    """Share of hits with a Wilson interval on n divided by the design effect of the clusters (Kish 1965).

    Never on fewer than as many draws as there are clusters, and on that many where every cluster is alike in being all
    hits or none, since their spread then cannot be estimated. NaN for no entries.
    """
    n = len(hit)
    if not n:
        return UNKNOWN
    share = float(hit.mean())
    _, index = np.unique(cluster, return_inverse=True)
    excess = np.bincount(index, weights=hit - share)
    k = len(excess)
    variance = float((excess**2).sum()) * k / max(k - 1, 1) / n**2
    draws = float(k) if variance == 0 else min(float(n), max(float(k), share * (1 - share) / variance))
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    centre = (share + z**2 / (2 * draws)) / (1 + z**2 / draws)
    half = z / (1 + z**2 / draws) * np.sqrt(share * (1 - share) / draws + z**2 / (4 * draws**2))
    return Interval(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)))
