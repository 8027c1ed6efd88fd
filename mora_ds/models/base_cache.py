"""A copy of the base on each node's own disk (--base_cache_dir): 128 nodes read shared storage once each, not 8 times.

    CACHE/NAME-DIGEST/     the files of the model's folder; the digest is that of its path and of their sizes and times
    CACHE/.filling-XXXX/   being copied; locked while its process lives, deleted by the next run that finds it abandoned

A folder gets its name by one rename when all of it is on disk. What is in the cache is never changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import at_work, disk_errors, fsync_tree, is_abandoned
from mora_ds.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

FLAG = "--base_cache_dir"
_FILLING = ".filling-"


def cached_base(folder: Path, cache: Path, ranks: Ranks) -> Path:
    """The copy of the model folder `folder` in `cache`, on this rank's node. Collective: the first rank of each node
    makes it, where there is none. Raises `UserError` for a cache without room, or one that cannot be written to."""
    ranks.agree(
        f"copy of the base to {FLAG}", lambda: _fill(folder, cache) if ranks.is_local_first else None, long=True
    )

    def found() -> Path:
        if not (target := _target(folder, cache)).is_dir():
            raise UserError(f"{FLAG} {cache}: rank {ranks.rank} does not see {target.name}: name a folder of its node")
        return target

    return ranks.agree(f"copy of the base in {FLAG}", found)


def _files(folder: Path) -> list[Path]:
    """The files of a model; links, as in the cache of the Hub, are followed."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _target(folder: Path, cache: Path) -> Path:
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _files(folder)]
    digest = hashlib.sha256(repr((str(folder.resolve()), facts)).encode()).hexdigest()[:16]
    return cache / f"{folder.resolve().name}-{digest}"


def _fill(folder: Path, cache: Path) -> None:
    target = _target(folder, cache)
    if target.is_dir():
        return
    try:
        with disk_errors(cache):
            cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RunError) as error:
        raise UserError(f"{FLAG} {cache}: the folder cannot be made: {error}") from error
    _delete_abandoned(cache)
    files = _files(folder)
    needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(cache).free
    if needed > free:
        raise UserError(f"{FLAG} {cache}: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free")
    logger.info("copying %s to %s", folder, target)
    with disk_errors(cache):
        partial = Path(tempfile.mkdtemp(prefix=_FILLING, dir=cache))
        try:
            with at_work(partial):
                for path in files:
                    shutil.copyfile(path, partial / path.name)
                fsync_tree(partial)
                partial.chmod(0o755)
                if not target.is_dir():  # another run may have been faster; of two renames the second one fails
                    os.rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _delete_abandoned(cache: Path) -> None:
    for partial in cache.glob(f"{_FILLING}*"):
        with suppress(OSError):  # another run deletes it at the same time
            if is_abandoned(partial):
                shutil.rmtree(partial, ignore_errors=True)
