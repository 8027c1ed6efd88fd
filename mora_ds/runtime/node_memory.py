"""Memory that all processes of a node map, and how much of it there is.

    first process of the node     an anonymous file: memfd_create(2)
    the others                    map /proc/PID/fd/N of the first one
    first process                 closes it: what is left are the mappings

As the file has no name, in /dev/shm or elsewhere, nothing is left of it when the
processes have ended, however they end, and no later run can take it for its own. The
size of /dev/shm does not limit it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from mora_ds.common.errors import RunError, UserError
from mora_ds.runtime.ranks import Ranks

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CGROUP = Path("/sys/fs/cgroup")


def node_members(ranks: Ranks) -> tuple[int, ...]:
    """Ranks of this node's processes that see each other's memory. Collective.

    A node begins at each process with local rank 0; processes in containers of their
    own, which do not see each other, count as several nodes.
    """
    facts = ranks.gather("processes of the node", (ranks.local_rank, machine()))
    leader = 0
    nodes = []
    for rank, (local_rank, kernel) in enumerate(facts):
        leader = rank if local_rank == 0 else leader
        nodes.append((leader, kernel))
    return tuple(rank for rank, node in enumerate(nodes) if node == nodes[ranks.rank])


def machine() -> tuple[str, str]:
    """The same for processes that can open each other's /proc/PID/fd."""
    try:
        return _BOOT_ID.read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return platform.node(), f"process {os.getpid()}"


def require_memory(nbytes: int, what: str, advice: str = "") -> None:
    """Raise `UserError` where fewer bytes are free than `what` takes: memory is taken
    when it is written to, and the kernel would end a process. `advice`: the end of the
    message."""
    free = free_bytes()
    if nbytes > free:
        raise UserError(
            f"{what} takes {nbytes / 1e9:,.3f} GB of memory, and {free / 1e9:,.3f} GB are available{advice}"
        )


@dataclass(frozen=True)
class Offer:
    """What the first process of a node tells the others of it."""

    process: int
    descriptor: int
    size: int
    """Bytes."""
    layout: str
    """A digest of what is to lie where; those who map it must have the same."""

    @classmethod
    def make(cls, size: int, layout: str) -> Offer:
        """New memory of `size` bytes, all zeros, not used yet. Raises `OSError`."""
        descriptor = os.memfd_create("mora_ds-base")
        try:
            os.ftruncate(descriptor, size)
        except OSError:
            os.close(descriptor)
            raise
        return cls(os.getpid(), descriptor, size, layout)

    def map(self, layout: str) -> torch.UntypedStorage:
        """The memory, mapped into this process. Raises `RunError` where it cannot
        be."""
        if layout != self.layout:
            raise RunError(
                "the processes of the node hold their tensors in different layouts"
            )
        path = f"/proc/{self.process}/fd/{self.descriptor}"
        try:
            if os.stat(path).st_size != self.size:
                raise RunError(
                    f"{path} is another file than the first process of the node means"
                )
            storage: Any = torch.UntypedStorage.from_file(
                path, shared=True, nbytes=self.size
            )
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"the memory of process {self.process} cannot be mapped: {error}"
            ) from error
        return storage

    def close(self) -> None:
        """Let go of the file, on the process that made the offer."""
        os.close(self.descriptor)


def trim() -> None:
    """Return freed memory to the system, which glibc would keep in the heap."""
    # Another C library has no such function
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes() -> int:
    """Bytes that the memory of this node, the limits of its control groups, and that of
    this process (ulimit -v) leave."""
    leave = [psutil.virtual_memory().available, *_cgroup_limits()]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        leave.append(max(0, limit - psutil.Process().memory_info().vms))
    return min(leave)


def _cgroup_limits() -> list[int]:
    """What the limits of this process's control groups (a container, a Slurm job)
    leave."""
    limits = []
    for folder in cgroup_folders():
        # A group without a limit has the text "max", the outermost one has no such
        # files
        with suppress(OSError, ValueError):
            limit = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            facts = dict(line.split() for line in lines)
            # The page cache is given up when memory is needed
            inactive = int(facts.get("inactive_file", 0))
            active = int(facts.get("active_file", 0))
            limits.append(max(0, limit - used + inactive + active))
    return limits


def cgroup_folders() -> list[Path]:
    """The folders of this process's control group (version 2) and of those around
    it."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                group = _CGROUP / path.lstrip("/")
                folders = (group, *group.parents)
                return [folder for folder in folders if folder.is_relative_to(_CGROUP)]
    return []
