"""Heartbeats between ranks: NCCL and TCP wait without end for a node whose power or network has failed.

Every rank increments a counter in the launcher's key-value store and reads that of the next rank. A rank whose counter
does not change for `timeout_s` is reported as failed. Whoever reports one, or fails itself, writes the reason to the
store, so that all ranks end within seconds.

                 store (rank 0's node):   beat/0 = 41   beat/1 = 41   beat/2 = 17   failed = "rank 2 ..."
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from mora_ds.runtime import signals

BEAT_S = 5.0
_GRACE_S = 10.0
"""Between the report of a failure and leaving: the launcher or a collective may give a better reason in that time."""
_FAREWELL_S = 2.0


def start(timeout_s: float) -> None:
    """Watch the other ranks until this process ends; has no effect in a job of one rank, or when called again.

    This process ends with exit code 1 when a rank fails.
    """
    global _heartbeat
    if _heartbeat is None and dist.get_world_size() > 1:
        _heartbeat = _Heartbeat(dist.get_rank(), dist.get_world_size(), timeout_s)


class _Heartbeat:
    def __init__(self, rank: int, world: int, timeout_s: float) -> None:
        self.rank, self.next, self.timeout_s = rank, (rank + 1) % world, timeout_s
        # A separate connection: one that waits for a key blocks all other users of the same one.
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
        self._prefix = f"mora_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._answered = time.monotonic()
        signals.before_failure(self._report_failure)
        for work in (self._beat, self._watch_store):
            threading.Thread(target=work, name=f"mora_ds heartbeat {work.__name__}", daemon=True).start()

    def _beat(self) -> None:
        count, seen, since = 0, "", time.monotonic()
        while True:
            count += 1
            try:
                self._store.set(self._key(f"beat/{self.rank}"), str(count))
                latest, failed = self._get(f"beat/{self.next}"), self._get("failed")
            except RuntimeError as error:  # torch's DistError
                return self._leave(f"the store on rank 0's node has ended ({str(error).splitlines()[0]})")
            self._answered = now = time.monotonic()
            if latest != seen:
                seen, since = latest, now
            if failed:
                return self._leave(failed)
            if now - since > self.timeout_s:
                return self._leave(f"rank {self.next} has sent no heartbeat for {now - since:.0f} s")
            time.sleep(min(BEAT_S, self.timeout_s / 4))

    def _watch_store(self) -> None:
        """A call to a store behind a broken network link does not return."""
        while True:
            silent = time.monotonic() - self._answered
            if silent > self.timeout_s + BEAT_S + _GRACE_S:
                return self._leave(f"the store on rank 0's node has not answered for {silent:.0f} s")
            time.sleep(1)

    def _leave(self, reason: str) -> None:
        signals.report_failure(reason)
        time.sleep(_GRACE_S)
        signals.leave_failed(f"{reason}: leaving without saving")

    def _report_failure(self, reason: str) -> None:
        """Write the reason to the store, unless that does not answer in time, or has ended: then rank 0 has, and the
        others notice that."""

        def write() -> None:
            with suppress(RuntimeError):  # torch's DistError
                self._store.set(self._key("failed"), reason)

        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        writing.join(_FAREWELL_S)

    def _get(self, name: str) -> str:
        key = self._key(name)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"


_heartbeat: _Heartbeat | None = None
