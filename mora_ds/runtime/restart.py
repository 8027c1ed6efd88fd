"""Runs a command again until it succeeds: `restart(times, wait_s, command)`, behind `mora-ds restart`.

    failure, or stopped (75)  -> wait, then again with --resume_from_checkpoint auto
    done (0), user error (2)  -> end
    two failures              -> end, if no checkpoint was written in between

A signal to this process makes every rank save and leave, however long that takes; the launchers themselves (deepspeed
0.19.8, torchrun of torch 2.13) kill the ranks after 30 seconds, or do not forward the signal.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import FrameType

from mora_ds.common.errors import SECONDS, UserError, out_of_bounds, refuse
from mora_ds.runtime.events import (
    EVENTS_FILE,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    AttemptEvents,
    EventsText,
)
from mora_ds.runtime.processes import is_rank, ranks_below

RESUME = "--resume_from_checkpoint"
LONGEST_WAIT_S = 300.0
ORPHANS_MAY_SAVE_S = 120.0
"""How long ranks whose launcher has ended may take to save before the next attempt kills them."""
_TICK_S = 0.3


class Verdict(Enum):
    """How an attempt ended."""

    DONE = "done"
    USER_ERROR = "a mistake that a restart does not correct"
    STOPPED = "stopped, to be run again"
    FAILED = "failed"


def restart(times: int, wait_s: float, command: Sequence[str]) -> int:
    """Run `command`, which starts a training, and up to `times` times again. Returns the exit code for all.

    Raises `UserError` for a command that cannot be resumed, and for numbers that are none of restarts or seconds.
    """
    few = [f"the number of restarts must be at least 0, got {times}"] if times < 0 else []
    refuse([*few, *out_of_bounds([("wait_s", wait_s, SECONDS)])])
    command = with_resume(command)
    requests = _StopRequests()
    latest: int | None = None
    has_failed = False
    for attempt in range(times + 1):
        _print(f"attempt {attempt + 1} of at most {times + 1}: {shlex.join(command)}")
        code, events = _attempt(command, requests)
        verdict = judge(code, events)
        saved = "no checkpoint was written" if events.saved is None else f"last checkpoint: step {events.saved}"
        _print(f"attempt {attempt + 1}: {verdict.value} (launcher's code {code}, ranks' {events.codes}); {saved}")
        for name in events.changed_files() if verdict is Verdict.FAILED else ():
            _print(
                f"{name} was changed or replaced while the ranks read their weights from it, and one may have ended by "
                "a bus error for that: put the original file back"
            )
        failure = code if code > 0 and code != EXIT_STOPPED else EXIT_FAILURE
        if requests.kill:
            return EXIT_INTERRUPTED
        if verdict in (Verdict.DONE, Verdict.USER_ERROR):
            return 0 if verdict is Verdict.DONE else EXIT_USER_ERROR
        if requests.stop:
            return EXIT_STOPPED if verdict is Verdict.STOPPED else failure
        if verdict is Verdict.FAILED:
            if has_failed and events.processes and events.saved is None:
                before = "none so far" if latest is None else f"step {latest}"
                _print(f"no checkpoint since the previous failure ({before}): another attempt would fail the same way")
                return failure
            has_failed = True
        elif events.saved is not None:  # by an attempt that was stopped: its checkpoint is one in between
            has_failed = False
        latest = latest if events.saved is None else events.saved
        if attempt < times and not requests.wait(min(wait_s, LONGEST_WAIT_S)):
            return EXIT_STOPPED
        wait_s *= 2
    _print(f"{times} restarts are used up")
    return EXIT_STOPPED if verdict is Verdict.STOPPED else failure


def with_resume(command: Sequence[str]) -> list[str]:
    """`command` with `--resume_from_checkpoint auto`. Raises `UserError` where a flag contradicts that."""
    scripts = [index for index, word in enumerate(command) if Path(word).name in ("pretrain.py", "pretrain")]
    if not scripts:
        raise UserError(
            "write: mora-ds restart TIMES -- mora-ds pretrain ... (or deepspeed or torchrun with launch/pretrain.py)"
        )
    flags = list(command[scripts[0] + 1 :])
    if any(flag.split("=")[0] == "--overwrite_output_dir" for flag in flags):
        raise UserError("--overwrite_output_dir: every restart would delete the results of the attempt before")
    given = [index for index, flag in enumerate(flags) if flag.split("=")[0] == RESUME]
    for index in given:
        value = flags[index].partition("=")[2] or " ".join(flags[index + 1 : index + 2])
        if value != "auto":
            raise UserError(f"{RESUME} {value}: a restart needs auto, which is added where the flag is missing")
    return list(command) if given else [*command, RESUME, "auto"]


def judge(code: int, events: AttemptEvents) -> Verdict:
    """The verdict on an attempt from the launcher's exit code and the ranks' events.

    The launcher's code is not enough: deepspeed's runner gives 0 for a launcher that a signal has killed (0.19.8),
    torchrun gives 1 whatever a rank gives.
    """
    codes = events.codes or ([] if events.processes else [code])
    if EXIT_USER_ERROR in codes:
        return Verdict.USER_ERROR
    if code == 0 and codes and not any(codes):
        return Verdict.DONE
    return Verdict.STOPPED if EXIT_STOPPED in codes and set(codes) <= {0, EXIT_STOPPED} else Verdict.FAILED


class _StopRequests:
    """Signals that this process received."""

    def __init__(self) -> None:
        self.stop = self.kill = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.kill |= self.stop and number == signal.SIGINT
        if not self.stop:
            _print(f"{signal.Signals(number).name}: every rank saves and leaves; Ctrl-C again ends them at once")
        self.stop = True

    def wait(self, seconds: float) -> bool:
        """Sleep before the next attempt. Returns False when a signal ended that."""
        _print(f"the next attempt begins in {seconds:g} s")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stop:
            time.sleep(min(_TICK_S, seconds))
        return not self.stop


def _attempt(command: list[str], requests: _StopRequests) -> tuple[int, AttemptEvents]:
    """Run `command` once. Returns its exit code and the events of its ranks, when all of them have ended."""
    with tempfile.TemporaryDirectory(prefix="mora_ds-") as folder:
        file = Path(folder) / "events.jsonl"
        told = EventsText(file)
        try:  # in a new session, so that Ctrl-C reaches only this process, which forwards it
            process = subprocess.Popen(command, env={**os.environ, EVENTS_FILE: str(file)}, start_new_session=True)
        except OSError as error:
            raise UserError(f"{command[0]}: {error.strerror}") from error
        asked: set[int] = set()
        while process.poll() is None:
            told.read()
            if requests.kill:
                _send(signal.SIGKILL, [*ranks_below(process.pid), -process.pid])
            elif requests.stop:
                ranks = set(ranks_below(process.pid)) - asked
                _send(signal.SIGUSR1, ranks)
                asked |= ranks
            time.sleep(_TICK_S)
        _wait_for(AttemptEvents.parse(told.read()).processes, requests)
        return process.returncode, AttemptEvents.parse(told.read())


def _wait_for(ranks: list[int], requests: _StopRequests) -> None:
    """Ranks whose launcher was killed save and leave by themselves; until then the output folder is locked."""
    deadline = time.monotonic() + ORPHANS_MAY_SAVE_S
    while left := [rank for rank in ranks if is_rank(rank)]:
        if requests.kill or time.monotonic() > deadline:
            _send(signal.SIGKILL, left)
        time.sleep(_TICK_S)


def _send(number: signal.Signals, processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _print(text: str) -> None:
    print(f"restart.py: {text}", file=sys.stderr, flush=True)
