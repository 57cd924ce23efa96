"""Neuron pages: groups of neurons and heads on chosen prompts, as one HTML file that opens anywhere without a network.

For each neuron, head or direction the value at every token, drawn by circuitsvis' ColoredTokens; the prompts that
activate it most; the tokens it writes for and against; its groups and scores. circuitsvis' own pick-list component
(TextNeuronActivations) is not used: it has one list of neuron names for all blocks, one colour scale for neurons of
very different size, which it drops when a single prompt is shown, and it computes through WebGL.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.data import Encoded
from safety_lens.errors import DataError
from safety_lens.models import check_hooks
from safety_lens.probes.attribution.scores import Scores
from safety_lens.probes.directions import Direction
from safety_lens.probes.groups import NeuronGroup
from safety_lens.report.offline import write_document
from safety_lens.report.pages.columns import (
    Column,
    Unit,
    by_rank,
    choose,
    direction_columns,
    peaks_of,
    scores_of,
    shares,
    unit_columns,
)
from safety_lens.report.pages.document import neuron_document
from safety_lens.report.pages.prompts import PagePrompt, ShownPrompt, shorten, shown_prompts
from safety_lens.report.pages.provenance import Fact, provenance
from safety_lens.report.pages.reading import read_directions, read_units
from safety_lens.types import Prompt

__all__ = ["NeuronPage", "PagePrompt", "neuron_page"]

LARGE = 10_000_000
"""Bytes from which a page is slow to open and to send; it is written all the same, and says so."""


@dataclass(frozen=True, eq=False)
class NeuronPage:
    """What a page shows; `html` is the page, `save` writes it, and a notebook displays it.

    values: float32, of every column at every token of all prompts, one prompt after the other. Of a neuron: the input
    of W_out (`mlp.hook_post`); of a head: length of what it adds to the residual stream; of a direction: projection.
    """

    title: str
    prompts: tuple[ShownPrompt, ...]
    columns: tuple[Column, ...]
    values: Float[np.ndarray, "column token"] = field(repr=False)
    groups: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: tuple[tuple[str, Fact], ...] = ()

    @cached_property
    def html(self) -> str:
        """The whole page; texts escaped, values to 1/32767 of the column's largest."""
        return neuron_document(
            self.title,
            self.prompts,
            self.columns,
            self.values,
            self.groups,
            self.scores,
            self.notes,
            self.provenance,
        )

    def save(self, path: str | Path) -> int:
        """Write the page; its size in bytes.

        Raises:
            DataError: the file cannot be written.
        """
        return write_document(Path(path), self.html)

    def of(self, prompt: int) -> Float[np.ndarray, "column token"]:
        """The values at the tokens of one prompt."""
        first = sum(len(p.tokens) for p in self.prompts[:prompt])
        return self.values[:, first : first + len(self.prompts[prompt].tokens)]

    def _repr_html_(self) -> str:
        """The page in a frame of its own: the notebook's styles and scripts and the page's do not touch."""
        page, title = escape(self.html, quote=True), escape(self.title, quote=True)
        style = "width:100%;height:760px;border:1px solid #ddd"
        return f'<div><iframe srcdoc="{page}" sandbox="allow-scripts" title="{title}" style="{style}"></iframe></div>'


