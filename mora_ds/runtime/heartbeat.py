"""Whether the other ranks are still there: NCCL waits in silence for a node that has gone, and so does TCP.

Every rank sets a counter of its own in the launcher's key-value store and reads that of the next rank. A rank whose
counter stands still for `silence_s` is given up; whoever gives one up, or fails itself, leaves a word in the store, so
that all ranks end within seconds and not one after the other.

                 store (rank 0's node):   beat/0 = 41   beat/1 = 41   beat/2 = 17   failed = "rank 2 ..."
"""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from mora_ds.runtime import signals

BEAT_S = 5.0
_GRACE_S = 10.0
"""Between hearing of a failure and leaving: the launcher or the collective may tell it better, and sooner."""
_FAREWELL_S = 2.0


def start(silence_s: float) -> None:
    """Watch the others until this process ends; once a process. Nothing to do for a single rank.

    A rank that is given up takes this process down with exit code 1.
    """
    global _pulse
    if _pulse is None and dist.get_world_size() > 1:
        _pulse = _Pulse(dist.get_rank(), dist.get_world_size(), silence_s)


class _Pulse:
    def __init__(self, rank: int, world: int, silence_s: float) -> None:
        self.rank, self.next, self.silence_s = rank, (rank + 1) % world, silence_s
        # A connection of its own: one that waits for a key holds up all others who use it.
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=silence_s),
        )
        self._prefix = f"mora_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._answered = time.monotonic()
        signals.before_failure(self._farewell)
        for work in (self._beat, self._listen):
            threading.Thread(target=work, name=f"mora_ds pulse {work.__name__}", daemon=True).start()

    def _beat(self) -> None:
        count, heard, since = 0, "", time.monotonic()
        while True:
            count += 1
            try:
                self._store.set(self._key(f"beat/{self.rank}"), str(count))
                latest, failed = self._get(f"beat/{self.next}"), self._get("failed")
            except RuntimeError as error:  # torch's DistError
                return self._give_up(f"the store of rank 0's node has gone ({str(error).splitlines()[0]})")
            self._answered = now = time.monotonic()
            if latest != heard:
                heard, since = latest, now
            if failed:
                return self._give_up(failed)
            if now - since > self.silence_s:
                return self._give_up(f"rank {self.next} has not been heard of for {now - since:.0f} s")
            time.sleep(min(BEAT_S, self.silence_s / 4))

    def _listen(self) -> None:
        """A call to a store behind a cut link does not come back."""
        while True:
            silent = time.monotonic() - self._answered
            if silent > self.silence_s + BEAT_S + _GRACE_S:
                return self._give_up(f"the store of rank 0's node has not answered for {silent:.0f} s")
            time.sleep(1)

    def _give_up(self, reason: str) -> None:
        signals.tell_failure(reason)
        time.sleep(_GRACE_S)
        signals.leave_failed(f"{reason}: leaving without saving")

    def _farewell(self, reason: str) -> None:
        """Tell the others, unless the store cannot be reached."""
        speaking = threading.Thread(target=lambda: self._store.set(self._key("failed"), reason), daemon=True)
        speaking.start()
        speaking.join(_FAREWELL_S)

    def _get(self, name: str) -> str:
        key = self._key(name)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"


_pulse: _Pulse | None = None
