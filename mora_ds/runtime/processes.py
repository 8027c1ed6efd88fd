"""Processes of this machine, as /proc shows them: whose child is whose, and which of them are launchers."""

from __future__ import annotations

import os
import socket
from pathlib import Path

_PROC = Path("/proc")
_MODULES = (
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
)
_PROGRAMS = ("deepspeed", "deepspeed.pt", "ds", "torchrun")
_WRAPPER = ("launch", "restart.py")


def parent_of(process: int) -> int | None:
    """Its parent's number; None when the process has gone, zombies included."""
    try:
        text = (_PROC / str(process) / "stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]  # the name before it may hold blanks and brackets
    return None if state in "ZX" else int(parent)


def is_launcher(process: int) -> bool:
    """Whether it starts ranks and should outlive them: deepspeed (both halves), torchrun, Slurm's step, our wrapper.

    A shell is none: a run that was started in the background outlives it rightly.
    """
    words = _command(process)[:4]
    if words and words[0].startswith("slurmstepd"):
        return True
    modules = [words[index + 1] for index, word in enumerate(words[:-1]) if word == "-m"]
    programs = [Path(word).name for word in words[:2]]
    wrapped = any(Path(word).parts[-2:] == _WRAPPER for word in words[:2])
    return wrapped or any(name in _MODULES for name in modules) or any(name in _PROGRAMS for name in programs)


def launchers_above(process: int) -> list[tuple[int, int]]:
    """(child, parent) pairs upwards from `process`, as far as the parents are launchers."""
    links = []
    while (parent := parent_of(process)) and is_launcher(parent):
        links.append((process, parent))
        process = parent
    return links


def siblings_alive(parent: int) -> int:
    """How many children `parent` has; zombies are none."""
    return len(_children(parent))


def ranks_below(process: int) -> list[int]:
    """Descendants that a launcher has given a rank, without the workers that those have started themselves."""
    found = []
    for child in _children(process):
        found += [child] if is_rank(child) else ranks_below(child)
    return found


def is_rank(process: int) -> bool:
    """Whether it is alive and a launcher gave it a rank."""
    ranked = any(entry.startswith(b"RANK=") for entry in _read(process, "environ").split(b"\0"))
    return ranked and parent_of(process) is not None and not is_launcher(process)


def _children(process: int) -> list[int]:
    numbers = [int(path.name) for path in _PROC.iterdir() if path.name.isdigit()]
    return [number for number in numbers if parent_of(number) == process]


def _command(process: int) -> list[str]:
    return [os.fsdecode(word) for word in _read(process, "cmdline").split(b"\0") if word]


def _read(process: int, name: str) -> bytes:
    try:
        return (_PROC / str(process) / name).read_bytes()
    except OSError:  # gone meanwhile, or another user's
        return b""


def only_rank() -> dict[str, str]:
    """The environment that a launcher gives a job's only rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
