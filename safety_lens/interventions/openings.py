"""Openings: token sequences with which answers begin, and the log-odds that a model begins its answer with one of them.

A single first token is a poor reading of a behaviour: "I" begins "I can't" and "I can". Whole openings are read
instead. Openings that share a beginning are run as one tree after each prompt, and prompts that share a beginning are
part of the same tree, so that one reading costs little more than a forward over the prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.batching import check_batch_size, length_batches
from safety_lens.data import Encoded
from safety_lens.errors import DataError
from safety_lens.forced import TOKEN_BUDGET, hooked_after_blocks, unembedded
from safety_lens.frames import Frame, running, whole
from safety_lens.interventions.edits import Edit
from safety_lens.interventions.scopes import EVERYWHERE, GENERATED, PROMPT
from safety_lens.kv import right_padded
from safety_lens.loading.paths import Paths, along
from safety_lens.models import named_hooks
from safety_lens.trees import Tree, can_run_trees, grow_trees, planted
from safety_lens.types import FwdHook, NamedHook

NAN = float("nan")
TREE = 512
"""Tokens of one tree at most."""
SHARED = (EVERYWHERE, PROMPT, GENERATED)
"""Scopes that ask of a token only whether it is of the prompt."""
UNEMBEDDED = 64
"""Tokens whose logits are computed at once."""
Spot = tuple[int, tuple[int, ...]]
"""A place that is read: the number of a prompt and the tokens after it."""


class Opening(NamedTuple):
    """A beginning of answers.

    Attributes:
        ids: Token ids; the stop token is the last one where the whole answer is that short.
        weight: Share of the answers with the behaviour (or of the others) that begin so; NaN where unknown.
        text: The tokens as text.
    """

    ids: tuple[int, ...]
    weight: float = NAN
    text: str = ""


@dataclass(frozen=True)
class Openings:
    """Openings of the answers that show a behaviour, and for comparison those of the model's other answers.

    Attributes:
        shown: Openings whose log-odds are read, by falling weight. None is the beginning of another.
        other: Most frequent openings of the other answers. They are listed, and not part of the score.

    Raises:
        DataError: No openings, or one without tokens.
    """

    shown: tuple[Opening, ...]
    other: tuple[Opening, ...] = ()

    def __post_init__(self) -> None:
        if not self.shown or not all(opening.ids for opening in (*self.shown, *self.other)):
            raise DataError(f"openings need one or more sequences of token ids, got {self.shown!r} and {self.other!r}")
        by_ids = {opening.ids: opening for opening in reversed(self.shown)}  # of equal ones the first stays
        longer = [ids for ids in by_ids if any(ids[:n] in by_ids for n in range(1, len(ids)))]
        object.__setattr__(self, "shown", tuple(o for o in self.shown if by_ids[o.ids] is o and o.ids not in longer))

    @cached_property
    def branches(self) -> "Branches":
        """The openings of the behaviour as a tree."""
        return Branches.of([opening.ids for opening in self.shown])

    def log_odds(
        self,
        model: HookedTransformer,
        prompts: Sequence[Encoded],
        hooks: Sequence[FwdHook] = (),
        *,
        batch_size: int | str = "auto",
    ) -> Float[np.ndarray, " prompt"]:
        """Log-odds that the answer begins with one of the behaviour's openings, in nats: log P − log(1 − P).

        Args:
            model: The model that would answer.
            prompts: Prompts as they are read; see `encode_for`.
            hooks: Edits, active for prompts and openings.
            batch_size: Trees in a forward pass, or "auto".

        Returns:
            One value for each prompt. For openings of one token this is the log-odds of a token set
            (Arditi et al. 2024, arXiv:2406.11717, appendix B).
        """
        reading = self.branches.reading(len(prompts))
        named = named_hooks(model, hooks)
        for forest in plant(model, prompts, self.branches.spots(len(prompts)), named, batch_size=batch_size):
            for spots, logits in forest.read(model, named):
                reading.add(spots, logits)
        return reading.log_odds()

    def listed(self, most: int = 6) -> str:
        """The behaviour's openings by falling weight, as text."""
        words = [repr(o.text) + ("" if np.isnan(o.weight) else f" {o.weight:.2f}") for o in self.shown[:most]]
        more = len(self.shown) - most
        return ", ".join(words) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Branches:
    """Openings merged at their common beginnings.

    Attributes:
        nodes: Proper beginnings of the openings, parents first; node 0 is the empty one.
        steps: For each node the tokens that go on, each with the number of the node it leads to (−1: an opening ends).
    """

    nodes: tuple[tuple[int, ...], ...]
    steps: tuple[dict[int, int], ...]

    @classmethod
    def of(cls, openings: Sequence[tuple[int, ...]]) -> "Branches":
        """Merge openings of which none is the beginning of another."""
        nodes = sorted({ids[:n] for ids in openings for n in range(len(ids))}, key=lambda ids: (len(ids), ids))
        number = {ids: k for k, ids in enumerate(nodes)}
        steps: list[dict[int, int]] = [{} for _ in nodes]
        for ids in openings:
            for n in range(len(ids)):
                steps[number[ids[:n]]][ids[n]] = number.get(ids[: n + 1], -1)
        return cls(tuple(nodes), tuple(steps))

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """Nodes that no other node continues: run after a prompt, they pass through all the others."""
        inner = {ids[:-1] for ids in self.nodes if ids}
        return [ids for ids in self.nodes if ids not in inner]

    def spots(self, prompts: int) -> list[Spot]:
        """Every path behind every prompt."""
        return [(number, path) for number in range(prompts) for path in self.paths]

    def reading(self, prompts: int) -> "Reading":
        """An empty reading of this many prompts."""
        return Reading(self, prompts)


