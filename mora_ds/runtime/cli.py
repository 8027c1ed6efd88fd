"""How a program of ours ends: 0, 2 for a user's mistake, 75 when stopped by a signal, 1 for a failure.

The message comes once, and first from rank 0; a rank that was torn down by another's end says so in one line.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from mora_ds.errors import RunError, Stopped, UserError
from mora_ds.runtime import signals
from mora_ds.runtime.events import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR
from mora_ds.runtime.signals import leave

_PATIENCE_S = 8.0
"""How long ranks other than 0 keep their error back: the launcher ends them as soon as rank 0 has told its own."""

_AFTER_YOU_S = 3.0
"""Launchers look for ended ranks every second or less."""

_LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""What gloo says when another rank has died or cannot be reached (torch 2.13, gloo/transport/tcp)."""


def run(main: Callable[[], None], restartable: bool = False) -> NoReturn:
    """Run `main` and leave the process. Never returns. `restartable`: signals stop it in order (`stopping`)."""
    # DeepSpeed calls these on every rank, and a user of ours cannot mend it.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    try:
        if restartable:
            signals.install()
        main()
    except Stopped as stopped:
        signals.settle()
        if _rank() == 0:
            print(stopped, file=sys.stderr)
        leave(EXIT_STOPPED)
    except SystemExit as left:
        leave(left.code if isinstance(left.code, int) else EXIT_FAILURE if left.code else 0)
    except BaseException as error:
        _fail(error)
    leave(0)


def _fail(error: BaseException) -> NoReturn:
    signals.uninstall()  # the launcher's SIGTERM ends a rank that only waits to repeat what another has said
    foreseen = isinstance(error, (UserError, RunError))
    if not foreseen and isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_CONTACT):
        _lose_contact(error)
    _wait_for_rank_0()
    if foreseen:
        print(f"{_who()}error: {error}", file=sys.stderr)
    else:
        print(_who(), file=sys.stderr, end="")
        traceback.print_exception(error)
    leave(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE)


def _lose_contact(error: RuntimeError) -> NoReturn:
    """Not the cause but a consequence: the launcher is to see the exit code of the other rank first."""
    print(
        f"{_who()}error: lost contact with another rank, which has ended (see its own words), was killed or cannot be "
        f"reached: {str(error).splitlines()[0]}",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(_AFTER_YOU_S)
    leave(EXIT_FAILURE)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _wait_for_rank_0() -> None:
    if _rank() != 0:
        time.sleep(_PATIENCE_S)


def _who() -> str:
    return f"[rank {_rank()}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns lined up to the right; the first row holds the titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
