"""What the model does: refusals, answers and facts, read against what the untrained model did on the same prompts.

One teacher-forced sweep over the untrained model's own greedy answers gives the refusal log-odds of the first token,
the KL from the untrained model at every token, and which rows would now be answered differently at all. Only those are
written anew: a row whose every token is still the most probable one has the same greedy answer as before. So a
measurement that finds nothing writes no text. Answers to harmful prompts are judged in memory and never kept.
Sources: Arditi et al. 2024, arXiv:2406.11717 (refusal log-odds); Qi et al. 2024, arXiv:2406.05946 (KL by position).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.bootstrap import mean_interval, ratio_interval
from safety_lens.data import Encoded
from safety_lens.data.built_in import is_organism
from safety_lens.errors import DataError, ModelError
from safety_lens.forced import Continuation, continuation_logprobs
from safety_lens.generation import generate, stop_tokens
from safety_lens.interventions.scorers.refusal_tokens import RefusalTokens, derive_refusal_tokens
from safety_lens.interventions.steering import ablate
from safety_lens.log import Measurement
from safety_lens.monitors.asking import Judge, Probes, facts, prompts, refused
from safety_lens.probes.directions import Direction
from safety_lens.stats import Interval, wilson
from safety_lens.types import Prompt

NAN = float("nan")
KEPT = 2048
"""Most probable tokens of the untrained model whose probabilities are kept; the others count as one token, which makes
the KL a lower bound (exact where the vocabulary is not larger)."""
CHUNK = 2**24  # log-probabilities held at once
POSITIONS = (1, 2, 4, 8)
CAUSAL = 24
"""Harmful prompts on which the old direction is ablated."""
FACT_TOKENS = 24


class Measured(NamedTuple):
    """Rows of one step, and the refusal log-odds of each set's prompts behind them."""

    rows: list[Measurement]
    log_odds: dict[str, Float[np.ndarray, " row"]]


@dataclass(frozen=True, eq=False)
class Answers:
    """The untrained model's answers to one set of prompts.

    rows: prompt and greedy answer, with the stop token where it stopped. shown: judged, per row. log_odds: of the first
    token. tokens, logprobs: the most probable tokens at every position of the answers, rows joined.
    """

    rows: tuple[Continuation, ...]
    shown: Float[np.ndarray, " row"]
    log_odds: Float[np.ndarray, " row"]
    tokens: Int[Tensor, "pos kept"]
    logprobs: Float[Tensor, "pos kept"]


@dataclass(frozen=True, eq=False)
class Before:
    """Behaviour before training. refusal: the tokens whose odds are read, None with the reason in `fault`."""

    refusal: RefusalTokens | None
    fault: str | None
    answers: dict[str, Answers]


@dataclass(frozen=True, eq=False)
class _Asked:
    """A set of prompts: how they are judged, how long the answers are, what its rate is called."""

    prompts: list[Encoded]
    judge: Judge
    new_tokens: int
    metric: str


class Behaviour:
    """The probes of one run: prompts fixed and tokenised once."""

    def __init__(self, model: HookedTransformer, probes: Probes, seed: int) -> None:
        self.probes, self.seed = probes, seed
        self.derive: dict[str, list[Prompt]] = {}
        self.asked: dict[str, _Asked] = {}
        for label in ("harmful", "harmless"):
            self.derive[label], measured = prompts(probes, label, seed)
            self.asked[label] = _Asked(encode_for(model, measured), refused, probes.new_tokens, "refusal_rate")
        if probes.facts and is_organism(model):
            questions, judge = facts(probes.facts, seed)
            self.asked["facts"] = _Asked(encode_for(model, questions), judge, FACT_TOKENS, "accuracy")

    def before(self, model: HookedTransformer) -> Before:
        """Write, judge and read the untrained model's answers."""
        refusal, fault = None, None
        try:
            refusal = derive_refusal_tokens(model, self.derive["harmful"], self.derive["harmless"], seed=self.seed)
        except (DataError, ModelError) as error:  # a model that does not refuse: unknown, and said in every row
            fault = str(error)
        return Before(refusal, fault, {name: _answers(model, asked, refusal) for name, asked in self.asked.items()})

    def measure(self, model: HookedTransformer, before: Before, step: int) -> Measured:
        """Rows of every set: log-odds, rate, their changes since before training, KL by token."""
        out = Measured([], {})
        for name, asked in self.asked.items():
            now = _read(model, before.answers[name], before.refusal)
            out.rows.extend(self._set(model, name, asked, before, now, step))
            out.log_odds[name] = now.log_odds
        return out

    def _set(
        self, model: HookedTransformer, name: str, asked: _Asked, before: Before, now: "_Now", step: int
    ) -> list[Measurement]:
        old = before.answers[name]
        shown = old.shown.copy()
        moved = np.flatnonzero(now.other)
        if len(moved):
            said = generate(model, [asked.prompts[i] for i in moved], max_new_tokens=asked.new_tokens)
            shown[moved] = asked.judge(moved.tolist(), said)

        def row(metric: str, value: Interval, n: int, note: str | None = None) -> Measurement:
            return Measurement(
                f"behaviour/{name}", metric, *value, n=n, split="probe", step=step, seed=self.seed, note=note
            )

        known, n = shown[np.isfinite(shown)], len(shown)
        rows = [
            row(asked.metric, wilson(int(known.sum()), len(known)), len(known)),
            row(f"{asked.metric}_change", mean_interval(shown - old.shown, seed=self.seed), n),
            row("token_kl", ratio_interval(now.kl_sums, now.lengths, seed=self.seed), n),
        ]
        rows += [row(f"token_kl_at_{k}", Interval(v, NAN, NAN), n) for k, v in now.kl_at.items()]
        if name != "facts":
            mean = mean_interval(now.log_odds, seed=self.seed)
            change = change_interval(now.log_odds - old.log_odds, self.seed)
            rows.append(row("refusal_log_odds", mean, n, before.fault))
            rows.append(row("refusal_log_odds_change", change, n, before.fault))
        return rows

    def causal_use(
        self,
        model: HookedTransformer,
        before: Before,
        direction: Direction,
        odds: Float[np.ndarray, " row"],
        step: int,
    ) -> list[Measurement]:
        """How far ablating the old direction lowers the refusal log-odds on harmful prompts now, in nats (M14).

        Near its value at step 0: refusals still pass through the old direction. Towards 0: they no longer do, or are
        gone. odds: the log-odds without ablation.
        """
        refusal = before.refusal
        if refusal is None:
            return []
        rows = [Continuation(row.prompt, row.tokens[:1]) for row in before.answers["harmful"].rows[:CAUSAL]]
        found = continuation_logprobs(model, rows, hooks=ablate(direction))
        left = torch.cat([refusal.read_first(x) for x in found]).numpy()
        drop = mean_interval(odds[:CAUSAL] - left, seed=self.seed)
        subject = f"{direction.concept}/{direction.method}"
        at: dict[str, Any] = {"hook": direction.hook, "split": "probe", "step": step, "seed": self.seed}
        return [Measurement(subject, "causal_use", *drop, n=len(rows), **at)]


