"""What a URL names, as a folder of this machine: fetched once a node, into a cache.

    local("s3://bucket/model", "--base")      CACHE/<hash of the URL, and of the sizes and versions there>/model
    local("s3://bucket/run")                  .../step-000100, the run's latest checkpoint
    local("out/checkpoints/latest")           the same path

`with_urls` does the reverse for messages: it replaces the path of a copy by its URL, and so
that of the working folder of a run whose --output_dir is a URL (`bind`).

A folder is complete as soon as it has its name. What has changed at the URL since is
fetched again, into another one. Nothing is ever deleted: it is a cache.
"""

import fcntl
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from mora_ds.common.errors import UserError
from mora_ds.common.files import atomic_folder, disk_errors, json_digest
from mora_ds.common.object_store import Objects, ObjectStore, StoreError
from mora_ds.common.untrusted import expanded, is_url

CHECKPOINTS = "checkpoints"
LATEST = "latest"
"""A link: on a disk to a folder next to it, elsewhere an object with that folder's
name."""

ALL = ("*",)

_cache: Path | None = None
"""The folder of `fetch_into`."""
_urls: dict[str, str] = {}
"""Folder of this machine -> the URL that it stands for: a copy of what is there, or the
working folder of a run there."""
_checkpoints: dict[str, str] = {}
"""Folder that stands for a run's checkpoints -> the URL where they are."""


def users_cache() -> Path:
    """The folder of mora_ds in the user's cache."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(folder, "--cache_dir") / "mora_ds"


def fetch_into(folder: Path) -> None:
    """From now on, in this process, fetch into this folder, not into the user's
    cache."""
    global _cache
    _cache = folder


def local(
    place: str | Path,
    flag: str = "",
    names: tuple[str, ...] = ALL,
    all_checkpoints: bool = False,
) -> Path:
    """The path `place`, or a folder with the content of that URL.

    `names`: patterns of the files that are needed. `all_checkpoints`: of a run, in place of
    its latest checkpoint. Raises `UserError` that names `flag` where there is nothing,
    and `StoreError`.
    """
    if not is_url(place):
        return expanded(place, flag)
    # This run's own checkpoints, which its storage fetches
    for root, url in _checkpoints.items():
        if str(place).startswith(f"{url}/"):
            return Path(root + str(place).removeprefix(url))
    return fetched_once(str(place), flag, names, all_checkpoints)


def bind(folder: Path, url: str) -> None:
    """From now on, in this process, a run at a URL works in `folder`, a resolved path.
    Its checkpoints are at the URL alone."""
    _urls[str(folder)] = url
    _checkpoints[f"{folder}/{CHECKPOINTS}"] = f"{url}/{CHECKPOINTS}"


def kept_at(root: Path) -> str | None:
    """The URL of the checkpoints that a run has in the folder `root`; None where they are
    in it."""
    return _checkpoints.get(str(root.resolve()))


def with_urls(text: object) -> str:
    """A message in which folders that stand for URLs have those as names."""
    message = str(text)
    for folder, url in _urls.items():
        message = message.replace(folder, url)
    return message


@cache
def fetched_once(
    url: str, flag: str, names: tuple[str, ...], all_checkpoints: bool
) -> Path:
    """Once a process: all that it reads is of one version."""
    store = _followed(ObjectStore(url, flag), all_checkpoints)
    versions = {
        name: version
        for name, version in store.find().items()
        if any(fnmatch(name, pattern) for pattern in names)
    }
    if not versions:
        raise UserError(f"{flag} {url}: there is no such folder".lstrip())
    return _copy(store, versions)


@cache
def fetched_files(folder: str, patterns: tuple[str, ...]) -> Path:
    """A folder with the files of a URL that fit these patterns. Raises `UserError`
    where none does."""
    store = ObjectStore(folder, "")
    versions: Objects = {}
    for pattern in patterns:
        versions |= store.glob(pattern)
    if not versions:
        raise UserError(f"no file matches '{folder}/{patterns[0]}'.")
    return _copy(store, versions)


def _copy(store: ObjectStore, versions: Objects) -> Path:
    """The folder with these objects, which is made where it is missing."""
    key = json_digest([store.url, versions])[:32]
    parent = ((_cache or users_cache()) / "fetched" / key).resolve()
    folder = parent / store.url.rpartition("/")[2]
    if not folder.exists():
        with disk_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            _fetch(store, versions, folder)
    _urls[str(folder)] = store.url
    return folder


def _fetch(store: ObjectStore, versions: Objects, folder: Path) -> None:
    # A lock may be of this node alone: another one fetches into a folder of its own
    own = folder.with_name(f".{platform.node()}")
    with _locked(folder.with_name(".lock")):
        if folder.exists():
            return
        with atomic_folder(own) as partial:
            store.fetch(list(versions), partial)
            if checkpoint := _linked(store, LATEST):
                (partial / LATEST).unlink(missing_ok=True)
                (partial / LATEST).symlink_to(checkpoint)
            if not versions.items() <= store.find().items():
                raise StoreError(
                    f"{store.url} has changed while it was fetched: try again"
                )
        try:
            own.rename(folder)
        except OSError:
            # Another node was faster, unless the folder is not there
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(own, ignore_errors=True)


def _followed(store: ObjectStore, all_checkpoints: bool) -> ObjectStore:
    """What a URL means: itself, the checkpoint that it links to, or a run's latest, or
    all of the run."""
    for link in ("", LATEST, f"{CHECKPOINTS}/{LATEST}"):
        if folder := _linked(store, link):
            parent = f"{store.url}/{link}".rstrip("/").rpartition("/")[0]
            is_all = all_checkpoints and link
            return ObjectStore(parent if is_all else f"{parent}/{folder}")
    return store


def _linked(store: ObjectStore, link: str) -> str | None:
    """The folder that an object names, if it is a link."""
    if store.facts(link) is None:
        return None
    name = store.read(link).decode(errors="replace")
    return name if name.startswith("step-") and "/" not in name else None


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """A context that one process has at a time."""
    # NFS locks files that are open for writing, and no folders
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
