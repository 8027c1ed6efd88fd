"""Requests to stop a rank: signals, and a launcher that has ended.

    SIGTERM, SIGUSR1, SIGINT, a launcher that has ended  -> in training: noted; all ranks agree at the end of the step
                                                         -> before and after: `Stopped` in the main thread, at once
    SIGINT again (a second later or more)                -> the process ends at once

The exit code tells a scheduler what to do: 0 done, 1 failed, 2 a mistake that another
start does not correct, 3 done but for what stands beside training, 75 saved and
stopped, to be started again.

A thread notices the requests: Python runs its own handlers between bytecodes only, and
a rank that waits in a collective executes none. `signal.set_wakeup_fd` wakes the thread
at once.
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
EXIT_FAILED_BESIDE = 3
"""The run is done and saved; an evaluation, a task, a tracker or an upload has
failed."""
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: neither done nor failed, to be started again."""
EXIT_INTERRUPTED = 130
"""The exit code that shells give a process that SIGINT ended."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_TICK_S = 0.5
SAME_CTRL_C_S = 1.0
"""A terminal and torchrun both send SIGINT: within this time they are one request."""
_PATIENCE_S = 10.0
"""How long the main thread may take to raise `Stopped` where there is nothing to
save."""


def install() -> None:
    """Watch from now on. To be called in the main thread; later calls have no
    effect."""
    global _watch
    if _watch is None:
        _watch = _Watch()
        # Forked workers share the pipe, and a pool sends them SIGTERM
        os.register_at_fork(after_in_child=uninstall)


def uninstall() -> None:
    """Give signals their default effect again: in a forked process, after an error."""
    if _watch is not None:
        _watch.stop()


@contextmanager
def deferred() -> Iterator[None]:
    """Inside the block requests are noted for `requested`, and nothing is raised."""
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
    """Whether this rank was asked to stop."""
    return _watch is not None and _watch.requested_at is not None


def ignore_requests() -> None:
    """Everything is saved: ignore signals and the end of other processes."""
    if _watch is not None:
        _watch.ignores = True


def leave(code: int) -> NoReturn:
    """End the process. By `os._exit`: gloo's threads often abort at interpreter exit
    after correct results (2.13)."""
    for stream in (sys.stdout, sys.stderr):
        # Where the reader has ended, or the disk is full, the exit code still counts
        with suppress(OSError):
            if stream is not None:
                stream.flush()
    os._exit(code)


class _Watch:
    """Signal handlers and watching thread of this process."""

    def __init__(self) -> None:
        self.requested_at: float | None = None
        """Time of the first request (monotonic seconds), if there was one."""
        self.defers = False
        self.ignores = False
        self._raised = False
        self._last_interrupt: float | None = None
        # Without a launcher the parent is a shell, which a run in the background may
        # outlive
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
                _print("SIGINT again: leaving at once")
                leave(EXIT_INTERRUPTED)
            self._last_interrupt = first
        self._request(signal.Signals(number).name, now)

    def _request(self, reason: str, now: float) -> None:
        if self.requested_at is None and not self.ignores:
            self.requested_at = now
            _replace_broken_pipes()
            saves = "saving at the end of this step, then " if self.defers else ""
            _print(f"{reason}: {saves}leaving")

    def _check(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._request(
                f"the launcher (process {self._launcher}) has ended", time.monotonic()
            )
            self._launcher = None
            # The main thread raises `Stopped`, unless that is deferred
            os.kill(os.getpid(), signal.SIGTERM)
        if self.requested_at is None:
            return
        _replace_broken_pipes()
        if not self.defers and time.monotonic() - self.requested_at > _PATIENCE_S:
            # The main thread waits for others, with nothing to save
            leave(EXIT_STOPPED)


_watch: _Watch | None = None


def _replace_broken_pipes() -> None:
    """Ctrl-C also ends the reader of `... | tee log`: writing a line must not fail."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0)):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def _print(text: str) -> None:
    """To stderr, without locks of Python, which the main thread may hold."""
    # A text that cannot be written must not end the thread that watches
    with suppress(OSError):
        os.write(2, f"{rank_prefix()}{text}\n".encode())
