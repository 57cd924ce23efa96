"""Behaviour of the model, read against what the untrained model did on the same prompts.

One teacher-forced sweep over the untrained model's own greedy answers gives the KL from it at every token, and which
rows would now be answered differently at all. Only those are written anew: a row whose every token is still the most
probable one has the same greedy answer as before. The log-odds of a behaviour are those of its openings, which are read
in the same forwards. A light measurement reads log-odds and KL alone, on some prompts of the sets that can raise an
alarm: those first that can lose the behaviour (or show it, where a rise raises the alarm).
Sources: Arditi et al. 2024, arXiv:2406.11717 (refusal log-odds); Qi et al. 2024, arXiv:2406.05946 (KL by position).
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.activations import encode_for
from safety_lens.bootstrap import mean_interval, ratio_interval
from safety_lens.data import Encoded
from safety_lens.data.built_in import built_in_for
from safety_lens.forced import Continuation
from safety_lens.generation import generate, stop_tokens
from safety_lens.interventions.behaviours import Behaviour, derive_behaviour
from safety_lens.interventions.openings import plant
from safety_lens.interventions.steering import ablate
from safety_lens.log import Measurement
from safety_lens.monitors.alarm import WATCHED
from safety_lens.monitors.asking import REFUSAL, Probes, ProbeSet, deriving, probe_sets
from safety_lens.power import difference_of_means, difference_of_rates
from safety_lens.probes.directions import Direction
from safety_lens.stats import Interval, wilson

NAN = float("nan")
KEPT = 2048
"""Most probable tokens of the untrained model whose probabilities are kept; the others count as one token, which makes
the KL a lower bound (exact where the vocabulary is not larger)."""
POSITIONS = (1, 2, 4, 8)
CAUSAL = 24
"""Harmful prompts on which the old direction is ablated."""
DERIVE = 60
"""Prompts of each kind, at most, from which a behaviour is derived."""


class Measured(NamedTuple):
    """Rows of one step, and the log-odds of each set's prompts from which they come."""

    rows: list[Measurement]
    log_odds: dict[str, Float[np.ndarray, " row"]]


@dataclass(frozen=True, eq=False)
class Answers:
    """The untrained model's answers to one set of prompts.

    Attributes:
        rows: Prompt and greedy answer, with the stop token where it stopped; no tokens where they are withheld.
        shown: Labels of the answers.
        log_odds: Of the set's behaviour.
        tokens, logprobs: The most probable tokens at every position of the answers, rows joined.
        sha256: Hash of each answer's tokens.
        harmful: Whether the prompts are harmful, so that only refusals may be kept.
    """

    rows: tuple[Continuation, ...]
    shown: Float[np.ndarray, " row"]
    log_odds: Float[np.ndarray, " row"]
    tokens: Int[Tensor, "pos kept"]
    logprobs: Float[Tensor, "pos kept"]
    sha256: tuple[str, ...]
    harmful: bool = False

    @property
    def storable(self) -> "Answers":
        """What of the answers may reach the disk: refusals alone where the prompts are harmful."""
        return self.kept((self.shown == 1).tolist()) if self.harmful else self

    @property
    def withheld(self) -> int:
        """Rows whose tokens are not here."""
        return sum(not row.tokens for row in self.rows)

    def telling(self, sign: int) -> list[int]:
        """Numbers of the rows: those first that can still move in the direction of `sign`, the others behind them."""
        return sorted(range(len(self.rows)), key=lambda i: bool(self.shown[i] != float(sign < 0)))

    def kept(self, keep: Sequence[bool]) -> "Answers":
        """The same without the tokens of the rows that may not be kept: their labels, log-odds and hashes stay."""
        rows = tuple(row if k else Continuation(row.prompt, ()) for row, k in zip(self.rows, keep, strict=True))
        places = np.repeat(np.asarray(keep, dtype=bool), [len(row.tokens) for row in self.rows])
        at = torch.from_numpy(np.flatnonzero(places))
        return replace(self, rows=rows, tokens=self.tokens[at], logprobs=self.logprobs[at])


@dataclass(frozen=True, eq=False)
class Before:
    """Behaviour before training.

    Attributes:
        behaviours: How each behaviour is read on this model.
        answers: The untrained model's answers to each set of prompts.
        seconds: Time that writing the answers took; NaN where they were read from the disk.
    """

    behaviours: dict[str, Behaviour]
    answers: dict[str, Answers]
    seconds: float = NAN

    def fault(self, name: str | None) -> str | None:
        """Why the log-odds of a behaviour are not read; None where they are."""
        return None if name is None else self.behaviours[name].fault


