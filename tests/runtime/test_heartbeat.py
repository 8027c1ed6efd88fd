"""What a rank makes of the others' heartbeats, with a store in this process; real ones are in `test_signals`."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mora_ds.runtime import heartbeat, signals
from mora_ds.runtime.heartbeat import _Heartbeat


class Store:
    """A key-value store as TCPStore is one, which may end."""

    def __init__(self, **values: str) -> None:
        self.values, self.has_ended = {f"mora_ds/0/{key}": value for key, value in values.items()}, False

    def set(self, key: str, value: str) -> None:
        if self.has_ended:
            raise RuntimeError("Connection reset by peer\nstack")
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return keys[0] in self.values


@pytest.fixture
def beating(monkeypatch: pytest.MonkeyPatch) -> Callable[[Store], tuple[str, Any]]:
    """Why rank 1 of 3 leaves, and the heartbeat, whose timeout is 0.2 s."""
    monkeypatch.setattr(heartbeat, "_GRACE_S", 0.0)
    monkeypatch.setattr(signals, "_callback", None)
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    monkeypatch.setenv("MASTER_PORT", "1")
    idle = SimpleNamespace(start=lambda: None, join=lambda seconds: None)
    monkeypatch.setattr(heartbeat, "threading", SimpleNamespace(Thread=lambda **kwargs: idle))
    reasons: list[str] = []
    monkeypatch.setattr(signals, "leave_failed", reasons.append)

    def beat(store: Store) -> tuple[str, Any]:
        monkeypatch.setattr(heartbeat.dist, "TCPStore", lambda *args, **kwargs: store)
        made = _Heartbeat(1, 3, timeout_s=0.2)
        made._beat()
        return reasons.pop(), made

    return beat


def test_a_failure_that_another_rank_has_reported_is_the_reason(beating: Any) -> None:
    store = Store(**{"beat/2": "7"}, failed="rank 0 has ended with exit code 1")
    assert beating(store)[0] == "rank 0 has ended with exit code 1: leaving without saving"
    assert store.values["mora_ds/0/beat/1"] == "1", "it has told that it is there itself"


@pytest.mark.parametrize("values", [{}, {"beat/2": "7"}], ids=["that never came", "that has stopped"])
def test_the_next_rank_is_given_the_timeout(beating: Any, values: dict[str, str]) -> None:
    began = time.monotonic()
    assert beating(Store(**values))[0].startswith("rank 2 has sent no heartbeat for 0 s")
    assert 0.2 < time.monotonic() - began < 2


def test_a_rank_that_goes_on_beating_is_there(beating: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the timeout, until the store ends, and with it rank 0's node."""
    store, since = Store(), time.monotonic()
    sleep = time.sleep

    def meanwhile(seconds: float) -> None:
        sleep(seconds)
        store.set("mora_ds/0/beat/2", str(time.monotonic()))
        store.has_ended = time.monotonic() - since > 0.5

    monkeypatch.setattr(heartbeat.time, "sleep", lambda seconds: None if store.has_ended else meanwhile(seconds))
    assert beating(store)[0].startswith("the store on rank 0's node has ended (Connection reset by peer)")
    assert int(store.values["mora_ds/0/beat/1"]) > 5


def test_a_store_that_does_not_answer_is_given_the_timeout_and_more(
    beating: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made = beating(Store(failed="known"))
    reasons: list[str] = []
    monkeypatch.setattr(signals, "leave_failed", reasons.append)
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.1)

    def later(seconds: float) -> None:
        made._answered -= seconds / 10

    monkeypatch.setattr(heartbeat.time, "sleep", later)
    made._answered = time.monotonic() - 0.2
    made._watch_store()
    assert reasons == ["the store on rank 0's node has not answered for 0 s: leaving without saving"]
    assert time.monotonic() - made._answered > 0.3


def test_the_reason_is_written_for_the_others_unless_the_store_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = object.__new__(_Heartbeat)
    made._prefix, made._store = "mora_ds/0", Store()
    made._report_failure("rank 1 has ended")
    assert made._store.values == {"mora_ds/0/failed": "rank 1 has ended"}
    made._store.has_ended = True
    made._report_failure("again")
