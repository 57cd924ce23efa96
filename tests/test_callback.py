"""The monitor in the Trainer: training does not feel it, every run ends measured, kills and ranks leave one log."""

import logging
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import integration_utils
from watched import PAIRS, PROBES, adapted, left_behind, same, tiny_concepts, trainer

from safety_lens.errors import ArtifactError, DataError, ModelError
from safety_lens.log import Measurement
from safety_lens.monitors import MonitorCallback, StopRule, csv_view, read_log
from safety_lens.monitors.actions import Alarm
from safety_lens.monitors.drift_log import DriftLog
from safety_lens.monitors.monitor import Monitor
from safety_lens.monitors.schedule import Tier


def watching(**more: Any) -> MonitorCallback:
    return MonitorCallback(tiny_concepts(), **{"every": 2, "budget": None, "probes": PROBES, "pairs": PAIRS, **more})


class Failing(MonitorCallback):
    """A real monitor whose second measurement fails, in the middle of its work and with the streams moved."""

    def _measurement(self, *parts: Any) -> Any:
        verdict = super()._measurement(*parts)
        torch.rand(3)
        if parts[1].global_step == 4:
            raise RuntimeError("out of luck")
        return verdict


def run(folder: Path, *callbacks: TrainerCallback, model: Any = None, **more: Any) -> dict[str, Tensor]:
    made = trainer(adapted() if model is None else model, folder, callbacks, **more)
    made.train()
    return left_behind(made)


# --- non-perturbation -----------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_bit_identical_with_and_without_the_monitor(setting: str, tmp_path: Path) -> None:
    more = SETTINGS[setting]
    alone = run(tmp_path / "alone", **more)
    callback = watching()
    watched = run(tmp_path / "watched", callback, **more)
    assert same(alone, watched) == []
    assert callback.log is not None
    assert callback.log.steps() == {0, 2, 4, 6, 8}


def test_the_comparison_would_see_one_random_number_drawn(tmp_path: Path) -> None:
    class Draws(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            if state.global_step == 3:
                torch.rand(1)

    differing = same(run(tmp_path / "a", max_steps=5), run(tmp_path / "b", Draws(), max_steps=5))
    assert any(name.startswith("parameter/") for name in differing)


def test_a_monitor_that_fails_under_warn_leaves_training_bit_identical_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = run(tmp_path / "alone")

    class FailsInside(Failing):
        def _measurement(self, *parts: Any) -> Any:
            state = torch.get_rng_state()
            try:
                return super()._measurement(*parts)
            finally:
                torch.set_rng_state(state)

    callback = FailsInside(tiny_concepts(), every=2, budget=None, probes=PROBES, pairs=PAIRS, on_error="warn")
    with caplog.at_level(logging.WARNING):
        watched = run(tmp_path / "watched", callback)
    assert same(alone, watched) == []
    assert "failed at step 4 and training goes on: out of luck" in caplog.text
    errors = [row for row in read_log(tmp_path / "watched" / "drift.jsonl") if row.metric == "error"]
    assert [(row.step, row.note) for row in errors] == [(4, "RuntimeError: out of luck")]
    assert callback.log is not None
    assert 8 in callback.log.steps()


def test_an_error_in_the_middle_of_a_measurement_leaves_every_stream_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safety_lens.monitors import geometry

    alone = run(tmp_path / "alone")
    real = geometry.entanglement

    def fails(nows: Any, common: Any) -> Any:
        if nows[0].step == 4:
            torch.rand(5)
            raise ValueError("singular")
        return real(nows, common)

    monkeypatch.setattr(geometry, "entanglement", fails)
    assert same(alone, run(tmp_path / "watched", watching(on_error="warn"))) == []


def test_under_raise_the_error_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        run(tmp_path, Failing(tiny_concepts(), every=2, budget=None, probes=PROBES, pairs=PAIRS))


def test_full_fine_tuning_and_autocast_are_watched_without_a_trace(tmp_path: Path) -> None:
    def full() -> Any:
        return zoo.make("llama", attention_dropout=0.1)

    more = {"learning_rate": 1e-3, "bf16": True, "max_steps": 4}
    alone = run(tmp_path / "alone", model=full(), **more)
    callback = watching()
    assert same(alone, run(tmp_path / "watched", callback, model=full(), **more)) == []
    cosines = [r.value for r in read_log(tmp_path / "watched" / "drift.jsonl") if r.metric == "cosine_to_baseline"]
    assert max(cosines) == 1.0
    assert min(cosines) < 0.999  # full fine-tuning was seen


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_organism_trains_bit_identically_under_a_monitor_with_all_probes(setting: str, tmp_path: Path) -> None:
    from organism_runs import organism_trainer

    def trained(name: str, *callbacks: TrainerCallback) -> dict[str, Tensor]:
        made = organism_trainer(
            "compliance", tmp_path / name, callbacks, dropout=0.1, max_steps=20, learning_rate=1e-3, **SETTINGS[setting]
        )
        made.train()
        return left_behind(made)

    callback = MonitorCallback(["refusal", "sycophancy", "deception"], every=5, budget=None)
    assert same(trained("alone"), trained("watched", callback)) == []
    assert callback.log is not None
    assert callback.log.steps() >= {0, 5, 10, 15, 20}


# --- a measurement at the end of every run --------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    return sorted({row.step for row in read_log(folder / "drift.jsonl") if row.step is not None})


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        pytest.param({"max_steps": 7}, [0, 3, 6, 7], marks=pytest.mark.slow),
        ({"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 16}, [0, 3, 6, 8]),
        ({"max_steps": 5, "gradient_accumulation_steps": 2}, [0, 3, 5]),
    ],
)
def test_the_last_step_is_measured_however_the_run_is_bounded(
    more: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    run(tmp_path, watching(every=3, probes=None, stop_rule=StopRule(delta=1e9)), **more)
    assert steps(tmp_path) == expected


def test_early_stopping_leaves_a_measurement_of_its_last_step_not_of_the_best_checkpoint(tmp_path: Path) -> None:
    more = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 20}
    more |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.3}
    callback = watching(every=7, probes=None, stop_rule=StopRule(delta=1e9))
    made = trainer(adapted(), tmp_path, [callback, EarlyStoppingCallback(1)], **more)
    made.train()
    stopped = made.state.global_step
    assert stopped < 20
    assert steps(tmp_path)[-1] == stopped
    last = {
        r.hook: r.value
        for r in read_log(tmp_path / "drift.jsonl")
        if r.step == stopped and r.metric == "direction_norm"
    }
    monitor = Monitor(made.model, tiny_concepts(), tokenizer=made.processing_class, probes=None, pairs=PAIRS)
    monitor.baseline(tmp_path / "drift-baseline", resumed=True)
    best = {r.hook: r.value for r in monitor.measure(stopped) if r.metric == "direction_norm"}
    assert last != best


