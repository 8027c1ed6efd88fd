"""Files of text at URLs, as members of a corpus. They are read in ranges, as a file on a
disk is, and never stored on this machine: the token cache holds their tokens alone.
Token files are copied to this machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from glob import escape, has_magic
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractBufferedFile

from mora_ds.common.errors import UserError
from mora_ds.common.fetched import fetched_files
from mora_ds.common.files import JsonObject
from mora_ds.common.object_store import ObjectStore, StoreError, in_folder, matches
from mora_ds.common.untrusted import is_url
from mora_ds.data.members import FileMember
from mora_ds.data.readers import TOKENS, file_kind, has_known_suffix
from mora_ds.data.token_files import TokenFile

BLOCK_BYTES = 8 << 20
"""The most bytes that are read ahead. Fewer at first: at the start of a run each rank
reads one document of each file."""


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

    def open(self) -> AbstractBufferedFile:
        """Its bytes. Reading raises `StoreError`, in spite of retries, and where the object
        was replaced."""
        return _Ranges(self)


class _Ranges(AbstractBufferedFile):
    """The bytes of an object, in requests that grow."""

    def __init__(self, file: RemoteFile) -> None:
        folder, _, name = file.url.rpartition("/")
        self._file = file
        self._store = ObjectStore(folder, "")
        super().__init__(self._store.filesystem, name, block_size=0, size=file.size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        data = self._store.read_range(self.path, start, end)
        # Asked after the read: only then are the bytes known to be of this version
        if self._store.facts(self.path) != (self._file.size, self._file.version):
            raise StoreError(f"{self._file} was changed after this run looked at it")
        # The next request reads ahead as much as was read so far
        self.cache.blocksize = min(end, BLOCK_BYTES)
        return data


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


def tokens_on_disk(pattern: str) -> str:
    """The pattern; of token files at URLs, that of their copies on this machine, next to
    their indices."""
    named: Any = RemoteFile(pattern, 0, "")
    if not is_url(pattern) or file_kind(named) != TOKENS:
        return pattern
    folder, name = in_folder(pattern)
    index = TokenFile(Path(name), "").index
    names = (name,) if index is None else (name, str(index.path))
    return f"{escape(str(fetched_files(folder, names)))}/{name}"


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
                f"{file} is a token file: name it by a pattern with its suffix"
            )
    return [RemoteMember(file, text_column) for file in files]
