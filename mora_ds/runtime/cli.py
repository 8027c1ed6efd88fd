"""Runs the main function of a program and sets its exit code: 0, 1 (failure), 2 (user
error), 3 (trained, but with a non-fatal failure), 75 (stopped).

Only rank 0 prints the error message. A rank that fails because another rank has ended
prints one line about it.
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
    NonFatalFailure,
    RunError,
    Stopped,
    UserError,
    raise_validation_errors,
    unusable_words,
)
from mora_ds.common.fetched import local, with_urls
from mora_ds.common.files import write_json_atomic
from mora_ds.common.untrusted import is_url
from mora_ds.runtime import launchers, signals
from mora_ds.runtime.log_setup import rank, rank_prefix, set_up_logging
from mora_ds.runtime.signals import (
    EXIT_FAILURE,
    EXIT_NON_FATAL_FAILURE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    exit_process,
)

_WAIT_FOR_RANK_0_S = 8.0
"""Other ranks delay their error message this long. Usually the launcher ends them
before, after rank 0."""

_WAIT_FOR_FAILED_RANK_S = 3.0
"""Launchers check for ended ranks at least once a second."""

_GLOO_SOURCE = "gloo/transport/"
"""Part of every message of gloo about another rank (gloo/common/logging.h)."""
_GLOO_DEVICE_SOURCE = "/device.cc"
"""Part of gloo's messages about this rank's network interface."""
_STORE_ERRORS = ("DistNetworkError", "DistStoreError")
"""Errors of the rendezvous, by name, because some programs do not import torch."""


def run(main: Callable[[], None], restartable: bool = False) -> NoReturn:
    """Run `main` with logging at INFO, then end the process. Never returns.

    `restartable`: on a signal the run saves and stops (`runtime/signals.py`).
    """
    # The calls are in DeepSpeed and in this program: the user cannot change them
    for deprecated in ("torch.distributed.*", "gradient_checkpointing_enable"):
        warnings.filterwarnings(
            "ignore", f"`{deprecated}` is deprecated", FutureWarning
        )
    logging.getLogger("DeepSpeed").addFilter(_is_relevant)
    if sys.__stderr__ is not None:
        # Prints the stack of a bus error, which a truncated mapped file causes
        faulthandler.enable(sys.__stderr__)
    try:
        try:
            if restartable:
                # First, as the level and the prefix of messages go by the rank
                launchers.adopt(sys.argv[1:])
                signals.install()
            set_up_logging()
            raise_validation_errors(unusable_words(sys.argv[1:]))
            main()
        except (Stopped, SystemExit):
            raise
        except BaseException as error:
            # If all ranks get a signal, a collective may fail because another rank
            # stopped first: then `_fail` raises this rank's `Stopped`
            _fail(error)
    except Stopped as stopped:
        signals.ignore_requests()
        if rank() == 0:
            print(with_urls(stopped), file=sys.stderr)
        exit_process(EXIT_STOPPED)
    except SystemExit as error:
        exit_process(
            error.code
            if isinstance(error.code, int)
            else EXIT_FAILURE
            if error.code
            else 0
        )
    exit_process(0)


def _is_relevant(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's warning about a missing GPU, which every process would
    print on import (deepspeed/accelerator/real_accelerator.py, `get_accelerator`). A
    run logs its device itself."""
    return "Setting accelerator to CPU" not in record.getMessage()


