"""Buckets, and whatever else fsspec reads and writes: objects that are put as a whole,
without renames, links and locks.

    store = ObjectStore("s3://bucket/run")     names are relative to the URL, with slashes
    Lease(store, ".lock")                      one process at a time, also after a killed one

Credentials and endpoints are found by the libraries' own ways (environment, files,
metadata of the machine); they are neither read nor written here.
"""

import logging
import os
import platform
import re
import threading
import time
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
from fsspec.implementations.dirfs import DirFileSystem

from mora_ds.common.errors import RunError, UserError, reason
from mora_ds.common.files import DISK_FULL
from mora_ds.common.untrusted import check_url, relative_path

logger = logging.getLogger(__name__)

_READ_BYTES = 4096
PAUSES_S = (1.0, 4.0, 16.0)
"""Seconds before each further attempt, after those of the library itself."""


_OPTIONS: dict[str, dict[str, Any]] = {
    "file": {"auto_mkdir": True},
    # botocore waits for a minute, and tries five times by itself, five times for s3fs. One
    # more attempt of each request is kept: a call makes several, and s3fs passes a 500 on
    "s3": {
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 30,
            "retries": {"max_attempts": 1},
        }
    },
}
"""What each protocol's library must know."""

_SECRET = re.compile(r"(?<=\?)\S+|(?<=://)[^/\s]*:\S*(?=@)")
"""What may be a signature or KEY:SECRET, in the URLs of other libraries' messages."""


Objects = dict[str, tuple[int, str]]
"""Name of an object -> (bytes, version). The version is a text that changes with it."""


class StoreError(RunError):
    """A store has not done what it was asked for, in spite of retries."""


class NoObject(StoreError):
    """There is no such object, or no such bucket."""


