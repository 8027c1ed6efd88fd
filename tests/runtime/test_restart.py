"""The restart wrapper: its verdicts, when it stops, and a real job that is killed, stopped and finishes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from mora_ds.common.errors import UserError
from mora_ds.common.files import stamp
from mora_ds.runtime import restart
from mora_ds.runtime.events import EVENTS_FILE, EXIT_STOPPED, AttemptEvents, Event, emit
from mora_ds.runtime.processes import ranks_below
from mora_ds.runtime.restart import Verdict, judge, with_resume
from tests.helpers.gloo import free_port
from tests.helpers.jobs import REPOSITORY, environment, launcher, playground, run
from tests.helpers.nodes import wait_for
from tests.helpers.resume import assert_same_run

WRAPPER = REPOSITORY / "launch" / "restart.py"

ACTOR = """
import json, os, shutil, signal, sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
from mora_ds.runtime import cli, signals
from mora_ds.runtime.events import Event, emit

def main():
    plan, done = Path("plan.json"), Path("done.json")
    acts, past = json.loads(plan.read_text()), json.loads(done.read_text()) if done.exists() else []
    done.write_text(json.dumps([*past, sys.argv[1:]]))
    for act, value in acts[len(past)]:
        if act == "save":
            emit(Event.SAVED, value)
        elif act == "lose":
            time.sleep(value)
            shutil.rmtree(Path(os.environ["MORA_DS_STATUS_FILE"]).parent)
        elif act == "wait":
            with signals.deferred():
                print("waiting", flush=True)
                while not signals.requested():
                    time.sleep(0.01)
                time.sleep(value)
                sys.exit(75)
        elif act == "die":
            os.kill(os.getpid(), value)
        else:
            sys.exit(value)

cli.run(main, restartable=True)
"""


def perform(folder: Path, *attempts: list[tuple[str, float]], times: int = 5) -> subprocess.Popen[str]:
    """The wrapper around a rank that only performs the `attempts`, one list of actions each."""
    (folder / "pretrain.py").write_text(ACTOR.format(repository=str(REPOSITORY)))
    (folder / "plan.json").write_text(json.dumps(attempts))
    rank = ["env", "RANK=0", sys.executable, str(folder / "pretrain.py"), "--flag"]
    wrapper = [sys.executable, str(WRAPPER), str(times), "--wait_s", "0.05", "--"]
    words = [*wrapper, "sh", "-c", '"$@"; exit $?', "sh", *rank]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def attempts_made(folder: Path) -> list[list[str]]:
    return json.loads((folder / "done.json").read_text())


def test_failures_and_stops_are_run_again_until_it_is_done(tmp_path: Path) -> None:
    first, second = [("save", 2), ("die", signal.SIGKILL)], [("save", 4), ("exit", 75)]
    process = perform(tmp_path, first, second, [("save", 6), ("exit", 1)], [("exit", 0)])
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert attempts_made(tmp_path) == [["--flag", "--resume_from_checkpoint", "auto"]] * 4
    assert "attempt 2: stopped, to be run again" in told and "last checkpoint: step 6" in told


def test_a_status_folder_that_vanishes_is_made_anew(tmp_path: Path) -> None:
    """As a system does that empties its temporary directory: ranks and wrapper go on, and earlier events stay known."""
    process = perform(tmp_path, [("save", 2), ("lose", 1), ("exit", 1)], [("lose", 0), ("save", 4), ("exit", 0)])
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert "attempt 1: failed (launcher's code 1, ranks' [1]); last checkpoint: step 2" in told
    assert "attempt 2: done (launcher's code 0, ranks' [0]); last checkpoint: step 4" in told


def test_events_that_cannot_be_written_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(EVENTS_FILE, str(tmp_path / "file" / "events.jsonl"))
    emit(Event.SAVED, 3)
    assert "restart.py is not told of 'saved'" in caplog.text


def test_the_same_step_twice_is_the_end(tmp_path: Path) -> None:
    process = perform(tmp_path, [("save", 2), ("exit", 1)], *[[("exit", 1)]] * 4)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and len(attempts_made(tmp_path)) == 2
    assert "no checkpoint since the previous failure (step 2)" in told


def test_no_more_attempts_than_asked_for_and_none_after_a_user_error(tmp_path: Path) -> None:
    process = perform(tmp_path, *[[("save", step), ("exit", 1)] for step in range(1, 5)], times=2)
    assert process.wait(timeout=60) == 1 and len(attempts_made(tmp_path)) == 3
    (tmp_path / "done.json").unlink()
    process = perform(tmp_path, [("exit", 2)], [("exit", 0)])
    assert process.wait(timeout=60) == 2 and len(attempts_made(tmp_path)) == 1


def test_a_signal_is_passed_on_and_ends_the_restarts(tmp_path: Path) -> None:
    process = perform(tmp_path, [("wait", 0.5)], [("exit", 0)])
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert process.returncode == EXIT_STOPPED and len(attempts_made(tmp_path)) == 1
    assert "SIGUSR1: saving at the end of this step" in told


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    process = perform(tmp_path, [("wait", 60)], [("exit", 0)])
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


class NoSignals:
    """In place of the wrapper's signals: the waits that were asked for."""

    def __init__(self) -> None:
        self.stop = self.kill = False
        self.waits: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return True


