"""What a direction does: bypass, induce and KL (Arditi et al. 2024, arXiv:2406.11717, app. C), for each prompt."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.batching import length_batches
from safety_lens.bootstrap import ratio_interval
from safety_lens.data import Encoded
from safety_lens.forced import TOKEN_BUDGET, unembedded
from safety_lens.frames import Frame, running, whole
from safety_lens.interventions.causality.behaviour import ReadLogits, TokenLogOdds, next_logprobs
from safety_lens.interventions.steering import ablate, steer
from safety_lens.kv import right_padded
from safety_lens.probes.directions import Direction
from safety_lens.stats import Interval

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
    """The two sides' prompts under one behaviour score; everything unedited is run once.

    positive, negative: prompts that the model answers. behaviour: function of the logits behind each prompt; a
    `TokenLogOdds` is read behind its prefix.
    """

    def __init__(
        self,
        model: HookedTransformer,
        positive: Sequence[Encoded],
        negative: Sequence[Encoded],
        behaviour: ReadLogits,
        *,
        batch_size: int | str = "auto",
    ) -> None:
        self.model, self.positive, self.negative, self.behaviour = model, positive, negative, behaviour
        self.prefix = behaviour.prefix if isinstance(behaviour, TokenLogOdds) else ()
        self.batch_size = batch_size

    @cached_property
    def base_positive(self) -> PerPrompt:
        """Behaviour score of each positive prompt without an edit."""
        return self._read(next_logprobs(self.model, self.positive, prefix=self.prefix, batch_size=self.batch_size))

    @cached_property
    def base_negative(self) -> PerPrompt:
        """Behaviour score of each negative prompt without an edit."""
        return self._read(self._negative_logprobs)

    @cached_property
    def _negative_logprobs(self) -> Float[Tensor, "prompt d_vocab"]:
        return next_logprobs(self.model, self.negative, prefix=self.prefix, batch_size=self.batch_size)

    def _read(self, logits: Float[Tensor, "prompt d_vocab"]) -> PerPrompt:
        return self.behaviour(logits).double().cpu().numpy()

    def bypass(self, direction: Direction) -> PerPrompt:
        """Behaviour score of each positive prompt with the direction ablated wherever the stream is written to."""
        hooks = ablate(direction)
        found = next_logprobs(self.model, self.positive, prefix=self.prefix, hooks=hooks, batch_size=self.batch_size)
        return self._read(found)

    def kl(self, direction: Direction) -> PerPrompt:
        """KL(unedited ‖ ablated) in nats of the token that is read, on each negative prompt."""
        hooks = ablate(direction)
        found = next_logprobs(
            self.model, self.negative, prefix=self.prefix, hooks=hooks, batch_size=self.batch_size
        ).double()
        base = self._negative_logprobs.double()
        terms = torch.where(base.isfinite(), base.exp() * (base - found), 0.0)
        return terms.sum(-1).clamp(min=0.0).numpy()

    def induce(self, directions: Sequence[Direction], coeff: float = 1.0) -> list[PerPrompt]:
        """Behaviour score of each negative prompt with coeff · vector added to every token at the direction's hook.

        The unedited blocks before a hook run once for all directions. That is exact, because adding at a hook of the
        stream changes nothing before it; where it is not the stream, or other hooks are active, everything runs again.
        """
        foreign = any(point.fwd_hooks for point in self.model.hook_dict.values())
        layers = [None if foreign else resume_layer(d.hook) for d in directions]
        out: list[PerPrompt] = [np.full(len(self.negative), np.nan) for _ in directions]
        resumed = [k for k, layer in enumerate(layers) if layer is not None]
        for part in self._batches() if resumed else ():
            stream = self._stream(part, {directions[k].hook for k in resumed})
            for k in resumed:
                out[k][part.rows] = self._read(self._finish(directions[k], coeff, stream[directions[k].hook], part))
        for k, d in enumerate(directions):
            if layers[k] is None:
                hooks = steer(d, coeff)
                found = next_logprobs(
                    self.model, self.negative, prefix=self.prefix, hooks=hooks, batch_size=self.batch_size
                )
                out[k] = self._read(found)
        return out

    def _batches(self) -> Iterator["_Part"]:
        ids = [(*e.ids, *self.prefix) for e in self.negative]
        device = torch.device(self.model.cfg.device or "cpu")
        cap = self.batch_size if isinstance(self.batch_size, int) else None
        budget = 10**9 if cap else TOKEN_BUDGET.get(device.type, 2048)
        for rows in length_batches([len(i) for i in ids], budget, max_rows=cap):
            tokens, mask = right_padded([ids[i] for i in rows], device)
            asked = [len(self.negative[i].ids) for i in rows]
            frame = whole(mask, *(torch.tensor(numbers, device=device) for numbers in (asked, rows)))
            yield _Part(list(rows), tokens, mask, frame)

    def _stream(self, part: "_Part", hooks: set[str]) -> dict[str, Float[Tensor, "row pos d_model"]]:
        """The unedited residual stream at each hook, from one forward up to the last of them."""
        kept: dict[str, Tensor] = {}

        def keep(act: Tensor, hook: object) -> None:
            kept[str(getattr(hook, "name", ""))] = act

        # a block must run for its own hook_resid_pre to fire
        stop = max(int(name.split(".")[1]) + 1 for name in hooks)
        with torch.no_grad(), running(part.frame), self.model.hooks(fwd_hooks=[(name, keep) for name in hooks]):
            self.model(part.tokens, attention_mask=part.mask, stop_at_layer=stop)
        return kept

    def _finish(
        self, direction: Direction, coeff: float, stream: Float[Tensor, "row pos d_model"], part: "_Part"
    ) -> Float[Tensor, "row d_vocab"]:
        """Logits behind each row's last token, with the direction added to the stream and the later blocks run."""
        (_, edit), *_ = steer(direction, coeff)
        layer, n_layers = resume_layer(direction.hook), self.model.cfg.n_layers
        with torch.no_grad(), running(part.frame):
            resid = edit(stream)
            if layer is not None and layer < n_layers:
                resid = self.model(resid, attention_mask=part.mask, start_at_layer=layer, stop_at_layer=n_layers)
            read = resid[torch.arange(len(resid), device=resid.device), part.mask.sum(1) - 1]
            return unembedded(self.model, read[None])[0].float()


class _Part(NamedTuple):
    """A batch of negative prompts, padded behind."""

    rows: list[int]
    tokens: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]
    frame: Frame
