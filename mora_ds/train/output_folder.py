"""The output folder of a run: who may write into it, and what stands in `run.yaml`.

    reserve -> (settings, files and model are checked; some things are written) -> commit, or rollback as if never begun

With --overwrite_output_dir the old run is set aside first and deleted by `commit`: a mistyped flag costs nothing.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
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
"""An empty file, locked while a process writes to the folder; the lock goes with the process, however it ends."""
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "safetensors")
_OURS = (
    RUN_FILE, METRICS_FILE, SUMMARY_FILE, "tensorboard", CHECKPOINTS, LEDGER_FOLDER, MERGED_FOLDER, BASE_FOLDER,
    TOKENIZER_FOLDER, "targets.yaml", "subspace",
)  # fmt: skip
"""Everything a run writes: what --overwrite_output_dir deletes, and nothing else."""


@dataclass(frozen=True)
class Reservation:
    """An output folder that is this run's, until now only on trial. One rank holds it."""

    folder: Path
    is_new: bool
    """Whether the folder itself was made for this run."""
    kept: frozenset[str]
    """What of a run was there before and stays."""

    def commit(self) -> None:
        """The run begins: what was set aside is deleted."""
        if (self.folder / ASIDE).is_dir():
            (self.folder / ASIDE).rename(self.folder / DELETING)
            shutil.rmtree(self.folder / DELETING)

    def rollback(self) -> None:
        """The run does not begin: the folder is again as it was."""
        for name in set(_OURS) - self.kept:
            _remove(self.folder / name)
        _bring_back(self.folder)
        _unlock(self.folder)
        if self.is_new and [path.name for path in self.folder.iterdir()] == [LOCK]:
            shutil.rmtree(self.folder)


def reserve(folder: Path, overwrite: bool, resume: bool) -> Reservation:
    """Make `folder` ready for a run. One rank calls it.

    Raises `UserError` when it holds another run (unless `overwrite` or `resume`), one that is still running, or is no
    folder to write into.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(folder, error) from error
    _lock(folder)
    _recover(folder)
    if (folder / RUN_FILE).exists() and not resume:
        if not overwrite:
            raise UserError(
                f"--output_dir {folder} holds another run: choose another folder, continue it with "
                "--resume_from_checkpoint auto, or delete it with --overwrite_output_dir"
            )
        _set_aside(folder)
    return Reservation(folder, is_new, frozenset(name for name in _OURS if _exists(folder / name)))


def claim(folder: Path) -> None:
    """Before anybody looks for checkpoints in a folder that is there: lock it, and make good what a killed run has
    left. Raises `UserError` when another run is writing to it. A folder without a run is left as it is."""
    if folder.is_dir() and any(_exists(folder / name) for name in (*_OURS, ASIDE, DELETING)):
        try:
            _lock(folder)
            _recover(folder)
        except OSError as error:
            raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"--output_dir {folder} cannot be written to: {error.strerror or error}")


def write_run_file(folder: Path, settings: dict[str, Any], resolved: dict[str, Any]) -> None:
    """`run.yaml`: the resolved settings, flat, so that it is a recipe that repeats the run, and what the run ran on."""
    content = {**settings, "versions": versions(), "resolved": resolved}
    with disk_errors(folder):
        beside = folder / f".{RUN_FILE}.partial"
        beside.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        beside.replace(folder / RUN_FILE)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


_locks: dict[Path, int] = {}
"""Folder -> open lock file of this process: closing one would give the lock up, so they stay open to the end."""


def _lock(folder: Path) -> None:
    """Ranks outlive a launcher that was killed alone (deepspeed 0.19.8): a run resumed meanwhile would write among
    their files. A POSIX lock, which worker processes do not inherit."""
    if (place := folder.resolve()) in _locks:
        return
    file = os.open(place / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(file)
        raise UserError(
            f"--output_dir {folder}: another run is writing to it at this moment; end that one first"
        ) from None
    except OSError:  # a file system without locks: as good as it gets
        pass
    _locks[place] = file


def _unlock(folder: Path) -> None:
    file = _locks.pop(folder.resolve(), None)
    if file is not None:
        os.close(file)


def _recover(folder: Path) -> None:
    """After a run that was killed: bring back what was only set aside, finish deleting what was to be deleted."""
    shutil.rmtree(folder / DELETING, ignore_errors=True)
    for name in _OURS:
        if _exists(folder / ASIDE / name):
            _remove(folder / name)
    _bring_back(folder)


def _set_aside(folder: Path) -> None:
    (folder / ASIDE).mkdir()
    for name in _OURS:
        if _exists(folder / name):
            (folder / name).rename(folder / ASIDE / name)


def _bring_back(folder: Path) -> None:
    for name in _OURS:
        if _exists(folder / ASIDE / name):
            (folder / ASIDE / name).rename(folder / name)
    if (folder / ASIDE).is_dir():
        (folder / ASIDE).rmdir()


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif _exists(path):
        path.unlink()