Attempt = tuple[int, AttemptEvents]
SAVED, FAILED = AttemptEvents([11], 5, [1]), AttemptEvents([11], None, [1])
PAUSED, IDLE = AttemptEvents([11], 6, [75]), AttemptEvents([11], None, [75])


def restarted(
    monkeypatch: pytest.MonkeyPatch, attempts: Iterator[Attempt], times: int, wait_s: float = 1.0
) -> tuple[int, list[float]]:
    """(exit code, waits) of the wrapper around attempts that end as told."""
    requests = NoSignals()
    monkeypatch.setattr(restart, "_StopRequests", lambda: requests)
    monkeypatch.setattr(restart, "_attempt", lambda command, requests: next(attempts))
    return restart.restart(times, wait_s, ["mora-ds", "pretrain"]), requests.waits


@pytest.mark.parametrize(
    ("attempts", "code"),
    [
        pytest.param([(1, FAILED), (1, FAILED)], 1, id="two failures"),
        pytest.param([(1, SAVED), (247, SAVED), (247, FAILED)], 247, id="the last one without a checkpoint"),
        pytest.param([(1, FAILED), (75, PAUSED), (1, FAILED), (1, FAILED)], 1, id="stopped with a checkpoint between"),
        pytest.param([(1, FAILED), (75, IDLE), (1, FAILED)], 1, id="stopped without one between"),
        pytest.param([(1, AttemptEvents())] * 5, 1, id="no process has started: not the run's fault"),
        pytest.param([(-9, SAVED)] * 5, 1, id="a signal's code is none of an exit"),
        pytest.param([(75, SAVED)] * 5, 1, id="failed, whatever the launcher says"),
        pytest.param([(75, PAUSED)] * 5, EXIT_STOPPED, id="stopped until the end"),
    ],
)
def test_when_it_gives_up_and_with_which_code(
    monkeypatch: pytest.MonkeyPatch, attempts: list[Attempt], code: int
) -> None:
    left = iter(attempts)
    found, waits = restarted(monkeypatch, left, times=4)
    assert found == code and not list(left) and len(waits) == len(attempts) - 1


def test_it_tells_the_last_checkpoint_of_all_attempts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restarted(monkeypatch, iter([(1, SAVED), (1, AttemptEvents()), (1, FAILED)]), times=4)
    assert "no checkpoint since the previous failure (step 5)" in capsys.readouterr().err


