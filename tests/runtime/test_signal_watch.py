"""What the thread that watches a rank's launcher does, without the thread."""

import time

import pytest

from mora_ds.runtime import signals
from mora_ds.runtime.signals import EXIT_STOPPED


class Left(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def leaving(monkeypatch):
    def leave(code):
        raise Left(code)

    monkeypatch.setattr(signals.os, "_exit", leave)
    monkeypatch.setattr(signals, "_replace_broken_pipes", lambda: None)


@pytest.fixture
def watch(leaving, monkeypatch):
    """A rank that was asked to stop, in training; it has no thread."""
    stand_in = object.__new__(signals._Watch)
    stand_in.since = time.monotonic()
    stand_in.defers = True
    stand_in.settled = False
    stand_in._launcher = None
    monkeypatch.setattr(signals, "_watch", stand_in)
    return stand_in


def test_a_rank_with_nothing_to_save_is_given_some_seconds(watch):
    watch.defers = False
    watch._check()
    watch.since -= signals._PATIENCE_S
    with pytest.raises(Left, match=rf"^{EXIT_STOPPED}$"):
        watch._check()
    watch.defers = True  # a step, a merge or a checkpoint takes as long as it takes
    watch._check()
