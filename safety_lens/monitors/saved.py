"""Drift of what is already on disk: adapters, merged models and checkpoints, compared with their base.

The base is read and measured once; every state is compared with that one baseline, so runs can be compared too.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safety_lens.artifacts import MANIFEST, sha256_of, tokenizer_fingerprint
from safety_lens.data import Concept, sides
from safety_lens.errors import ModelError
from safety_lens.loading.gguf_files import names_gguf
from safety_lens.loading.hooked import main_dtype
from safety_lens.loading.hub import put_adapter, read_model, read_tokenizer, resolve, weights_file
from safety_lens.log import Measurement
from safety_lens.models import load_hf
from safety_lens.monitors import Probes
from safety_lens.monitors.alarm import WATCHED, StopRule
from safety_lens.monitors.audit import Gaps, audit_adapter, input_gaps
from safety_lens.monitors.baseline import Baseline
from safety_lens.monitors.monitor import Monitor
from safety_lens.monitors.readings import Pairs
from safety_lens.probes.directions import Direction


@dataclass(frozen=True)
class State:
    """One set of weights on disk. step: of its training, None where nothing says. made_for: the base it names."""

    source: str
    is_adapter: bool
    step: int | None
    made_for: str | None = None


@dataclass(frozen=True)
class SavedRun:
    """The states of one source, in the order of their steps. measurements: the base at step 0, audits, drift."""

    name: str
    states: tuple[State, ...]
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...] = ()


def find_states(source: str | Path) -> tuple[State, ...]:
    """What a source holds: an adapter, a model, or the checkpoints of a training run (and its end, if it is there).

    Raises:
        ModelError: nothing that could be measured.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return (_hub_state(str(source)),)
    places = sorted(
        [*folder.glob("checkpoint-*"), *folder.glob("checkpoints/checkpoint-*")],
        key=lambda path: int(path.name.rpartition("-")[2]) if path.name.rpartition("-")[2].isdigit() else 0,
    )
    states = [state for place in places if (state := _state(place)) is not None]
    end = _state(folder)
    if end is not None and not any(state.step is not None and state.step == end.step for state in states):
        states.append(end)
    if not states:
        raise ModelError(
            f"{source} holds no adapter, model or checkpoint: adapter_config.json or config.json with *.safetensors"
        )
    return tuple(states)


def _state(folder: Path) -> State | None:
    if (folder / "adapter_config.json").is_file():
        said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return State(str(folder), True, _step(folder), said.get("base_model_name_or_path"))
    return State(str(folder), False, _step(folder)) if (folder / "config.json").is_file() else None


def _step(folder: Path) -> int | None:
    for name, key in (("trainer_state.json", "global_step"), (MANIFEST, "steps")):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get(key)
            return int(found) if isinstance(found, int) else None
    return None


def _hub_state(name: str) -> State:
    resolve(name)  # a path that does not exist is an error here
    if names_gguf(name):
        return State(name, False, None)
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return State(name, False, None)
    try:
        said: Any = PeftConfig.from_pretrained(name)
    except (OSError, ValueError):
        return State(name, False, None)
    return State(name, True, None, said.base_model_name_or_path)