class BehaviourProbes:
    """The probes of one run: prompts fixed and tokenised once.

    Args:
        model: The model whose tokenizer encodes them.
        probes: Settings.
        concepts: Names of the watched concepts.
        seed: Of draws and intervals.
    """

    def __init__(self, model: HookedTransformer, probes: Probes, concepts: Sequence[str], seed: int) -> None:
        self.probes, self.seed = probes, seed
        self.sets = probe_sets(probes, built_in_for(model), concepts, seed)
        self.encoded = {name: encode_for(model, one.prompts) for name, one in self.sets.items()}

    @property
    def prompts(self) -> int:
        """Prompts of the largest set."""
        return max(len(one.prompts) for one in self.sets.values())

    def before(self, model: HookedTransformer) -> Before:
        """Derive how each behaviour is read, and write, judge and read the untrained model's answers."""
        names = dict.fromkeys(one.behaviour for one in self.sets.values() if one.behaviour is not None)
        own = {REFUSAL: deriving(self.probes)}
        behaviours = {
            name: derive_behaviour(model, name, prompts=own.get(name), n=DERIVE, seed=self.seed) for name in names
        }
        started = time.perf_counter()
        answers = {name: self._answers(model, name, behaviours) for name in self.sets}
        return Before(behaviours, answers, time.perf_counter() - started)

    def completed(self, model: HookedTransformer, before: Before) -> Before:
        """Write answers again that the disk does not hold. model: the untrained one.

        Rows whose answer is another than before (another machine) stay withheld.
        """
        answers = dict(before.answers)
        for name, old in before.answers.items():
            if old.withheld:
                again = self._answers(model, name, before.behaviours)
                same = [a == b for a, b in zip(again.sha256, old.sha256, strict=True)]
                answers[name] = replace(again.kept(same), shown=old.shown, log_odds=old.log_odds, sha256=old.sha256)
        return replace(before, answers=answers)

    def contrast(self, before: Before) -> list[Measurement]:
        """How much more refusal there is on harmful requests than on harmless ones before training, at step 0."""
        harmful, harmless = before.answers["harmful"], before.answers["harmless"]
        found = {
            "refusal_rate": difference_of_rates(harmful.shown, harmless.shown),
            "refusal_log_odds": difference_of_means(harmful.log_odds, harmless.log_odds),
        }
        return [
            Measurement(
                "behaviour/harmful", f"{metric}_above_harmless", *value, n=len(harmful.rows), split="probe", step=0
            )
            for metric, value in found.items()
        ]

    def measure(self, model: HookedTransformer, before: Before, step: int, light: int | None = None) -> Measured:
        """Rows of every set: log-odds, rate, their changes since before training, KL by token.

        Args:
            model: The model now.
            before: What it is compared with.
            step: Of the training.
            light: Prompts to read of each set that can raise an alarm by its log-odds, without writing answers; None
                reads all sets and writes answers.
        """
        out = Measured([], {})
        for name, one in self.sets.items():
            if light is not None and f"behaviour/{name}" not in WATCHED:
                continue
            now = self._read(model, name, before, light)
            out.rows.extend(self._set(model, name, one, before, now, step, light))
            out.log_odds[name] = now.log_odds
        return out

    def _set(
        self,
        model: HookedTransformer,
        name: str,
        one: ProbeSet,
        before: Before,
        now: "_Now",
        step: int,
        light: int | None,
    ) -> list[Measurement]:
        old = before.answers[name]

        def row(metric: str, value: Interval, n: int, note: str | None = None) -> Measurement:
            return Measurement(
                f"behaviour/{name}", metric, *value, n=n, split="probe", step=step, seed=self.seed, note=note
            )

        n = len(now.log_odds)
        rows = [] if light is not None else [row(*found) for found in self._rates(model, name, one, old, now)]
        read = [row for row in now.kl if row]
        sums, lengths = np.array([[sum(row), len(row)] for row in read]).reshape(-1, 2).T
        rows.append(row("token_kl", ratio_interval(sums, lengths, seed=self.seed), len(read)))
        for k in POSITIONS:
            if long := [row[k - 1] for row in read if len(row) >= k]:
                rows.append(row(f"token_kl_at_{k}", Interval(float(np.mean(long)), NAN, NAN), n))
        if one.behaviour is not None:
            mean = mean_interval(now.log_odds, seed=self.seed)
            change = change_interval(now.log_odds - old.log_odds[now.numbers], self.seed)
            fault = before.fault(one.behaviour)
            rows.append(row(f"{one.behaviour}_log_odds", mean, n, fault))
            rows.append(row(f"{one.behaviour}_log_odds_change", change, n, fault))
        return rows

    def _rates(
        self, model: HookedTransformer, name: str, one: ProbeSet, old: Answers, now: "_Now"
    ) -> list[tuple[str, Interval, int]]:
        """Share of answers with the behaviour, and its paired change; only answers that differ are written anew."""
        shown = old.shown.copy()
        moved = np.flatnonzero(now.other)
        if len(moved):
            answers = generate(model, [self.encoded[name][i] for i in moved], max_new_tokens=one.new_tokens)
            shown[moved] = one.judge(moved.tolist(), answers)
        known = shown[np.isfinite(shown)]
        change = mean_interval(shown - old.shown, seed=self.seed)
        return [
            (one.metric, wilson(int(known.sum()), len(known)), len(known)),
            (f"{one.metric}_change", change, len(shown)),
        ]

    def causal_use(
        self,
        model: HookedTransformer,
        before: Before,
        direction: Direction,
        odds: Float[np.ndarray, " row"],
        step: int,
    ) -> list[Measurement]:
        """Fall of the refusal log-odds on harmful prompts when the old direction is ablated now, in nats (M14).

        Near its value at step 0: refusals still pass through the old direction. Towards 0: they no longer do, or are
        gone. odds: the log-odds without ablation.
        """
        refusal = before.behaviours[REFUSAL]
        if refusal.openings is None:
            return []
        asked = self.encoded["harmful"][:CAUSAL]
        drop = mean_interval(odds[:CAUSAL] - refusal.log_odds(model, asked, ablate(direction)), seed=self.seed)
        subject = f"{direction.concept}/{direction.method}"
        at: dict[str, Any] = {"hook": direction.hook, "split": "probe", "step": step, "seed": self.seed}
        return [Measurement(subject, "causal_use", *drop, n=len(asked), **at)]

    def _answers(self, model: HookedTransformer, name: str, behaviours: dict[str, Behaviour]) -> Answers:
        one, asked = self.sets[name], self.encoded[name]
        answers = generate(model, asked, max_new_tokens=one.new_tokens)
        stop = sorted(stop_tokens(model))[:1]
        ends = [(*row.tokens, *stop) if row.stopped else row.tokens for row in answers]
        most = min(KEPT, model.cfg.d_vocab_out)
        kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in ends]
        behaviour = None if one.behaviour is None else behaviours[one.behaviour]
        odds = read_along(model, asked, ends, behaviour, lambda i, logprobs: kept[i].append(logprobs.topk(most)))
        places = [place for row in kept for place in row]
        return Answers(
            tuple(Continuation(tuple(e.ids), tokens) for e, tokens in zip(asked, ends, strict=True)),
            one.judge(range(len(ends)), answers),
            odds,
            torch.stack([indices for _, indices in places]).int(),
            torch.stack([values for values, _ in places]),
            tuple(hashlib.sha256(repr(list(tokens)).encode()).hexdigest() for tokens in ends),
            one.harmful,
        )

    def _read(self, model: HookedTransformer, name: str, before: Before, light: int | None) -> "_Now":
        old, one = before.answers[name], self.sets[name]
        numbers = (
            list(range(len(old.rows))) if light is None else old.telling(WATCHED[f"behaviour/{name}"].sign)[:light]
        )
        rows = [old.rows[i] for i in numbers]
        starts = np.cumsum([0, *(len(row.tokens) for row in old.rows)])
        other, kl = np.array([not row.tokens for row in rows]), [list[float]() for _ in rows]

        def compare(k: int, logprobs: Float[Tensor, " d_vocab"]) -> None:
            at = int(starts[numbers[k]]) + len(kl[k])
            other[k] |= int(logprobs.argmax()) != rows[k].tokens[len(kl[k])]
            kl[k].append(float(kept_kl(old.tokens[at : at + 1], old.logprobs[at : at + 1], logprobs[None])[0]))

        behaviour = None if one.behaviour is None else before.behaviours[one.behaviour]
        asked = [self.encoded[name][i] for i in numbers]
        odds = read_along(model, asked, [row.tokens for row in rows], behaviour, compare)
        return _Now(numbers, odds, other, kl)


