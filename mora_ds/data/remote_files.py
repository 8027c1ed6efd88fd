"""Files of text at URLs, as members of a corpus. They are read in ranges, as a file on a
disk is, and never stored on this machine: the token cache holds their tokens alone.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from glob import has_magic
from typing import Any

from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject
from mora_ds.common.object_store import ObjectStore, StoreError, matches
from mora_ds.data.members import FileMember
from mora_ds.data.readers import TOKENS, file_kind, has_known_suffix

BLOCK_BYTES = 8 << 20
"""The most bytes of one request."""
FIRST_BYTES = 1 << 20
"""Bytes of the first request. At the start of a run each rank reads one document of each
file."""


@dataclass(frozen=True)
class RemoteFile:
    """An object, with what a reader of text needs of a `Path`."""

    url: str
    size: int
    version: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def open(self) -> io.BufferedReader:
        """Its bytes. Reading raises `StoreError`, in spite of retries."""
        return io.BufferedReader(_Ranges(self), BLOCK_BYTES)


class _Ranges(io.RawIOBase):
    """The bytes of an object. Each read is a request."""

    def __init__(self, file: RemoteFile) -> None:
        folder, _, self._name = file.url.rpartition("/")
        self._store = ObjectStore(folder, "")
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {
            io.SEEK_SET: 0,
            io.SEEK_CUR: self._position,
            io.SEEK_END: self._file.size,
        }
        self._position = start[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self._position, FIRST_BYTES))
        end = min(self._position + wanted, self._file.size)
        if end <= self._position:
            return 0
        data = self._store.read_range(self._name, self._position, end)
        if len(data) != end - self._position:
            raise StoreError(f"{self._file} was changed after this run looked at it")
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@dataclass(frozen=True)
class RemoteMember(FileMember):
    """A file of text at a URL."""

    path: Any
    """`RemoteFile`"""

    def sha256(self) -> str:
        with self.path.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def stat_signature(self) -> JsonObject:
        return vars(self.path)

    def size_bytes(self) -> int:
        return self.path.size


def remote_members(pattern: str, text_column: str) -> list[RemoteMember]:
    """The files that a URL with *, ? and [ names, sorted, without empty ones. Raises
    `UserError` where there is none, or one of tokens."""
    found = matches(pattern)
    files: list[Any] = [
        RemoteFile(url, *found[url]) for url in sorted(found) if found[url][0]
    ]
    if pattern not in found and not has_magic(pattern):
        # A folder
        files = list(filter(has_known_suffix, files))
    if not files:
        raise UserError(f"no file matches {pattern!r}.")
    for file in files:
        if file_kind(file) == TOKENS:
            raise UserError(
                f"{file} is a token file, which is read in place: copy it to a disk"
            )
    return [RemoteMember(file, text_column) for file in files]
