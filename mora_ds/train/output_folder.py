"""The output folder of a run: which run may write into it, and the content of `run.yaml`.

    reserve -> (settings, files and model are checked; some things are written) -> commit, or rollback to how it was

With --overwrite_output_dir the old run is set aside first and deleted by `commit`: a mistyped flag costs nothing.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mora_ds.checkpoint.layout import (
    BASE_FOLDER,
    CHECKPOINTS,
    LEDGER_FOLDER,
    MERGED_FOLDER,
    METRICS_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    TOKENIZER_FOLDER,
)
from mora_ds.errors import UserError
from mora_ds.files import disk_errors

ASIDE, DELETING = ".overwritten", ".deleting"
LOCK = ".lock"
"""An empty file, locked while a process writes to the folder; the lock ends with the process, however that ends."""
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "safetensors")
_OURS = (
    RUN_FILE, METRICS_FILE, SUMMARY_FILE, "tensorboard", CHECKPOINTS, LEDGER_FOLDER, MERGED_FOLDER, BASE_FOLDER,
    TOKENIZER_FOLDER, "targets.yaml", "subspace",
)  # fmt: skip
"""Everything a run writes: what --overwrite_output_dir deletes, and nothing else."""


@dataclass(frozen=True)
class Reservation:
    """An output folder that is reserved for a run which has not begun. Held by rank 0."""

    folder: Path
    is_new: bool
    """Whether the folder itself was made for this run."""
    kept: frozenset[str]
    """The files and folders of a run that were there before and stay."""

    def commit(self) -> None:
        """Begin the run: delete what was set aside."""
        if (self.folder / ASIDE).is_dir():
            (self.folder / ASIDE).rename(self.folder / DELETING)
            shutil.rmtree(self.folder / DELETING)

    def rollback(self) -> None:
        """Give the run up: the folder is again as it was."""
        for name in set(_OURS) - self.kept:
            _remove(self.folder / name)
        _bring_back(self.folder)
        file = _locks.pop(self.folder.resolve(), None)
        if file is not None:
            os.close(file)
        if self.is_new and [path.name for path in self.folder.iterdir()] == [LOCK]:
            shutil.rmtree(self.folder)


def reserve(folder: Path, overwrite: bool, resume: bool) -> Reservation:
    """Make `folder` ready for a run. Called by rank 0.

    Raises `UserError` when it holds another run (unless `overwrite` or `resume`) or one that is still running, and
    when it cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    is_new = not folder.exists()
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    _lock(folder)
    _recover(folder)
    if (folder / RUN_FILE).exists() and not resume:
        if not overwrite:
            raise UserError(
                f"--output_dir {folder} holds another run: choose another folder, continue it with "
                "--resume_from_checkpoint auto, or delete it with --overwrite_output_dir"
            )
        _set_aside(folder)
    return Reservation(folder, is_new, frozenset(_present(folder)))


def claim(folder: Path) -> None:
    """Lock a folder that holds a run, and repair what a killed run has left, before its checkpoints are looked for.

    A folder without a run stays as it is. Raises `UserError` when another run is writing to it.
    """
    if _present(folder) or (folder / ASIDE).is_dir() or (folder / DELETING).is_dir():
        with _writing(folder):
            _lock(folder)
            _recover(folder)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn an `OSError` into a `UserError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written to: {error.strerror or error}") from error


def write_run_file(folder: Path, settings: dict[str, Any], resolved: dict[str, Any]) -> None:
    """Write `run.yaml`: the resolved settings, which as a recipe repeat the run, and versions and facts of the run."""
    content = {**settings, "versions": versions(), "resolved": resolved}
    with disk_errors(folder):
        partial = folder / f".{RUN_FILE}.partial"
        partial.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        partial.replace(folder / RUN_FILE)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


_locks: dict[Path, int] = {}
"""Folder -> lock file of this process. Closing a lock file gives the lock up, so they stay open to the end."""


def _lock(folder: Path) -> None:
    """Raise `UserError` while another run writes to the folder.

    The processes of a run outlive a launcher that was killed alone (deepspeed 0.19.8): a run resumed meanwhile would
    write among their files. It is a POSIX lock, which worker processes do not inherit.
    """
    if (resolved := folder.resolve()) in _locks:
        return
    file = os.open(resolved / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(file)
        raise UserError(
            f"--output_dir {folder}: another run is writing to it at this moment; end that one first"
        ) from None
    except OSError:  # a file system without locks: the folder is used unlocked
        pass
    _locks[resolved] = file


def _recover(folder: Path) -> None:
    """After a run that was killed: bring back what was only set aside, finish deleting what was to be deleted."""
    shutil.rmtree(folder / DELETING, ignore_errors=True)
    for name in _present(folder / ASIDE):
        _remove(folder / name)
    _bring_back(folder)


def _set_aside(folder: Path) -> None:
    (folder / ASIDE).mkdir()
    for name in _present(folder):
        (folder / name).rename(folder / ASIDE / name)


def _bring_back(folder: Path) -> None:
    for name in _present(folder / ASIDE):
        (folder / ASIDE / name).rename(folder / name)
    if (folder / ASIDE).is_dir():
        (folder / ASIDE).rmdir()


def _present(folder: Path) -> list[str]:
    """What `folder` has of a run, broken links included."""
    return [name for name in _OURS if os.path.lexists(folder / name)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
