"""What a rank makes of the others' heartbeats, with a store in this process; real ones are in `test_signals`."""

from __future__ import annotations

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


class Clock:
    """In place of `time`: only sleeping takes any."""

    def __init__(self) -> None:
        self.now = 100.0
        self.meanwhile: Callable[[], None] = lambda: None
        """What another rank does during each sleep."""

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(heartbeat, "time", made)
    return made


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why this rank leaves."""
    found: list[str] = []
    monkeypatch.setattr(signals, "_callback", None)
    monkeypatch.setattr(signals, "leave_failed", found.append)
    return found


@pytest.fixture
def beating(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[Store], Any]:
    """The heartbeat of rank 1 of 3 with a timeout of 20 s, whose threads do nothing by themselves."""
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    monkeypatch.setenv("MASTER_PORT", "1")
    idle = SimpleNamespace(start=lambda: None, join=lambda seconds: None)

    def made(store: Store) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heartbeat, "threading", SimpleNamespace(Thread=lambda **kwargs: idle))
            patch.setattr(heartbeat.dist, "TCPStore", lambda *args, **kwargs: store)
            return _Heartbeat(1, 3, timeout_s=20.0)

    return made


def test_a_failure_that_another_rank_has_reported_is_the_reason(beating: Any, reasons: list[str]) -> None:
    store = Store(**{"beat/2": "7"}, failed="rank 0 has ended with exit code 1")
    beating(store)._beat()
    assert reasons == ["rank 0 has ended with exit code 1: leaving without saving"]
    assert store.values["mora_ds/0/beat/1"] == "1", "it has told that it is there itself"


@pytest.mark.parametrize("values", [{}, {"beat/2": "7"}], ids=["that never came", "that has stopped"])
def test_the_next_rank_is_given_the_timeout(
    beating: Any, reasons: list[str], clock: Clock, values: dict[str, str]
) -> None:
    beating(Store(**values))._beat()
    step = min(heartbeat.BEAT_S, 5.0)
    assert reasons == [f"rank 2 has sent no heartbeat for {20 + step:.0f} s: leaving without saving"]
    assert clock.now == 100.0 + 20 + step + heartbeat._GRACE_S, "and the others are given time to read why"


def test_a_rank_that_goes_on_beating_is_there(beating: Any, reasons: list[str], clock: Clock) -> None:
    """For ten times the timeout, until the store ends, and with it rank 0's node."""
    store = Store()

    def meanwhile() -> None:
        store.values["mora_ds/0/beat/2"] = str(clock.now)
        store.has_ended = clock.now > 100 + 10 * 20

    clock.meanwhile = meanwhile
    beating(store)._beat()
    (reason,) = reasons
    assert reason.startswith("the store on rank 0's node has ended (Connection reset by peer)")
    assert int(store.values["mora_ds/0/beat/1"]) >= 200 / heartbeat.BEAT_S


def test_a_store_that_does_not_answer_is_given_the_timeout_and_more(
    beating: Any, reasons: list[str], clock: Clock
) -> None:
    beating(Store())._watch_store()
    longest = 20 + heartbeat.BEAT_S + heartbeat._GRACE_S
    (reason,) = reasons
    silent = float(reason.split(" for ")[1].split()[0])
    assert reason.startswith("the store on rank 0's node has not answered for ") and longest < silent <= longest + 1


def test_the_reason_is_written_for_the_others_unless_the_store_has_ended(
    beating: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnoticed: list[Any] = []
    monkeypatch.setattr(heartbeat.threading, "excepthook", unnoticed.append)
    store = Store()
    made = beating(store)
    made._report_failure("rank 1 has ended")
    assert store.values == {"mora_ds/0/failed": "rank 1 has ended"}
    store.has_ended = True
    made._report_failure("again")
    assert unnoticed == [], "that is no error of its own"
