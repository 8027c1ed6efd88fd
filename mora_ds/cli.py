"""How a program of ours ends: 0, 2 for a user's mistake, 1 for a failure; the message once, and first from rank 0."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from mora_ds.errors import RunError, UserError

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2

_PATIENCE_S = 8.0
"""How long ranks other than 0 keep their error back: the launcher ends them as soon as rank 0 has told its own."""


def run(main: Callable[[], None]) -> NoReturn:
    """Run `main` and leave the process. Never returns.

    Leaves by `os._exit`: gloo's threads often abort at interpreter exit after right results (torch 2.13).
    """
    # DeepSpeed calls these on every rank, and a user of ours cannot mend it.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    try:
        main()
    except (UserError, RunError) as error:
        _wait_for_rank_0()
        print(f"{_who()}error: {error}", file=sys.stderr)
        _leave(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE)
    except SystemExit as leave:
        _leave(leave.code if isinstance(leave.code, int) else EXIT_FAILURE if leave.code else 0)
    except BaseException:
        _wait_for_rank_0()
        print(_who(), file=sys.stderr, end="")
        traceback.print_exc()
        _leave(EXIT_FAILURE)
    _leave(0)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _wait_for_rank_0() -> None:
    if _rank() != 0:
        time.sleep(_PATIENCE_S)


def _who() -> str:
    return f"[rank {_rank()}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
