"""Runs the main function of a program and sets its exit code: 0, 2 (user error), 3
(trained, but something beside it failed), 75 (stopped), 1 (failure).

Rank 0 prints the error message, once; a rank that fails because another one has ended
prints one line that says so.
"""

import argparse
import faulthandler
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mora_ds.common.errors import (
    FailedBeside,
    RunError,
    Stopped,
    UserError,
    refuse,
    unusable_words,
)
from mora_ds.common.files import write_json_atomic
from mora_ds.runtime import signals
from mora_ds.runtime.log_setup import rank, rank_prefix, set_up_logging
from mora_ds.runtime.signals import (
    EXIT_FAILED_BESIDE,
    EXIT_FAILURE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    leave,
)

_WAIT_FOR_RANK_0_S = 8.0
"""How long other ranks hold an error back: the launcher ends them after rank 0."""

_WAIT_FOR_FAILED_RANK_S = 3.0
"""Launchers poll for ended ranks every second or more often."""

_OF_GLOO = "gloo/transport/"
"""In every message of gloo about another rank (gloo/common/logging.h)."""
_OF_GLOO_DEVICE = "/device.cc"
"""The file of those that are about this rank's own network interface."""
_OF_STORE = ("DistNetworkError", "DistStoreError")
"""Errors by which ranks find each other; by name, as some programs have no torch."""


def run(main: Callable[[], None], restartable: bool = False) -> NoReturn:
    """Run `main` with logging at INFO, then end the process. Never returns.

    `restartable`: signals make the run save and stop (`runtime/signals.py`).
    """
    # DeepSpeed calls the one, this program the other, on every rank: the user cannot
    # change that
    for deprecated in ("torch.distributed.*", "gradient_checkpointing_enable"):
        warnings.filterwarnings(
            "ignore", f"`{deprecated}` is deprecated", FutureWarning
        )
    logging.getLogger("DeepSpeed").addFilter(_can_be_acted_on)
    set_up_logging()
    if sys.__stderr__ is not None:
        # Prints the stack of a bus error: a mapped file was truncated
        faulthandler.enable(sys.__stderr__)
    try:
        try:
            if restartable:
                signals.install()
            refuse(unusable_words(sys.argv[1:]))
            main()
        except (Stopped, SystemExit):
            raise
        except BaseException as error:
            # The error may be that of a collective in which a signal has come, as
            # another rank left at its own: `Stopped` is then raised within `_fail`
            _fail(error)
    except Stopped as stopped:
        signals.ignore_requests()
        if rank() == 0:
            print(stopped, file=sys.stderr)
        leave(EXIT_STOPPED)
    except SystemExit as left:
        leave(
            left.code
            if isinstance(left.code, int)
            else EXIT_FAILURE
            if left.code
            else 0
        )
    leave(0)


def _can_be_acted_on(record: logging.LogRecord) -> bool:
    """False for the warning of DeepSpeed that it has found no GPU, which each process
    would print as it is imported (deepspeed/accelerator/real_accelerator.py,
    `get_accelerator`). A run says itself where it computes."""
    return "Setting accelerator to CPU" not in record.getMessage()