# --- kill and resume ------------------------------------------------------------------------------------------------


def _train_until_killed(folder: str, kill_at: int) -> None:
    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            if state.global_step == kill_at:
                with (Path(folder) / "drift.jsonl").open("a") as file:  # as if the kill had cut a write short
                    file.write('{"subject": "joy/dim", "metr')
                    file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10}
    trainer(adapted(), Path(folder), [watching(), Kill()], **saving).train()


def forked(target: Any, *arguments: Any) -> int:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def numbers(rows: list[Measurement]) -> dict[tuple[Any, ...], float]:
    """Rows of a log by what they measure; times are left out. Fails on a duplicate."""
    out: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row.metric.endswith("seconds"):
            continue
        key = (row.step, row.subject, row.metric, row.hook, row.split)
        assert key not in out, f"duplicate {key}"
        out[key] = row.value
    return out


@pytest.mark.parametrize("kill_at", [7, *(pytest.param(k, marks=pytest.mark.slow) for k in (5, 8, 9))])
def test_killed_and_resumed_the_log_is_that_of_one_run(kill_at: int, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, watching(), **saving)
    assert forked(_train_until_killed, str(cut), kill_at) == -signal.SIGKILL
    assert not (cut / "drift.jsonl").read_text().endswith("\n")
    before = (cut / "drift-baseline" / "manifest.json").read_bytes()
    made = trainer(adapted(seed=5), cut, [watching()], **saving)
    made.train(resume_from_checkpoint=True)
    assert (cut / "drift-baseline" / "manifest.json").read_bytes() == before
    mine, theirs = (numbers(read_log(folder / "drift.jsonl")) for folder in (cut, whole))
    assert mine.keys() == theirs.keys()
    assert {k for k in mine if mine[k] != theirs[k] and mine[k] == mine[k]} == set()


def test_a_run_that_starts_over_moves_the_old_log_aside(tmp_path: Path) -> None:
    run(tmp_path, watching(probes=None), max_steps=2)
    old = (tmp_path / "drift.jsonl").read_bytes()
    run(tmp_path, watching(probes=None), max_steps=4)
    assert (tmp_path / "drift.jsonl.1").read_bytes() == old
    assert steps(tmp_path)[-1] == 4


