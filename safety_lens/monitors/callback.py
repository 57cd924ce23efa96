"""The monitor as a callback of the Hugging Face Trainer: add it, train, read the drift log.

In a distributed run rank 0 measures and writes, and tells the others what came of it, so that all of them stop, save or
fail together. The run is never disturbed: see `monitor` and `isolation`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safety_lens.data import Concept
from safety_lens.errors import DataError, OtherProcessError, SafetyLensError
from safety_lens.log import Measurement
from safety_lens.monitors.actions import Action, Alarm, actions_named
from safety_lens.monitors.alarm import WATCHED, Level, StopRule, Verdict
from safety_lens.monitors.asking import Probes
from safety_lens.monitors.baseline import Baseline
from safety_lens.monitors.drift_log import DriftLog, write_csv
from safety_lens.monitors.inputs import named_concepts
from safety_lens.monitors.isolation import undisturbed
from safety_lens.monitors.monitor import Monitor
from safety_lens.monitors.processes import from_first, several_processes
from safety_lens.monitors.readings import Pairs
from safety_lens.monitors.reporters import Reporters, figures
from safety_lens.monitors.schedule import BUDGET, Due, Schedule, Tier
from safety_lens.probes.estimators import estimator
from safety_lens.probes.groups import NeuronGroup

LOG = logging.getLogger("safety_lens.monitor")
ON_ERROR = ("raise", "warn")


@dataclass(frozen=True)
class _Outcome:
    """What rank 0 tells the others: the verdict on a measurement, or the message of its error."""

    verdict: Verdict | None = None
    error: str | None = None


class MonitorCallback(TrainerCallback):
    """Measures drift before training, while it goes on, and at the end.

    Args:
        concepts: `Concept`s, or names and paths that `load_concept` takes.
        every: optimizer steps between full measurements, at least; fewer after a notice (see `StopRule.faster`).
        budget: share of the training time that measuring may take, the measurement before training left out. Log-odds
            and KL of the probes are measured as often as that allows, directions and answers where it allows them; see
            `Schedule`. None: full measurements every `every` steps, whatever they cost.
        log: the drift log (JSON lines). A bare file name lies in the Trainer's output_dir.
        baseline: folder of the stored baseline; default "<log>-baseline" beside the log.
        on_error: "raise" ends the training with the error; "warn" notes it in the log and goes on. Both leave the
            model and its random streams as they were. Mistakes in these arguments are raised in any case.
        stop_rule: when to raise an alarm. on_alarm: what it does, once, when it begins: "log", "checkpoint", "stop",
            "reduce_lr", or functions of an `Alarm`.
        audit: also audit the adapters' weights at the last step (M12, M15; see `audit_adapter`, also for its memory);
            `safety-lens monitor` does it from the disk.
        hooks, method, probes, pairs, seed, batch_size, groups, frozen: see `Monitor`. tokenizer: default the Trainer's.

    Raises:
        DataError: a wrong argument, or a concept with too few pairs.
    """

    def __init__(
        self,
        concepts: Sequence[Concept | str],
        *,
        every: int = 50,
        budget: float | None = BUDGET,
        log: str | Path = "drift.jsonl",
        baseline: str | Path | None = None,
        on_error: str = "raise",
        stop_rule: StopRule | None = None,
        on_alarm: Sequence[str | Action] | str | Action = ("log",),
        audit: bool = False,
        hooks: Sequence[str] | None = None,
        method: str = "dim",
        probes: Probes | None = Probes(),  # noqa: B008 - frozen
        pairs: Pairs = Pairs(),  # noqa: B008 - frozen
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        batch_size: int | str = "auto",
        groups: Sequence[NeuronGroup] = (),
        frozen: Sequence[NeuronGroup] = (),
    ) -> None:
        if every < 1:
            raise DataError(f"the monitor measures every {every} steps: give 1 or more")
        if on_error not in ON_ERROR:
            raise DataError(f"on_error {on_error!r} is not known; choose {' or '.join(ON_ERROR)}")
        estimator(method)
        self.concepts = tuple(concepts)
        named_concepts(concepts, tokenizer)  # mistakes are raised before training
        self.every, self.warns, self.rule = (
            every,
            on_error == "warn",
            stop_rule if stop_rule is not None else StopRule(),
        )
        self.schedule = Schedule(every, self.rule.faster, budget)
        self.actions = actions_named(on_alarm)
        self.tokenizer, self._audits = tokenizer, audit
        self._log_name, self._baseline_name = Path(log), baseline
        self._settings: dict[str, Any] = {
            "hooks": hooks, "method": method, "probes": probes, "pairs": pairs, "seed": seed, "batch_size": batch_size,
            "groups": tuple(groups), "frozen": tuple(frozen),
        }  # fmt: skip
        self._monitor: Monitor | None = None
        self._reporters = Reporters()
        self.log: DriftLog | None = None
        self._measured: int | None = None
        self.clock: Callable[[], float] = time.perf_counter

    # --- Trainer events ---------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Measure the baseline, or find it again; make the log fit to continue."""
        self._measured, self._alarmed, self.schedule.steps = state.global_step, False, state.max_steps
        self._do(lambda: self._begin(args, state, control, parts), state, control, parts)
        self._resumed_at = self.clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Measure where a measurement is due, and behind the last step."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        self._measure(args, state, control, parts, last)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Measure the last step of a run that an evaluation stopped, before the best checkpoint is put in its place."""
        if control.should_training_stop:
            self._measure(args, state, control, parts, last=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Measure the end unless that is done; release the hooked model."""
        self._measure(args, state, control, parts, last=True)
        self._reporters.close(args, state, control)
        if state.is_world_process_zero:
            LOG.info(self.schedule.spending())
        if state.is_world_process_zero and self.log is not None:
            with undisturbed():
                write_csv(self.log.path)
        self._monitor = None

    # --- work -------------------------------------------------------------------------------------------------------

    def _measure(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, parts: Any, last: bool
    ) -> None:
        if self._measured == state.global_step:
            return
        due = self._due(state, last)
        if due.tier is Tier.NONE:
            return
        self._measured = state.global_step
        self._do(lambda: self._measurement(args, state, control, parts, due, last), state, control, parts)
        self._resumed_at = self.clock()

    def _due(self, state: TrainerState, last: bool) -> Due:
        """What is measured at this step; the first process decides where it depends on the time."""
        noticed = self.rule.verdict.level is not Level.OK
        now = self.clock()
        self.schedule.trained += now - self._resumed_at
        self._resumed_at = now
        if self.schedule.budget is None:
            return self.schedule.due(state.global_step, last=last, noticed=noticed)
        if state.is_world_process_zero and (line := self.schedule.shortage(state.global_step)):
            LOG.warning(line)
        return from_first(lambda: self.schedule.due(state.global_step, last=last, noticed=noticed))

    def _do(
        self, work: Callable[[], Verdict], state: TrainerState, control: TrainerControl, parts: dict[str, Any]
    ) -> None:
        """Run work on rank 0, share what came of it, and act on it everywhere."""
        with undisturbed():  # all of it, reporters included
            outcome = self._shared(self._attempt(work, state) if state.is_world_process_zero else _Outcome())
        if outcome.error is not None and not self.warns:
            raise OtherProcessError(f"the monitor of another process failed: {outcome.error}")
        if outcome.verdict is None:
            return
        begins = outcome.verdict.level is Level.ALARM and not self._alarmed
        self._alarmed = outcome.verdict.level is Level.ALARM
        self.rule.verdict = outcome.verdict  # the interval must be the same everywhere
        if begins:
            alarm = Alarm(
                state.global_step, outcome.verdict, control, parts.get("optimizer"), parts.get("lr_scheduler")
            )
            for action in self.actions:
                action(alarm)

    def _attempt(self, work: Callable[[], Verdict], state: TrainerState) -> _Outcome:
        try:
            return _Outcome(work())
        # The one boundary to somebody else's run, as on_error documents it: whatever a measurement meets (a model's own
        # code, memory, the disk), "warn" notes it in the log and the run goes on, and "raise" raises it as it is.
        except Exception as error:
            if not self.warns:
                if several_processes():
                    self._shared(_Outcome(error=f"{type(error).__name__}: {error}"))
                raise
            LOG.warning("the monitor failed at step %d and training goes on: %s", state.global_step, error)
            self._note_error(state.global_step, error)
            return _Outcome(error=str(error))

    def _note_error(self, step: int, error: Exception) -> None:
        note = f"{type(error).__name__}: {error}"
        if self.log is None:
            return
        try:
            self.log.append([Measurement("run", "error", 1.0, step=step, note=note)])
        except SafetyLensError as second:
            LOG.warning("and it could not be noted in the log: %s", second)

    def _shared(self, outcome: _Outcome) -> _Outcome:
        if not several_processes():
            return outcome
        box = [outcome]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, parts: dict[str, Any]
    ) -> Verdict:
        step, path = state.global_step, self._path(args)
        log = DriftLog(path)
        repaired = log.open(step)
        if repaired.torn or repaired.again:
            LOG.info("%s: %d rows behind step %d are measured again", path, repaired.again, step)
        self.log = log
        tokenizer = self.tokenizer if self.tokenizer is not None else parts.get("processing_class")
        self._monitor = Monitor(parts["model"], self.concepts, tokenizer=tokenizer, **self._settings)
        self._monitor.clock = self.clock
        folder = Path(self._baseline_name or path.with_name(f"{path.stem}-baseline"))
        for line in self._monitor.pair_lines:
            LOG.info(line)
        LOG.info("monitor: measuring the state before training, or reading it from %s", folder)
        baseline = self._monitor.baseline(folder, resumed=step > 0)
        self._report_faults(baseline)
        self._settle(baseline)
        self.rule.replay(log.rows)
        self.schedule.replay(log.rows, step)
        self._alarmed = self.rule.verdict.level is Level.ALARM
        if not log.rows:
            rows = [*baseline.rows, *self.rule.notice_rows()]
            log.append(rows)
            self._report(args, state, control, rows, parts)
        return self.rule.verdict

    def _settle(self, baseline: Baseline) -> None:
        """Take over what measurements cost, and report what will be measured."""
        known = {row.metric: row for row in baseline.rows if row.subject == "run"}
        if "full_seconds" in known:
            self.schedule.full = known["full_seconds"].value
        if light := known.get("light_seconds"):
            self.schedule.prompts = light.n or 0
            self.schedule.light = light.value / max(1, self.schedule.prompts)
        LOG.info(self.schedule.plan())
        watched = [
            name for name in (baseline.before.answers if baseline.before else {}) if f"behaviour/{name}" in WATCHED
        ]
        if watched:
            LOG.info(self.rule.plan(self.schedule.most, len(watched)))
        if self.rule.controls is not None:
            LOG.info(self.rule.controls.line())

    def _path(self, args: TrainingArguments) -> Path:
        bare = self._log_name.parent == Path()
        return Path(args.output_dir) / self._log_name if bare else self._log_name

    def _report_faults(self, baseline: Baseline) -> None:
        """Log, before the first step, what this run cannot measure."""
        for line in baseline.faults(self._monitor.headline if self._monitor else ""):
            LOG.warning(line)
        seconds = next((row.value for row in baseline.rows if (row.subject, row.metric) == ("run", "seconds")), None)
        if seconds is not None:
            LOG.info("monitor: the measurement before training took %.0f s", seconds)

    def _measurement(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        parts: dict[str, Any],
        due: Due = Due(Tier.FULL),  # noqa: B008 - immutable
        last: bool = False,
    ) -> Verdict:
        if self._monitor is None or self.log is None:
            raise DataError("the monitor could not be set up at the start of training, so nothing is measured")
        light = due.prompts if due.tier is Tier.LIGHT else None
        rows = self._monitor.measure(state.global_step, light) if light else self._monitor.measure(state.global_step)
        if seconds := [row.value for row in rows if (row.subject, row.metric) == ("run", "seconds")]:
            self.schedule.measured(due.tier, state.global_step, seconds[0], due.prompts)
        rows.append(Measurement("run", "training_seconds", self.schedule.trained, step=state.global_step))
        before, verdict = self.rule.verdict, self.rule.update(rows)
        if verdict.level is Level.NOTICE and before.level is not Level.NOTICE:
            LOG.warning("notice at step %d: %s", state.global_step, "; ".join(verdict.reasons))
        if last and self._audits and not any(row.metric == "finite" for row in rows):
            rows += self._monitor.audit(state.global_step)
        note = "; ".join(verdict.reasons) or None
        rows.append(Measurement("run", "level", float(verdict.level), step=state.global_step, note=note))
        self.log.append(rows)
        self._report(args, state, control, rows, parts)
        return verdict

    def _report(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        rows: Sequence[Measurement],
        parts: dict[str, Any],
    ) -> None:
        headline = self._monitor.headline if self._monitor else ""
        self._reporters.send(args, state, control, figures(rows, headline), parts.get("model"))
