"""The output folder of a run: which run may write into it, and what of it is a run's
own.

    reserve (lock, repair) -> prepare -> (settings, files and model are checked; some things are written, run.yaml last)
                                      -> commit, or abandon: it is as it was

A run owns only what it has made. Names that a run uses must not be there without a run,
whose mark is run.yaml. Until `commit`, the file `STARTING` lists what the start-up may
make, and what it may change of an earlier run is set aside: with both, the next start
undoes one that was killed.
"""

import fcntl
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mora_ds.checkpoint.layout import (
    BASE_FOLDER,
    CHECKPOINTS,
    LATEST,
    LEDGER_FOLDER,
    MERGED_FOLDER,
    METRICS_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    TOKENIZER_FOLDER,
)
from mora_ds.checkpoint.manager import complete_checkpoints
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import (
    disk_errors,
    link_or_copy,
    writable,
    write_json_atomic,
)
from mora_ds.common.untrusted import plain_json, read_text
from mora_ds.remora.sums import SUMS_FOLDER
from mora_ds.train.profile import PROFILE
from mora_ds.train.run_file import holds_run, owned_by_run
from mora_ds.train.trackers import TENSORBOARD, WANDB

ASIDE = ".overwritten"
DELETING = ".deleting"
STARTING = ".mora_ds-starting"
"""Lists the names that a run which has not begun may have made."""
LOCK = ".lock"
"""An empty file, locked while processes write to the folder: byte 0 by rank 0, byte 1
by the others together. A lock ends with its process, however that ends."""
_ORPHANS_S = 60.0
"""How long a run waits for ranks of an earlier one whose rank 0 has ended. They leave
at their next collective, which is at the end of a step."""
DEMO = "demo"
NAMES = (
    RUN_FILE, METRICS_FILE, SUMMARY_FILE, TENSORBOARD, CHECKPOINTS, LEDGER_FOLDER, MERGED_FOLDER, BASE_FOLDER,
    TOKENIZER_FOLDER, WANDB, PROFILE, DEMO,
)  # fmt: skip
"""Everything that a run writes."""
_AT_START = (BASE_FOLDER, TOKENIZER_FOLDER)
"""What the start-up of a run writes, where its settings ask for it; what a resumed one
may write again, with `RUN_FILE` and the merge ledger."""


@dataclass
class Reservation:
    """An output folder that is reserved for a run which has not begun. Held by rank
    0."""

    folder: Path
    new_folders: tuple[Path, ...]
    """The folders that were made for this run, the innermost first."""
    had_lock_file: bool

    def prepare(self, overwrite: bool, resume: bool, exports: bool = False) -> None:
        """Set aside what the run may change. `exports`: whether it writes a merged
        model. The second call does nothing.

        Raises `UserError` when the folder holds another run (unless `overwrite` or
        `resume`), something under the run's names that the run in the folder has not
        made, or something that the run could not write to.
        """
        if (self.folder / STARTING).exists():
            return
        is_run = holds_run(self.folder)
        # Checkpoints may lie in another storage than the folder
        is_taken = is_run or complete_checkpoints(self.folder / CHECKPOINTS)
        if is_taken and not (overwrite or resume):
            raise UserError(
                f"--output_dir {self.folder} holds another run: choose another folder, continue it with "
                "--resume_from_checkpoint auto, or delete it with --overwrite_output_dir"
            )
        listed = owned_by_run(self.folder)
        # run.yaml may come from anywhere: of what it lists, only names of a run count
        owned = _present(self.folder, [name for name in NAMES if name in listed])
        written = [name for name in NAMES if exports or name != MERGED_FOLDER]
        strange = [name for name in _present(self.folder, written) if name not in owned]
        if strange:
            raise UserError(
                f"--output_dir {self.folder} holds {', '.join(strange)}, which the run there has not made and this one "
                "would replace: move it away, or choose another folder"
            )
        if resume and exports:
            check_merged(self.folder / MERGED_FOLDER)
        with writable("--output_dir", self.folder):
            if is_run:
                (self.folder / ASIDE).mkdir()
                if resume:
                    changed = (*_AT_START, LEDGER_FOLDER, RUN_FILE)
                    _copy_aside(
                        self.folder, [name for name in changed if name in owned]
                    )
                else:
                    for name in owned:
                        (self.folder / name).rename(self.folder / ASIDE / name)
            # What is there now is the earlier run's or the user's: the start-up makes
            # none of it.
            makes = [name for name in NAMES if not os.path.lexists(self.folder / name)]
            write_json_atomic(self.folder / STARTING, makes)

    def commit(self) -> None:
        """Begin the run, whose run.yaml is written: delete what was set aside.

        Killed between the two steps, it leaves a resumed run as it was, and nothing of
        an overwritten one.
        """
        if (self.folder / ASIDE).is_dir():
            (self.folder / ASIDE).rename(self.folder / DELETING)
        (self.folder / STARTING).unlink(missing_ok=True)
        shutil.rmtree(self.folder / DELETING, ignore_errors=True)
        _reservations.pop(self.folder.resolve(), None)


