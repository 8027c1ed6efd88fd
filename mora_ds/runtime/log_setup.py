"""Configures the logger `mora_ds`: which messages a process prints, and where.

    rank 0          INFO to stdout as plain text; WARNING and above to stderr
    other ranks     WARNING and above to stderr

Modules log with `logging.getLogger(__name__)`. A program that only imports mora_ds
configures nothing and prints nothing: `mora_ds/__init__.py` gives the logger a
NullHandler.
"""

import logging
import os
import sys
from enum import Enum

from tqdm import tqdm

LOGGER = "mora_ds"


class LogLevel(str, Enum):
    """Values of --log_level; each is the lower-case name of a level of `logging`."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def set_up_logging(level: str = LogLevel.INFO) -> None:
    """Send this process's messages to stdout and stderr, from a level on.

    `level` holds for rank 0. The other ranks print from WARNING on, or from DEBUG on
    where `level` is debug. A name that is no `LogLevel` counts as info: `validate`
    reports it together with the other mistakes. Call it again to change the level.
    """
    threshold = (
        getattr(logging, level.upper()) if level in list(LogLevel) else logging.INFO
    )
    if rank() != 0 and threshold != logging.DEBUG:
        threshold = max(threshold, logging.WARNING)
    logger = logging.getLogger(LOGGER)
    logger.handlers = [_Console()]
    logger.propagate = False
    logger.setLevel(threshold)


def rank() -> int:
    """The global rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def rank_prefix() -> str:
    """ "[rank 1] " before a message that any rank may print; "" in a run of one
    process."""
    return f"[rank {rank()}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


class _Console(logging.Handler):
    """Writes to the streams that `sys` has, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        is_news = record.levelno < logging.WARNING
        stream = sys.stdout if is_news else sys.stderr
        if stream is None:  # as `>&-` leaves it
            return
        text = self.format(record)
        # A run of weeks does not end with its log, on a full disk or before a dead
        # reader
        try:
            tqdm.write(text if is_news else rank_prefix() + text, file=stream)
            stream.flush()
        except OSError:
            self.handleError(record)
