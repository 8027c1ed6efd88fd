"""The learning rate at its corners, and the steps of the merges."""

import dataclasses
import itertools
import math

import pytest

from mora_ds.config.adapter import AdapterArguments
from mora_ds.config.lr_schedule import (
    Schedule,
    ScheduleArguments,
    ScheduleKind,
    schedule_kind,
)
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row, parsed

JAGGED = Schedule(
    ScheduleKind.COSINE,
    peak=1.0,
    total_steps=100,
    warmup_steps=10,
    min_ratio=0.1,
    merge_every=25,
    restart_warmup_steps=4,
)


def merge_steps(schedule):
    """All step counts after which a merge is planned, in order."""
    return [
        done for done in range(1, schedule.total_steps) if schedule.merges_after(done)
    ]


def test_first_warmup_climbs_by_equal_steps_and_never_starts_at_zero():
    schedule = Schedule(ScheduleKind.LINEAR, peak=1.1, total_steps=50, warmup_steps=10)
    rates = [schedule.learning_rate(step) for step in range(11)]
    assert rates == pytest.approx([0.1 * (step + 1) for step in range(11)])


@pytest.mark.parametrize(
    "kind, middle, end",
    [
        (ScheduleKind.LINEAR, 0.6, 0.2),
        (ScheduleKind.COSINE, 0.6, 0.2),
        (ScheduleKind.CONSTANT, 1.0, 1.0),
    ],
)
def test_global_curve_at_its_corners(kind, middle, end):
    schedule = Schedule(
        kind, peak=2e-3, total_steps=110, warmup_steps=10, min_ratio=0.2
    )
    at = [schedule.learning_rate(step) / 2e-3 for step in (10, 60, 110, 500)]
    assert at == pytest.approx([1.0, middle, end, end])


def test_cosine_is_a_cosine():
    schedule = Schedule(ScheduleKind.COSINE, peak=1.0, total_steps=100)
    assert schedule.learning_rate(25) == pytest.approx(
        0.5 * (1 + math.cos(math.pi / 4))
    )


def test_rewarmup_after_a_merge_is_linear():
    target = JAGGED.curve(29)
    ramp = [JAGGED.learning_rate(step, [25]) for step in range(25, 30)]
    assert ramp == pytest.approx([target * step / 5 for step in (1, 2, 3, 4, 5)])
    assert JAGGED.learning_rate(24, [25]) == JAGGED.curve(24)
    assert JAGGED.learning_rate(30, [25]) == JAGGED.curve(30)


MERGES = """
{} | [25, 50, 75]
# the last one that leaves a step at the full learning rate
{total_steps: 80} | [25, 50, 75]
{total_steps: 79} | [25, 50]
# none within the first warm-up
{warmup_steps: 25} | [25, 50, 75]
{warmup_steps: 26} | [50, 75]
{warmup_steps: 51} | [75]
{merge_every: 100} | []
{merge_every: 0} | []
"""


@each_row("changes, merges", MERGES)
def test_merges_keep_off_the_first_warmup_and_the_end(changes, merges):
    schedule = dataclasses.replace(JAGGED, **parsed(changes))
    planned = parsed(merges)
    assert merge_steps(schedule) == schedule.merges_left(0) == planned
    assert schedule.merges_left(50) == [step for step in planned if step > 50]
    # Without a merge there is no re-warmup
    for step in range(schedule.total_steps):
        assert schedule.learning_rate(step) == schedule.curve(step)


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_every_rewarmup_stays_below_the_curve_and_above_zero(kind):
    for total, warmup, every, ramp in itertools.product(
        (7, 40, 101), (0, 3), (2, 5, 13), (1, 4, 12)
    ):
        if every <= ramp:
            continue
        schedule = Schedule(kind, 1.0, total, warmup, 0.05, every, ramp)
        merges = merge_steps(schedule)
        ramped = {merge + k for merge in merges for k in range(ramp)}
        for step in range(total):
            rate = schedule.learning_rate(step, merges)
            if step in ramped:
                assert 0 < rate < schedule.curve(step)
            else:
                assert rate == schedule.curve(step)
        # Each cycle reaches the curve
        assert all(done + ramp < total for done in merges)


def test_names_of_schedules():
    assert schedule_kind("constant_with_warmup") is ScheduleKind.CONSTANT
    with user_error(r"--lr_scheduler_type 'cosin'.*Did you mean 'cosine'"):
        schedule_kind("cosin")


def test_all_problems_are_listed_at_once():
    wrong = {"total_steps": 5, "warmup_steps": 5, "merge_every": 3}
    with user_error(r"--warmup_steps(.|\n)*--merge_every"):
        Schedule(ScheduleKind.LINEAR, peak=1.0, **wrong)


def test_warmup_stable_decay_stays_then_falls_in_a_straight_line():
    schedule = Schedule(
        schedule_kind("wsd"),
        peak=1.0,
        total_steps=110,
        warmup_steps=10,
        min_ratio=0.1,
        decay_ratio=0.25,
    )
    assert [schedule.learning_rate(step) for step in (10, 50, 85)] == [1.0, 1.0, 1.0]
    assert schedule.learning_rate(97) == pytest.approx(
        0.1 + 0.9 * (1 - 87 / 100) / 0.25
    )
    assert schedule.learning_rate(109) == pytest.approx(0.1 + 0.9 * 0.01 / 0.25)


def test_defaults_are_those_of_the_flags():
    schedule = Schedule(ScheduleKind.LINEAR, 1.0, 9)
    adapter = AdapterArguments()
    settings = ScheduleArguments()
    assert schedule.restart_warmup_steps == adapter.restart_warmup_steps == 10
    assert schedule.decay_ratio == settings.decay_ratio == 0.2
