"""What a URL names, as a folder of this machine: fetched once a node, into a cache.

    local("s3://bucket/model", "--base")      CACHE/<hash of the URL, and of the sizes and versions there>/model
    local("s3://bucket/run")                  .../step-000100, the run's latest checkpoint
    local("out/checkpoints/latest")           the same path

A folder is complete as soon as it has its name. What has changed at the URL since is
fetched again, into another one. Nothing is ever deleted: it is a cache.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from mora_ds.common.errors import UserError
from mora_ds.common.files import atomic_folder, json_digest
from mora_ds.common.object_store import ObjectStore
from mora_ds.common.untrusted import expanded, is_url, read_text

CHECKPOINTS = "checkpoints"
LATEST = "latest"
BEST = "best"
"""Links: on a disk to a folder next to it, elsewhere an object with that folder's
name."""

_LINK_BYTES = 20

ALL = ("*",)

_folders: dict[str, Path] = {}
"""The cache of this process, by the name `_CACHE`."""
_CACHE = "cache"
_urls: dict[str, str] = {}
"""Fetched folder -> its URL."""


def users_cache() -> Path:
    """The folder of mora_ds in the user's cache."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(folder, "--cache_dir") / "mora_ds"


def fetch_into(folder: Path) -> None:
    """From now on, in this process, fetch into this folder, not into the user's
    cache."""
    _folders[_CACHE] = folder


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
    return _fetched(str(place), flag, names, all_checkpoints)


def with_urls(text: object) -> str:
    """A message in which fetched folders have their URLs as names."""
    message = str(text)
    for folder, url in _urls.items():
        message = message.replace(folder, url)
    return message


@cache
def _fetched(
    url: str, flag: str, names: tuple[str, ...], all_checkpoints: bool
) -> Path:
    """Once a process: all that it reads is of one version."""
    store = ObjectStore(url, flag)
    if not all_checkpoints:
        store = _followed(store, flag)
    versions = {
        name: version
        for name, version in store.versions("").items()
        if any(fnmatch(name, pattern) for pattern in names)
    }
    if not versions:
        raise UserError(f"{flag} {url}: there is no such folder".lstrip())
    key = json_digest([store.url, versions])[:32]
    parent = _folders.get(_CACHE, users_cache()) / "fetched" / key
    folder = parent / store.url.rpartition("/")[2]
    parent.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    with _locked(parent):
        if not folder.exists():
            with atomic_folder(folder) as partial:
                store.fetch(list(versions), partial)
                _make_links(partial)
    _urls[str(folder)] = store.url
    return folder


def _followed(store: ObjectStore, flag: str) -> ObjectStore:
    """What a URL means: itself, the checkpoint that it links to, or a run's latest."""
    for link in ("", LATEST, f"{CHECKPOINTS}/{LATEST}"):
        if folder := _linked(store, link):
            parent = f"{store.url}/{link}".rstrip("/").rpartition("/")[0]
            return ObjectStore(f"{parent}/{folder}", flag)
    return store


def _linked(store: ObjectStore, link: str) -> str | None:
    """The folder that an object names, if it is a link."""
    size = store.size(link)
    if size is None or size > _LINK_BYTES:
        return None
    name = store.read(link).decode(errors="replace")
    return name if _is_checkpoint(name) else None


def _make_links(folder: Path) -> None:
    for link in [*folder.rglob(LATEST), *folder.rglob(BEST)]:
        if link.is_file() and link.stat().st_size <= _LINK_BYTES:
            target = read_text(link)
            if _is_checkpoint(target):
                link.unlink()
                link.symlink_to(target)


def _is_checkpoint(name: str) -> bool:
    return name.startswith("step-") and "/" not in name


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A context that one process of the node has at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Not where the file system has no locks: the same is fetched twice then
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
