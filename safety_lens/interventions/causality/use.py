"""Effects of a direction on each prompt: bypass, induce and KL (Arditi et al. 2024, arXiv:2406.11717, app. C)."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.bootstrap import ratio_interval
from safety_lens.data import Encoded
from safety_lens.forced import unembedded
from safety_lens.generation import generate
from safety_lens.interventions.openings import Forest, Openings, Spot, plant
from safety_lens.interventions.steering import ablate, steer
from safety_lens.models import named_hooks
from safety_lens.probes.directions import Direction
from safety_lens.stats import Interval
from safety_lens.types import FwdHook

KL_TOKENS = 4
"""Tokens of an answer along which the KL of an ablation is read."""
PerPrompt = Float[np.ndarray, " prompt"]


def clustered_mean(values: PerPrompt, clusters: Sequence[str], *, seed: int = 0) -> Interval:
    """Mean with a bootstrap interval over clusters of prompts (templates); NaN limits for a single cluster."""
    _, index = np.unique(list(clusters), return_inverse=True)
    return ratio_interval(np.bincount(index, values), np.bincount(index).astype(float), seed=seed)


def resume_layer(hook: str) -> int | None:
    """The first block that has not run where the residual stream is as at `hook`; None where it is not the stream."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook)
    return None if found is None else int(found[1]) + (found[2] == "post")


class CausalUse:
    """Prompts that show a behaviour and prompts that do not, under the log-odds of its openings.

    Everything unedited is run once.

    Args:
        model: The model that answers.
        positive: Prompts whose answers show the behaviour.
        negative: Prompts whose answers do not.
        openings: Openings whose log-odds are read.
        batch_size: Trees in a forward pass, or "auto".
    """

    def __init__(
        self,
        model: HookedTransformer,
        positive: Sequence[Encoded],
        negative: Sequence[Encoded],
        openings: Openings,
        *,
        batch_size: int | str = "auto",
    ) -> None:
        self.model, self.positive, self.negative, self.openings = model, positive, negative, openings
        self.batch_size = batch_size

    def part(self, start: int = 0, stop: int | None = None) -> "CausalUse":
        """The same for some prompts of both sides."""
        some = slice(start, stop)
        found = CausalUse(
            self.model, self.positive[some], self.negative[some], self.openings, batch_size=self.batch_size
        )
        found.base_positive, found.base_negative = self.base_positive[some], self.base_negative[some]
        found._own_beginnings = self._own_beginnings[some]
        return found

    @cached_property
    def base_positive(self) -> PerPrompt:
        """Log-odds of each positive prompt without an edit."""
        return self.openings.log_odds(self.model, self.positive, batch_size=self.batch_size)

    @cached_property
    def base_negative(self) -> PerPrompt:
        """Log-odds of each negative prompt without an edit."""
        return self.openings.log_odds(self.model, self.negative, batch_size=self.batch_size)

    def bypass(self, direction: Direction) -> PerPrompt:
        """Log-odds of each positive prompt with the direction ablated wherever the stream is written to."""
        return self.openings.log_odds(self.model, self.positive, ablate(direction), batch_size=self.batch_size)

    def kl(self, direction: Direction) -> PerPrompt:
        """KL(unedited ‖ ablated) in nats per token, along the first tokens of each negative prompt's own answer."""
        found, totals = self._logprobs(ablate(direction)), np.zeros((2, len(self.negative)))
        for (prompt, ids), base in self._base_logprobs.items():
            p, q = base.double(), found[prompt, ids].double()
            kl = torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum().clamp(min=0.0)
            totals[:, prompt] += float(kl), 1.0
        return np.asarray(totals[0] / totals[1])

    @cached_property
    def _own_beginnings(self) -> list[tuple[int, ...]]:
        """The unedited model's greedy answers to negative prompts, up to the last token that the KL reads."""
        written = generate(self.model, self.negative, max_new_tokens=KL_TOKENS - 1, batch_size=self.batch_size)
        return [tuple(answer.tokens) for answer in written]

    @cached_property
    def _base_logprobs(self) -> dict[Spot, Float[Tensor, " d_vocab"]]:
        return self._logprobs([])

    def _logprobs(self, hooks: Sequence[FwdHook]) -> dict[Spot, Float[Tensor, " d_vocab"]]:
        """Log-probabilities of the first tokens of each negative prompt's own answer."""
        named, rows = named_hooks(self.model, hooks), dict[Spot, Tensor]()
        own = list(enumerate(self._own_beginnings))
        for forest in plant(self.model, self.negative, own, named, batch_size=self.batch_size):
            for spots, logits in forest.read(self.model, named):
                rows |= zip(spots, logits.log_softmax(-1).cpu(), strict=True)
        return rows

    def induce(self, directions: Sequence[Direction], coeff: float = 1.0, scope: str = "all") -> list[PerPrompt]:
        """Log-odds of each negative prompt with coeff · vector added at the direction's hook, to the tokens of a scope.

        The unedited blocks before a hook run once for all directions. That is exact, because adding at a hook of the
        stream changes nothing before it; where it is not the stream, or other hooks are active, everything runs again.
        """
        foreign = any(point.fwd_hooks for point in self.model.hook_dict.values())
        layers = [None if foreign else resume_layer(d.hook) for d in directions]
        branches = self.openings.branches
        spots = branches.spots(len(self.negative))
        readings = [branches.reading(len(self.negative)) for _ in directions]
        resumed = {k: layer for k, layer in enumerate(layers) if layer is not None}
        hooks = {directions[k].hook for k in resumed}
        edits = {k: steer(directions[k], coeff, scope=scope)[0] for k in resumed}
        named = named_hooks(self.model, list(edits.values()))
        forests = plant(self.model, self.negative, spots, named, batch_size=self.batch_size)
        for forest in forests if resumed else ():
            stream = self._stream(forest, hooks)
            for k, layer in resumed.items():
                for read, logits in self._finish(edits[k], stream[directions[k].hook], forest, layer):
                    readings[k].add(read, logits)
        return [
            readings[k].log_odds()
            if k in resumed
            else self.openings.log_odds(
                self.model, self.negative, steer(d, coeff, scope=scope), batch_size=self.batch_size
            )
            for k, d in enumerate(directions)
        ]

    def _stream(self, forest: Forest, hooks: set[str]) -> dict[str, Float[Tensor, "row pos d_model"]]:
        """The unedited residual stream at each hook, from one forward up to the last of them."""
        kept: dict[str, Tensor] = {}

        def keep(act: Tensor, hook: object) -> None:
            kept[str(getattr(hook, "name", ""))] = act

        # a block must run for its own hook_resid_pre to fire
        stop = max(int(name.split(".")[1]) + 1 for name in hooks)
        with torch.no_grad(), forest.running(), self.model.hooks(fwd_hooks=[(name, keep) for name in hooks]):
            self.model(forest.tokens, attention_mask=forest.mask, stop_at_layer=stop)
        return kept

    def _finish(
        self, hook: FwdHook, stream: Float[Tensor, "row pos d_model"], forest: Forest, layer: int
    ) -> Iterator[tuple[list[Spot], Float[Tensor, "spot d_vocab"]]]:
        """Logits at every spot, few at once, with the direction added to the stream and the later blocks run."""
        _, edit = hook
        n_layers = self.model.cfg.n_layers
        with torch.no_grad(), forest.running():
            resid = edit(stream)
            if layer < n_layers:
                resid = self.model(resid, attention_mask=forest.mask, start_at_layer=layer, stop_at_layer=n_layers)
        return forest.logits(resid, partial(unembedded, self.model))
