"""The monitor's schedule: what is measured when, so that measuring stays within its share of the training time."""

from typing import Any

import pytest

from safety_lens.errors import DataError
from safety_lens.log import Measurement
from safety_lens.monitors.schedule import Due, Schedule, Tier


def lived(schedule: Schedule, step_seconds: float = 1.0, noticed: bool = False) -> list[tuple[int, Due]]:
    """A whole run on a clock of its own: every measurement takes what the schedule expects."""
    out = []
    for step in range(1, schedule.steps + 1):
        schedule.trained += step_seconds
        due = schedule.due(step, last=step == schedule.steps, noticed=noticed)
        if due.tier is not Tier.NONE:
            seconds = schedule.full if due.tier is Tier.FULL else due.prompts * schedule.light
            schedule.measured(due.tier, step, seconds, due.prompts)
            out.append((step, due))
    return out


def schedule(**more: Any) -> Schedule:
    return Schedule(
        **{"every": 50, "faster": 5, "budget": 0.05, "steps": 400, "full": 5.0, "light": 0.02, "prompts": 48, **more}
    )


def tiers(found: list[tuple[int, Due]], tier: Tier) -> list[int]:
    return [step for step, due in found if due.tier is tier]


@pytest.mark.parametrize("noticed", [False, True])
@pytest.mark.parametrize("full", [0.01, 1.0, 5.0, 11.0, 25.0])
@pytest.mark.parametrize("light", [0.001, 0.02, 0.1])
def test_measuring_stays_within_its_share_whatever_it_costs(full: float, light: float, noticed: bool) -> None:
    one = schedule(full=full, light=light)
    found = lived(one, noticed=noticed)
    least = 8 * light  # the last step is measured in any case
    assert one.spent <= max(0.05 * one.trained, least) + 1e-9
    assert found[-1][0] == 400
    free = schedule(full=full, light=light, budget=None)
    lived(free, noticed=noticed)
    if full >= 5:
        assert free.spent > 0.05 * free.trained, "without a budget it would have cost more"


def test_cheap_measurements_come_as_often_as_they_are_asked_for() -> None:
    found = lived(schedule(full=0.01, light=0.0001))
    assert tiers(found, Tier.FULL) == list(range(50, 401, 50))
    assert set(tiers(found, Tier.LIGHT)) == {5, *(s for s in range(10, 400, 10) if s % 50)}
    assert lived(schedule(budget=None)) == [(s, Due(Tier.FULL)) for s in range(50, 401, 50)]
    assert tiers(lived(schedule(budget=None), noticed=True), Tier.FULL) == list(range(10, 401, 10))


def test_light_measurements_come_before_the_first_full_one_and_read_fewer_prompts_where_they_must() -> None:
    found = lived(schedule(full=11.0, light=0.05))
    first = tiers(found, Tier.LIGHT)[0]
    assert first < tiers(found, Tier.FULL)[0]
    prompts = [due.prompts for _, due in found if due.tier is Tier.LIGHT]
    assert all(8 <= n <= 20 for n in prompts), "about one training step at most"


def test_early_steps_are_measured_from_what_the_whole_run_will_earn() -> None:
    """The first ones cost more than 5 % of the training until then, and all of them less than 5 % of the run."""
    one = schedule(steps=100, full=157.0, light=0.42)
    steps = tiers(lived(one, step_seconds=3.3), Tier.LIGHT)
    assert steps[:3] == [5, 10, 20]
    assert steps[-1] == 100
    assert 8 * 0.42 > 0.05 * 5 * 3.3
    assert one.spent <= 0.05 * one.trained


def test_a_light_measurement_in_between_waits_until_it_can_read_enough_prompts() -> None:
    one = schedule(steps=200, full=157.0, light=0.2, prompts=48)
    found = dict(lived(one, step_seconds=3.3))
    assert [found[step].prompts for step in (5, 10, 20, 40)] == [8, 8, 8, 8]
    between = [due.prompts for step, due in found.items() if 40 < step < 200]
    assert len(between) > 3
    assert set(between) == {16}
    few = dict(lived(schedule(steps=200, full=157.0, light=0.2, prompts=5), step_seconds=3.3))
    assert {due.prompts for due in few.values()} == {5}


@pytest.mark.parametrize("every", [5, 10, 50, 200, 1000])
@pytest.mark.parametrize("steps", [3, 40, 100, 400])
def test_there_are_never_more_measurements_than_the_false_alarms_are_budgeted_for(every: int, steps: int) -> None:
    for more in ({}, {"full": 0.01, "light": 0.0001}, {"budget": None}, {"budget": 1.0}):
        for noticed in (False, True):
            one = schedule(every=every, steps=steps, **more)
            assert len(lived(one, noticed=noticed)) <= one.most


def test_a_run_that_spends_more_than_its_budget_says_why() -> None:
    over, within = (schedule(spent=spent, trained=100.0).spending() for spent in (6.0, 4.0))
    assert "6.0 % of 100 s of training; the last step is measured whatever it costs" in over
    assert within.endswith("4.0 % of 100 s of training")


def test_a_run_too_short_for_a_full_measurement_has_light_ones_and_says_so() -> None:
    one = schedule(steps=40, full=11.0)
    assert "too short for one" in one.plan()
    found = lived(one)
    assert tiers(found, Tier.FULL) == []
    assert len(tiers(found, Tier.LIGHT)) > 1
    early = schedule(steps=40, full=11.0, trained=3.0)
    assert "too short for a full measurement" in str(early.shortage(3))
    assert early.shortage(4) is None, "reported once"
    assert schedule(full=11.0, trained=3.0).shortage(3) is None, "400 steps are long enough"


def test_the_last_step_is_measured_in_full_where_that_fits_in_all() -> None:
    found = lived(schedule(full=11.0, light=0.05))
    assert found[-1] == (400, Due(Tier.FULL))


def test_a_resumed_run_goes_on_with_the_times_of_its_log() -> None:
    one = schedule()
    rows = []
    for step in range(1, 201):
        one.trained += 1.0
        due = one.due(step, last=False, noticed=False)
        if due.tier is not Tier.NONE:
            seconds = one.full if due.tier is Tier.FULL else due.prompts * one.light
            one.measured(due.tier, step, seconds, due.prompts)
            at = {"step": step}
            rows += [
                Measurement("run", "tier", float(due.tier.value), n=due.prompts or None, **at),
                Measurement("run", "seconds", seconds, **at),
                Measurement("run", "training_seconds", one.trained, **at),
            ]
    again = schedule()
    again.replay(rows, 200)
    assert (again.trained, again.spent) == pytest.approx((one.trained, one.spent))
    assert (again.full, again.light) == pytest.approx((one.full, one.light))
    for each in (one, again):
        each.trained += 1.0
    assert again.due(201, last=False, noticed=True) == one.due(201, last=False, noticed=True)


def test_budgets_that_are_no_share_are_refused() -> None:
    for wrong in (0.0, 1.5, -0.1):
        with pytest.raises(DataError, match="share of the training time"):
            schedule(budget=wrong)
