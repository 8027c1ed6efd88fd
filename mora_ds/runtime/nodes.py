"""Nodes that do not see the run's folder: they keep nothing there, and files travel to and from rank 0's node.

    node of rank 0      OUTPUT_DIR             the run: checkpoints, ledger, curves
    a follower          OUTPUT_DIR/.follower   on storage of its own: its shards until rank 0 has them, a copy of the
                                               ledger, what it resumes from; gone when the run ends

Where all nodes share the folder there are no followers, and nothing here sends a byte.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from mora_ds.errors import RunError, UserError
from mora_ds.files import disk_errors
from mora_ds.runtime.ranks import Ranks

FOLDER = ".follower"
_INCOMING = ".incoming"
_CHUNK = 16 << 20
"""Bytes that are in memory at a time."""
_SEEN_WITHIN_S = 20.0
"""How late a network file system may show a new file to other nodes."""


@dataclass(frozen=True)
class Followers:
    """Which nodes follow, and where this rank works. Made, and asked to move files, by all ranks together."""

    ranks: Ranks
    folder: Path
    """The run's folder; on a follower one of its own."""
    leaders: tuple[int, ...]
    """The first rank of each follower."""
    names: tuple[str, ...]
    """Of the followers, as they call themselves."""

    @classmethod
    def find(cls, folder: Path, ranks: Ranks) -> Followers:
        """Rank 0 puts up a sign in `folder`; the nodes that do not see it follow."""
        sign = ranks.on_first(lambda: _put_up_sign(folder))
        facts: list[Any] = [None] * ranks.world
        dist.all_gather_object(facts, (_sees(folder / sign), ranks.local_rank, platform.node()), group=ranks.group)
        if ranks.is_first:
            (folder / sign).unlink(missing_ok=True)
        leader, leaders = 0, []
        for rank, (sees, local_rank, name) in enumerate(facts):
            leader = rank if local_rank == 0 else leader
            if sees != facts[leader][0]:
                raise UserError(
                    f"--output_dir {folder}: ranks {leader} and {rank} on {name} see different folders there"
                )
            if rank == leader and not sees:
                leaders.append(rank)
        own = folder if facts[ranks.rank][0] else folder / FOLDER
        followers = cls(ranks, own, tuple(leaders), tuple(facts[rank][2] for rank in leaders))
        followers._begin()
        return followers

    @property
    def leads(self) -> bool:
        """Whether this rank is a follower's first."""
        return self.ranks.rank in self.leaders

    def share(self, path: Path) -> None:
        """What rank 0 has under `path`, a file or folder in its `folder`, under the follower's `path` too."""
        self._send(path, path)

    def fetch(self, path: Path) -> Path:
        """A folder of rank 0's node, wherever it lies there, as this rank can read it."""
        own = path if self.folder.name != FOLDER else self.folder / "fetched" / path.name
        self._send(path, own)
        return own

    def gather(self, path: Path, group: Any) -> None:
        """The files that followers have in their folder `path` move into rank 0's. On `group`, a gloo group."""
        for leader in self.leaders:
            if self.ranks.rank == leader:
                _send_files(path, 0, group)
                shutil.rmtree(path)
            elif self.ranks.is_first:
                _receive_files(path, leader, group)

    def close(self) -> None:
        """Followers leave nothing behind. Each rank for itself."""
        if self.leads:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # something else lies there
                self.folder.parent.rmdir()

    def _begin(self) -> None:
        if self.leads:
            shutil.rmtree(self.folder, ignore_errors=True)
            with disk_errors(self.folder.parent):
                self.folder.mkdir(parents=True)

    def _send(self, source: Path, target: Path) -> None:
        for leader in self.leaders:
            if self.ranks.is_first:
                _send_files(source, leader, self.ranks.group)
        if self.leads:
            incoming = target.with_name(target.name + _INCOMING)
            shutil.rmtree(incoming, ignore_errors=True)
            _receive_files(incoming, 0, self.ranks.group)
            shutil.rmtree(target, ignore_errors=True)
            incoming.rename(target)
        if self.leaders:
            self.ranks.barrier()


def _put_up_sign(folder: Path) -> str:
    """A name that no client of a network file system can have looked up before, and remember as missing."""
    sign = f".seen-by-all-{uuid4().hex}"
    with disk_errors(folder):
        (folder / sign).touch()
    return sign


def _sees(sign: Path) -> bool:
    until = time.monotonic() + _SEEN_WITHIN_S
    while not sign.exists():
        if time.monotonic() > until:
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
    """(n,) bytes each, `size` in all."""
    with path.open("rb") as file:
        for start in range(0, size, _CHUNK):
            content = bytearray(file.read(min(_CHUNK, size - start)))
            if len(content) < min(_CHUNK, size - start):
                raise RunError(f"{path} became shorter while it was sent")
            yield torch.frombuffer(content, dtype=torch.uint8)


def _receive_files(folder: Path, sender: int, group: Any) -> None:
    """Everything is received even when it cannot be written: the sender must not wait for ever."""
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
    if problem is not None:
        with disk_errors(folder):
            raise problem


def _append(path: Path, part: torch.Tensor) -> OSError | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(part.numpy().data)
    except OSError as error:
        return error
    return None
