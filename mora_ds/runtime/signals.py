"""Asked to stop, or left alone: how a rank notices, and when it may act on it.

    SIGTERM, SIGUSR1, SIGINT, a launcher that has died   -> in training: noted; all ranks agree at the next step's end
                                                         -> before and after it: `Stopped` in the main thread, at once
    SIGINT again (a second later or more)                -> the process ends, whatever it does

A thread does the noticing: Python runs its own handlers only between bytecodes, and a rank that waits in a collective
executes none. `signal.set_wakeup_fd` tells the thread at once.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from mora_ds.errors import Stopped
from mora_ds.runtime.events import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_STOPPED, Event, report
from mora_ds.runtime.processes import launchers_above, parent_of, siblings_alive

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_TICK_S = 0.5
_SAME_CTRL_C_S = 1.0
"""A terminal sends SIGINT to everybody, and torchrun sends it on: within this time it is one and the same."""
_PATIENCE_S = 10.0
"""How long the main thread may take to raise `Stopped` where there is nothing to save."""


def install() -> None:
    """Watch from now on. In the main thread; once a process."""
    global _watch
    if _watch is None:
        _watch = _Watch()
        report(Event.STARTED, os.getpid())
        os.register_at_fork(after_in_child=_in_child)


def uninstall() -> None:
    """Signals have their usual effect again: this process is about to end with an error."""
    if _watch is not None:
        _watch.stop()


@contextmanager
def deferred() -> Iterator[None]:
    """Within it requests are noted for `requested`, and nothing is raised."""
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
    """All is saved: from here on this rank leaves in peace, whoever else goes and whatever signal comes."""
    if _watch is not None:
        _watch.settled = True


def is_installed() -> bool:
    """Whether this process is a rank that may end itself, and not a program that only uses these rooms."""
    return _watch is not None


def before_failure(tell: Callable[[str], None]) -> None:
    """`tell(reason)` is called once, before this rank ends with an error."""
    global _tell
    _tell = tell


def tell_failure(reason: str) -> None:
    """Let the other ranks know, if they do not yet."""
    global _tell
    tell, _tell = _tell, None
    if tell is not None:
        tell(reason)


def leave_failed(reason: str) -> None:
    """End the process for what befell another rank, unless this one is leaving already."""
    if _watch is not None and not _watch.settled:
        _say(reason)
        leave(EXIT_FAILURE)


def leave(code: int) -> NoReturn:
    """End the process. By `os._exit`: gloo's threads often abort at interpreter exit after right results (2.13)."""
    report(Event.LEFT, code)
    if code not in (0, EXIT_STOPPED):
        tell_failure(f"rank {_rank()} has ended with exit code {code}")
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            continue  # whoever read us is gone; the code still counts
    os._exit(code)


class _Watch:
    """Handlers and thread of this process."""

    def __init__(self) -> None:
        self.since: float | None = None
        """When the first request came (monotonic seconds), if one did."""
        self.defers = self.settled = self._raised = self._terminated = False
        self._last_interrupt: float | None = None
        self._launchers = launchers_above(os.getpid())
        self._siblings = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        self._alone = 0
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            signal.signal(number, self._in_main_thread)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="mora_ds stop watch", daemon=True).start()

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
                self._look_around()

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._last_interrupt is not None and now - self._last_interrupt > _SAME_CTRL_C_S:
                _say("SIGINT again: leaving at once")
                leave(EXIT_INTERRUPTED)
            self._last_interrupt = self._last_interrupt or now
        self._terminated |= number == signal.SIGTERM
        self._request(signal.Signals(number).name, now)

    def _request(self, reason: str, now: float) -> None:
        if self.since is None and not self.settled:
            self.since = now
            _mend_pipes()
            _say(f"{reason}: {'saving at the end of this step, then leaving' if self.defers else 'leaving'}")

    def _look_around(self) -> None:
        for process, launcher in self._launchers:
            if parent_of(process) != launcher:
                self._launchers = []
                self._request(f"the launcher (process {launcher}) has gone", time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)  # raises in the main thread, where that is the thing to do
                return
        if self.since is None:
            return
        _mend_pipes()
        if not self.defers and time.monotonic() - self.since > _PATIENCE_S:
            leave(EXIT_STOPPED)  # the main thread waits for others, with nothing to save
        self._leave_if_alone()

    def _leave_if_alone(self) -> None:
        """Launchers end the others by SIGTERM when a rank has died; waiting for that one would never end (NCCL)."""
        if not self._terminated or self._siblings < 2:
            return
        alive = siblings_alive(os.getppid())
        self._alone = self._alone + 1 if 0 < alive < self._siblings else 0
        if self._alone > 10:
            leave_failed("another rank of this node has died: leaving without saving")


_watch: _Watch | None = None
_tell: Callable[[str], None] | None = None


def _in_child() -> None:
    """Forked workers share the pipe, and a pool ends its workers by SIGTERM: not a word of that to the parent."""
    if _watch is not None:
        _watch.stop()


def _mend_pipes() -> None:
    """Ctrl-C ends the reader of `... | tee log` too; a log line must not fail the checkpoint for it."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _say(text: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    line = f"[rank {_rank()}] {text}\n" if world > 1 else f"{text}\n"
    os.write(2, line.encode())


def _rank() -> Any:
    return os.environ.get("RANK", "0")
