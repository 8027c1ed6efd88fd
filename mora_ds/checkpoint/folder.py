"""The folder of all checkpoints of a run: which of them a resume takes, whether it is intact, how it is deleted.

Needs neither DeepSpeed nor other processes. `writer` writes and loads checkpoints, `verify` checks them in depth.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from mora_ds.checkpoint.layout import BEST, LATEST, LEDGER_FOLDER, complete_checkpoints, is_step_name
from mora_ds.common.errors import UserError
from mora_ds.common.files import MANIFEST, disk_errors, fsync, recorded_hashes, replace_symlink, verify_manifest
from mora_ds.common.untrusted import expanded
from mora_ds.remora.ledger import LEDGER_FILE, read_records

logger = logging.getLogger(__name__)

AUTO = "auto"
"""Value of --resume_from_checkpoint: the newest checkpoint that is intact."""

WRITING = ".writing"
OLD = ".old"
_GONE = ".gone"
"""Ends of the hidden names of folders: being written, replaced by a new one of the same step, being deleted."""


def settle(root: Path) -> None:
    """Repairs what a killed run has left in `root`, which need not exist, and deletes what could not be deleted before.
    Only the one process that may write to `root` may call it."""
    if not root.is_dir():
        return
    with disk_errors(root):
        for old, final in _hidden(root, f"{OLD}{WRITING}"):
            if not final.exists():  # killed between the two renames: this may be the only good one
                os.rename(old, final)
        for ending in (WRITING, f"{OLD}{WRITING}", f"{_GONE}{WRITING}"):
            for partial, _ in _hidden(root, ending):
                delete(partial)
        for link in (LATEST, BEST):
            (root / f".{link}.partial").unlink(missing_ok=True)


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line a file; empty when it is intact."""
    try:
        return verify_manifest(folder) or ledger_problems(folder)
    except UserError as error:  # no manifest, or a damaged one
        return [str(error)]


def ledger_problems(folder: Path) -> list[str]:
    """Where a checkpoint's manifest and its merge ledger record different hashes. Reads no cycle.

    A cycle that was damaged while the run went on is in the manifest in its damaged state; the ledger has its hash
    from the time of the merge.
    """
    path = folder / LEDGER_FOLDER / LEDGER_FILE
    if not path.exists():
        return []
    listed = recorded_hashes(folder)
    return [
        f"{path.parent / cycle.file} is not the cycle that {path.name} has on record"
        for cycle in read_records(path.parent)
        if listed.get(f"{LEDGER_FOLDER}/{cycle.file}") != cycle.sha256
    ]


def _hidden(root: Path, ending: str) -> list[tuple[Path, Path]]:
    """(hidden folder, the checkpoint that its name speaks of) for every name .step-NNNNNN`ending` in `root`."""
    names = [(path, path.name.removeprefix(".").removesuffix(ending)) for path in root.glob(f".step-*{ending}")]
    return [(path, root / name) for path, name in names if is_step_name(name)]


def delete(folder: Path) -> None:
    """Deletes as much of a folder as can be deleted, which need not exist. What cannot be (a file that is still open
    on an NFS server, a folder without permission) is only worth a warning: the next save tries again (`settle`)."""
    if not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        if folder.is_symlink():  # a checkpoint that the user keeps elsewhere
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        logger.warning("warning: %s cannot be deleted and takes up space: %s; the next save tries again", folder, error)


def retire(folder: Path) -> None:
    """Deletes a checkpoint, renamed first: a half-deleted one never has a checkpoint's name. Where it cannot be deleted
    it is a warning, as in `delete`."""
    gone = folder.with_name(f".{folder.name}{_GONE}{WRITING}")
    try:
        os.rename(folder, gone)
    except OSError as error:
        logger.warning("warning: %s cannot be deleted and takes up space: %s; the next save tries again", folder, error)
    else:
        delete(gone)


def name_latest(root: Path, checkpoint: Path) -> None:
    """Links `latest` to the checkpoint that a run resumes from, where there is no such link: a run that was killed
    between renaming its only checkpoint and linking it would otherwise end without one."""
    if checkpoint.parent.resolve() == root.resolve() and not (root / LATEST).exists():
        replace_symlink(root / LATEST, checkpoint.name)


def name_best(root: Path, best: Path) -> None:
    """Links `best` to that checkpoint, if it exists."""
    if best.is_dir() and (root / BEST).resolve() != best.resolve():
        replace_symlink(root / BEST, best.name)


def sync_folders(folder: Path) -> None:
    """Makes the names of new files in `folder` and below survive a power cut."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        fsync(path)


def resume_checkpoint(wanted: str, root: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint wanted` means, its files verified; `root` holds the run's own.

    latest: what the link names. auto: the newest intact one, from the latest backwards, or None where none was ever
    completed. Otherwise a path. Raises `UserError` when the one asked for is missing or damaged, or when `auto` meets
    damaged ones only: a run does not start afresh over damaged checkpoints.
    """
    if wanted == AUTO:
        return _newest_intact(root)
    folder = (root / LATEST if wanted == LATEST else expanded(wanted, "--resume_from_checkpoint")).resolve()
    if wanted == LATEST and folder.parent != root.resolve():
        raise UserError(
            f"--resume_from_checkpoint {LATEST}: {root / LATEST} leads to {folder}, which is no checkpoint of this "
            f"run. --resume_from_checkpoint {AUTO} takes the newest one that is"
        )
    if not (folder / MANIFEST).is_file():
        raise UserError(f"--resume_from_checkpoint {wanted}: no checkpoint at {folder}")
    if damage := problems(folder):
        raise UserError(
            f"--resume_from_checkpoint {wanted}: {folder} is damaged: {'; '.join(damage)}. "
            f"--resume_from_checkpoint {AUTO} takes the newest one that is intact"
        )
    return folder


def _newest_intact(root: Path) -> Path | None:
    """Passes over checkpoints after the one that `latest` names: a resume from an earlier one has left them behind."""
    latest = (root / LATEST).resolve()
    folders = complete_checkpoints(root)
    named = [number for number, folder in enumerate(folders, 1) if folder.resolve() == latest]
    if named:
        folders = folders[: named[-1]]
    skipped = []
    for folder in reversed(folders):
        damage = problems(folder)
        if not damage:
            return folder
        logger.warning("skipped %s: %s", folder, "; ".join(damage))
        skipped.append(f"{folder}: {damage[0]}")
    if skipped:
        raise UserError(
            f"--resume_from_checkpoint {AUTO}: no checkpoint in {root} is intact. To start afresh take another "
            "--output_dir, or --overwrite_output_dir in place of this flag:\n  " + "\n  ".join(skipped)
        )
    return None


def is_complete(folder: Path) -> bool:
    """Whether every file of the manifest exists, in its size: cheap, as no file is read."""
    try:
        return not verify_manifest(folder, hashes=False)
    except UserError:
        return False