def test_resuming_without_a_baseline_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run(tmp_path, **saving)
    with pytest.raises(ArtifactError, match="no baseline is stored"):
        trainer(adapted(), tmp_path, [watching()], **{**saving, "max_steps": 4}).train(resume_from_checkpoint=True)


# --- two processes --------------------------------------------------------------------------------------------------


def still() -> Any:
    """Without dropout: ranks draw other masks than one process does."""
    return adapted(model=zoo.make("llama"), lora_dropout=0.0)


def _rank(rank: int, port: int, folder: str, stop: bool) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    kind = Falls if stop else MonitorCallback
    callback = kind(tiny_concepts(), every=2, budget=None, probes=PROBES, pairs=PAIRS, on_alarm="stop")
    run(Path(folder), callback, model=still(), per_device_train_batch_size=2, ddp_backend="gloo")
    torch.distributed.destroy_process_group()


def in_two_processes(folder: Path, stop: bool = False) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, port, str(folder), stop)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_two_gloo_processes_write_the_log_of_one(tmp_path: Path) -> None:
    in_two_processes(tmp_path / "two")
    run(tmp_path / "one", watching(), model=still())
    two, one = (numbers(read_log(tmp_path / name / "drift.jsonl")) for name in ("two", "one"))
    assert two.keys() == one.keys()
    known = [k for k in one if one[k] == one[k] and "angle" not in k[2]]
    assert (
        max(abs(two[k] - one[k]) / max(1.0, abs(one[k])) for k in known) < 2e-3
    )  # gradients are summed in another order
    assert sorted(p.name for p in (tmp_path / "two").iterdir() if p.name.startswith("drift")) == [
        "drift-baseline",
        "drift.csv",
        "drift.jsonl",
    ]


# --- alarms, reporters, audits, bad inputs --------------------------------------------------------------------------


@pytest.mark.slow
def test_an_alarm_on_rank_0_stops_both_processes(tmp_path: Path) -> None:
    in_two_processes(tmp_path, stop=True)
    assert steps(tmp_path)[-1] == 4


class Falls(MonitorCallback):
    """A real monitor whose rows get one that alarms at step 4: a tiny random model has no refusals to lose."""

    def row(self, step: int) -> Measurement:
        low = -2.0 if step >= 4 else 0.0
        return Measurement("behaviour/harmful", "refusal_log_odds_change", low, low, low, step=step)

    def _begin(self, *parts: Any) -> Any:
        verdict = super()._begin(*parts)
        assert self._monitor is not None
        measure = self._monitor.measure
        vars(self._monitor)["measure"] = lambda step: [*measure(step), self.row(step)]
        return verdict


class Turns(Falls):
    """The same with a direction that has turned from step 4 on."""

    def row(self, step: int) -> Measurement:
        now = 0.5 if step >= 4 else 1.0
        return Measurement("joy/dim", "cosine_cv", now, now, now, hook="blocks.1.hook_resid_post", step=step)


def test_an_alarm_acts_once_saves_a_checkpoint_and_stops_the_run(tmp_path: Path) -> None:
    alarms: list[Alarm] = []
    callback = Falls(
        tiny_concepts(), every=2, budget=None, probes=None, pairs=PAIRS, on_alarm=(alarms.append, "checkpoint")
    )
    run(tmp_path, callback)
    assert [alarm.step for alarm in alarms] == [4]
    assert (tmp_path / "checkpoint-4").is_dir()
    stopping = Falls(tiny_concepts(), every=2, budget=None, probes=None, pairs=PAIRS, on_alarm="stop")
    run(tmp_path / "stopped", stopping)
    assert steps(tmp_path / "stopped") == [0, 2, 4]
    level = [row for row in read_log(tmp_path / "stopped" / "drift.jsonl") if row.metric == "level"][-1]
    assert level.value == 2
    assert "fell by 2.00 nats" in str(level.note)


def test_figures_reach_what_report_to_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, dict[str, float]] = {}

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **parts: Any) -> None:
            seen.setdefault(state.global_step, {}).update(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Reporter)
    run(tmp_path, watching(), report_to=["tensorboard"], max_steps=4)
    assert sorted(seen)[:3] == [0, 2, 4]
    for name in ("joy/dim/cosine_to_baseline", "joy/dim/cross_joy_calm_cosine", "behaviour/harmful/token_kl"):
        assert f"drift/{name}" in seen[2], name
    assert seen[2]["drift/run/level"] in (0.0, 1.0)


