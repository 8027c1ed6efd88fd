"""Stop requests to a rank: signals, and the end of the launcher.

    SIGTERM, SIGUSR1, SIGINT, end of the launcher    -> in training: recorded; all ranks stop after the step
                                                     -> before and after training: `Stopped` in the main thread
    SIGINT again (a second later or more)            -> the process ends immediately

Exit codes for the scheduler: 0 done, 1 failed, 2 user error (a restart does not help), 3
trained with a non-fatal failure, 75 saved and stopped (to be restarted).

A thread receives the requests, because Python runs signal handlers only between
bytecodes, and a rank that waits in a collective executes none. `signal.set_wakeup_fd`
wakes the thread immediately.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from mora_ds.common.errors import Stopped
from mora_ds.runtime.log_setup import rank_prefix

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_NON_FATAL_FAILURE = 3
"""The run is done and saved, but an evaluation, a task, a tracker or an upload has
failed."""
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: neither done nor failed, to be restarted."""
EXIT_INTERRUPTED = 130
"""The shells' exit code for a process ended by SIGINT."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_TICK_S = 0.5
SAME_CTRL_C_S = 1.0
"""On Ctrl-C a terminal and torchrun both send SIGINT: within this time they count as
one request."""
_STOP_TIMEOUT_S = 10.0
"""How long the main thread may take to raise `Stopped` if there is nothing to save."""


def install() -> None:
    """Start to handle stop requests. Call in the main thread; later calls have no
    effect."""
    global _watch
    if _watch is None:
        _watch = _Watch()
        # Forked workers share the pipe, and a pool sends them SIGTERM
        os.register_at_fork(after_in_child=uninstall)


def uninstall() -> None:
    """Restore the default effect of signals: in a forked process, after an error."""
    if _watch is not None:
        _watch.stop()


@contextmanager
def deferred() -> Iterator[None]:
    """A context in which requests are only recorded for `requested`, not raised."""
    if _watch is None:
        yield
        return
    _watch.defers = True
    try:
        yield
    finally:
        _watch.defers = False
        _watch.requested_at = None


def requested() -> bool:
    """Whether this rank got a stop request."""
    return _watch is not None and _watch.requested_at is not None


def ignore_requests() -> None:
    """Ignore signals and the end of other processes. Call when everything is saved."""
    if _watch is not None:
        _watch.ignores = True


def exit_process(code: int) -> NoReturn:
    """Flush the streams and end the process by `os._exit`, because gloo's threads often
    abort at interpreter exit (torch 2.13)."""
    for stream in (sys.stdout, sys.stderr):
        # A closed pipe or a full disk must not change the exit code
        with suppress(OSError):
            if stream is not None:
                stream.flush()
    os._exit(code)


class _Watch:
    """Signal handlers and the thread that receives stop requests."""

    def __init__(self) -> None:
        self.requested_at: float | None = None
        """Time of the first request (monotonic seconds), if any."""
        self.defers = False
        self.ignores = False
        self._raised = False
        self._last_interrupt: float | None = None
        # Without a launcher the parent is a shell, which may end before a run in the
        # background
        self._launcher = os.getppid() if "RANK" in os.environ else None
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            signal.signal(number, self._in_main_thread)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="mora_ds signals", daemon=True).start()

    def stop(self) -> None:
        self.ignores = True
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self.defers or self.ignores or self._raised:
            return
        self._raised = True
        raise Stopped(f"stopped by {signal.Signals(number).name} with nothing to save")

    def _run(self) -> None:
        while True:
            tick = _TICK_S if self.requested_at is None else _TICK_S / 5
            ready, _, _ = select.select([self._reader], [], [], tick)
            for number in os.read(self._reader, 64) if ready else b"":
                self._note(number)
            if not self.ignores:
                self._check()

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            first = self._last_interrupt or now
            if now - first > SAME_CTRL_C_S:
                _print("SIGINT again: exiting immediately")
                exit_process(EXIT_INTERRUPTED)
            self._last_interrupt = first
        self._request(signal.Signals(number).name, now)

    def _request(self, reason: str, now: float) -> None:
        if self.requested_at is None and not self.ignores:
            self.requested_at = now
            _replace_broken_pipes()
            saves = "saving at the end of this step, then " if self.defers else ""
            _print(f"{reason}: {saves}exiting")

    def _check(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._request(
                f"the launcher (process {self._launcher}) has ended", time.monotonic()
            )
            self._launcher = None
            # Makes the main thread raise `Stopped`, unless deferred
            os.kill(os.getpid(), signal.SIGTERM)
        if self.requested_at is None:
            return
        _replace_broken_pipes()
        if not self.defers and time.monotonic() - self.requested_at > _STOP_TIMEOUT_S:
            # Nothing to save; the main thread waits for other ranks
            exit_process(EXIT_STOPPED)


_watch: _Watch | None = None


def _replace_broken_pipes() -> None:
    """Replace stdout and stderr by /dev/null if their reader has ended, as Ctrl-C also
    ends the `tee` of `... | tee log`."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0)):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def _print(text: str) -> None:
    """Print to stderr without Python's locks, which the main thread may hold."""
    # A failed write must not end this thread
    with suppress(OSError):
        os.write(2, f"{rank_prefix()}{text}\n".encode())
