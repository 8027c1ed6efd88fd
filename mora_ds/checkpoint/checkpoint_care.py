"""Care of a folder of checkpoints: which are whole, and what a run that was killed there has left.

settle(root)        before anybody looks: undo a replacement that stopped half way, clear what is only half there
problems(folder)    what is wrong with a checkpoint: its manifest, every file, its ledger
retire(folder)      delete one so that a kill leaves no half of it under its name
name_latest         give `latest` back its target
name_best           let `best` name the checkpoint of the best evaluation

.step-000100.writing        being written       .step-000100.old.writing    replaced by one that was being renamed
.step-000100.gone.writing   being deleted
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

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