def reserve(folder: Path) -> Reservation:
    """Lock `folder` for a run, and repair what a killed one has left. Called by rank 0.

    A reservation that this process holds already is returned as it is: the demo's,
    whose main job is a run. Raises `UserError` for a folder with any of the `NAMES` and
    without a run, one that another run is writing to, and one that cannot be written
    to.
    """
    if (reservation := _reservations.get(folder.resolve())) is not None:
        return reservation
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    _check_owned(folder)
    new_folders = tuple(path for path in (folder, *folder.parents) if not path.exists())
    had_lock_file = (folder / LOCK).exists()
    try:
        with writable("--output_dir", folder):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            _lock(folder)
            shutil.rmtree(folder / DELETING, ignore_errors=True)
            _undo(folder)
    except (UserError, RunError):
        _remove_empty(new_folders)
        raise
    reservation = _reservations[folder.resolve()] = Reservation(
        folder, new_folders, had_lock_file
    )
    return reservation


def is_reserved(folder: Path) -> bool:
    """Whether this process holds a reservation of `folder` already."""
    return folder.resolve() in _reservations


def abandon(folder: Path) -> None:
    """Bring a folder that this process has reserved back to how it was, and give up the
    lock, which every rank has."""
    reservation = _reservations.get(folder.resolve())
    if reservation is not None:
        _undo(folder)
        if not reservation.had_lock_file:
            (folder / LOCK).unlink(missing_ok=True)
        del _reservations[folder.resolve()]
    release(folder)
    if reservation is not None:
        _remove_empty(reservation.new_folders)


def join(folder: Path) -> None:
    """Share the lock of `folder`, which rank 0 has reserved. Called by the other ranks,
    which may write there for some seconds after rank 0 has ended. Has no effect on a
    node that does not see rank 0's folder."""
    path = folder.resolve() / LOCK
    if path.parent not in _locks and path.is_file():
        with writable("--output_dir", folder):
            file = _locks[path.parent] = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        _try_lock(file, fcntl.LOCK_SH, _OTHERS)


def release(folder: Path) -> None:
    """Give this process's lock of `folder` up."""
    if (file := _locks.pop(folder.resolve(), None)) is not None:
        os.close(file)


def names_of_run(folder: Path, exports: bool) -> list[str]:
    """What the run that begins in `folder` makes, and what it has written already where
    it is resumed. `exports`: whether it writes a merged model."""
    optional = (*_AT_START, DEMO, MERGED_FOLDER)
    written = [*owned_by_run(folder), *_present(folder, (*_AT_START, DEMO))]
    if exports:
        written.append(MERGED_FOLDER)
    return [name for name in NAMES if name in written or name not in optional]


def check_merged(folder: Path) -> None:
    """Raise `UserError` where --export_merged would replace something that is neither a
    model nor a folder of models."""
    if not os.path.lexists(folder):
        return
    models = [folder]
    if folder.is_dir() and not (folder / "config.json").is_file():
        models = list(folder.iterdir())  # one for each domain
    are_models = all((model / "config.json").is_file() for model in models)
    if folder.is_symlink() or not are_models:
        raise UserError(
            f"--export_merged: {folder} holds something other than a model; move it away"
        )


# -- checks ----------------------------------------------------------------------------


def _check_owned(folder: Path) -> None:
    """Raise `UserError` for a folder with any of the names and no run that has made
    them."""
    present = _present(folder, (*NAMES, ASIDE, DELETING))
    way_on = (
        f"--output_dir NEW --resume_from_checkpoint {folder / CHECKPOINTS / LATEST}"
    )
    for name in (*present, f"{LEDGER_FOLDER}/{SUMS_FOLDER}"):
        # What is written, moved or deleted through a link is not the run's
        if (folder / name).is_symlink():
            raise UserError(
                f"--output_dir {folder}: {name} is a link, and a run does not write through links. Replace it by the "
                f"folder or file that it names, or continue in another folder, on any disk: {way_on}"
            )
    has_run = holds_run(folder) or holds_run(folder / ASIDE) or _starting(folder)
    if present and not has_run:
        lost = ""
        if CHECKPOINTS in present:
            lost = f"; if a run's run.yaml was lost, its checkpoints go on in another folder: {way_on}"
        raise UserError(
            f"--output_dir {folder} holds {', '.join(present)}, and no run that has made it (no run.yaml that a "
            f"run has written). A run would replace it: choose another folder, or move it away{lost}"
        )