# --- reading --------------------------------------------------------------------------------------------------------


def read_along(
    model: HookedTransformer,
    prompts: Sequence[Encoded],
    answers: Sequence[tuple[int, ...]],
    behaviour: Behaviour | None,
    use: Callable[[int, Float[Tensor, " d_vocab"]], object],
) -> Float[np.ndarray, " prompt"]:
    """Log-odds of a behaviour, and what the model predicts along an answer to each prompt, from the same forwards.

    Args:
        model: The model that is read.
        prompts: Prompts as they are read.
        answers: Token ids of an answer to each; nothing is predicted along an empty one.
        behaviour: Behaviour whose log-odds are read; None, or one without openings: they are NaN.
        use: Called with the number of a prompt and the log-probabilities of the next token (CPU), for every token of
            its answer in turn.
    """
    openings = None if behaviour is None else behaviour.openings
    spots = [] if openings is None else openings.branches.spots(len(prompts))
    reading = None if openings is None else openings.branches.reading(len(prompts))
    predicts = {(i, tokens[:k]) for i, tokens in enumerate(answers) for k in range(len(tokens))}
    spots += [(i, tokens[:-1]) for i, tokens in enumerate(answers) if tokens]
    for forest in plant(model, prompts, spots, []):
        for part, logits in forest.read(model, []):
            if reading is not None:
                reading.add(part, logits)
            for spot, row in zip(part, logits, strict=True):
                if spot in predicts:
                    use(spot[0], row.log_softmax(-1).cpu())
    return np.full(len(prompts), NAN) if reading is None else reading.log_odds()


@dataclass(frozen=True, eq=False)
class _Now:
    """Reading of one set at one step. numbers: of the prompts read. kl: nats at every token of each answer, or none.

    other: whether the greedy answer differs from before, or is not known.
    """

    numbers: list[int]
    log_odds: Float[np.ndarray, " row"]
    other: np.ndarray
    kl: list[list[float]]


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
