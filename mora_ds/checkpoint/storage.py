"""Where the checkpoints of a run are kept: `Storage`, a small protocol; `LocalStorage`,
a folder that all ranks see; and `ObjectStorage`, a bucket.

A storage holds folders of files. Files are written into a folder whose name begins with
a dot; its manifest.json comes last; `commit` then gives the folder its name, at once.
So a folder with a manifest is a checkpoint, and one without is none.

Another kind of storage is another class with these methods, which `make_storage` makes:
nothing else in mora_ds opens, lists or deletes what a storage holds.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from mora_ds.checkpoint.layout import BEST, LATEST, is_step_name
from mora_ds.common.fetched import kept_at
from mora_ds.common.files import (
    MANIFEST,
    atomic_path,
    disk_errors,
    file_sizes,
    fsync,
    fsync_tree,
    link_or_copy,
    replace_symlink,
    stat_signature,
)
from mora_ds.common.object_store import (
    NoObject,
    ObjectStore,
    StoreError,
    confirm_leases,
)

logger = logging.getLogger(__name__)

WRITING = ".writing"
"""The end of the hidden name under which a folder is written."""
_OLD = ".old"
_GONE = ".gone"
"""Ends of the hidden names of folders that are replaced or deleted."""
_NOT_DELETED = (
    "warning: %s cannot be deleted and takes up space: %s; the next save tries again"
)


class Storage(Protocol):
    """The checkpoints of one run, and nothing else. Names are relative, with slashes:
    step-000100, step-000100/engine/rank-00000.safetensors. Every rank has its own
    object; all of them see the same files. Errors of a full disk, or its like, are
    `RunError`s.
    """

    root: Path
    """What users and messages call it."""

    def folders(self) -> list[str]:
        """The names of all folders, hidden ones included."""

    def sizes(self, folder: str) -> dict[str, int]:
        """{name in the folder: bytes} of all its files, at any depth."""

    def exists(self, file: str) -> bool:
        """Whether there is such a file."""

    def open_read(self, name: str) -> Path:
        """A path on this machine with the content of a file or a folder, which may be
        missing there. Not to be written to."""

    def write(self, file: str) -> AbstractContextManager[Path]:
        """A path on this machine to write to, which becomes the file at the end of the
        block; nothing where the block raises."""

    def put(self, file: str, source: Path) -> None:
        """Store a file of this machine, which nobody changes any more."""

    def commit(self, written: str, final: str) -> None:
        """Give a folder that is complete its final name, in place of a folder that has
        it. Whenever the process is killed, one of the two has the name, at the latest
        after `repair`."""

    def delete(self, folder: str) -> None:
        """Delete a folder, the manifest first or at once. What cannot be deleted is a
        warning."""

    def repair(self) -> None:
        """Clean up what a killed process has left under hidden names."""

    def link(self, link: str, folder: str) -> None:
        """Name a folder `link` too, in place of one that has been named so."""

    def linked(self, link: str) -> str | None:
        """The folder that `link` names, if there is one in this storage."""


def storage_of(root: Path) -> Storage:
    """The storage of the checkpoints in `root`."""
    return make_storage(root)


def located(path: Path) -> tuple[Storage, str]:
    """The storage and the name of a checkpoint that a user names by its path, or by
    that of a link."""
    path = path.resolve()
    storage = storage_of(path.parent)
    return storage, storage.linked(path.name) or path.name


def local_copy(checkpoint: Path) -> Path:
    """A folder on this machine with the files of a checkpoint."""
    return storage_of(checkpoint.parent).open_read(checkpoint.name)


class LocalStorage:
    """A folder on a disk, or on a file system that all nodes share.

    Only folders with the name of a checkpoint, and hidden ones with a known ending, are ever
    deleted; a link that the user has put in place of a checkpoint stays.
    """

    def __init__(self, root: Path) -> None:
        """`root` need not exist."""
        self.root = root

    def folders(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return [path.name for path in self.root.iterdir() if path.is_dir()]

    def sizes(self, folder: str) -> dict[str, int]:
        return file_sizes(self.root / folder)

    def exists(self, file: str) -> bool:
        return (self.root / file).is_file()

    def open_read(self, name: str) -> Path:
        return self.root / name

    @contextmanager
    def write(self, file: str) -> Iterator[Path]:
        path = self._made_for(file)
        with atomic_path(path) as temporary:
            yield temporary

    def put(self, file: str, source: Path) -> None:
        """By a hard link where the disk has them."""
        link_or_copy(source, self._made_for(file))

    def commit(self, written: str, final: str) -> None:
        folder = self.root / final
        old = self.root / f".{final}{_OLD}{WRITING}"
        # The ranks have flushed their files; a rank does not open a thousand of them
        fsync_tree(self.root / written, with_files=False)
        if folder.exists():
            os.replace(folder, old)
        os.replace(self.root / written, folder)
        _delete(old)
        fsync(self.root)

    def delete(self, folder: str) -> None:
        """Renamed first: a half-deleted one never has a checkpoint's name."""
        path = self.root / folder
        if path.is_symlink():
            return
        gone = path
        if not folder.startswith("."):
            gone = self.root / f".{folder}{_GONE}{WRITING}"
            try:
                os.rename(path, gone)
            except OSError as error:
                logger.warning(_NOT_DELETED, path, error)
                return
        _delete(gone)

    def repair(self) -> None:
        if not self.root.is_dir():
            return
        with disk_errors(self.root):
            for old, final in self._hidden(f"{_OLD}{WRITING}"):
                # Killed between the two renames: this may be the only good one
                if not final.exists():
                    os.rename(old, final)
            for ending in (WRITING, f"{_OLD}{WRITING}", f"{_GONE}{WRITING}"):
                for partial, _ in self._hidden(ending):
                    _delete(partial)
            for link in (LATEST, BEST):
                (self.root / f".{link}.partial").unlink(missing_ok=True)

    def link(self, link: str, folder: str) -> None:
        replace_symlink(self.root / link, folder)

    def linked(self, link: str) -> str | None:
        path = self.root / link
        if not path.is_symlink():
            return None
        target = os.readlink(path)
        named = self.root / target
        if "/" in target:
            named = named.resolve()
        is_here = named.parent.resolve() == self.root.resolve()
        return named.name if is_here and named.is_dir() else None

    def _made_for(self, file: str) -> Path:
        """The path of a file, whose folder exists."""
        path = self.root / file
        with disk_errors(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _hidden(self, ending: str) -> list[tuple[Path, Path]]:
        """(hidden folder, the folder that it was or is to be) for every name that
        `commit`, `delete` or a save has made with this ending."""
        hidden = []
        for path in self.root.glob(f".*{ending}"):
            name = path.name.removeprefix(".").removesuffix(ending)
            if is_step_name(name):
                hidden.append((path, self.root / name))
        return hidden


def _delete(folder: Path) -> None:
    """Deletes as much of a folder as can be deleted, which need not exist. What cannot
    be (a file that is still open on an NFS server, a folder without permission) is only
    worth a warning: the next save tries again (`repair`)."""
    if not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        if folder.is_symlink():
            # The checkpoint itself, which the user keeps elsewhere, stays
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except FileNotFoundError:
        pass  # Another rank has deleted it
    except OSError as error:
        logger.warning(_NOT_DELETED, folder, error)


class ObjectStorage:
    """A bucket, or another `ObjectStore`, in which a rename is a copy of everything.

    So files are put under the final name, and the manifest, which comes last, is the
    commit. A checkpoint that replaces one of the same step is written under the hidden
    name and copied when it is complete: `repair` goes on with a copy that was killed.
    A cycle of the merge ledger that an earlier checkpoint has is copied in the store.
    """

    def __init__(self, root: Path, url: str, copies: Path) -> None:
        """`copies`: the folder into which this run fetches what it reads. It may be `root`,
        where nothing else is read."""
        self.root = root
        self._copies = copies
        self._store = ObjectStore(url)
        self._newest: dict[object, str] = {}
        """Path and stat signature of a file -> where it was put last."""

    def folders(self) -> list[str]:
        return self._store.folders()

    def sizes(self, folder: str) -> dict[str, int]:
        key = self._key(folder)
        facts = self._store.find(key)
        return {name.removeprefix(f"{key}/"): size for name, (size, _) in facts.items()}

    def exists(self, file: str) -> bool:
        return self._store.facts(self._key(file)) is not None

    def open_read(self, name: str) -> Path:
        """Fetched once, for all ranks of the machine."""
        key = self._key(name)
        copy = self._copies / key
        if not copy.is_file():
            files = [key] if self._store.facts(key) else self._store.find(key)
            missing = [file for file in files if not (self._copies / file).exists()]
            self._store.fetch(missing, self._copies)
        return copy

    @contextmanager
    def write(self, file: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.root.parent) as folder:
            path = Path(folder) / "file"
            yield path
            if file.endswith(MANIFEST):
                confirm_leases()
            self._store.put(self._key(file), path)

    def put(self, file: str, source: Path) -> None:
        key = self._key(file)
        known = (source, stat_signature(source))
        try:
            self._store.copy(self._newest[known], key)
        except (KeyError, NoObject):
            self._store.put(key, source)
        self._newest[known] = key

    def commit(self, written: str, final: str) -> None:
        if self._is_committed(written):
            self._replace(written, final)

    def _replace(self, written: str, final: str) -> None:
        self._delete(final)
        manifest = f"{written}/{MANIFEST}"
        for file in sorted(
            self._store.find(written), key=lambda file: file == manifest
        ):
            self._store.copy(file, file.replace(written, final, 1))
        self._delete(written)

    def delete(self, folder: str) -> None:
        try:
            self._delete(self._key(folder))
        except StoreError as error:
            logger.warning(_NOT_DELETED, folder, error)

    def _delete(self, key: str) -> None:
        self._store.delete(f"{key}/{MANIFEST}")
        self._store.delete(key)
        shutil.rmtree(self._copies / key, ignore_errors=True)

    def repair(self) -> None:
        """Also deletes checkpoints without a manifest: no other run writes one."""
        # Hidden names come first
        for folder in sorted(self.folders()):
            final = _final_name(folder)
            if final != folder and self._is_committed(folder):
                self._replace(folder, final)
            elif is_step_name(final) and not self._is_committed(folder):
                self.delete(folder)

    def link(self, link: str, folder: str) -> None:
        self._store.write(link, folder.encode())

    def linked(self, link: str) -> str | None:
        name = self._store.read(link).decode(errors="replace")
        return name if name in self.folders() else None

    def _is_committed(self, key: str) -> bool:
        return self._store.facts(f"{key}/{MANIFEST}") is not None

    def _key(self, name: str) -> str:
        """Where the objects of a name lie: what is written under a hidden name, under
        the final one, unless a checkpoint has it."""
        folder = name.split("/")[0]
        final = _final_name(folder)
        if final == folder or self._is_committed(final):
            return name
        return name.replace(folder, final, 1)


def _final_name(folder: str) -> str:
    """The name that a folder which is being written is to have; others' own."""
    final = folder.removeprefix(".").removesuffix(WRITING)
    is_hidden = folder == f".{final}{WRITING}" and is_step_name(final)
    return final if is_hidden else folder


def make_storage(root: Path) -> Storage:
    """The storage of a folder of checkpoints: the one place that chooses its kind."""
    url = kept_at(root)
    return LocalStorage(root) if url is None else ObjectStorage(root, url, root)