def neuron_page(
    model: HookedTransformer,
    groups: Sequence[NeuronGroup],
    prompts: Sequence[Prompt | PagePrompt],
    *,
    scores: Mapping[str, Scores] | None = None,
    directions: Sequence[Direction] = (),
    limit: int = 200,
    tokens: int = 8,
    title: str = "Neurons",
    source: str = "given in memory",
    raw: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> NeuronPage:
    """Run the prompts once more and gather what a page shows.

    Args:
        groups: of neurons, heads or weights; of weights, the neurons and heads that hold them, with their share.
        prompts: texts or conversations; `PagePrompt` gives one a label. Those labelled "harmful" are folded away, and
            an answer in one is cut after 12 tokens.
        scores: name → scores of weights, neurons or heads. The first ranks what is shown.
        directions: every token is projected on each, at its hook.
        limit: neurons and heads on the page, taken from the groups in turn; a note says what was left out.
        tokens: how many promoted and how many suppressed tokens of each neuron.
        source: where the prompts are from, for the provenance.
        raw, template_kwargs: as for `capture`. on_batch: called with the number of prompts read, for a progress bar.

    Raises:
        DataError: nothing to show, two groups of one name, prompts that cannot be encoded.
        HookNameError: a direction at a hook that the model does not have.
        ModelMismatchError: a group or direction that does not fit the model.
        ModelError: activations that are not finite.
    """
    _check(groups, prompts, directions, limit, tokens)
    check_hooks(model, [d.hook for d in directions])
    asked = [p if isinstance(p, PagePrompt) else PagePrompt(p) for p in prompts]
    whole = encode_for(model, [p.prompt for p in asked], raw=raw, template_kwargs=template_kwargs)
    kept = [shorten(e, p.label) for e, p in zip(whole, asked, strict=True)]
    projected = direction_columns(directions, model)
    members = {g.name: shares(g, model) for g in groups}
    by_name = scores_of(scores or {}, model)
    chosen = _choose(model, groups, members, by_name, kept, limit, on_batch)
    shown = unit_columns(model, chosen.units, members, by_name, tokens)
    along = read_directions(model, kept, directions, on_batch)
    return NeuronPage(
        title,
        shown_prompts(model, asked, whole, kept),
        (*shown, *projected),
        np.concatenate([chosen.values, along]),
        tuple(members),
        tuple(by_name),
        chosen.notes,
        tuple(provenance(model, groups, asked, scores or {}, directions, source)),
    )


def _check(
    groups: Sequence[NeuronGroup], prompts: Sequence[object], directions: Sequence[Direction], limit: int, tokens: int
) -> None:
    if not prompts:
        raise DataError("a page needs at least one prompt to show activations on")
    if not groups and not directions:
        raise DataError("a page needs a group of neurons or a direction to show")
    if limit < 1 or tokens < 0:
        raise DataError(f"limit must be 1 or more and tokens 0 or more, got {limit} and {tokens}")
    names = [g.name for g in groups]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"two groups are named {twice[0]!r}: rename one, or the page cannot tell them apart")


@dataclass(frozen=True, eq=False)
class _Chosen:
    units: tuple[Unit, ...]
    values: Float[np.ndarray, "column token"]
    notes: tuple[str, ...]


def _choose(
    model: HookedTransformer,
    groups: Sequence[NeuronGroup],
    members: Mapping[str, Mapping[Unit, float]],
    scores: Mapping[str, Mapping[str, Any]],
    kept: Sequence[Encoded],
    limit: int,
    on_batch: Callable[[int], None] | None,
) -> _Chosen:
    """Neurons and heads by the first scores; without scores by share of a group of weights, else by activation."""
    first = next(iter(scores), None)
    held = None if first is None else scores[first]
    by_peak = [g.name for g in groups if held is None and g.unit != "weight"]
    read = tuple(dict.fromkeys(unit for name in by_peak for unit in members[name]))
    found = read_units(model, kept, read, on_batch) if read else None
    peaks = {} if found is None else peaks_of(read, found)
    how = {
        g.name: "largest activation" if g.name in by_peak else f"largest {first}" if first else "largest share in it"
        for g in groups
    }
    ranked = {
        (name, kind): by_rank(share, kind, held, peaks)
        for name, share in members.items()
        for kind in dict.fromkeys(unit[0] for unit in share)
    }
    chosen = choose(ranked, limit, how)
    if found is None or not set(chosen.units) <= set(read):
        found, read = read_units(model, kept, chosen.units, on_batch), chosen.units
    place = {unit: row for row, unit in enumerate(read)}
    return _Chosen(chosen.units, found[[place[unit] for unit in chosen.units]], chosen.notes)
