"""What the thread that watches a rank's launcher and the other ranks does, without the thread."""

from __future__ import annotations

import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from mora_ds.runtime import signals
from mora_ds.runtime.events import EXIT_STOPPED


class Left(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(signals.os, "_exit", leave)
    monkeypatch.setattr(signals, "_callback", None)
    monkeypatch.setattr(signals, "_replace_broken_pipes", lambda: None)


@pytest.mark.parametrize(("code", "told"), [(0, []), (EXIT_STOPPED, []), (1, ["rank 0 has ended with exit code 1"])])
def test_a_failure_is_reported_once_and_nothing_else_is(leaving: None, code: int, told: list[str]) -> None:
    reported: list[str] = []
    signals.before_failure(reported.append)
    for _ in range(2):
        with pytest.raises(Left, match=rf"^{code}$"):
            signals.leave(code)
    assert reported == told


def test_a_rank_that_has_saved_does_not_end_for_another_ones_failure(
    leaving: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for watch in (None, SimpleNamespace(settled=True)):
        monkeypatch.setattr(signals, "_watch", watch)
        signals.leave_failed("another rank has failed")
    monkeypatch.setattr(signals, "_watch", SimpleNamespace(settled=False))
    with pytest.raises(Left, match=r"^1$"):
        signals.leave_failed("another rank has failed")


@pytest.fixture
def watch(leaving: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A rank of two on this machine that was asked to stop by SIGTERM, in training; it has no thread."""
    made: Any = object.__new__(signals._Watch)
    made.since, made.defers, made.settled, made._raised, made._terminated = time.monotonic(), True, False, False, True
    made._launchers, made._siblings, made._ticks_with_dead_sibling = [], 2, 0
    monkeypatch.setattr(signals, "_watch", made)
    return made


def test_a_rank_ends_when_another_one_of_its_node_is_gone_for_a_while(
    watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NCCL a collective waits for a dead rank without end. A launcher that is gone has no children at all."""
    running: list[int] = [1] * 10 + [2] + [0] * 20 + [1] * 10
    for count in running:
        monkeypatch.setattr(signals, "children_of", lambda process, count=count: [1] * count)
        watch._check_processes()
    monkeypatch.setattr(signals, "children_of", lambda process: [1])
    watch._terminated = False
    watch._check_processes()  # asked by another signal, no rank need have died
    watch._terminated = True
    with pytest.raises(Left, match=r"^1$"):
        watch._check_processes()


def test_a_rank_with_nothing_to_save_is_given_some_seconds(watch: Any) -> None:
    watch._terminated = watch.defers = False
    watch._check_processes()
    watch.since -= signals._PATIENCE_S
    with pytest.raises(Left, match=rf"^{EXIT_STOPPED}$"):
        watch._check_processes()
    watch.defers = True  # a step, a merge or a checkpoint takes as long as it takes
    watch._check_processes()


def test_a_launcher_that_has_ended_is_a_request(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(signals.os, "kill", lambda process, number: sent.append(number))
    monkeypatch.setattr(signals, "parent_of", {10: 8, 8: 1}.get)
    watch.since, watch._launchers = None, [(10, 8)]
    watch._check_processes()
    assert watch.since is None and not sent
    watch._launchers = [(10, 8), (8, 7)]
    watch._check_processes()
    assert watch.since is not None and sent == [signal.SIGTERM] and not watch._launchers
