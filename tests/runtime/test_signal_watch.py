"""The thread that watches a rank's launcher, tested without the thread."""

import time

import pytest

from mora_ds.runtime import signals
from mora_ds.runtime.signals import EXIT_STOPPED


class Left(BaseException):
    """Raised in place of the end of the process."""


def test_a_rank_with_nothing_to_save_is_given_some_seconds(monkeypatch):
    def exit_process(code):
        raise Left(code)

    monkeypatch.setattr(signals.os, "_exit", exit_process)
    monkeypatch.setattr(signals, "_replace_broken_pipes", lambda: None)
    watch = object.__new__(signals._Watch)
    asked_now = {"requested_at": time.monotonic(), "ignores": False, "_launcher": None}
    vars(watch).update(asked_now, defers=False)
    monkeypatch.setattr(signals, "_watch", watch)
    watch._check()
    watch.requested_at -= signals._PATIENCE_S
    with pytest.raises(Left, match=rf"^{EXIT_STOPPED}$"):
        watch._check()
    watch.defers = True  # a step, a merge or a checkpoint takes as long as it takes
    watch._check()
