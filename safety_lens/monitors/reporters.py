"""Drift figures for whatever `report_to` names: TensorBoard, Weights & Biases and the others of transformers.

A callback cannot reach the Trainer that calls it, so the integrations are made a second time here: they write into the
same run (W&B) or the same folder (TensorBoard), as if the Trainer had logged the figures itself.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from safety_lens.log import Measurement

PREFIX = "drift"
SHOWN = frozenset(
    (
        *("cosine_to_baseline", "cosine_cv", "auroc_fixed", "auroc_current", "direction_norm", "retained_signal"),
        *("d_prime_fixed", "d_prime_current", "balanced_accuracy", "subspace_angle", "causal_use", "logit_lens"),
    )
)


def figures(rows: Sequence[Measurement], headline: str) -> dict[str, float]:
    """The figures worth a curve: geometry at the headline hook, behaviour, neuron groups, the level.

    Unknown numbers are left out.
    """
    out = {}
    for row in rows:
        geometric = row.hook == headline and (row.metric in SHOWN or row.metric.startswith("cross_"))
        shared = row.subject == "run" and row.metric in ("level", "seconds", "finite")
        behaviour = row.subject.startswith("behaviour/") and not row.metric.startswith("token_kl_at_")
        neurons = row.subject.startswith("neurons/") and row.split == "total" and not row.metric.startswith("change_q")
        if (geometric or shared or behaviour or neurons) and row.value == row.value:
            out[f"{PREFIX}/{row.subject}/{row.metric}"] = row.value
    return out


class Reporters:
    """The integrations that `report_to` names, made when the first figures come."""

    def __init__(self) -> None:
        self._made: list[TrainerCallback] | None = None

    def send(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        figures: dict[str, float],
        model: Any,
    ) -> None:
        """Log figures at the current step."""
        if self._made is None:
            self._made = [kind() for kind in get_reporting_integration_callbacks(args.report_to)]
            for reporter in self._made:
                if isinstance(reporter, TensorBoardCallback) and reporter.logging_dir is None:
                    reporter.logging_dir = _events_folder(args)
                reporter.on_train_begin(args, state, control, model=model)
        for reporter in self._made:
            reporter.on_log(args, state, control, model=model, logs=dict(figures))

    def close(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Flush and close what can be closed; a W&B run belongs to the Trainer and is left open."""
        for reporter in self._made or []:
            writer = getattr(reporter, "tb_writer", None)
            if writer is not None:
                writer.close()
        self._made = None


def _events_folder(args: TrainingArguments) -> str | None:
    """Where the Trainer's own writer began to write; None where it did not.

    Left alone, a second writer takes a folder named after a later second, and TensorBoard shows two runs. Files of
    events carry the number of the process that writes them.
    """
    begun = Path(args.output_dir, "runs").glob(f"*/events.out.tfevents.*.{os.getpid()}.*")
    newest = max(begun, key=lambda file: file.stat().st_mtime_ns, default=None)
    return None if newest is None else str(newest.parent)
