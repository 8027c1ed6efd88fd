"""Memory that all ranks of a node map, and the amount of free memory.

    local rank 0      creates an anonymous file: memfd_create(2)
    other ranks       map /proc/PID/fd/N of local rank 0
    local rank 0      closes the file; only the mappings remain

The file has no name, in /dev/shm or elsewhere. So the memory is freed when the processes
end, even if they are killed, no later run can find it, and the size of /dev/shm does not
limit it.
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
    """Ranks of this node that can map each other's memory. Collective.

    Each rank with local rank 0 starts a node. Ranks in different containers, which
    cannot see each other, count as different nodes.
    """
    facts = ranks.gather("processes of the node", (ranks.local_rank, machine()))
    leader = 0
    nodes = []
    for rank, (local_rank, kernel) in enumerate(facts):
        leader = rank if local_rank == 0 else leader
        nodes.append((leader, kernel))
    return tuple(rank for rank, node in enumerate(nodes) if node == nodes[ranks.rank])


def machine() -> tuple[str, str]:
    """An identity that is equal for processes that can open each other's
    /proc/PID/fd."""
    try:
        return _BOOT_ID.read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return platform.node(), f"process {os.getpid()}"


def require_memory(nbytes: int, what: str, advice: str = "") -> None:
    """Raise `UserError` if fewer than `nbytes` are free. Memory is allocated on the
    first write, so without this check the kernel would kill a process. `what`: the user
    of the memory. `advice`: the end of the message."""
    free = free_bytes()
    if nbytes > free:
        raise UserError(
            f"{what} takes {nbytes / 1e9:,.3f} GB of memory, and {free / 1e9:,.3f} GB are available{advice}"
        )


@dataclass(frozen=True)
class SharedMemory:
    """A handle of memory created by local rank 0, which it sends to its node's
    ranks."""

    process: int
    descriptor: int
    size: int
    """Bytes."""
    layout: str
    """A digest of the positions of all tensors; ranks that map must have the same."""

    @classmethod
    def create(cls, size: int, layout: str) -> SharedMemory:
        """Create `size` bytes of zeros, allocated on the first write. Raises
        `OSError`."""
        descriptor = os.memfd_create("mora_ds-base")
        try:
            os.ftruncate(descriptor, size)
        except OSError:
            os.close(descriptor)
            raise
        return cls(os.getpid(), descriptor, size, layout)

    def map(self, layout: str) -> torch.UntypedStorage:
        """Map the memory into this process. Raises `RunError` on failure."""
        if layout != self.layout:
            raise RunError(
                "the ranks of the node have their tensors in different layouts"
            )
        path = f"/proc/{self.process}/fd/{self.descriptor}"
        try:
            if os.stat(path).st_size != self.size:
                raise RunError(
                    f"{path} is not the file that local rank 0 of the node created"
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
        """Close the file in the process that created it. Mappings stay valid."""
        os.close(self.descriptor)


def trim() -> None:
    """Return freed heap memory to the system, which glibc would keep."""
    # Other C libraries have no such function
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes() -> int:
    """Free bytes: the minimum over the node's memory, the limits of its control groups,
    and the limit of this process (ulimit -v)."""
    free = [psutil.virtual_memory().available, *_cgroup_free_bytes()]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free.append(max(0, limit - psutil.Process().memory_info().vms))
    return min(free)


def _cgroup_free_bytes() -> list[int]:
    """Free bytes in each control group of this process that has a limit (a container, a
    Slurm job)."""
    free = []
    for folder in cgroup_folders():
        # Without a limit the file says "max"; the root group has no such files
        with suppress(OSError, ValueError):
            limit = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            facts = dict(line.split() for line in lines)
            # The kernel reclaims the page cache when memory is needed
            inactive = int(facts.get("inactive_file", 0))
            active = int(facts.get("active_file", 0))
            free.append(max(0, limit - used + inactive + active))
    return free


def cgroup_folders() -> list[Path]:
    """The folders of this process's control group (version 2) and of its parents."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                group = _CGROUP / path.lstrip("/")
                folders = (group, *group.parents)
                return [folder for folder in folders if folder.is_relative_to(_CGROUP)]
    return []