# -- the lock --------------------------------------------------------------------------

_reservations: dict[Path, Reservation] = {}
"""Folder -> the reservation of this process that is neither begun nor given up."""

_locks: dict[Path, int] = {}
"""Folder -> lock file of this process, open to the end: to close it gives up the
lock."""

_FLOCK = "hhqqi"
"""The C structure `flock` on 64-bit Linux: type, whence, start, length, process."""

_FIRST = 0
"""The byte that rank 0 locks."""
_OTHERS = 1


def _lock(folder: Path) -> None:
    """Raise `UserError` while another run writes to the folder.

    The processes of a run outlive a launcher that was killed alone (deepspeed 0.19.8):
    a run resumed meanwhile would write among their files. It is a POSIX lock, which
    worker processes do not inherit.
    """
    if (resolved := folder.resolve()) in _locks:
        return
    path = resolved / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if not _try_lock(file, fcntl.LOCK_EX, _FIRST):
            holder = _holder(file, _FIRST)
            os.close(file)
            raise UserError(
                f"--output_dir {folder}: processes of its run are still alive ({holder}); end them first"
            )
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            break
        # A run that was given up has deleted the file since it was opened.
        os.close(file)
    deadline = time.monotonic() + _ORPHANS_S
    while not _try_lock(file, fcntl.LOCK_EX, _OTHERS):
        if time.monotonic() > deadline:
            holder = _holder(file, _OTHERS)
            os.close(file)
            raise UserError(
                f"--output_dir {folder}: rank 0 of an earlier run has ended, but other processes of that run are "
                f"alive ({holder}); end them first"
            )
        time.sleep(0.1)
    # The other ranks of this run share that byte from here on. A file system without
    # locks has none to give back.
    with suppress(OSError):
        fcntl.lockf(file, fcntl.LOCK_UN, 1, _OTHERS)
    _locks[resolved] = file


def _try_lock(file: int, kind: int, byte: int) -> bool:
    """Lock a byte of a lock file. False where another process holds it. Where the file
    system has no locks, the folder is used unlocked."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB, 1, byte)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _holder(file: int, byte: int) -> str:
    """The process that has locked a byte of a lock file."""
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, wanted))
    if kind == fcntl.F_UNLCK:
        return "which has just ended"
    return f"process {pid}" if pid > 0 else "on another node"


# -- what is set aside -----------------------------------------------------------------


def _starting(folder: Path) -> list[str]:
    """The names that a start-up which was not committed may have made."""
    try:
        names = plain_json(read_text(folder / STARTING), STARTING)
    except (OSError, UserError):
        return []
    return [name for name in NAMES if isinstance(names, list) and name in names]


def _undo(folder: Path) -> None:
    """Undo a start-up that was not committed: remove what it has made, bring back what
    it had set aside."""
    for name in _starting(folder):
        _remove(folder / name)
    # From here on the names are the earlier run's again, which a second attempt must
    # not remove.
    (folder / STARTING).unlink(missing_ok=True)
    aside = folder / ASIDE
    for name in _present(aside, NAMES):
        _remove(folder / name)
        (aside / name).rename(folder / name)
    if aside.is_dir():
        shutil.rmtree(aside)  # the start of a copy


def _copy_aside(folder: Path, names: Iterable[str]) -> None:
    """Set copies aside; hard links where the file system has them, as a run replaces
    these files and writes into none of them. Sums of merges, as large as the model, are
    linked or left out: a run forms them again."""
    sums = folder / LEDGER_FOLDER / SUMS_FOLDER

    def copy(source: str, target: str) -> None:
        if Path(source).parent == sums:
            with suppress(OSError):
                os.link(source, target)
        else:
            link_or_copy(Path(source), Path(target))

    for name in names:
        partial = folder / ASIDE / f".{name}.partial"
        with disk_errors(folder):
            if (folder / name).is_dir():
                shutil.copytree(
                    folder / name, partial, symlinks=True, copy_function=copy
                )
            else:
                link_or_copy(folder / name, partial)
        partial.rename(folder / ASIDE / name)


def _present(folder: Path, names: Iterable[str]) -> list[str]:
    """The names that exist in `folder`, broken links included."""
    return [name for name in names if os.path.lexists(folder / name)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        # One that was not made, or that something else was put into meanwhile, stays.
        with suppress(OSError):
            folder.rmdir()
