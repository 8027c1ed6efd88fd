"""Files that are there whole or not at all: atomic writes, links, manifests with hashes.

    write beside (hidden or ".partial") -> fsync -> rename over -> fsync the folder

Whatever kills the process, a reader finds the old file or the new one, never half of one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from mora_ds.errors import RunError, UserError

MANIFEST = "manifest.json"
"""Sizes and hashes of all other files of a folder."""

FULL = (errno.ENOSPC, errno.EDQUOT)

_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
"""What a file system says that was remounted read-only after a fault, or is gone from the network."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk (or quota) and one that refuses to be written to into a `RunError` that names `folder`; other
    errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise RunError(f"the disk that holds {folder} is full: {error.strerror}") from error
        if error.errno in _REFUSED:
            raise RunError(f"writing to {folder} failed: {error}") from error
        raise


def fsync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    _fsync(folder)


def fsync_tree(folder: Path) -> None:
    """Every file and folder under `folder`, and `folder` itself."""
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Hands out a path beside `path`; what was written there takes its place if the block ends well, else goes."""
    beside = path.with_name(f".{path.name}.partial")
    with disk_errors(path.parent):
        beside.unlink(missing_ok=True)  # left by a killed process, it may be a hard link: never write into it
        try:
            yield beside
            _fsync(beside)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_json_atomic(path: Path, content: Any, indent: int | None = 2) -> None:
    """UTF-8 JSON, indented or (`None`) in one line, replaced atomically. Raises `RunError` on a full disk."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `UserError` naming the file when it is missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: a JSON object was expected, not {type(content).__name__}")
    return content


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def replace_symlink(link: Path, target: str) -> None:
    """Makes `link` point at `target` (relative to the link's folder) by one atomic rename."""
    beside = link.with_name(f".{link.name}.partial")
    beside.unlink(missing_ok=True)
    with disk_errors(link.parent):
        beside.symlink_to(target)
        os.replace(beside, link)
    fsync_folder(link.parent)


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """While the block runs, `is_abandoned` tells other processes that `folder` is no killed one's leftover: the folder
    itself is locked, and the lock goes with the process. On a file system without such locks nothing is told."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_abandoned(folder: Path) -> bool:
    """Whether nobody is `at_work` in `folder` any more. An empty one may be about to be locked."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return any(folder.iterdir())
    except OSError:  # locked by its builder, or there are no locks here
        return False
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """`target` becomes a hard link of `source`, or a copy where the file system has no links. Replaces atomically."""
    if target.exists() and os.path.samefile(source, target):  # rename(2) between two links of one file does nothing
        return
    with atomic_path(target) as beside:
        try:
            os.link(source, beside)
        except OSError as error:
            if error.errno in FULL:
                raise
            shutil.copyfile(source, beside)


def copy_folder(source: Path, target: Path) -> None:
    """A copy of all files, with their times. Raises `RunError` on a full disk (`shutil.copytree` has its own error)."""
    with disk_errors(target):
        target.mkdir(parents=True)
        for path in sorted(source.rglob("*")):
            if path.is_dir():
                (target / path.relative_to(source)).mkdir()
            else:
                shutil.copy2(path, target / path.relative_to(source))


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Hands out an empty folder beside `folder`, which takes its place if the block ends well, else is removed.

    An existing `folder` is replaced: moved aside, and deleted once the new one stands.
    """
    partial, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    with disk_errors(folder.parent):
        _restore(old, folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            fsync_tree(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        fsync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def _restore(old: Path, folder: Path) -> None:
    """Undoes a replacement that was killed between its two renames, or clears what it left after them."""
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Writes `manifest.json`: size and sha256 of every file under `folder`, each on disk before the manifest is."""
    files = {}
    with disk_errors(folder):
        for path in _files_of(folder):
            _fsync(path)
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    write_json_atomic(folder / MANIFEST, {"format": 1, "files": files, "seal": _seal(files)})


def _seal(files: dict[str, Any]) -> str:
    """sha256 of a manifest's own list: one that was cut, edited or lost a line is known by it."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def verify_manifest(folder: Path, hashes: bool = True) -> list[str]:
    """What is wrong with `folder`, one line a file; empty when every file is as the manifest says (without `hashes`:
    there, and of the right size).

    Files that the manifest does not know are no problem. Raises `UserError` for a missing or damaged manifest.
    """
    content = read_json(folder / MANIFEST)
    with malformed(folder / MANIFEST):
        if "seal" not in content:
            return [f"{folder / MANIFEST} has no seal: damaged, or written by mora_ds 0.1.0, which can still read it"]
        if content["seal"] != _seal(content["files"]):
            return [f"{folder / MANIFEST} is damaged: it does not list what it was written with"]
        listed = [(folder / name, int(facts["size"]), str(facts["sha256"])) for name, facts in content["files"].items()]
    checked = [(path, size, sha256 if hashes else None) for path, size, sha256 in listed]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing and reading hold no lock
        return [problem for problem in pool.map(lambda entry: file_problem(*entry), checked) if problem]


def recorded_hashes(folder: Path) -> dict[str, str]:
    """Relative name -> sha256, as the manifest of `folder` has them; verified by `verify_manifest`, not here."""
    with malformed(folder / MANIFEST):
        return {name: str(facts["sha256"]) for name, facts in read_json(folder / MANIFEST)["files"].items()}


def file_problem(path: Path, size: int, sha256: str | None) -> str:
    """What is wrong with a file, "" for nothing: missing, another size, another hash (not read when it is `None`)."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size:,} bytes instead of {size:,}"
    if sha256 is not None and sha256_file(path) != sha256:
        return f"{path} is damaged: its sha256 is not the one recorded"
    return ""


@contextmanager
def malformed(path: Path) -> Iterator[None]:
    """Turns the errors of picking a wrongly built JSON object apart into a `UserError` naming its file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error


def require_format(path: Path, content: dict[str, Any], known: int = 1) -> None:
    """Raises `UserError` for a file written in a format that this version does not know."""
    if content.get("format") != known:
        raise UserError(f"{path} has format {content.get('format')!r}; this version of mora_ds reads format {known}")


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def remove_quietly(path: Path) -> None:
    """Deletes a file that nobody refers to any more; a failure to do so is harmless."""
    with suppress(OSError):
        path.unlink()


# -- recipes -----------------------------------------------------------------------------------------------------
class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where plain YAML keeps the last one without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(path: str, what: str) -> dict[Any, Any]:
    """The mapping in a YAML file that gives no key twice. Raises `UserError`, which calls the file `what`."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {error}") from error
    try:
        content = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(content).__name__}")
    return content