def test_waits_grow_up_to_a_limit_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    code, waits = restarted(monkeypatch, repeat((75, PAUSED)), times=2000, wait_s=10)
    assert code == EXIT_STOPPED and waits == [10, 20, 40, 80, 160, *[restart.LONGEST_WAIT_S] * 1995]
    assert restarted(monkeypatch, repeat((75, PAUSED)), times=0) == (EXIT_STOPPED, [])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((-1, 1.0), "at least 0, got -1"), ((1, -1.0), "--wait_s must be"), ((1, float("nan")), "--wait_s must be")],
)
def test_numbers_that_are_none_of_restarts_or_seconds(numbers: tuple[int, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        restart.restart(*numbers, ["mora-ds", "pretrain"])


def test_ranks_tell_what_has_happened_and_which_files_they_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(EVENTS_FILE, str(tmp_path / "made" / "events.jsonl"))
    base, other = tmp_path / "base", tmp_path / "other"
    for path in (base, other):
        path.write_text("weights")
    told: list[tuple[Event, Any]] = [(Event.STARTED, 11), (Event.STARTED, 12), (Event.SAVED, 4), (Event.SAVED, 8)]
    for event, value in [*told, *((Event.MAPPED, [str(path), stamp(path)]) for path in (base, other)), (Event.LEFT, 1)]:
        emit(event, value)
    events = AttemptEvents.parse((tmp_path / "made" / "events.jsonl").read_text())
    assert (events.processes, events.saved, events.codes, events.changed_files()) == ([11, 12], 8, [1], [])
    base.write_text("other weights")
    assert events.changed_files() == [str(base)]
    restarted(monkeypatch, iter([(1, events)]), times=0)
    assert f"{base} was changed or replaced" in capsys.readouterr().err
    monkeypatch.delenv(EVENTS_FILE)
    emit(Event.SAVED, 9)  # without a wrapper it is told to nobody


def test_what_launchers_say_and_what_ranks_say() -> None:
    """The codes on the left are those of deepspeed 0.19.8 and torchrun (torch 2.13)."""
    assert judge(1, AttemptEvents([11, 12], 5, [75, 75])) is Verdict.STOPPED, "launch.py after SIGTERM, torchrun"
    assert judge(0, AttemptEvents([11, 12], 5, [75, 75])) is Verdict.STOPPED, "the runner, its launch.py killed"
    assert judge(0, AttemptEvents([11, 12], 5, [])) is Verdict.FAILED, "the runner, everything below it killed"
    assert judge(247, AttemptEvents([11, 12], 5, [1])) is Verdict.FAILED
    assert judge(1, AttemptEvents([11, 12], None, [2, 1])) is Verdict.USER_ERROR
    assert judge(0, AttemptEvents([11, 12], 9, [0, 0])) is Verdict.DONE
    assert judge(1, AttemptEvents([11, 12], 9, [0, 0])) is Verdict.FAILED, "the launcher itself"
    assert judge(1, AttemptEvents([11, 12], 5, [75, 1])) is Verdict.FAILED, "one rank while the others saved"
    elsewhere = [judge(code, AttemptEvents()) for code in (0, 2, 75, 1)]  # ranks on nodes that do not see the file
    assert elsewhere == [Verdict.DONE, Verdict.USER_ERROR, Verdict.STOPPED, Verdict.FAILED]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["train.py"], "launch/pretrain.py"),
        (["launch/pretrain.py", "--overwrite_output_dir"], "--overwrite_output_dir"),
        (["launch/pretrain.py", "--resume_from_checkpoint", "latest"], "--resume_from_checkpoint latest"),
        (["launch/pretrain.py", "--resume_from_checkpoint=/x"], "--resume_from_checkpoint /x"),
    ],
)
def test_commands_that_cannot_be_resumed_are_refused(flags: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        with_resume(["deepspeed", *flags])
    given = ["d", "pretrain.py", "--resume_from_checkpoint", "auto"]
    assert with_resume(given) == given


@pytest.mark.gloo
@pytest.mark.heavy
def test_a_job_that_is_killed_and_stopped_finishes_as_if_nothing_had_been(tmp_path: Path) -> None:
    user, out, whole = playground(tmp_path), tmp_path / "out", tmp_path / "whole"
    more = ("--max_steps", 40, "--merge_every", 9, "--restart_warmup_steps", 1, "--save_steps", 4, "--eval_steps", 0)
    run(2, user.flags(whole, *more))
    words = launcher(2, user.flags(out, *more))
    words[1:1] = ["--master_port", str(free_port())]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(WRAPPER), "3", "--wait_s", "0.1", "--", *words],
            cwd=tmp_path, env=environment(), stdout=file, stderr=file, text=True,
        )  # fmt: skip
    try:
        for step, rank, number in ((4, 1, signal.SIGKILL), (16, 0, signal.SIGUSR1)):
            wait_for(out / "checkpoints" / f"step-{step:06d}", [process])
            os.kill(ranks_below(process.pid)[rank], number)
        assert process.wait(timeout=200) == 0, log.read_text()
    finally:
        process.kill()
    told = log.read_text()
    assert "attempt 1: failed" in told and "attempt 2: stopped" in told and "attempt 3: done" in told
    assert_same_run(out, whole)