def test_the_table_has_one_row_per_step_and_concept_at_one_hook(tmp_path: Path) -> None:
    run(tmp_path, watching(), max_steps=4)
    lines = [line.split(",") for line in csv_view(tmp_path / "drift.jsonl").splitlines()]
    head, rows = lines[0], lines[1:]
    assert [(row[0], row[1]) for row in rows] == [(s, c) for s in "024" for c in ("calm", "joy")]
    assert len({row[3] for row in rows}) == 1
    wanted = {"cosine_to_baseline", "auroc_fixed", "auroc_current", "direction_norm", "cross_joy_calm_cosine"}
    assert wanted <= set(head)
    assert all(len(row) == len(head) for row in rows)
    with pytest.raises(ArtifactError, match="no rows at"):
        csv_view(tmp_path / "drift.jsonl", hook="blocks.9.hook_resid_post")


def test_the_audit_at_the_end_is_asked_for_and_draws_nothing(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", max_steps=4)
    assert same(alone, run(tmp_path / "audited", watching(probes=None, audit=True), max_steps=4)) == []
    rows = [row for row in read_log(tmp_path / "audited" / "drift.jsonl") if row.metric == "alignment_write"]
    assert {row.step for row in rows} == {4}
    assert {row.subject for row in rows} == {"joy/dim", "calm/dim"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "give 1 or more"),
        ({"on_error": "ignore"}, "choose raise or warn"),
        ({"on_alarm": ("shout",)}, "'shout' is not known"),
        ({"method": "dims"}, "'dims' is not known"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        watching(**arguments)


def test_a_log_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = trainer(adapted(), tmp_path / "run", [watching(log=tmp_path / "file" / "drift.jsonl")])
    with pytest.raises(ArtifactError, match="cannot write the drift log"):
        made.train()
    assert made.state.global_step == 0


def test_a_damaged_line_inside_a_log_is_named(tmp_path: Path) -> None:
    row = Measurement("joy/dim", "auroc_fixed", 1.0, step=0).to_json()
    (tmp_path / "drift.jsonl").write_text(f"{row}\n{{oops\n{row}\n")
    with pytest.raises(ArtifactError, match="line 2"):
        DriftLog(tmp_path / "drift.jsonl").open(3)
    with pytest.raises(ArtifactError, match="line 2"):
        read_log(tmp_path / "drift.jsonl")


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_log_cut_at_any_byte_reads_and_continues(cut: int, tmp_path: Path) -> None:
    path, rows = tmp_path / "drift.jsonl", [Measurement("joy/dim", "auroc_fixed", 0.5, step=s) for s in (0, 2, 4)]
    log = DriftLog(path)
    log.open(0)
    log.append(rows)
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_log(path) == rows[:2]
    again = DriftLog(path)
    assert again.open(2).torn
    again.append(rows[2:])
    assert read_log(path) == rows


def test_a_trainer_without_a_tokenizer_is_told_what_to_pass(tmp_path: Path) -> None:
    made = trainer(adapted(), tmp_path, [watching()])
    made.processing_class = made.callback_handler.processing_class = None
    with pytest.raises(ModelError, match="pass tokenizer="):
        made.train()


def test_diverged_weights_raise_the_alarm_and_end_a_run_that_stops_on_alarms(tmp_path: Path) -> None:
    class Diverges(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **parts: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    run(tmp_path, Diverges(), watching(on_alarm="stop"))
    last = [row for row in read_log(tmp_path / "drift.jsonl") if row.metric == "finite"]
    assert (last[0].step, last[0].value) in ((3, 0.0), (4, 0.0))
    assert steps(tmp_path)[-1] <= 4


def test_trl_trains_under_the_monitor(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: its SFTTrainer cannot be tried")
    from datasets import Dataset

    data = Dataset.from_list([{"text": " ".join(f"w{i + j}" for j in range(8))} for i in range(4, 20)])
    args = trl.SFTConfig(str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no", bf16=False)
    from synthetic import chat_tokenizer

    made = trl.SFTTrainer(
        adapted(), args=args, train_dataset=data, processing_class=chat_tokenizer(), callbacks=[watching()]
    )
    made.train()
    assert steps(tmp_path) == [0, 2, 4]


# --- what is reported before and while training -----------------------------------------------------------------------


def test_pairs_faults_and_the_time_before_training_are_reported_before_step_1(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stops(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            raise KeyboardInterrupt

    with caplog.at_level(logging.INFO, "safety_lens.monitor"), pytest.raises(KeyboardInterrupt):
        run(tmp_path, watching(), Stops())
    assert "pairs: joy from drawn: 8 train, 0 val, 6 test; 6 train and 6 test are read" in caplog.text
    assert "refusal log-odds will not be measured, and no light measurement can raise its alarm: 0 of" in caplog.text
    assert "the measurement before training took" in caplog.text


def test_a_notice_is_reported_once_when_it_begins_and_the_table_lies_next_to_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "safety_lens.monitor"):
        run(tmp_path / "turns", Turns(tiny_concepts(), every=2, budget=None, probes=None, pairs=PAIRS))
    log = read_log(tmp_path / "turns" / "drift.jsonl")
    noticed = [row.step for row in log if row.metric == "level" and row.value == 1]
    assert len(noticed) > 1
    assert [r.getMessage() for r in caplog.records if "notice at step" in r.getMessage()] == [
        next(m for m in (f"notice at step {r.step}: {r.note}" for r in log if r.metric == "level" and r.value == 1))
    ]
    assert (tmp_path / "turns" / "drift.csv").read_text() == csv_view(tmp_path / "turns" / "drift.jsonl")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "safety_lens.monitor"):
        run(tmp_path / "still", watching(probes=None, stop_rule=StopRule(delta=1e9)))
    assert "notice at step" not in caplog.text


# --- the budget ------------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """A clock on which a training step takes one second."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.now += 1.0


class Budgeted(MonitorCallback):
    """A real monitor on that clock: a full measurement takes `full` seconds, a light one 0.05 s a prompt."""

    def __init__(self, clock: Clock, full: float, **more: Any) -> None:
        super().__init__(tiny_concepts(), **{"every": 10, "probes": PROBES, "pairs": PAIRS, **more})
        self.clock, self.full = clock, full

    def _settle(self, baseline: Any) -> None:
        super()._settle(baseline)
        self.schedule.full, self.schedule.light = self.full, 0.05

    def _begin(self, *parts: Any) -> Any:
        verdict = super()._begin(*parts)
        assert self._monitor is not None
        clocked = self._monitor._clocked

        def slow(tier: Tier, started: float, step: int, n: int | None = None) -> list[Measurement]:
            self.clock.now += self.full if tier is Tier.FULL else 0.05 * (n or 0)  # type: ignore[attr-defined]
            return [*clocked(tier, started, step, n), *self.extra(step)]

        vars(self._monitor)["_clocked"] = slow
        return verdict

    def extra(self, step: int) -> list[Measurement]:
        return []


def tiers(folder: Path, tier: Tier) -> list[int]:
    rows = read_log(folder / "drift.jsonl")
    return [int(row.step or 0) for row in rows if row.metric == "tier" and row.value == tier.value]


def test_under_a_budget_training_is_bit_identical_and_measuring_stays_within_its_share(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", max_steps=40)
    clock = Clock()
    callback = Budgeted(clock, full=0.7)
    assert same(alone, run(tmp_path / "watched", clock, callback, max_steps=40)) == []
    assert 0 < callback.schedule.share <= 0.05
    assert tiers(tmp_path / "watched", Tier.FULL)[-1] == 40
    assert len(tiers(tmp_path / "watched", Tier.LIGHT)) > 1
    free = Budgeted(Clock(), full=0.7, budget=None, stop_rule=StopRule(delta=1e9))
    run(tmp_path / "free", free, max_steps=40)
    assert tiers(tmp_path / "free", Tier.FULL) == [10, 20, 30, 40], "the clock decides nothing without a budget"


def test_a_light_measurement_raises_the_alarm_in_a_run_too_short_for_a_full_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Falling(Budgeted):
        def extra(self, step: int) -> list[Measurement]:
            low = -2.0 if step >= 12 else 0.0
            return [Measurement("behaviour/harmful", "refusal_log_odds_change", low, low, low, step=step)]

    clock = Clock()
    callback = Falling(clock, full=11.0, on_alarm="stop")
    with caplog.at_level(logging.INFO, "safety_lens.monitor"):
        run(tmp_path, clock, callback, max_steps=40)
    assert tiers(tmp_path, Tier.FULL) == []
    assert callback.rule.alarmed_at in tiers(tmp_path, Tier.LIGHT)
    assert 12 <= steps(tmp_path)[-1] < 40
    reported = caplog.text
    assert "this run of 40 steps is too short for one" in reported
    assert "s of measuring" in reported
    assert "this run of 40 steps is too short for a full measurement" in reported
    assert "alarms: a run in which nothing changes raises one with a probability of at most 0.05" in reported
