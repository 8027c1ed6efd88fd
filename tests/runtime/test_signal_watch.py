"""What the thread that watches a rank's launcher does, without the thread."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from mora_ds.runtime import signals
from mora_ds.runtime.signals import EXIT_STOPPED


class Left(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(signals.os, "_exit", leave)
    monkeypatch.setattr(signals, "_replace_broken_pipes", lambda: None)


@pytest.fixture
def watch(leaving: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A rank that was asked to stop, in training; it has no thread."""
    made: Any = object.__new__(signals._Watch)
    made.since, made.defers, made.settled, made._launcher = time.monotonic(), True, False, None
    monkeypatch.setattr(signals, "_watch", made)
    return made


def test_a_rank_with_nothing_to_save_is_given_some_seconds(watch: Any) -> None:
    watch.defers = False
    watch._check()
    watch.since -= signals._PATIENCE_S
    with pytest.raises(Left, match=rf"^{EXIT_STOPPED}$"):
        watch._check()
    watch.defers = True  # a step, a merge or a checkpoint takes as long as it takes
    watch._check()


def test_a_launcher_that_has_ended_is_a_request(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(signals.os, "kill", lambda process, number: sent.append(number))
    parents = [8]
    monkeypatch.setattr(signals.os, "getppid", lambda: parents[0])
    watch.since, watch._launcher = None, 8
    watch._check()
    assert watch.since is None and not sent
    parents[0] = 1
    watch._check()
    assert watch.since is not None and sent == [signal.SIGTERM] and watch._launcher is None
