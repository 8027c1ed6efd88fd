"""The learning rate at its corners, and the steps at which squares are merged."""

import dataclasses
import itertools
import math

import pytest

from mora_ds.common.errors import UserError
from mora_ds.config.adapter import AdapterArguments
from mora_ds.config.training import TrainingArguments
from mora_ds.remora.schedule import Schedule, ScheduleKind, schedule_kind
from tests.helpers.errors import user_error

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
    return [done for done in range(1, schedule.total_steps) if schedule.merges_after(done)]


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
    schedule = Schedule(kind, peak=2e-3, total_steps=110, warmup_steps=10, min_ratio=0.2)
    at = [schedule.learning_rate(step) / 2e-3 for step in (10, 60, 110, 500)]
    assert at == pytest.approx([1.0, middle, end, end])


def test_cosine_is_a_cosine():
    schedule = Schedule(ScheduleKind.COSINE, peak=1.0, total_steps=100)
    assert schedule.learning_rate(25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_ramp_after_a_merge_is_a_straight_line_to_the_curve():
    target = JAGGED.curve(29)
    ramp = [JAGGED.learning_rate(step, [25]) for step in range(25, 30)]
    assert ramp == pytest.approx([target * step / 5 for step in (1, 2, 3, 4, 5)])
    assert JAGGED.learning_rate(24, [25]) == JAGGED.curve(24)
    assert JAGGED.learning_rate(30, [25]) == JAGGED.curve(30)


def test_last_merge_that_leaves_a_full_rate_step_is_kept_and_later_ones_are_not():
    assert merge_steps(JAGGED) == [25, 50, 75]
    assert merge_steps(dataclasses.replace(JAGGED, total_steps=80)) == [25, 50, 75]
    short = dataclasses.replace(JAGGED, total_steps=79)
    assert merge_steps(short) == [25, 50]
    assert short.learning_rate(75, [25, 50]) == short.curve(75), (
        "without a merge there is no ramp"
    )


def test_no_merge_before_the_first_warmup_ends():
    assert merge_steps(dataclasses.replace(JAGGED, warmup_steps=26)) == [50, 75]
    assert merge_steps(dataclasses.replace(JAGGED, warmup_steps=25)) == [25, 50, 75]


def test_nothing_is_merged_at_interval_zero():
    schedule = dataclasses.replace(JAGGED, merge_every=0)
    assert merge_steps(schedule) == []
    assert not any(schedule.merges_after(done) for done in range(101))
    assert all(schedule.learning_rate(step) == schedule.curve(step) for step in range(100))


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_every_ramp_stays_below_the_curve_and_above_zero_for_many_settings(kind):
    for total, warmup, every, ramp in itertools.product(
        (7, 40, 101), (0, 3), (2, 5, 13), (1, 4, 12)
    ):
        if every <= ramp:
            continue
        schedule = Schedule(kind, 1.0, total, warmup, 0.05, every, ramp)
        ramped = {merge + k for merge in merge_steps(schedule) for k in range(ramp)}
        for step in range(total):
            rate = schedule.learning_rate(step, merge_steps(schedule))
            assert (
                0 < rate < schedule.curve(step)
                if step in ramped
                else rate == schedule.curve(step)
            )
        assert all(done + ramp < total for done in merge_steps(schedule)), (
            "each cycle reaches the curve"
        )
        assert merge_steps(schedule) == [
            done for done in range(total + 1) if schedule.merges_after(done)
        ]


def test_names_of_schedules():
    assert schedule_kind("constant_with_warmup") is ScheduleKind.CONSTANT
    with user_error(r"--lr_scheduler_type 'cosin'.*Did you mean 'cosine'"):
        schedule_kind("cosin")


def test_all_problems_are_listed_at_once():
    with pytest.raises(UserError) as caught:
        Schedule(
            ScheduleKind.LINEAR, peak=1.0, total_steps=5, warmup_steps=5, merge_every=3
        )
    for flag in ("--warmup_steps", "--merge_every"):
        assert flag in str(caught.value)


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
    assert schedule.learning_rate(97) == pytest.approx(0.1 + 0.9 * (1 - 87 / 100) / 0.25)
    assert schedule.learning_rate(109) == pytest.approx(0.1 + 0.9 * 0.01 / 0.25)


def test_defaults_are_those_of_the_flags():
    schedule = Schedule(ScheduleKind.LINEAR, 1.0, 9)
    adapter = AdapterArguments()
    training = TrainingArguments()
    assert schedule.restart_warmup_steps == adapter.restart_warmup_steps == 10
    assert schedule.decay_ratio == training.decay_ratio == 0.2


def test_merges_still_to_come():
    """None within the first warm-up, nor so late that its re-warmup would not end."""
    schedule = Schedule(
        ScheduleKind.COSINE,
        peak=1.0,
        total_steps=100,
        merge_every=25,
        restart_warmup_steps=4,
    )
    assert schedule.merges_left(0) == [25, 50, 75]
    assert schedule.merges_left(50) == [75]
    assert dataclasses.replace(schedule, total_steps=79).merges_left(0) == [25, 50]
    assert dataclasses.replace(schedule, warmup_steps=51).merges_left(0) == [75]
    assert dataclasses.replace(schedule, merge_every=100).merges_left(0) == []
