"""What mitigation.py compares: penalties, freezing, SafeLoRA and dropped rows, with their controls."""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mitigation_runs import RATE, STEPS, Row, Setting, adapted, batches, conversations, read, tokens
from peft import PeftModel

from safety_lens.forced import Continuation
from safety_lens.interventions.freezing import freeze
from safety_lens.interventions.penalties import FisherPenalty, KlPenalty, safe_lora
from safety_lens.models import load_model
from safety_lens.probes.attribution import snip_scores
from safety_lens.probes.examples import read_examples
from safety_lens.probes.fisher import sampled_nll
from safety_lens.probes.groups import NeuronGroup, group_of
from safety_lens.probes.matrices import matrices_of
from safety_lens.probes.ranking import set_difference, top
from safety_lens.probes.row_risk import row_risk
from safety_lens.probes.stored import store_gradients

MODEL = load_model("organism", device="cpu")


@functools.cache
def safety() -> list[Continuation]:
    return read_examples("safety", MODEL, split="train", limit=64, seed=0).continuations


@functools.cache
def gradients() -> Any:
    return store_gradients(MODEL, safety(), matrices_of(MODEL), loss=sampled_nll(0))


@functools.cache
def scores(name: str) -> Any:
    return snip_scores(MODEL, read_examples(name, MODEL, split="train", limit=64, seed=0).continuations)


def fisher(value: float) -> Setting:
    return Setting("fisher", value, protect=lambda live, o, s: FisherPenalty(live, gradients(), energy=value))


def kl(value: float) -> Setting:
    return Setting("kl", value, protect=lambda live, o, s: KlPenalty(live, safety(), weight=value, seed=s))


def _frozen(live: PeftModel, optimizer: torch.optim.Optimizer, group: NeuronGroup) -> None:
    freeze(live, group).attach(optimizer)


def freezing(value: float) -> Setting:
    """The top share by SNIP; below 0: the top |share| without the top half of it for utility."""

    def group() -> NeuronGroup:
        if value > 0:
            return top(scores("safety"), MODEL, value)
        return set_difference(scores("safety"), scores("utility"), MODEL, q=-value, p=-value / 2)

    return Setting("freeze", value, protect=lambda live, o, s: _frozen(live, o, group()))


def freezing_random(value: float) -> Setting:
    def group(seed: int) -> NeuronGroup:
        rng = np.random.default_rng(seed)
        size = freezing_size(value)
        index = {
            m.name: torch.from_numpy(np.sort(rng.choice(m.numel, int(size * m.numel), replace=False)))
            for m in matrices_of(MODEL)
        }
        return group_of(MODEL, "random", "weight", index)

    return Setting("freeze random", value, protect=lambda live, o, s: _frozen(live, o, group(s)))


def freezing_size(value: float) -> float:
    if value > 0:
        return value
    return set_difference(scores("safety"), scores("utility"), MODEL, q=-value, p=-value / 2).share


@functools.cache
def unaligned() -> Any:
    """The organism fine-tuned to comply with harmful requests, merged."""
    data = [(tokens(m), True) for m in conversations("compliance")]
    live = adapted(99)
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    stream = batches([row for row, _ in data], 99)
    for _ in range(STEPS):
        optimizer.zero_grad()
        live(**next(stream)).loss.backward()
        optimizer.step()
    print(f"unaligned stand-in: {read(live, STEPS, 'val')}", flush=True)
    return live.merge_and_unload()


def safelora(value: float) -> Setting:
    def project(live: PeftModel) -> None:
        safe_lora(live, unaligned(), threshold=value)

    return Setting("safelora", value, after=project)


def dropping(value: float) -> Setting:
    def kept(rows: Sequence[tuple[Row, bool]], seed: int) -> list[Row]:
        found = row_risk(MODEL, [Continuation(tuple(i[:a]), tuple(i[a:])) for (i, a), _ in rows], safety())
        out = set(found.riskiest(value).tolist())
        caught = sum(rows[i][1] for i in out)
        print(f"  {len(out)} rows dropped, {caught} of {sum(bad for _, bad in rows)} that comply", flush=True)
        return [row for i, (row, _) in enumerate(rows) if i not in out]

    return Setting("drop", value, rows=kept)


def dropping_random(value: float) -> Setting:
    def kept(rows: Sequence[tuple[Row, bool]], seed: int) -> list[Row]:
        return [row for row, _ in random.Random(seed).sample(list(rows), len(rows) - int(value * len(rows)))]

    return Setting("drop random", value, rows=kept)


GRID: dict[str, tuple[Callable[[float], Setting], tuple[float, ...]]] = {
    "kl": (kl, (0.3, 1.0)),
    "fisher": (fisher, (5e3, 2e4)),
    "freeze": (freezing, (-0.2, 0.5)),
    "safelora": (safelora, (0.05, 0.1, 0.2, 1.0)),
    "drop": (dropping, (0.1, 0.15)),
}
CONTROLS = {"freeze": freezing_random, "drop": dropping_random}
