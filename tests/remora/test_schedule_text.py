"""What a run says about its merges beforehand, and the plot in the docs: the code's own output, to the letter."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mora_ds.common.errors import UserError
from mora_ds.remora.schedule import Schedule, ScheduleKind
from mora_ds.remora.schedule_text import start_lines, text_plot
from tests.helpers.tools import call

ROOT = Path(__file__).resolve().parents[2]
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
    warmed = dataclasses.replace(PLAIN, warmup_steps=51)
    assert said(warmed, done=60) == "merges after step 75 of 100"
    short = dataclasses.replace(PLAIN, total_steps=79)
    assert said(short, done=76) == ("there will be no merge: --merge_every is 25, 3 steps are left")


def test_a_plot_shows_ramps_merges_and_the_curve() -> None:
    flat = dataclasses.replace(PLAIN, kind=ScheduleKind.CONSTANT, restart_warmup_steps=4)
    title, *rows, axis = text_plot(flat, [25, 50, 75], columns=100, rows=5)
    assert title.strip() == "constant" and {len(line) for line in (title, *rows, axis)} == {109}
    assert [column for column, mark in enumerate(axis[9:]) if mark == "^"] == [25, 50, 75]
    assert [row[9 + 26] for row in rows] == [" ", " ", "*", " ", " "], "step 26 runs at 2/5"
    assert rows[0][9:59] == "*" * 25 + " " * 3 + "*" * 22, "steps 25 to 27 lie below 4/5"


def test_a_plot_wider_than_the_run_has_no_holes() -> None:
    _, *rows, _ = text_plot(dataclasses.replace(PLAIN, total_steps=30), [], columns=70, rows=4)
    assert all(any(row[9 + column] == "*" for row in rows) for column in range(70))


def plot(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plot_schedule.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_documented_plot_is_what_its_command_prints() -> None:
    page = (ROOT / "docs" / "concepts" / "remora-schedule.md").read_text(encoding="utf-8")
    ((command, expected),) = re.findall(
        r"(python tools/plot_schedule\.py .*?)\n```\n+```[a-z]*\n(.*?)```", page, flags=re.S
    )
    done = plot(*shlex.split(command)[2:])
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    for kind in ScheduleKind:
        assert kind.value in expected
    assert expected.count("^") >= 4 * 3


def test_the_plot_tool_names_what_is_missing_or_wrong(tmp_path: Path) -> None:
    for flags, part in (
        (["--merge_every", "5"], "--max_steps"),
        (["--max_steps", "50", "--merge_every", "5"], "--restart_warmup_steps"),
        (["--max_steps", "50", "--rows", "none"], "--rows"),
        (["--max_steps", "50", "--colums", "9"], "unknown flag --colums"),
    ):
        with pytest.raises(UserError, match=part):
            call("plot_schedule", *flags)
    done = plot("--colums", "9")
    assert done.returncode == 2 and done.stderr.count("error") == 1 and "Traceback" not in done.stderr
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(UserError, match="pip install matplotlib"):
            call("plot_schedule", "--max_steps", "50", "--png", tmp_path / "a.png")


def test_a_recipe_and_merges_that_were_made() -> None:
    recipe = "configs/recipes/pretrain_250m.yaml"
    done = plot(recipe, "--max_steps", "4000", "--merges", "3000", "2000")
    assert done.returncode == 0 and done.stdout.count("^") == 3  # two merges, and the legend


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = plot("--max_steps", "50", "--merge_every", "20", "--png", str(tmp_path / "a.png"))
    assert done.returncode == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
