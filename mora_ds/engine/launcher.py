"""DeepSpeed's launcher, which starts one process per GPU: its flags, and its command for
`mora-ds pretrain`.

Written against DeepSpeed 0.19.8: deepspeed/launcher/runner.py, `parse_args` and `main`.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType

import psutil

from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import lines_of
from mora_ds.runtime import signals
from mora_ds.runtime.cli import StrictParser
from mora_ds.runtime.launchers import SWITCHES, VALUES

RUNNER = "deepspeed.launcher.runner"
"""The module that the program `deepspeed` runs (bin/deepspeed)."""

CONNECTIONS = ("pdsh", "ssh")
"""The programs by which DeepSpeed's runner starts other nodes, unless --launcher names
another way (deepspeed/launcher/multinode_runner.py, `PDSHRunner`)."""


def launcher_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into (flags of the launcher, all others). Raises `UserError`
    for a flag without its value."""
    parser = StrictParser(add_help=False, allow_abbrev=False)
    for name in VALUES:
        parser.add_argument(f"--{name}")
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parsed, remaining = parser.parse_known_args(list(argv))
    words = []
    for name in VALUES:
        value = getattr(parsed, name)
        if value is not None:
            words += [f"--{name}", value]
    words += [f"--{name}" for name in SWITCHES if getattr(parsed, name)]
    return words, remaining


def command(launcher: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The command that starts `mora-ds pretrain` with `flags` on every GPU.

    The launcher's only warning, about a missing hostfile, is shown only if the user names
    one. --log_level debug or info shows all of its logs.
    """
    level = "warning" if "--hostfile" in launcher else "error"
    for flag, value in pairwise(flags):
        if flag == "--log_level" and value in ("debug", "info"):
            level = value
    runner = [sys.executable, "-m", RUNNER, "--log_level", level, *launcher]
    return [*runner, "--module", "mora_ds", "pretrain", *flags]


def check_connections(launcher: Sequence[str]) -> None:
    """Raise `UserError` where the launcher would need pdsh or ssh, which this machine
    does not have."""
    # The last two may leave one node of several
    ways = {"--no_ssh", "--launcher", "--num_nodes", "--include"}
    if "--hostfile" not in launcher or ways.intersection(launcher):
        return
    file = Path(launcher[launcher.index("--hostfile") + 1])
    lines = lines_of(file) if file.is_file() else ()
    hosts = [line for line in lines if line.strip() and not line.startswith("#")]
    if len(hosts) < 2:
        return
    missing = [name for name in CONNECTIONS if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"--hostfile: {' and '.join(missing)} not found, by which DeepSpeed starts the other nodes: install "
            "pdsh and an ssh client (apt install pdsh openssh-client), or start every node itself with --no_ssh "
            "--node_rank N --master_addr NODE"
        )


def run_launcher(words: Sequence[str]) -> int:
    """Run a launcher, and return its exit code once its ranks have ended.

    A stop request to this process goes to its ranks on this machine. DeepSpeed's runner
    would die of the signal, or ignore it as process 1 of a container, and leave the
    ranks training (deepspeed/launcher/runner.py, `main`, has no handler).
    """
    signals.uninstall()
    stopped: list[psutil.Process] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.extend(_stop_ranks())

    for number in signals.SIGNALS:
        signal.signal(number, stop)
    code = subprocess.Popen(words).wait()
    psutil.wait_procs(stopped)
    return code if code >= 0 else 128 - code


def _stop_ranks() -> list[psutil.Process]:
    """Send SIGTERM to the ranks on this machine; before there are any, and where pdsh
    starts them, to DeepSpeed's runner and what it has started. Returns the processes.

    Below this process are the runner, launch.py or pdsh, and then the ranks.
    """
    stopped = []
    with suppress(psutil.Error):
        runners = psutil.Process().children()
        started = [child for runner in runners for child in runner.children()]
        by_launch = [child for child in started if child.name() != "pdsh"]
        ranks = [rank for launch in by_launch for rank in launch.children()]
        for process in ranks or [*runners, *started]:
            process.send_signal(signal.SIGTERM)
            stopped.append(process)
    return stopped


def set_single_process_env() -> None:
    """Set the environment variables of a launcher for a run of one process.

    Port 0: torch's store chooses a free port, which no other process needs to know.
    """
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )


def accelerators() -> int:
    """Number of visible GPUs of this machine."""
    # Imported here, because the flags need no torch
    import torch

    return torch.cuda.device_count()
