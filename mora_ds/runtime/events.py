"""What a rank tells the wrapper that started its launcher: launchers keep exit codes back, or turn them into others.

One JSON line an event in the file that the environment names; without that variable nothing is written.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

STATUS_FILE = "MORA_DS_STATUS_FILE"
"""Environment variable that names the file."""

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: neither done nor failed, run me again."""
EXIT_INTERRUPTED = 130
"""What shells give a process that SIGINT ended."""


class Event(str, Enum):
    """What happened; the number that goes with it."""

    STARTED = "started"
    """the process"""
    SAVED = "saved"
    """optimizer step of a checkpoint that is complete"""
    LEFT = "left"
    """exit code"""


def report(event: Event, value: int) -> None:
    """Append an event of this rank; lines this short are written whole, whoever else writes."""
    if path := os.environ.get(STATUS_FILE):
        line = json.dumps({"rank": int(os.environ.get("RANK", "0")), "event": event.value, "value": value})
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


@dataclass
class Told:
    """What the ranks of one attempt have told."""

    processes: list[int] = field(default_factory=list)
    saved: int | None = None
    """The latest step."""
    codes: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Told:
        told = cls()
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            event, value = Event(entry["event"]), int(entry["value"])
            if event is Event.STARTED:
                told.processes.append(value)
            elif event is Event.SAVED:
                told.saved = value
            else:
                told.codes.append(value)
        return told
