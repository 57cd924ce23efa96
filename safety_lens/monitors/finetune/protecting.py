"""What protects a run: risky rows left out, and a penalty on moving away from the model's own safe answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase, TrainerCallback

from safety_lens.data.labelled import Labelled
from safety_lens.errors import DataError
from safety_lens.forced import Continuation
from safety_lens.interventions.penalties import AlignGuard, FisherPenalty, KlPenalty, Moved, Penalty, PenaltyCallback
from safety_lens.models import load_model
from safety_lens.monitors.finetune.config import Protect, RunConfig
from safety_lens.monitors.processes import from_first
from safety_lens.probes.examples import ExampleSet, read_examples
from safety_lens.probes.fisher import sampled_nll
from safety_lens.probes.matrices import Matrix, matrices_of
from safety_lens.probes.row_risk import RowRisk, responses_of, row_risk, write_row_risk
from safety_lens.probes.stored import StoredGradients, store_gradients

ROW_RISK = "row_risk.jsonl"
"""In the run's folder: every row's line, risk and push, riskiest first."""


@dataclass(frozen=True)
class Protection:
    """rows: what is trained on. callbacks: for the Trainer. notes: what a reader must know. entry: of the manifest."""

    rows: Sequence[Labelled]
    callbacks: tuple[TrainerCallback, ...] = ()
    notes: tuple[str, ...] = ()
    entry: dict[str, Any] = field(default_factory=dict)


def protect(
    config: RunConfig, live: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Labelled]
) -> Protection:
    """What a run's protection asks for, made from the model as it is before training.

    live: with adapters, which have no effect yet. The model, its gradients and the random state stay as they are.

    Raises:
        DataError: no safety example left, answers that the model does not give, or no row left.
        ModelError: what is trained cannot be followed by a penalty.
    """
    chosen = config.protect
    if not chosen.is_on:
        return Protection(rows)
    model = load_model(live, tokenizer=tokenizer, check=False)
    data = config.data
    answered = read_examples(
        chosen.safety, model, kind="safety", limit=chosen.rows, seed=config.seed, max_length=data.max_length,
        raw=data.raw, template_kwargs=data.template_kwargs,
    )  # fmt: skip
    safety = from_first(lambda: answered)  # GPUs round differently: all processes go on with one and the same
    followed = set(Moved(live).matrices)
    trained = [matrix for matrix in matrices_of(model) if matrix.name in followed]
    notes, entry = list(safety.notes), {"safety": chosen.safety, "rows": len(safety), "sha256": safety.sha256}
    if chosen.drop_risky:
        rows, risk, note = _dropped(config, model, rows, safety, trained)
        notes.append(note)
        entry["risky_lines"] = risk
    callbacks: tuple[TrainerCallback, ...] = ()
    if chosen.penalty is not None:
        given = Given(live, model, safety.continuations, trained, chosen, config.seed)
        callbacks = (PenaltyCallback(PENALTIES[chosen.penalty](given), live),)
    return Protection(rows, callbacks, tuple(notes), {"protection": entry})


def _dropped(
    config: RunConfig,
    model: HookedTransformer,
    rows: Sequence[Labelled],
    safety: ExampleSet,
    trained: Sequence[Matrix],
) -> tuple[list[Labelled], list[int], str]:
    """Rows without the riskiest, the lines of those, and a note."""
    parts = [responses_of(row) for row in rows]
    judged = [number for number, found in enumerate(parts) if found]
    if not judged:
        raise DataError("no training row has a prompt and a response: their risk cannot be told, so none is dropped")
    belongs = [place for place, number in enumerate(judged) for _ in parts[number]]
    responses = [response for number in judged for response in parts[number]]
    risk = row_risk(model, responses, safety.continuations, matrices=trained, belongs=belongs)
    found = from_first(lambda: _written(config, risk, [rows[number].line for number in judged]))
    out = {judged[place] for place in found.riskiest(config.protect.drop_risky).tolist()}
    kept = [row for number, row in enumerate(rows) if number not in out]
    if not kept:
        raise DataError(f"drop_risky {config.protect.drop_risky} leaves no row: choose a smaller share")
    lines = sorted(rows[number].line for number in out)
    return kept, lines, _told(found, lines, len(rows), len(rows) - len(judged))


def _written(config: RunConfig, found: RowRisk, lines: Sequence[int]) -> RowRisk:
    config.out.mkdir(parents=True, exist_ok=True)
    write_row_risk(config.out / ROW_RISK, found, lines)
    return found


def _told(found: RowRisk, lines: Sequence[int], n: int, unjudged: int) -> str:
    shown = ", ".join(map(str, lines[:8])) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")
    without = f"; {unjudged} rows without a prompt could not be judged and stay" if unjudged else ""
    return f"the {len(lines)} riskiest of {n} rows are left out (row {shown}); risks are in {ROW_RISK}{without}"


# --- penalties by name ------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What a penalty is made of: the live model and the hooked one, safe answers, and the matrices that are trained."""

    live: nn.Module
    model: HookedTransformer
    safety: list[Continuation]
    trained: Sequence[Matrix]
    settings: Protect
    seed: int

    def gradients(self) -> StoredGradients:
        return store_gradients(self.model, self.safety, self.trained, loss=sampled_nll(self.seed))


def _kl(given: Given) -> Penalty:
    weight = 1.0 if given.settings.weight is None else given.settings.weight
    return KlPenalty(given.live, given.safety, weight=weight, batch_size=given.settings.batch, seed=given.seed)


def _fisher(given: Given) -> Penalty:
    weight = 20_000.0 if given.settings.weight is None else given.settings.weight
    return FisherPenalty(given.live, given.gradients(), energy=weight, anchor=given.settings.anchor)


def _alignguard(given: Given) -> Penalty:
    """alignment-risk's weights, times `weight`."""
    by = 1.0 if given.settings.weight is None else given.settings.weight
    return AlignGuard(given.live, given.gradients(), lambda_a=0.25 * by, lambda_t=0.5 * by, lambda_nc=0.1 * by)


PENALTIES = {"kl": _kl, "fisher": _fisher, "alignguard": _alignguard}
"""The penalties that a configuration can name."""
