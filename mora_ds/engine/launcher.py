"""DeepSpeed's launcher, which starts one process per GPU: its flags, and its command for
`mora-ds pretrain`.

Written against DeepSpeed 0.19.8: deepspeed/launcher/runner.py, `parse_args` and `main`.
"""

import os
import sys
from collections.abc import Sequence
from itertools import pairwise

from mora_ds.runtime.cli import StrictParser

RUNNER = "deepspeed.launcher.runner"
"""The module that the program `deepspeed` runs (bin/deepspeed)."""

VALUES = (
    "hostfile", "include", "exclude", "num_nodes", "num_gpus", "master_port", "master_addr", "node_rank", "launcher",
    "launcher_args", "ssh_port", "bind_core_list",
)  # fmt: skip
"""Launcher flags with a value that `mora-ds pretrain` passes on."""

SWITCHES = ("no_ssh", "force_multi", "bind_cores_to_rank")

TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Environment variables of srun and MPI launchers with the number of processes."""


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


def is_one_of_several() -> bool:
    """Whether srun or an MPI launcher has started several processes."""
    return any(os.environ.get(name, "1") != "1" for name in TASKS)


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
