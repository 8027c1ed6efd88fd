"""Configures the logger `mora_ds`: the level and the stream of a process's messages.

    rank 0          INFO to stdout as plain text; WARNING and above to stderr
    other ranks     WARNING and above to stderr

Modules log with `logging.getLogger(__name__)`. Importing mora_ds configures nothing and
prints nothing: `mora_ds/__init__.py` adds a NullHandler to the logger.
"""

import logging
import os
import sys
from enum import Enum

from tqdm import tqdm

from mora_ds.common.fetched import with_urls

LOGGER = "mora_ds"


class LogLevel(str, Enum):
    """Values of --log_level: lower-case names of `logging` levels."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def set_up_logging(level: str = LogLevel.INFO) -> None:
    """Print this process's messages of at least this level to stdout and stderr.

    `level` applies to rank 0. Other ranks print from WARNING on, or from DEBUG on if
    `level` is debug. An unknown level is treated as info, because `validate` reports it
    together with other errors. Call again to change the level.
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
    """The prefix of a message that any rank may print, such as "[rank 1] "; empty for
    one process."""
    return f"[rank {rank()}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


class _Console(logging.Handler):
    """Writes to `sys.stdout` and `sys.stderr`, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        is_news = record.levelno < logging.WARNING
        stream = sys.stdout if is_news else sys.stderr
        if stream is None:  # closed by `>&-`
            return
        text = with_urls(self.format(record))
        # A full disk or a closed pipe of the log must not end the run
        try:
            tqdm.write(text if is_news else rank_prefix() + text, file=stream)
            stream.flush()
        except OSError:
            self.handleError(record)
