"""Events that ranks report to launch/restart.py, which cannot rely on the exit codes of launchers.

Each rank appends one JSON line for every event to the file that an environment variable names; without it, nothing.
The file lies in the temporary directory, which some systems empty of what is old: it may vanish during a long run.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from mora_ds.common.files import stamp
from mora_ds.runtime.log_setup import rank

logger = logging.getLogger(__name__)

EVENTS_FILE = "MORA_DS_STATUS_FILE"
"""Environment variable with the path of the file."""

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: the run is neither done nor failed, and can be started again."""
EXIT_INTERRUPTED = 130
"""The exit code that shells give a process that SIGINT ended."""


class Event(str, Enum):
    """Kind of event; the comment says what its value is."""

    STARTED = "started"  # process id
    SAVED = "saved"  # optimizer step of a complete checkpoint
    LEFT = "left"  # exit code
    MAPPED = "mapped"  # [path, its `files.stamp`] of a file that weights are read from


def emit(event: Event, value: Any) -> None:
    """Append an event of this rank. Lines this short are written in one piece, whichever ranks write at the time.

    A file that has vanished is made anew, with its folder. One that cannot be written to is a warning: training does
    not depend on it.
    """
    path = os.environ.get(EVENTS_FILE)
    if not path:
        return
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"rank": rank(), "event": event.value, "value": value}) + "\n")
    except OSError as error:
        logger.warning("warning: restart.py is not told of %r: %s", event.value, error)


@dataclass
class EventsText:
    """The text of an events file, followed while ranks append to it; what was read stays known if the file vanishes."""

    path: Path
    _lost: str = ""
    """Text of files that have vanished."""
    _text: str = ""

    def read(self) -> str:
        """All text so far. Call it now and then: only what has been read survives the loss of the file."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            text = ""
        if not text.startswith(self._text):  # another file than before
            self._lost += self._text
        self._text = text
        return self._lost + text


@dataclass
class AttemptEvents:
    """All events of one attempt to run a job."""

    processes: list[int] = field(default_factory=list)
    """Process ids of the ranks that started."""
    saved: int | None = None
    """Step of the latest checkpoint; None without one."""
    codes: list[int] = field(default_factory=list)
    """Exit codes of the ranks that reported one."""
    mapped: dict[str, Any] = field(default_factory=dict)
    """File of the base -> its stamp when it was mapped, of the ranks on this node."""

    def changed_files(self) -> list[str]:
        """Mapped files that are no longer what they were: a rank that reads beyond the end of one that was cut off ends
        by a bus error (signal 7), which it cannot explain itself."""
        return [name for name, before in self.mapped.items() if stamp(Path(name)) != tuple(before)]

    @classmethod
    def parse(cls, text: str) -> AttemptEvents:
        """The events in the lines of an events file."""
        events = cls()
        for line in text.splitlines():
            entry = json.loads(line)
            event, value = Event(entry["event"]), entry["value"]
            if event is Event.STARTED:
                events.processes.append(value)
            elif event is Event.SAVED:
                events.saved = value
            elif event is Event.MAPPED:
                events.mapped[value[0]] = value[1]
            else:
                events.codes.append(value)
        return events
