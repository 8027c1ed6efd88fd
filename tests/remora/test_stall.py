"""The detector by itself: flat, falling, rising, noisy, short and degenerate histories."""

from __future__ import annotations

import json
import math
import random

import numpy
import pytest

from mora_ds.common.errors import UserError
from mora_ds.remora.stall import DEFAULT_TOLERANCE, LEAST_WINDOW, StallRule, StallSignal, trend

WINDOW = 200
RULE = StallRule(StallSignal.LOSS, WINDOW, 0.01)


def noisy(fall: float, noise: float, seed: int, count: int = WINDOW) -> list[float]:
    """Losses near 2.5 that fall by that share over the window; `noise` is a standard deviation."""
    draw = random.Random(seed)
    return [2.5 * (1 - fall * step / (count - 1)) + draw.gauss(0, noise) for step in range(count)]


def share_stalled(fall: float, noise: float) -> float:
    return sum(RULE.stalled(noisy(fall, noise, seed)) for seed in range(300)) / 300


def test_a_line_is_found_as_numpy_finds_it() -> None:
    values = noisy(0.1, 0.2, seed=3, count=50)
    (slope, level), covariance = numpy.polyfit(numpy.arange(50) - 24.5, values, 1, cov=True)
    found = trend(values)
    assert found is not None
    assert found.change == pytest.approx(slope * 49 / level)
    assert found.error == pytest.approx(2 * math.sqrt(covariance[0, 0]) * 49 / level)


def test_noisy_and_flat_has_stalled() -> None:
    assert share_stalled(fall=0.0, noise=0.02) > 0.97


def test_noisy_and_falling_has_not() -> None:
    """At exactly the tolerance two standard errors let about one window in 40 through; at twice that, none."""
    assert share_stalled(fall=0.01, noise=0.02) < 0.06
    assert share_stalled(fall=0.02, noise=0.02) == 0


def test_noise_that_could_hide_a_fall_is_no_stall_and_is_complained_about() -> None:
    flat = noisy(0.0, 0.2, seed=0)
    assert share_stalled(fall=0.0, noise=0.2) == 0
    complaint = RULE.complaint(flat)
    assert complaint and "--stall_window of more than" in complaint and "--stall_tolerance is 1.00%" in complaint
    needed = int(complaint.split("more than ")[1].split(",")[0])
    line = RULE.judge(flat)
    assert line is not None and needed == math.ceil(WINDOW * (line.error / 0.01) ** 2)
    longer = StallRule(StallSignal.LOSS, 2 * needed, 0.01)
    assert longer.stalled(noisy(0.0, 0.2, seed=1, count=2 * needed))
    assert RULE.complaint(noisy(0.0, 0.02, seed=0)) is None and RULE.complaint(flat[1:]) is None


def test_rising_is_not_flat() -> None:
    assert not RULE.stalled(noisy(-0.05, 0.02, seed=0))


@pytest.mark.parametrize("place", [0, WINDOW // 2, WINDOW - 1])
def test_one_spike_puts_a_merge_off_and_causes_none(place: int) -> None:
    falling, flat = noisy(0.02, 0.005, seed=0), noisy(0.0, 0.005, seed=0)
    assert RULE.stalled(flat)
    falling[place] += 3.0
    flat[place] += 3.0
    assert not RULE.stalled(falling) and not RULE.stalled(flat)


def test_without_noise_a_decay_stalls_when_it_moves_by_less_than_the_tolerance() -> None:
    losses = [2.0 + 0.8 * math.exp(-step / 500) for step in range(3000)]
    stalled = [RULE.stalled(losses[:done]) for done in range(3000)]
    first = stalled.index(True)
    assert all(stalled[first:])
    window = losses[first - WINDOW : first]
    assert (window[0] - window[-1]) / numpy.mean(window) == pytest.approx(0.01, rel=0.02)


def test_the_norm_of_a_random_walk_stalls_with_the_defaults_after_about_2000_steps() -> None:
    rule, history = StallRule(StallSignal.UPDATE, WINDOW, 0.05), []
    for done in range(1, 4000):
        history = rule.noted(history, math.sqrt(done))
        if rule.stalled(history):
            break
    assert 1900 < done < 2300


def test_a_short_history_has_not_stalled() -> None:
    assert not RULE.stalled([]) and RULE.judge([]) is None
    assert not RULE.stalled([2.5] * (WINDOW - 1)) and RULE.judge([2.5] * (WINDOW - 1)) is None
    assert RULE.stalled([2.5] * WINDOW)
    assert [trend([1.0] * count) is None for count in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("values", [[0.0] * 5, [1e-300, 0.0, 0.0], [5e-324] * 4, [1e150, 2e150, 1e150], [3.0] * 5])
def test_no_history_gives_what_is_no_number(values: list[float]) -> None:
    found = trend(values)
    assert found is None or (math.isfinite(found.change) and math.isfinite(found.error) and found.error >= 0)
    json.dumps(StallRule(StallSignal.UPDATE, 3, 0.1).facts(values), allow_nan=False)


def test_squares_that_have_not_moved_have_not_stalled() -> None:
    assert not StallRule(StallSignal.UPDATE, 3, 0.1).stalled([0.0, 0.0, 0.0, 0.0])


def test_only_the_window_counts_and_a_kept_window_decides_as_the_whole_history() -> None:
    history = noisy(0.5, 0.02, seed=1, count=400) + noisy(0.0, 0.01, seed=2, count=300)
    kept: list[float] = []
    for done, value in enumerate(history, start=1):
        kept = RULE.noted(json.loads(json.dumps(kept)), value)  # through a checkpoint at every step
        assert len(kept) == min(done, WINDOW)
        assert RULE.judge(kept) == RULE.judge(history[:done])
    assert RULE.stalled(kept)


def test_what_is_said_and_logged_of_a_history() -> None:
    rule, history = StallRule(StallSignal.LOSS, 3, 0.01), [9.0, 1.0, 2.0, 3.5]
    line = trend(history[1:])
    assert line is not None and line.change != pytest.approx(line.error, abs=0.1)
    told = {"signal": "loss", "tolerance": 0.01}
    numbers = {"value": 3.5, "values": 4, "change": line.change, "error": line.error}
    assert rule.facts(history) == {**told, **numbers}
    assert rule.facts([]) == {**told, "value": None, "values": 0, "change": None, "error": None}
    assert rule.sentence(history) == (
        f"the training loss moved by {line.change:+.2%} +- {line.error:.2%} over the last 3 steps, "
        "--stall_tolerance is 1.00%"
    )
    assert rule.sentence(history[:2]) == "the training loss has 2 of 3 values since the re-warmup"
    assert DEFAULT_TOLERANCE == {StallSignal.LOSS: 0.01, StallSignal.UPDATE: 0.05}


def test_settings_that_make_no_rule_are_refused_together() -> None:
    with pytest.raises(UserError) as caught:
        StallRule(StallSignal.LOSS, LEAST_WINDOW - 1, math.nan)
    assert "--stall_window must be at least 3, got 2" in str(caught.value)
    assert "--stall_tolerance must be above 0, got nan" in str(caught.value)
    with pytest.raises(UserError, match="--stall_tolerance must be above 0, got inf"):
        StallRule(StallSignal.LOSS, LEAST_WINDOW, math.inf)