def measure_saved(
    base: str | Path,
    sources: Sequence[str | Path],
    concepts: Sequence[Concept | str],
    *,
    hooks: Callable[[int], list[str] | None] = lambda n_layers: None,
    method: str = "dim",
    probes: Probes | None = Probes(),  # noqa: B008 (frozen)
    pairs: Pairs = Pairs(),  # noqa: B008 (frozen)
    stop_rule: Callable[[], StopRule] = StopRule,
    stored: Path | None = None,
    seed: int = 0,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str | None = None,
    on_rows: Callable[[str, Sequence[Measurement]], None] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> list[SavedRun]:
    """Audit and measure every state of every source against the base.

    All states are audited from their weights first (M12, M13, M15: no forward through them); then they are measured
    as a run in training would be. A state whose step nothing records comes after the others.

    Args:
        hooks: function of the number of blocks, giving hook names; None: every block's resid_post.
        pairs: how many pairs of each concept are read.
        stop_rule: makes a fresh rule; each run gets its own.
        stored: folder of the base's measurement, as `Monitor.baseline` takes it: read where it is there, else written.
        on_line: called with lines about what is read and what cannot be measured, before the first measurement.
        on_rows: called with the name of a run and rows as soon as they are there.

    Raises:
        ModelError: an adapter or model that belongs to another base (both are named), or has another tokenizer.
    """
    found = {name: find_states(source) for name, source in zip(run_names(sources), sources, strict=True)}
    hf, tokenizer = load_hf(base, device=device, dtype=dtype)
    if tokenizer is None:
        raise ModelError(f"{base} has no tokenizer: put its files into the folder")
    settings: dict[str, Any] = {
        "tokenizer": tokenizer, "method": method, "probes": probes, "pairs": pairs, "seed": seed,
        "hooks": hooks(int(hf.config.num_hidden_layers)),
    }  # fmt: skip
    notes = {name: [_checked(state, base, tokenizer) for state in states] for name, states in found.items()}
    first = Monitor(hf, concepts, **settings)
    there = stored is not None and (stored / MANIFEST).is_file()
    for line in (*first.pair_lines, f"reading the baseline in {stored}" if there else f"measuring the base {base}"):
        on_line(line)
    baseline = first.baseline(stored)
    for line in baseline.faults(first.headline):
        on_line(f"! {line}")
    rules = {name: stop_rule() for name in found}
    watched = [name for name in (baseline.before.answers if baseline.before else {}) if f"behaviour/{name}" in WATCHED]
    for line in {rules[name].plan(len(states), len(watched)) for name, states in found.items()} if watched else ():
        on_line(line)
    against = _Base(hf, first, baseline, {c.name: _gaps(first, c) for c in first.concepts}, settings, rules)
    rows = {name: [*baseline.rows, *rules[name].notice_rows()] for name in found}
    ordered = [(name, step, state) for name, states in found.items() for step, state in _ordered(states)]
    for name, step, state in ordered:
        if state.step is None:
            rows[name].append(Measurement("run", UNKNOWN_STEP, 1.0, step=step))
    for work in (_audited, _measured):  # the audits of all first: they take seconds
        for name, step, state in ordered:
            made = work(against, name, step, state)
            rows[name] += made
            if on_rows is not None:
                on_rows(name, made)
    said = {name: tuple(dict.fromkeys(note for note in notes[name] if note)) for name in found}
    return [SavedRun(name, states, tuple(rows[name]), said[name]) for name, states in found.items()]


UNKNOWN_STEP = "unknown_step"
"""Metric of the "run" row of a saved state whose step nothing records; its number is only its place in the order."""


class _Base(NamedTuple):
    """The base as everything is compared with it.

    gaps: per concept, what the writing matrices read. rules: name of a run → its stop rule.
    """

    hf: PreTrainedModel
    monitor: Monitor
    baseline: Baseline
    gaps: dict[str, Gaps]
    settings: dict[str, Any]
    rules: dict[str, StopRule]


def _ordered(states: Sequence[State]) -> list[tuple[int, State]]:
    """Every state with its step; one whose step nothing records is put one after the last that is known."""
    last = max((state.step for state in states if state.step is not None), default=0)
    return [(last + 1 if state.step is None else state.step, state) for state in states]


def _gaps(first: Monitor, concept: Concept) -> Gaps:
    positives, negatives = sides(concept.train)
    return input_gaps(first.model, positives, negatives, raw=concept.raw)


def run_names(sources: Sequence[str | Path]) -> list[str]:
    """A short name for every source: the last part of its path, as much more as tells them apart."""
    parts = [[part for part in Path(source).parts if part not in ("/", ".", "..")] for source in sources]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{part[-1]} ({i})" for i, part in enumerate(parts, 1)]


def base_directions(baseline: Baseline, hooks: Sequence[str]) -> list[Direction]:
    """The directions before training at the given hooks, those that are no result left out."""
    return [
        Direction(place.concept, hook, torch.from_numpy(place.vectors[place.hooks.index(hook)]).float(), place.method)
        for place in baseline.places
        for hook in hooks
        if hook not in place.faults
    ]


def _audited(base: _Base, name: str, step: int, state: State) -> list[Measurement]:
    rows: list[Measurement] = []
    live = _live(base.hf, state)
    directions = base_directions(base.baseline, base.monitor.common)
    for concept in base.monitor.concepts:
        mine = [d for d in directions if d.concept == concept.name]
        whole = not rows  # what is not about a direction is said once
        found = audit_adapter(base.hf, live, mine, gaps=base.gaps[concept.name], intruders=whole, other_base=True)
        rows += [replace(row, step=step) for row in found if whole or row.subject != "run"]
    return rows


def _measured(base: _Base, name: str, step: int, state: State) -> list[Measurement]:
    monitor = Monitor(_live(base.hf, state), base.monitor.concepts, **base.settings)
    monitor.adopt(base.baseline)
    measured = monitor.measure(step)
    verdict = base.rules[name].update(measured)
    note = "; ".join(verdict.reasons) or None
    return [*measured, Measurement("run", "level", float(verdict.level), step=step, note=note)]


def _live(hf: PreTrainedModel, state: State) -> nn.Module:
    """The weights of a state as a model; an adapter goes on an aliasing copy of the base."""
    device = next(hf.parameters()).device
    if not state.is_adapter:
        other: nn.Module = read_model(resolve(state.source).base, dtype=main_dtype(hf), device=device)
        _same_shape(hf, other, state)
        return other
    try:
        live: nn.Module = put_adapter(hf, state.source)[0]
        return live
    except ModelError as error:
        raise ModelError(f"{state.source} was made for {state.made_for}, not for {hf.name_or_path}: {error}") from error


def _same_shape(hf: PreTrainedModel, other: nn.Module, state: State) -> None:
    mine, theirs = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (hf, other))
    if mine != theirs:
        odd = next(n for n in [*mine, *theirs] if mine.get(n) != theirs.get(n))
        raise ModelError(
            f"{state.source} ({type(other).__name__}) is no fine-tune of {hf.name_or_path} ({type(hf).__name__}): {odd}"
            f" has shape {theirs.get(odd)}, the base's has {mine.get(odd)}"
        )


