"""Storages of checkpoints in place of the disk: the memory of a process of its own, which
outlives ranks that are killed, and a bucket behind S3 over HTTP.

    @OVER_STORES                     a test with the fixture `out` runs with checkpoints on disk, in memory, in a bucket
    shown(out)                       checkpoints that are elsewhere lie in `out` too, for assertions that read files
    stored(out)                      those that lie in `out` are elsewhere from now on
    be_read_only(out)                from now on the memory takes nothing, as a file system that was remounted

A run's checkpoints are in memory where the socket `SOCKET` lies next to its output folder,
and in a bucket where the file `ENDPOINT` does.
"""

import errno
import shutil
import tempfile
from contextlib import contextmanager, suppress
from multiprocessing.managers import BaseManager
from pathlib import Path

import pytest

from mora_ds.checkpoint import storage as storages
from mora_ds.checkpoint.layout import BEST, LATEST
from mora_ds.checkpoint.storage import LocalStorage, ObjectStorage, make_storage
from tests.helpers.buckets import reach

SOCKET = "memory"
ENDPOINT = "endpoint"
KEY = b"tests"
READ_ONLY = (None, "read-only")
BUCKET = pytest.param("bucket", marks=pytest.mark.heavy)
OVER_STORES = pytest.mark.parametrize("out", ["disk", "memory", BUCKET], indirect=True)


class Server(BaseManager):
    """Holds {(folder of checkpoints, name): bytes of a file, or the folder of a link}, None
    for what is gone.
    """


CONTENT = {}
Server.register("content", callable=lambda: CONTENT, exposed=["copy", "update"])


class MemoryStorage:
    def __init__(self, root, socket):
        self.root = root
        self._socket = socket

    def _content(self):
        server = Server(str(self._socket), KEY)
        server.connect()
        return server.content()

    def _names(self, below=""):
        """{name: content}, of what begins so."""
        return {
            name: data
            for (root, name), data in self._content().copy().items()
            if root == self.root.resolve()
            and name.startswith(below)
            and data is not None
        }

    def _update(self, changes):
        """All at once."""
        root = self.root.resolve()
        content = self._content()
        if content.copy().get(READ_ONLY):
            raise OSError(errno.EROFS, "Read-only file system")
        content.update({(root, name): changes[name] for name in changes})

    def folders(self):
        return list({name.split("/")[0] for name in self._names() if "/" in name})

    def sizes(self, folder):
        files = self._names(f"{folder}/").items()
        return {name.removeprefix(f"{folder}/"): len(data) for name, data in files}

    def exists(self, file):
        return file in self._names()

    def open_read(self, name):
        copy = Path(tempfile.mkdtemp(dir=self._socket.parent, prefix="copy-"))
        for file, data in self._names(name).items():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            if "/" in file:
                (copy / file).write_bytes(data)
            else:
                (copy / file).symlink_to(data)
        return copy / name

    @contextmanager
    def write(self, file):
        with tempfile.TemporaryDirectory(dir=self._socket.parent) as folder:
            path = Path(folder) / "file"
            yield path
            self.put(file, path)

    def put(self, file, source):
        self._update({file: source.read_bytes()})

    def commit(self, written, final):
        files = self._names(f"{written}/")
        moved = {file.replace(written, final, 1): files[file] for file in files}
        gone = [*files, *self._names(f"{final}/")]
        self._update({**dict.fromkeys(gone), **moved})

    def delete(self, folder):
        with suppress(OSError):
            self._update(dict.fromkeys(self._names(folder)))

    def repair(self):
        self.delete(".")

    def link(self, link, folder):
        self._update({link: folder})

    def linked(self, link):
        folder = self._names().get(link)
        return folder if folder in self.folders() else None


def chosen(root):
    home = root.absolute().parent.parent
    if (home / SOCKET).is_socket():
        return MemoryStorage(root, home / SOCKET)
    if (home / ENDPOINT).is_file():
        url = reach((home / ENDPOINT).read_text(), root)
        return ObjectStorage(root, url, home / "copies" / root.absolute().parent.name)
    return make_storage(root)


storages.make_storage = chosen


@contextmanager
def in_memory(folder):
    """The checkpoints of runs with output folders in `folder` are in memory."""
    server = Server(str(folder / SOCKET), KEY)
    server.start()
    try:
        yield
    finally:
        server.shutdown()


def store_of(out):
    return storages.storage_of(out / "checkpoints")


def stored(out):
    store = store_of(out)
    if isinstance(store, LocalStorage):
        return
    for path in sorted(store.root.rglob("*")):
        name = path.relative_to(store.root).as_posix()
        if path.is_symlink():
            store.link(name, path.readlink().name)
        elif path.is_file():
            store.put(name, path)
    shutil.rmtree(store.root)


def shown(out):
    store = store_of(out)
    if not isinstance(store, LocalStorage):
        for folder in store.folders():
            shutil.copytree(
                store.open_read(folder), store.root / folder, dirs_exist_ok=True
            )
        for link in (LATEST, BEST):
            if folder := store.linked(link):
                (store.root / link).symlink_to(folder)


@contextmanager
def edited(out, name):
    """The path of a checkpoint, or of a file of it, for a change of it."""
    store = store_of(out)
    if isinstance(store, LocalStorage):
        yield store.root / name
        return
    folder = name.split("/")[0]
    copy = Path(shutil.copytree(store.open_read(folder), out / "edited" / folder))
    yield copy.parent / name
    store.delete(folder)
    for path in copy.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(copy.parent).as_posix(), path)
    shutil.rmtree(copy.parent)


def be_read_only(out, value=True):
    store_of(out)._content().update({READ_ONLY: value})