def _fail(error: BaseException) -> NoReturn:
    # From now on the launcher's SIGTERM may end this rank
    signals.uninstall()
    expected = isinstance(error, (UserError, RunError))
    if not expected and isinstance(error, RuntimeError) and _is_lost_contact(error):
        _exit_after_lost_contact(error)
    # Rank 0 raises an error of `Ranks` at the same time and prints it
    if rank() != 0:
        is_shared = getattr(error, "is_shared", False)
        time.sleep(_WAIT_FOR_FAILED_RANK_S if is_shared else _WAIT_FOR_RANK_0_S)
    if expected:
        print(f"{rank_prefix()}error: {with_urls(error)}", file=sys.stderr)
    else:
        print(rank_prefix(), file=sys.stderr, end="")
        traceback.print_exception(error)
    if isinstance(error, NonFatalFailure):
        exit_process(EXIT_NON_FATAL_FAILURE)
    exit_process(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE)


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether the error means that another rank has died or cannot be reached."""
    text = str(error)
    if type(error).__name__ in _STORE_ERRORS:
        return "EADDRINUSE" not in text
    return _GLOO_SOURCE in text and _GLOO_DEVICE_SOURCE not in text


def _exit_after_lost_contact(error: RuntimeError) -> NoReturn:
    """Print that another rank failed first, and wait until the launcher has seen that
    rank's exit code."""
    first_line = str(error).splitlines()[0]
    which = ", which has ended (see its own message), was killed or cannot be reached"
    if "Timed out waiting" in first_line:
        # Imported here, as the error comes from torch
        from mora_ds.runtime.ranks import absent_ranks

        names = absent_ranks() or "unknown"
        which = f" ({names}), which did not answer within --collective_timeout_s: stopped, busy, or cannot be reached"
    print(
        f"{rank_prefix()}error: lost contact with another rank{which}: {first_line}",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(_WAIT_FOR_FAILED_RANK_S)
    exit_process(EXIT_FAILURE)


class StrictParser(argparse.ArgumentParser):
    """Raises `UserError` instead of ending the process, except for `-h`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class Url(str):
    """What a flag names in place of a path that is read."""


def source(text: str) -> Path | Url:
    """The value of a flag that names what is read. `FetchingParser` makes a path of a
    URL."""
    return Url(text) if is_url(text) else Path(text)


def path_on_disk(text: str) -> Path:
    """The value of a flag that cannot be a URL."""
    if is_url(text):
        raise argparse.ArgumentTypeError(
            "URLs are not supported; give a path on a disk"
        )
    return Path(text)


class FetchingParser(argparse.ArgumentParser):
    """Fetches what `source` flags name by URLs, once all flags are known to be
    right."""

    def parse_args(self, *arguments: Any, **more: Any) -> Any:
        options = super().parse_args(*arguments, **more)

        def fetched(value: Any) -> Any:
            if isinstance(value, list):
                return list(map(fetched, value))
            return local(value) if isinstance(value, Url) else value

        for name, value in vars(options).items():
            setattr(options, name, fetched(value))
        return options


def command_parser(documentation: str | None) -> argparse.ArgumentParser:
    """A parser without abbreviated flags, described by a module's first line."""
    return FetchingParser(
        description=(documentation or "").splitlines()[0], allow_abbrev=False
    )


DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Values of --dtype: `tensor_files.COMPUTE_DTYPES`, and a checkpoint's or model's
own."""

SHARED_FLAGS: dict[str, dict[str, Any]] = {
    "--base": {"type": source, "help": "new path of the base, if it was moved"},
    "--delta_scale": {
        "type": float,
        "default": 1.0,
        "metavar": "S",
        "help": "scale of the update: 0 is the base, 1 the trained model; values between restore old knowledge",
    },
    "--device": {"default": "cpu", "help": "device to compute on, such as cuda"},
    "--domain": {
        "metavar": "NAME",
        "help": "for a run with domain adapters: the domain, or 'shared' for none",
    },
    "--dtype": {"choices": DTYPES, "default": "auto"},
    "--json": {
        "type": path_on_disk,
        "metavar": "FILE",
        "help": "also write all results to this file",
    },
    "--onto": {
        "type": source,
        "metavar": "DIR",
        "help": "add the update to this model of the base's shapes, such as an instruct model, instead of to the base",
    },
    "--output": {
        "type": path_on_disk,
        "required": True,
        "help": "folder to write; must be new or empty",
    },
    "--text_column": {
        "default": "text",
        "help": "column or JSON key of the text",
    },
    "--trust_remote_code": {
        "action": "store_true",
        "help": "run code from the model's folder or repository",
    },
    "model": {"type": source, "metavar": "MODEL"},
    "path": {
        "type": source,
        "help": "ledger folder, checkpoint, or a run's output folder",
    },
}
"""Flags and arguments with the same meaning in several commands."""


def shared_flags(parser: argparse.ArgumentParser, *names: str, **more: Any) -> None:
    """Add the named flags of `SHARED_FLAGS`. `more`: what this command says otherwise,
    such as the help."""
    for name in names:
        parser.add_argument(name, **{**SHARED_FLAGS[name], **more})


def add_action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add the parser of one action of a command. `actions`: from `add_subparsers`."""
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
    """Print the result of a command. Raises `RunError` if stdout cannot be written."""
    try:
        print(*map(with_urls, lines), sep="\n", flush=True)
    except OSError as error:
        raise RunError(f"stdout cannot be written: {error.strerror}") from error


def record_and_say(path: Path | None, content: Any, lines: Sequence[str]) -> None:
    """Write the results of a command to the file of --json, if any, and print `lines`
    even if writing fails."""
    try:
        if path is not None:
            write_json_atomic(path, content)
    finally:
        say(*lines)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a right-aligned text table. The first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def check_writable(flag: str, path: Path | None) -> None:
    """Raise `UserError` that names `flag` if no file can be written to `path`, or if
    `path` is a folder or a device."""
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
    """Raise `UserError` that names --device if torch has no such device."""
    # Imported here, because the other functions of this module do not need torch
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