class Reading:
    """Log-probabilities of going on and of leaving at every node, for every prompt."""

    def __init__(self, branches: Branches, prompts: int) -> None:
        self.branches, self.number = branches, {ids: k for k, ids in enumerate(branches.nodes)}
        self.leave = np.full((prompts, len(branches.nodes)), NAN)
        self.go = [{token: np.full(prompts, NAN) for token in steps} for steps in branches.steps]

    def add(self, spots: Sequence[Spot], logits: Float[Tensor, "spot d_vocab"]) -> None:
        """Note what the logits after some beginnings say; a spot is a prompt and the tokens after it.

        Spots that are not of the openings are passed over.
        """
        for (prompt, ids), row in zip(spots, logits, strict=True):
            if ids not in self.number:
                continue
            node, exact = self.number[ids], row.double()
            total, steps = exact.logsumexp(-1), self.branches.steps[node]
            taken = list(steps)
            for token, value in zip(taken, (exact[taken] - total).tolist(), strict=True):
                self.go[node][token][prompt] = value
            exact[taken] = -torch.inf  # summed on its own: 1 − P would lose everything near 1
            self.leave[prompt, node] = float(exact.logsumexp(-1) - total)

    def log_odds(self) -> Float[np.ndarray, " prompt"]:
        """log P(any opening) − log P(none): every answer ends an opening or leaves the tree at one node."""
        reach = [np.zeros(len(self.leave)) for _ in self.branches.nodes]
        ends = []
        for node, steps in enumerate(self.branches.steps):
            for token, to in steps.items():
                along_it = reach[node] + self.go[node][token]
                if to < 0:
                    ends.append(along_it)
                else:
                    reach[to] = along_it
        left = np.stack(reach, 1) + self.leave
        return np.asarray(np.logaddexp.reduce(np.stack(ends, 1), 1) - np.logaddexp.reduce(left, 1))


