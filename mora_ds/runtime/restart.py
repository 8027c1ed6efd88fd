"""Run a command again until it is done: `restart(times, wait_s, command)`, behind `launch/restart.py`.

    failure, or stopped (75)  -> wait, then again with --resume_from_checkpoint auto
    done (0), user error (2)  -> that is the end
    the same step twice       -> so is this: two failures with no checkpoint in between

A signal to this process asks every rank to save and leave, however long that takes; the launchers between (deepspeed
0.19.8, torchrun of torch 2.13) would kill them after 30 seconds, or know nothing of it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import FrameType

from mora_ds.errors import UserError
from mora_ds.runtime.events import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR, STATUS_FILE, Told
from mora_ds.runtime.processes import is_rank, ranks_below

RESUME = "--resume_from_checkpoint"
LONGEST_WAIT_S = 300.0
LEFT_BEHIND_S = 120.0
"""How long ranks that have lost their launcher may take to save before the next attempt kills them."""
_TICK_S = 0.3


class Verdict(Enum):
    """How an attempt ended."""

    DONE = "done"
    USER_ERROR = "a mistake that a restart does not mend"
    STOPPED = "stopped, to be run again"
    FAILED = "failed"


def restart(times: int, wait_s: float, command: Sequence[str]) -> int:
    """Run `command`, which starts a `pretrain.py`, and up to `times` times again. Returns the exit code of it all.

    Raises `UserError` for a command that cannot be resumed.
    """
    command = with_resume(command)
    asked = _Asked()
    furthest: int | None = None
    failures = 0
    for attempt in range(times + 1):
        _say(f"attempt {attempt + 1} of at most {times + 1}: {shlex.join(command)}")
        code, told = _attempt(command, asked)
        verdict = judge(code, told)
        _say(f"attempt {attempt + 1}: {verdict.value} (launcher's code {code}, ranks' {told.codes}); {_saved(told)}")
        if asked.at_once:
            return EXIT_INTERRUPTED
        if verdict in (Verdict.DONE, Verdict.USER_ERROR):
            return 0 if verdict is Verdict.DONE else EXIT_USER_ERROR
        if asked.to_stop:
            return EXIT_STOPPED if verdict is Verdict.STOPPED else _failure(code)
        if verdict is Verdict.FAILED:
            if failures and told.processes and told.saved is None:
                _say(f"no checkpoint since the failure before ({_at(furthest)}): another attempt would go the same way")
                return _failure(code)
            failures += 1
        furthest = furthest if told.saved is None else told.saved
        if attempt < times and not asked.sleep(min(wait_s * 2**attempt, LONGEST_WAIT_S)):
            return EXIT_STOPPED
    _say(f"{times} restarts are used up")
    return EXIT_STOPPED if verdict is Verdict.STOPPED else _failure(code)


def with_resume(command: Sequence[str]) -> list[str]:
    """`command` with `--resume_from_checkpoint auto`. Raises `UserError` where that contradicts it."""
    scripts = [index for index, word in enumerate(command) if Path(word).name == "pretrain.py"]
    if not scripts:
        raise UserError("write: restart.py TIMES -- deepspeed launch/pretrain.py ... (torchrun as well)")
    flags = list(command[scripts[0] + 1 :])
    if any(flag.split("=")[0] == "--overwrite_output_dir" for flag in flags):
        raise UserError("--overwrite_output_dir: every restart would delete what the attempt before has done")
    given = [index for index, flag in enumerate(flags) if flag.split("=")[0] == RESUME]
    for index in given:
        value = flags[index].partition("=")[2] or " ".join(flags[index + 1 : index + 2])
        if value != "auto":
            raise UserError(f"{RESUME} {value}: a restart needs auto, which is added where it is missing")
    return list(command) if given else [*command, RESUME, "auto"]


def judge(code: int, told: Told) -> Verdict:
    """What the launcher's exit code and the ranks' own mean together.

    deepspeed's runner gives 0 for a launcher that a signal has killed (0.19.8), torchrun 1 for whatever a rank gives.
    """
    codes = told.codes or ([] if told.processes else [code])
    if EXIT_USER_ERROR in codes:
        return Verdict.USER_ERROR
    if code == 0 and codes and not any(codes):
        return Verdict.DONE
    return Verdict.STOPPED if EXIT_STOPPED in codes and set(codes) <= {0, EXIT_STOPPED} else Verdict.FAILED


class _Asked:
    """Signals that this process got."""

    def __init__(self) -> None:
        self.to_stop = self.at_once = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.at_once |= self.to_stop and number == signal.SIGINT
        if not self.to_stop:
            _say(f"{signal.Signals(number).name}: every rank saves and leaves; Ctrl-C once more ends them at once")
        self.to_stop = True

    def sleep(self, seconds: float) -> bool:
        """False when a signal ended it."""
        _say(f"the next attempt begins in {seconds:g} s")
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.to_stop:
            time.sleep(min(_TICK_S, seconds))
        return not self.to_stop


def _attempt(command: list[str], asked: _Asked) -> tuple[int, Told]:
    """One run of `command`: its exit code, and what its ranks have told. None of them is left afterwards."""
    with tempfile.TemporaryDirectory(prefix="mora_ds-") as folder:
        status = Path(folder) / "status.jsonl"
        status.touch()
        try:  # a session of its own: Ctrl-C is for this process, which passes it on as the ranks need it
            process = subprocess.Popen(command, env={**os.environ, STATUS_FILE: str(status)}, start_new_session=True)
        except OSError as error:
            raise UserError(f"{command[0]}: {error.strerror}") from error
        told_to_stop: set[int] = set()
        while process.poll() is None:
            if asked.at_once:
                _kill(ranks_below(process.pid))
                _kill([-process.pid])
            elif asked.to_stop:
                _forward(set(ranks_below(process.pid)) - told_to_stop, told_to_stop)
            time.sleep(_TICK_S)
        _wait_for(Told.read(status).processes, asked)
        return process.returncode, Told.read(status)


def _forward(ranks: set[int], done: set[int]) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGUSR1)
        done.add(rank)


def _wait_for(ranks: list[int], asked: _Asked) -> None:
    """Ranks whose launcher was killed save and leave by themselves; until then the output folder is locked."""
    until = time.monotonic() + LEFT_BEHIND_S
    while left := [rank for rank in ranks if is_rank(rank)]:
        if asked.at_once or time.monotonic() > until:
            _kill(left)
        time.sleep(_TICK_S)


def _kill(processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _failure(code: int) -> int:
    return code if code > 0 and code != EXIT_STOPPED else EXIT_FAILURE


def _saved(told: Told) -> str:
    return "no checkpoint was written" if told.saved is None else f"last checkpoint: step {told.saved}"


def _at(step: int | None) -> str:
    return "none so far" if step is None else f"step {step}"


def _say(text: str) -> None:
    print(f"restart.py: {text}", file=sys.stderr, flush=True)
