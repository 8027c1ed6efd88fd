"""What a run says about its merges beforehand."""

from __future__ import annotations

import dataclasses

from mora_ds.remora.schedule import Schedule, ScheduleKind
from mora_ds.remora.schedule_text import start_lines

PLAIN = Schedule(ScheduleKind.COSINE, peak=1.0, total_steps=100, merge_every=25, restart_warmup_steps=4)


def said(schedule: Schedule, done: int = 0) -> str:
    return "\n".join(start_lines(schedule, done))


def test_all_merges_are_listed() -> None:
    assert said(PLAIN) == "merges after steps 25, 50, 75 of 100"
    assert said(dataclasses.replace(PLAIN, merge_every=0)) == ""


def test_a_long_list_is_shortened() -> None:
    text = said(dataclasses.replace(PLAIN, total_steps=10_000))
    assert "steps 25, 50, 75, 100, 125, 150, ..., 9850, 9875, 9900, 9925, 9950, 9975 (399 in all)" in text
    assert "200, 225, 250, 275, 300 of 325" in said(dataclasses.replace(PLAIN, total_steps=325)), "12 are all shown"


def test_a_merge_whose_ramp_would_not_end_is_announced_as_left_out() -> None:
    short = dataclasses.replace(PLAIN, total_steps=79)
    lines = said(short).splitlines()
    assert lines[0] == "merges after steps 25, 50 of 79"
    assert lines[1].startswith(
        "the merge at step 75 is left out: 4 steps would follow and the re-warmup alone takes 4 "
    )
    assert "goes on to step 79; its update stays unmerged, and exports add it" in lines[1]
    assert "left out" not in said(dataclasses.replace(PLAIN, total_steps=80))


def test_merges_that_the_first_warmup_swallows_are_announced() -> None:
    text = said(dataclasses.replace(PLAIN, warmup_steps=51))
    assert text == "merges after step 75 of 100\nno merge after steps 25, 50: the first warm-up takes 51"
    assert said(dataclasses.replace(PLAIN, warmup_steps=25)) == said(PLAIN)


def test_an_interval_longer_than_the_run_is_announced() -> None:
    text = said(dataclasses.replace(PLAIN, merge_every=100))
    assert text == "there will be no merge: --merge_every is 100, the run has 100 steps"


def test_a_resumed_run_lists_what_is_left() -> None:
    assert said(PLAIN, done=50) == "merges after step 75 of 100"
    assert start_lines(PLAIN, 75, merge_pending=True) == ["merges after step 75 of 100"]
    warmed = dataclasses.replace(PLAIN, warmup_steps=51)
    assert said(warmed, done=60) == "merges after step 75 of 100"
    short = dataclasses.replace(PLAIN, total_steps=79)
    assert said(short, done=76) == ("there will be no merge: --merge_every is 25, 3 steps are left")