# --- reading --------------------------------------------------------------------------------------------------------


def _answers(model: HookedTransformer, asked: _Asked, refusal: RefusalTokens | None) -> Answers:
    said = generate(model, asked.prompts, max_new_tokens=asked.new_tokens)
    stop = sorted(stop_tokens(model))[:1]
    ends = [(*row.tokens, *stop) if row.stopped else row.tokens for row in said]
    rows = tuple(Continuation(tuple(e.ids), tokens) for e, tokens in zip(asked.prompts, ends, strict=True))
    log_odds, kept = np.full(len(rows), NAN), {}
    for i, found in _sweep(model, rows):
        log_odds[i] = _first(found, refusal)
        kept[i] = found.topk(min(KEPT, found.shape[-1]))
    tokens = torch.cat([kept[i].indices for i in range(len(rows))]).int()
    logprobs = torch.cat([kept[i].values for i in range(len(rows))])
    return Answers(rows, asked.judge(range(len(rows)), said), log_odds, tokens, logprobs)


def _first(found: Float[Tensor, "new d_vocab"], refusal: RefusalTokens | None) -> float:
    return NAN if refusal is None else float(refusal.read_first(found[:1]))


def _sweep(
    model: HookedTransformer, rows: Sequence[Continuation]
) -> Iterator[tuple[int, Float[Tensor, "new d_vocab"]]]:
    """Log-probabilities row by row, of few rows at once; rows of similar length share a forward."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt) + len(rows[i].tokens), i))
    most = max(1, CHUNK // (max(len(row.tokens) for row in rows) * model.cfg.d_vocab_out))
    for start in range(0, len(order), most):
        part = order[start : start + most]
        yield from zip(part, continuation_logprobs(model, [rows[i] for i in part]), strict=True)


@dataclass(frozen=True, eq=False)
class _Now:
    """other: whether the greedy answer differs from before. kl_sums: nats over each answer."""

    log_odds: Float[np.ndarray, " row"]
    other: np.ndarray
    kl_sums: Float[np.ndarray, " row"]
    lengths: Float[np.ndarray, " row"]
    kl_at: dict[int, float]


def _read(model: HookedTransformer, old: Answers, refusal: RefusalTokens | None) -> _Now:
    n = len(old.rows)
    starts = np.cumsum([0, *(len(row.tokens) for row in old.rows)])
    log_odds, other, kl = np.full(n, NAN), np.zeros(n, dtype=bool), dict[int, np.ndarray]()
    for i, found in _sweep(model, old.rows):
        log_odds[i] = _first(found, refusal)
        other[i] = found.argmax(-1).tolist() != list(old.rows[i].tokens)
        at = slice(int(starts[i]), int(starts[i + 1]))
        kl[i] = kept_kl(old.tokens[at], old.logprobs[at], found)
    sums = np.array([kl[i].sum() for i in range(n)])
    by_position = {k: [kl[i][k - 1] for i in range(n) if len(kl[i]) >= k] for k in POSITIONS}
    kl_at = {k: float(np.mean(values)) for k, values in by_position.items() if values}
    return _Now(log_odds, other, sums, np.diff(starts).astype(float), kl_at)


def kept_kl(
    tokens: Int[Tensor, "pos kept"], before: Float[Tensor, "pos kept"], now: Float[Tensor, "pos d_vocab"]
) -> Float[np.ndarray, " pos"]:
    """KL(before ‖ now) per position in nats, tokens that are not kept counted as one: exactly 0 where nothing moved."""
    p, q = before.double(), now.gather(-1, tokens.long()).double()
    terms = torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum(-1)
    if tokens.shape[-1] < now.shape[-1]:
        left, right = ((1 - x.exp().sum(-1)).clamp(min=1e-12) for x in (p, q))
        terms = terms + left * (left.log() - right.log())
    return terms.clamp(min=0.0).numpy()


def change_interval(change: Float[np.ndarray, " prompt"], seed: int) -> Interval:
    """Mean change of log-odds over prompts, 95 %; the point 0 where none changed at all, as before the first step.

    Several prompts that changed by the same amount keep the wide interval of `mean_interval`: they say little. NaN ends
    for a single prompt.
    """
    return mean_interval(change, span=1.0 if np.nan_to_num(change).any() else 0.0, seed=seed)