def _checked(state: State, base: str | Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Refuse what provably belongs to another base or tokenizer; what cannot be checked is a note."""
    _check_tokenizer(state, base, tokenizer)
    if not state.is_adapter:
        return None
    here, there = resolve(base).base, state.made_for
    if there is None or there == here:
        return None
    mine, theirs = _weights_hash(here), _recorded_hash(state) or _weights_hash(there)
    if mine is None or theirs is None:
        return f"{state.source} names {there} as its base; whether {base} is the same cannot be checked here"
    if mine != theirs:
        raise ModelError(
            f"the adapter {state.source} was made for {there}, and {base} is another model (its weights differ): give"
            f" {there} as the base"
        )
    return None


def _recorded_hash(state: State) -> str | None:
    """The hash of the base's weights that a run of `safety-lens finetune` has written down."""
    for folder in (Path(state.source), Path(state.source).parent.parent):
        if (folder / MANIFEST).is_file():
            said = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("base")
            return said.get("sha256") if isinstance(said, dict) else None
    return None


def _weights_hash(name: str) -> str | None:
    weights = weights_file(name)
    return sha256_of(weights) if weights else None


def _check_tokenizer(state: State, base: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    if not Path(state.source).is_dir():
        return
    own = read_tokenizer(state.source)
    if own is None:
        return
    mine, theirs = tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(own)
    if mine["vocab_sha256"] != theirs["vocab_sha256"]:
        raise ModelError(
            f"{state.source} comes with another tokenizer ({theirs['vocab_size']} tokens) than {base}"
            f" ({mine['vocab_size']} tokens): they do not belong together"
        )