def _fail(error: BaseException) -> NoReturn:
    # From here on the launcher's SIGTERM ends a rank, which only waits to repeat rank
    # 0's message
    signals.uninstall()
    expected = isinstance(error, (UserError, RunError))
    if not expected and isinstance(error, RuntimeError) and _is_lost_contact(error):
        _lose_contact(error)
    # Rank 0 has the error of all ranks, as `Ranks` raises it, at the same time
    if rank() != 0:
        is_shared = getattr(error, "is_shared", False)
        time.sleep(_WAIT_FOR_FAILED_RANK_S if is_shared else _WAIT_FOR_RANK_0_S)
    if expected:
        print(f"{rank_prefix()}error: {error}", file=sys.stderr)
    else:
        print(rank_prefix(), file=sys.stderr, end="")
        traceback.print_exception(error)
    if isinstance(error, FailedBeside):
        leave(EXIT_FAILED_BESIDE)
    leave(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE)


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether another rank has died or cannot be reached."""
    text = str(error)
    if type(error).__name__ in _OF_STORE:
        return "EADDRINUSE" not in text
    return _OF_GLOO in text and _OF_GLOO_DEVICE not in text


def _lose_contact(error: RuntimeError) -> NoReturn:
    """Report that another rank failed first, and let the launcher see its exit code."""
    print(
        f"{rank_prefix()}error: lost contact with another rank, which has ended (see its own message), was killed or "
        f"cannot be reached: {str(error).splitlines()[0]}",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(_WAIT_FOR_FAILED_RANK_S)
    leave(EXIT_FAILURE)


class StrictParser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would end the process, but for `-h`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def command_parser(documentation: str | None) -> argparse.ArgumentParser:
    """A parser without abbreviated flags, described by a module's first line."""
    return argparse.ArgumentParser(
        description=(documentation or "").splitlines()[0], allow_abbrev=False
    )


DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Values of --dtype: `tensor_files.COMPUTE_DTYPES`, and a checkpoint's or model's
own."""

SHARED_FLAGS: dict[str, dict[str, Any]] = {
    "--base": {"type": Path, "help": "where the base lies now, if it was moved"},
    "--delta_scale": {
        "type": float,
        "default": 1.0,
        "metavar": "S",
        "help": "multiply the update: 0 is the base, 1 the trained model; between them old knowledge comes back",
    },
    "--device": {"default": "cpu", "help": "where to compute, such as cuda"},
    "--domain": {
        "metavar": "NAME",
        "help": "of a run with domain adapters: the domain, or 'shared' for none",
    },
    "--json": {"type": Path, "metavar": "FILE", "help": "write all figures there too"},
    "--onto": {
        "type": Path,
        "metavar": "DIR",
        "help": "add the update to this model of the base's shapes, such as an instruct model, instead of to the base",
    },
    "--output": {
        "type": Path,
        "required": True,
        "help": "folder to write; must be new or empty",
    },
    "--text_column": {
        "default": "text",
        "help": "column or JSON key that holds the text",
    },
    "--trust_remote_code": {
        "action": "store_true",
        "help": "run code that comes with the model",
    },
}
"""Flags that mean the same in several commands."""


def shared_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add some of `SHARED_FLAGS`."""
    for name in names:
        parser.add_argument(name, **SHARED_FLAGS[name])


def add_action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    """The parser of one action of a command, among its `add_subparsers`."""
    return actions.add_parser(
        name,
        help=text,
        description=text,
        allow_abbrev=False,
    )


def say_loading() -> None:
    """Tell who waits for a plan what takes seconds: the imports come first."""
    steps = (
        "loading torch, transformers and DeepSpeed, then measuring a part of the model"
    )
    print(steps, file=sys.stderr)


def say(*lines: str) -> None:
    """Print the result of a command. Raises `RunError` where it cannot be written."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        raise RunError(f"stdout cannot be written: {error.strerror}") from error


def record_and_say(path: Path | None, content: Any, lines: Sequence[str]) -> None:
    """Write what a command has measured to the file of --json, where one is named, and
    print it. A full disk does not lose it."""
    try:
        if path is not None:
            write_json_atomic(path, content)
    finally:
        say(*lines)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a text table, aligned to the right; the first row has titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def check_writable(flag: str, path: Path | None) -> None:
    """Raise `UserError`, which names `flag`, where a file could not be written, or
    would take the place of a folder or a device."""
    if path is None:
        return
    try:
        if path.exists() and not path.is_file():
            raise FileExistsError
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise UserError(
            f"{flag} {path}: name a file in a folder that you can write to"
        ) from error


def check_device(name: str) -> None:
    """Raise `UserError`, which names --device, where torch has no device of that
    name."""
    # Imported here, as the other programs of this module start without it
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