@dataclass(frozen=True, eq=False)
class Forest:
    """One batch: prompts, each followed by token sequences, as trees (or as padded rows where paths is None).

    Attributes:
        reads: Row, column, and what is read there: number of the prompt and the tokens after it.
    """

    tokens: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]
    frame: Frame
    paths: Paths | None
    reads: list[tuple[int, int, Spot]]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let edits see the frame of this batch, and attention its paths."""
        with running(self.frame), nullcontext() if self.paths is None else along(self.paths):
            yield

    def read(
        self, model: HookedTransformer, hooks: Sequence[NamedHook]
    ) -> Iterator[tuple[list[Spot], Float[Tensor, "spot d_vocab"]]]:
        """Prompt and tokens of every spot, and the logits there, with these hooks active; few spots at once."""
        with torch.no_grad(), self.running(), model.hooks(fwd_hooks=list(hooks)):
            if whole_rows := hooked_after_blocks(model):
                values = model(self.tokens, attention_mask=self.mask)
            else:
                values = model(self.tokens, attention_mask=self.mask, stop_at_layer=model.cfg.n_layers)
        return self.logits(values, (lambda logits: logits) if whole_rows else partial(unembedded, model))

    def logits(
        self, values: Float[Tensor, "row pos d"], head: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[list[Spot], Float[Tensor, "spot d_vocab"]]]:
        """Spots, and what the head makes of an activation there."""
        for start in range(0, len(self.reads), UNEMBEDDED):
            rows, columns, spots = zip(*self.reads[start : start + UNEMBEDDED], strict=True)
            with torch.no_grad():
                found = head(values[list(rows), list(columns)][None])[0].float()
            yield list(spots), found


def plant(
    model: HookedTransformer,
    prompts: Sequence[Encoded],
    rows: Sequence[Spot],
    hooks: Sequence[NamedHook],
    *,
    batch_size: int | str = "auto",
) -> Iterator[Forest]:
    """Batches of prompts with the tokens that follow them; what follows a prompt is read at each of its beginnings.

    Prompts that begin alike share a tree where no active edit can tell one token from another by its place.

    Raises:
        DataError: A prompt that does not fit in the model's context, or a bad batch size.
    """
    check_batch_size(batch_size)
    ids = [(*prompts[number].ids, *path) for number, path in rows]
    if (longest := max(map(len, ids), default=0)) > model.cfg.n_ctx:
        raise DataError(f"a prompt and an opening have {longest} tokens; the model takes {model.cfg.n_ctx}")
    device = torch.device(model.cfg.device or "cpu")
    trees = list[Tree]()
    if can_run_trees(model, [name for name, _ in hooks]):
        together = [range(len(rows))] if _may_share(model, hooks) else _by_prompt(rows)
        trees = _grown(ids, together)
        lengths = [len(e.ids) for e in prompts]
        if not all(_parts_prompts(tree, [lengths[rows[i][0]] for i in tree.rows]) for tree in trees):
            trees = _grown(ids, _by_prompt(rows))  # an answer to one prompt is the beginning of another prompt
    lengths = [len(tree.tokens) for tree in trees] if trees else [len(row) for row in ids]
    cap = batch_size if isinstance(batch_size, int) else None
    budget = 10**9 if cap else TOKEN_BUDGET.get(device.type, 2048)
    done: set[Spot] = set()
    for batch in length_batches(lengths, budget, max_rows=cap):
        if trees:
            tokens, mask, steps = planted([trees[i] for i in batch], device)
            members = [(b, row, nodes) for b, i in enumerate(batch) for row, nodes in zip(*trees[i][3:], strict=True)]
            first = [rows[trees[i].rows[0]][0] for i in batch]
        else:
            tokens, mask = right_padded([ids[i] for i in batch], device)
            steps, members = None, [(b, i, list(range(len(ids[i])))) for b, i in enumerate(batch)]
            first = [rows[i][0] for i in batch]
        frame = whole(mask, *(torch.tensor(n, device=device) for n in ([len(prompts[p].ids) for p in first], first)))
        if steps is not None:
            ends = torch.zeros_like(mask)
            for b, row, columns in members:
                ends[b, list(columns)] = len(prompts[rows[row][0]].ids)
            frame = Frame(torch.where(mask > 0, steps.position, -1), ends, frame.row, frame.run)
        yield Forest(tokens, mask, frame, steps, _spots(members, rows, prompts, done))


def _spots(
    members: Sequence[tuple[int, int, Sequence[int]]],
    rows: Sequence[Spot],
    prompts: Sequence[Encoded],
    done: set[Spot],
) -> list[tuple[int, int, Spot]]:
    """Row and column of every beginning that no earlier spot reads."""
    out = []
    for b, row, columns in members:
        number, path = rows[row]
        for n in range(len(path) + 1):
            spot = (number, path[:n])
            if spot not in done:
                done.add(spot)
                out.append((b, columns[len(prompts[number].ids) - 1 + n], spot))
    return out


def _grown(ids: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> list[Tree]:
    """Trees of the rows of each group."""
    return [
        tree._replace(rows=[group[i] for i in tree.rows])
        for group in groups
        for tree in grow_trees([ids[i] for i in group], TREE)
    ]


def _parts_prompts(tree: Tree, lengths: Sequence[int]) -> bool:
    """Check that each token of a tree is of the prompt for all of its rows, or for none."""
    inside, behind = set[int](), set[int]()
    for nodes, length in zip(tree.nodes, lengths, strict=True):
        inside.update(nodes[:length])
        behind.update(nodes[length:])
    return inside.isdisjoint(behind)


def _by_prompt(rows: Sequence[Spot]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, (number, _) in enumerate(rows):
        groups.setdefault(number, []).append(i)
    return list(groups.values())


def _may_share(model: HookedTransformer, hooks: Sequence[NamedHook]) -> bool:
    """Check that active hooks treat all prompt tokens alike, and all later ones, so that prompts may share them."""
    if any(point.fwd_hooks for point in model.hook_dict.values()):
        return False
    edits = [fn for _, fn in hooks]
    return all(isinstance(e, Edit) and e.scope in SHARED and e.gate is None and e.watch is None for e in edits)
