"""Processes of this machine: parents and children, launchers and the ranks that they started."""

from __future__ import annotations

import socket
from itertools import pairwise
from pathlib import Path

import psutil

_LAUNCHER_MODULES = (
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
)
_LAUNCHER_PROGRAMS = ("deepspeed", "deepspeed.pt", "ds", "torchrun")
_WRAPPER = ("launch", "restart.py")
_COMMANDS = ("mora-ds", "mora_ds")
"""The console script, and the package after -m."""


def parent_of(process: int) -> int | None:
    """Process id of its parent; None for a process that has ended, zombies included."""
    try:
        running = psutil.Process(process)
        return None if running.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else running.ppid()
    except psutil.NoSuchProcess:
        return None


def children_of(process: int) -> list[int]:
    """Process ids of its children that have not ended."""
    try:
        children = psutil.Process(process).children()
    except psutil.NoSuchProcess:
        return []
    return [child.pid for child in children if parent_of(child.pid) is not None]


def is_launcher(process: int) -> bool:
    """Whether it starts ranks and should outlive them: deepspeed (both programs), torchrun, Slurm's step, a restart.

    A shell is not one: a run that was started in the background may outlive its shell.
    """
    try:
        words = psutil.Process(process).cmdline()[:4]
    except psutil.Error:
        return False
    if words and words[0].startswith("slurmstepd"):
        return True
    paths = [Path(word) for word in words[:2]]
    return (
        any(path.name in _LAUNCHER_PROGRAMS or path.parts[-2:] == _WRAPPER for path in paths)
        or any(flag == "-m" and name in _LAUNCHER_MODULES for flag, name in pairwise(words))
        or any(Path(program).name in _COMMANDS and word == "restart" for program, word in pairwise(words))
    )  # fmt: skip


def launchers_above(process: int) -> list[tuple[int, int]]:
    """(child, parent) pairs upwards from `process`, as far as the parents are launchers."""
    links = []
    while (parent := parent_of(process)) and is_launcher(parent):
        links.append((process, parent))
        process = parent
    return links


def ranks_below(process: int) -> list[int]:
    """Descendants that a launcher started as ranks, without the worker processes of these."""
    ranks = []
    for child in children_of(process):
        ranks += [child] if is_rank(child) else ranks_below(child)
    return ranks


def is_rank(process: int) -> bool:
    """Whether it is running and a launcher gave it a rank."""
    try:
        has_rank = "RANK" in psutil.Process(process).environ()
    except psutil.Error:  # it has ended, or belongs to another user
        return False
    return has_rank and parent_of(process) is not None and not is_launcher(process)


def only_rank() -> dict[str, str]:
    """The environment variables that a launcher sets for a job of one process."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
