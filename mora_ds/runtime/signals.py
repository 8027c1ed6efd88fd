"""Requests to stop a rank: signals, and a launcher that has ended.

    SIGTERM, SIGUSR1, SIGINT, a launcher that has ended  -> in training: noted; all ranks agree at the end of the step
                                                         -> before and after: `Stopped` in the main thread, at once
    SIGINT again (a second later or more)                -> the process ends at once

A thread notices the requests: Python runs its own handlers between bytecodes only, and a rank that waits in a
collective executes none. `signal.set_wakeup_fd` wakes the thread at once.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from mora_ds.common.errors import Stopped
from mora_ds.runtime.events import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_STOPPED, Event, emit
from mora_ds.runtime.log_setup import rank, rank_prefix
from mora_ds.runtime.processes import children_of, launchers_above, parent_of

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_TICK_S = 0.5
_SAME_CTRL_C_S = 1.0
"""A terminal sends SIGINT to all processes, and torchrun forwards it: within this time they are one request."""
_PATIENCE_S = 10.0
"""How long the main thread may take to raise `Stopped` where there is nothing to save."""


def install() -> None:
    """Watch from now on. To be called in the main thread; later calls have no effect."""
    global _watch
    if _watch is None:
        _watch = _Watch()
        emit(Event.STARTED, os.getpid())
        os.register_at_fork(after_in_child=uninstall)  # forked workers share the pipe, and a pool sends them SIGTERM


def uninstall() -> None:
    """Give the signals their default effect again: this process is about to end with an error, or is a forked one."""
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
        _watch.defers, _watch.since = False, None


def requested() -> bool:
    """Whether this rank was asked to stop."""
    return _watch is not None and _watch.since is not None


def settle() -> None:
    """Everything is saved: from now on this rank ignores signals and the end of other processes."""
    if _watch is not None:
        _watch.settled = True


def is_installed() -> bool:
    """Whether this process is a rank that may end itself, rather than a program that only imports mora_ds."""
    return _watch is not None


def before_failure(callback: Callable[[str], None]) -> None:
    """`callback(reason)` is called once, before this rank ends with an error."""
    global _callback
    _callback = callback


def report_failure(reason: str) -> None:
    """Call the callback of `before_failure`, unless that has happened."""
    global _callback
    callback, _callback = _callback, None
    if callback is not None:
        callback(reason)


def leave_failed(reason: str) -> None:
    """End the process because another rank has failed, unless this one has saved and is leaving already."""
    if _watch is not None and not _watch.settled:
        _print(reason)
        leave(EXIT_FAILURE)


def leave(code: int) -> NoReturn:
    """End the process. By `os._exit`: gloo's threads often abort at interpreter exit after correct results (2.13)."""
    emit(Event.LEFT, code)
    if code not in (0, EXIT_STOPPED):
        report_failure(f"rank {rank()} has ended with exit code {code}")
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):  # the reader has ended; the exit code still counts
            stream.flush()
    os._exit(code)


class _Watch:
    """Signal handlers and watching thread of this process."""

    def __init__(self) -> None:
        self.since: float | None = None
        """Time of the first request (monotonic seconds), if there was one."""
        self.defers = self.settled = self._raised = self._terminated = False
        self._last_interrupt: float | None = None
        self._launchers = launchers_above(os.getpid())
        self._siblings = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        self._ticks_with_dead_sibling = 0
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            signal.signal(number, self._in_main_thread)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="mora_ds signals", daemon=True).start()

    def stop(self) -> None:
        self.settled = True
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.defers or self.settled or self._raised:
            return
        self._raised = True
        raise Stopped(f"stopped by {signal.Signals(number).name} with nothing to save")

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], _TICK_S if self.since is None else _TICK_S / 5)
            for number in os.read(self._reader, 64) if ready else b"":
                self._note(number)
            if not self.settled:
                self._check_processes()

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._last_interrupt is not None and now - self._last_interrupt > _SAME_CTRL_C_S:
                _print("SIGINT again: leaving at once")
                leave(EXIT_INTERRUPTED)
            self._last_interrupt = self._last_interrupt or now
        self._terminated |= number == signal.SIGTERM
        self._request(signal.Signals(number).name, now)

    def _request(self, reason: str, now: float) -> None:
        if self.since is None and not self.settled:
            self.since = now
            _replace_broken_pipes()
            _print(f"{reason}: {'saving at the end of this step, then leaving' if self.defers else 'leaving'}")

    def _check_processes(self) -> None:
        for process, launcher in self._launchers:
            if parent_of(process) != launcher:
                self._launchers = []
                self._request(f"the launcher (process {launcher}) has ended", time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)  # raises `Stopped` in the main thread unless that is deferred
                return
        if self.since is None:
            return
        _replace_broken_pipes()
        if not self.defers and time.monotonic() - self.since > _PATIENCE_S:
            leave(EXIT_STOPPED)  # the main thread waits for others, with nothing to save
        if self._terminated and self._siblings > 1:
            # Launchers end the other ranks by SIGTERM when one has died; with NCCL, waiting for that one never ends.
            running = len(children_of(os.getppid()))
            self._ticks_with_dead_sibling = self._ticks_with_dead_sibling + 1 if 0 < running < self._siblings else 0
            if self._ticks_with_dead_sibling > 10:
                leave_failed("another rank of this node has died: leaving without saving")


_watch: _Watch | None = None
_callback: Callable[[str], None] | None = None


def _replace_broken_pipes() -> None:
    """Ctrl-C also ends the reader of `... | tee log`; writing a log line must not make the checkpoint fail."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0)):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def _print(text: str) -> None:
    """To stderr, without the locks of Python's streams and loggers, which the main thread may hold."""
    os.write(2, f"{rank_prefix()}{text}\n".encode())
