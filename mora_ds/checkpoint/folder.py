"""The checkpoints in a run's folder: their names, which of them is meant, whether it is whole, whose it is.

Needs neither DeepSpeed nor other ranks; `checkpoint` writes and loads them, `verification` looks deeper.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mora_ds import files
from mora_ds.errors import UserError
from mora_ds.files import MANIFEST, disk_errors, fsync_folder, malformed, read_json, replace_symlink, verify_manifest

LATEST = "latest"

BEST = "best"

WRITING = ".writing"

OLD = ".old"

_GONE = ".gone"

_LEDGER = "ledger"

_VECTORS = "vectors.safetensors"


def settle(root: Path) -> None:
    """Makes good what a killed run has left. Only for whoever alone may write to `root`, which need not be there."""
    if not root.is_dir():
        return
    with disk_errors(root):
        for old in root.glob(f".step-*{OLD}{WRITING}"):
            final = root / old.name.removeprefix(".").removesuffix(f"{OLD}{WRITING}")
            if not final.exists():  # killed between the two renames: this may be the only good one
                os.rename(old, final)
        for partial in root.glob(f".step-*{WRITING}"):
            shutil.rmtree(partial, ignore_errors=True)
        for link in (LATEST, BEST):
            (root / f".{link}.partial").unlink(missing_ok=True)


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line a file; empty when it is whole."""
    try:
        return verify_manifest(folder) or ledger_problems(folder)
    except UserError as error:  # no manifest, or a damaged one
        return [str(error)]


def ledger_problems(folder: Path) -> list[str]:
    """A cycle that was damaged while the run went on is in the checkpoint's manifest as it is now: the ledger knows
    better. Compares what the two have on record and reads no cycle."""
    path = folder / _LEDGER / "ledger.json"
    if not path.exists():
        return []
    listed = read_json(folder / MANIFEST)["files"]
    with malformed(path):
        content = read_json(path)
        kept = [(f"{_LEDGER}/{cycle['file']}", cycle["sha256"], "cycle") for cycle in content["cycles"]]
        if "vectors" in content:
            kept.append((f"{_LEDGER}/{_VECTORS}", content["vectors"]["sha256"], "file of singular vectors"))
    return [
        f"{folder / name} is not the {what} that {path.name} has on record"
        for name, sha256, what in kept
        if listed.get(name, {}).get("sha256") != sha256
    ]


def retire(folder: Path) -> None:
    """Deletes a checkpoint; renamed first, so that no half of one ever has its name."""
    gone = folder.with_name(f".{folder.name}{_GONE}{WRITING}")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def name_latest(root: Path, checkpoint: Path) -> None:
    """Lets `latest` name the checkpoint that a run goes on from, where it names none: a run killed between renaming
    its only checkpoint and `latest` would else be finished without a latest one."""
    if checkpoint.parent.resolve() == root.resolve() and not (root / LATEST).exists():
        replace_symlink(root / LATEST, checkpoint.name)


def name_best(root: Path, best: Path) -> None:
    """Lets `best` name that checkpoint, if it is there and another one is named."""
    if best.is_dir() and (root / BEST).resolve() != best.resolve():
        replace_symlink(root / BEST, best.name)


def sync_folders(folder: Path) -> None:
    """Names of new files in `folder` and below survive a power cut."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        fsync_folder(path)


ENGINE_TAG = "engine"

AUTO = "auto"


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def find_checkpoint(wanted: str, root: Path, say: Callable[[str], None]) -> Path | None:
    """The folder that `--resume_from_checkpoint` means, its files verified.

    latest: what the link names. auto: the newest that verifies, from that one backwards, or None where none was ever
    completed. Otherwise a path. Raises `UserError` when the one asked for is missing or damaged, or `auto` finds
    damaged ones only: a run is not begun afresh over its own remains.
    """
    if wanted == AUTO:
        skipped = []
        for folder in _newest_first(root):
            found = problems(folder)
            if not found:
                return folder
            say(f"skipped {folder}: {'; '.join(found)}")
            skipped.append(f"{folder}: {found[0]}")
        if skipped:
            raise UserError(
                f"--resume_from_checkpoint {AUTO}: no checkpoint in {root} is whole. To begin afresh take another "
                "--output_dir, or --overwrite_output_dir in place of this flag:\n  " + "\n  ".join(skipped)
            )
        return None
    folder = (root / LATEST if wanted == LATEST else Path(wanted).expanduser()).resolve()
    if wanted == LATEST and folder.parent != root.resolve():
        raise UserError(
            f"--resume_from_checkpoint {LATEST}: {root / LATEST} leads to {folder}, which is no checkpoint of this "
            f"run. --resume_from_checkpoint {AUTO} takes the newest one that is"
        )
    if not (folder / "manifest.json").is_file():
        raise UserError(f"--resume_from_checkpoint {wanted}: no checkpoint at {folder}")
    if found := problems(folder):
        raise UserError(
            f"--resume_from_checkpoint {wanted}: {folder} is damaged: {'; '.join(found)}. "
            "--resume_from_checkpoint auto takes the newest one that is whole"
        )
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file of the manifest is there, in its size: cheap, as no file is read."""
    try:
        return not files.verify_manifest(folder, hashes=False)
    except UserError:
        return False


def complete_checkpoints(root: Path) -> list[Path]:
    """Renamed step folders, oldest first."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), key=step_of)


def _newest_first(root: Path) -> list[Path]:
    """Those of the branch that `latest` is on: later ones are what a resume from an earlier checkpoint left behind."""
    folders = complete_checkpoints(root)
    latest = (root / LATEST).resolve()
    return [folder for folder in reversed(folders) if latest not in folders or step_of(folder) <= step_of(latest)]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
