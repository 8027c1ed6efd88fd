"""Followers: nodes that do not see the run's output folder. Files travel to and from rank 0's node.

    node of rank 0      OUTPUT_DIR             the run: checkpoints, merge ledger, metrics
    a follower          OUTPUT_DIR/.follower   on its local disk: its shards until rank 0 has received them, copies of
                                               the ledger and of the checkpoint; deleted when the run ends

Where all nodes share the folder there are no followers, and nothing here sends a byte.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import VISIBLE_WITHIN_S, disk_errors, fsync
from mora_ds.runtime.ranks import Ranks

FOLDER = ".follower"
_INCOMING = ".incoming"
_CHUNK = 16 << 20
"""Bytes that are sent, and held in memory, at a time."""


@dataclass(frozen=True)
class Followers:
    """The nodes that follow, and the folder that this rank works in. All ranks make it, and move files, together."""

    ranks: Ranks
    folder: Path
    """The run's folder; on a follower its local one."""
    leaders: tuple[int, ...]
    """The first rank of each follower."""
    names: tuple[str, ...]
    """Host names of the followers."""

    @classmethod
    def find(cls, folder: Path, ranks: Ranks) -> Followers:
        """Rank 0 creates a marker file in `folder`; nodes that do not see it are followers.

        Raises `UserError` where ranks of one node see different folders.
        """
        facts = _who_sees(folder, ranks)
        leader, leaders = 0, []
        for rank, (sees, local_rank, name) in enumerate(facts):
            leader = rank if local_rank == 0 else leader
            if sees != facts[leader][0]:
                raise UserError(
                    f"--output_dir {folder}: ranks {leader} and {rank} on {name} see different folders there"
                )
            if rank == leader and not sees:
                leaders.append(rank)
        local = folder if facts[ranks.rank][0] else folder / FOLDER
        followers = cls(ranks, local, tuple(leaders), tuple(facts[rank][2] for rank in leaders))
        if followers.leads:
            shutil.rmtree(local, ignore_errors=True)
            with disk_errors(folder):
                local.mkdir(parents=True)
        return followers

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of a follower."""
        return self.ranks.rank in self.leaders

    def share(self, path: Path) -> None:
        """Copy a file or folder inside rank 0's `folder` to the follower's `path`."""
        self._send(path, path)

    def fetch(self, path: Path) -> Path:
        """Copy any folder of rank 0's node to the followers. Returns the path that this rank can read it at."""
        local = path if self.folder.name != FOLDER else self.folder / "fetched" / path.name
        self._send(path, local)
        return local

    def gather(self, path: Path, group: Any) -> None:
        """Move the files in the followers' folder `path` into rank 0's, over `group`, a gloo group."""
        for leader in self.leaders:
            if self.ranks.rank == leader:
                _send_files(path, 0, group)
                shutil.rmtree(path)
            elif self.ranks.is_first:
                _receive_files(path, leader, group)

    def close(self) -> None:
        """Delete the follower's local folder. Not collective."""
        if self.leads:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # the parent holds other files
                self.folder.parent.rmdir()

    def _send(self, source: Path, target: Path) -> None:
        if not self.leaders:
            return
        self.ranks.barrier(f"copy of {source.name} to other nodes", long=True)
        if self.ranks.is_first:
            for leader in self.leaders:
                _send_files(source, leader, self.ranks.group)
        if self.leads:
            incoming = target.with_name(target.name + _INCOMING)
            shutil.rmtree(incoming, ignore_errors=True)
            _receive_files(incoming, 0, self.ranks.group)
            shutil.rmtree(target, ignore_errors=True)
            incoming.rename(target)
        self.ranks.barrier(f"end of the copy of {source.name}", long=True)


def _who_sees(folder: Path, ranks: Ranks) -> list[tuple[bool, int, str]]:
    """Of every rank: whether it sees a file that rank 0 makes in `folder`, its local rank and its host's name.

    The file's name is new in every run: clients of network file systems remember names that they did not find.
    """
    name = f".seen-by-all-{uuid4().hex}"  # rank 0's counts

    def create() -> str:
        with disk_errors(folder):
            (folder / name).touch()
        return name

    try:
        marker = folder / ranks.on_first("output folder of the nodes", create)
        facts = (_becomes_visible(marker), ranks.local_rank, platform.node())
        return ranks.gather("visibility of the output folder", facts)
    except Exception as error:
        ranks.leave(error)  # the others still look for the file, and see this error where they meet next
        raise
    finally:
        if ranks.is_first:
            (folder / name).unlink(missing_ok=True)


def _becomes_visible(path: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _send_files(folder: Path, to: int, group: Any) -> None:
    listed = [(path, path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [(path.relative_to(folder).as_posix(), size) for path, size in listed]
    dist.send_object_list([names], dst=to, group=group)
    for path, size in listed:
        for part in _parts(path, size):
            dist.send(part, dst=to, group=group)


def _parts(path: Path, size: int) -> Iterator[torch.Tensor]:
    """The file as uint8 tensors of at most `_CHUNK` bytes, `size` in total."""
    with path.open("rb") as file:
        for start in range(0, size, _CHUNK):
            content = bytearray(file.read(min(_CHUNK, size - start)))
            if len(content) < min(_CHUNK, size - start):
                raise RunError(f"{path} became shorter while it was sent")
            yield torch.frombuffer(content, dtype=torch.uint8)


def _receive_files(folder: Path, sender: int, group: Any) -> None:
    """Receives everything even when it cannot be written, so that the sender does not wait without end."""
    names: list[Any] = [None]
    dist.recv_object_list(names, src=sender, group=group)
    problem: OSError | None = None
    for name, size in names[0]:
        parts = [min(_CHUNK, size - start) for start in range(0, size, _CHUNK)] or [0]
        for numel in parts:
            part = torch.empty(numel, dtype=torch.uint8)
            if numel:
                dist.recv(part, src=sender, group=group)
            problem = problem or _append(folder / name, part)
        problem = problem or _flushed(folder / name)
    if problem is not None:
        with disk_errors(folder):
            raise problem


def _flushed(path: Path) -> OSError | None:
    try:
        fsync(path)
    except OSError as error:
        return error
    return None


def _append(path: Path, part: torch.Tensor) -> OSError | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(part.numpy().data)
    except OSError as error:
        return error
    return None