class ObjectStore:
    """The objects below a URL. Methods raise `StoreError`."""

    def __init__(self, url: str, flag: str = "--output_dir") -> None:
        """Raises `UserError` that names `flag` where the URL is a pattern or has
        credentials, the protocol is unknown, its library is missing, or what is stored
        would end with the process."""
        check_url(url, flag)
        self.url = url.rstrip("/")
        where = f"{flag} {url}".lstrip()
        if has_magic(url):
            # `rm` of fsspec would delete what matches
            raise UserError(f"{where}: leave out *, ? and [, which make it a pattern")
        protocol = url.partition("://")[0]
        # What other ranks and other machines write is seen at once
        options = {"use_listings_cache": False, **_OPTIONS.get(protocol, {})}
        try:
            filesystem, root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{where}: {reason(error)} (pip install 'mora_ds[s3]', 'mora_ds[gcs]', 'mora_ds[abfs]')"
            ) from error
        if protocol == "memory" or not root.strip("/"):
            raise UserError(
                f"{where}: give a bucket, or another store that outlives the process, and a name in it"
            )
        self.filesystem = DirFileSystem(root, filesystem)

    def put(self, name: str, source: Path) -> None:
        """Store a file of this machine."""
        self._call("put_file", str(source), name)

    def write(self, name: str, data: bytes) -> None:
        self._call("pipe_file", name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Store an object unless there is one; False where there is. At once, where the
        store can: s3fs asks with If-None-Match."""
        try:
            self._call("pipe_file", name, data, mode="create")
        except FileExistsError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """The content, of which no more than a name or a lease needs; nothing where
        there is no such object."""
        content: bytes = self._found(b"", "head", name, size=_READ_BYTES)
        return content

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes of an object, which must be there."""
        content: bytes = self._call("cat_file", name, start=start, end=end)
        return content

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        """Make files of these names in `folder`, several at a time."""
        targets = [str(folder / relative_path(name)) for name in names]
        try:
            if names:
                self._call("get", list(names), targets)
        except StoreError as error:
            # A part of a file would pass for the file
            for target in targets:
                Path(target).unlink(missing_ok=True)
            raise StoreError(f"{error} (fetched into {folder})") from error

    def facts(self, name: str) -> tuple[int, str] | None:
        """(bytes, version) of an object; None where there is none."""
        entry = self._found({}, "info", name)
        return object_facts(entry) if entry.get("type") == "file" else None

    def find(self, folder: str = "") -> Objects:
        """All objects below a name."""
        return self._list("find", folder)

    def glob(self, pattern: str) -> Objects:
        """The objects that fit a pattern, or lie in the folder of that name."""
        return self._list("glob", pattern) or self.find(pattern)

    def _list(self, method: str, name: str) -> Objects:
        entries = self._found({}, method, name, detail=True)
        return {
            path: object_facts(entry)
            for path, entry in entries.items()
            if path and entry["type"] == "file"
        }

    def folders(self) -> list[str]:
        """The first parts of names, where others follow."""
        entries = self._found([], "ls", "", detail=True)
        return [
            entry["name"].strip("/")
            for entry in entries
            if entry["type"] == "directory"
        ]

    def copy(self, source: str, target: str) -> None:
        """Copy an object, in the store."""
        self._call("cp_file", source, target)

    def delete(self, name: str) -> None:
        """Delete an object, or all below a name; there need not be any."""
        self._found(None, "rm", name, recursive=True)

    def _found(self, absent: Any, method: str, name: str, **options: Any) -> Any:
        """What a method returns; `absent` where there is nothing of that name."""
        try:
            return self._call(method, name, **options)
        except NoObject:
            return absent

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        for pause_s in (*PAUSES_S, None):
            try:
                return getattr(self.filesystem, method)(*arguments, **options)
            except FileExistsError:
                raise
            except (FileNotFoundError, NotADirectoryError) as error:
                raise NoObject(
                    f"{self.url}: {_SECRET.sub('...', reason(error))}"
                ) from error
            # Each library has errors of its own
            except Exception as error:
                is_full = getattr(error, "errno", None) in DISK_FULL
                if pause_s is None or is_full or isinstance(error, PermissionError):
                    raise StoreError(
                        f"{self.url}: {method} failed: {_SECRET.sub('...', reason(error))}"
                    ) from error
                time.sleep(pause_s)


def in_folder(pattern: str) -> tuple[str, str]:
    """(folder without *, ? and [, what follows it) of a URL."""
    found = re.fullmatch(r"([^*?[]*)/(.+)", pattern.rstrip("/"))
    assert found is not None, "a URL has slashes"
    return found[1], found[2]


def matches(pattern: str) -> Objects:
    """The objects that a URL names, by their URLs: one, those that fit *, ? and [, or
    all in a folder."""
    if pattern.startswith("http"):
        # There ? begins a signature
        check_url(pattern, "")
    folder, rest = in_folder(pattern)
    store = ObjectStore(folder, "")
    found = store.glob(rest)
    return {f"{store.url}/{name}": found[name] for name in found}


_VERSIONS = ("ETag", "etag", "mtime", "Last-Modified", "last_modified", "blob_id")
"""What stores call the version of an object, the best ones first."""


def object_facts(entry: dict[str, Any]) -> tuple[int, str]:
    """(bytes, version) of an object, from an entry of an fsspec listing."""
    # Azure quotes it in one of two answers
    versions = [str(entry[name]).strip('"') for name in _VERSIONS if name in entry]
    return entry["size"], "".join(versions[:1])


RENEWED_S = 5.0
"""Seconds after which a holder renews its lease."""
EXPIRES_S = 30.0
"""Seconds without a renewal after which a lease is another's to take. They are counted
by who waits, so that clocks need not agree."""


_leases: list["Lease"] = []
"""Those that this process has."""


def confirm_leases() -> None:
    """Ask whether this process still has its leases: after a hang it need not know yet
    that one has expired. Raises `RunError` where another process has taken it."""
    for lease in _leases:
        lease.confirm()


class Lease:
    """The right to write to a store: an object with owner and time, which its holder
    renews, so that who waits sees whether a killed process has left it."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self._name = name
        self._owner = f"process {os.getpid()} on {platform.node()}, {uuid4().hex}"
        self._is_lost = False
        self._in_use = threading.Lock()
        """Held while the object is renewed: a store on a disk shows it empty meanwhile."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        """Raises `UserError` where another process has it, or the store cannot tell."""
        if not self._store.create(self._name, self._content()):
            self._await_expiry()
            self._store.delete(self._name)
            if not self._store.create(self._name, self._content()):
                raise self._taken()
        if self._store.create(self._name, self._content()):
            # Some answer to S3's requests and ignore If-None-Match
            self._store.delete(self._name)
            raise UserError(
                f"--output_dir {self._store.url}: this store has no conditional writes, so that "
                "two runs could write there; give another one"
            )
        self._thread.start()
        _leases.append(self)

    def confirm(self) -> None:
        """`check`, by asking the store now."""
        with self._in_use:
            self._is_lost |= self._holder() != self._owner
        self.check()

    def check(self) -> None:
        """Raises `RunError` where another process has taken the lease, which was not
        renewed in time."""
        if self._is_lost:
            raise RunError(
                f"{self._store.url}: this run was out of touch for {EXPIRES_S:.0f} s, and another one writes there now"
            )

    def release(self) -> None:
        self._ended.set()
        if self in _leases:
            _leases.remove(self)
        if self._thread.is_alive():
            self._thread.join()
            if self._holder() == self._owner:
                self._store.delete(self._name)

    def _await_expiry(self) -> None:
        content = self._store.read(self._name)
        logger.info(
            f"{self._store.url} was reserved by {self._holder()}: waiting for {EXPIRES_S:.0f} s whether it is alive"
        )
        time.sleep(EXPIRES_S)
        now = self._store.read(self._name)
        # A store on a disk shows an object that is renewed as empty
        is_released = not now and self._store.facts(self._name) is None
        if now != content and not is_released:
            raise self._taken()

    def _taken(self) -> UserError:
        return UserError(
            f"--output_dir {self._store.url}: another run writes there ({self._holder()}); end it first"
        )

    def _holder(self) -> str:
        """Who has the lease; "" where nobody has."""
        return self._store.read(self._name).decode(errors="replace").partition("\n")[0]

    def _content(self) -> bytes:
        return f"{self._owner}\n{time.time()}\n".encode()

    def _renew(self) -> None:
        while not (self._is_lost or self._ended.wait(RENEWED_S)):
            try:
                with self._in_use:
                    self._is_lost = self._holder() != self._owner
                    if not self._is_lost:
                        self._store.write(self._name, self._content())
            except StoreError as error:
                logger.warning(f"the lease was not renewed: {error}")
