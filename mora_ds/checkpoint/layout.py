"""Names of the files and folders of a run, a checkpoint and an adapter, what a given
path means, and the folder of all checkpoints: which of them a resume takes, whether it
is intact, how it is deleted.

    OUTPUT_DIR/         run.yaml  metrics.jsonl  summary.json  ledger/  tokenizer/  base/  merged/  checkpoints/
    checkpoints/        step-000050/  step-000100/  latest -> step-000100  best -> step-000050
    step-000100/        engine/  ledger/  adapter.json  adapter.safetensors  base.json  tokenizer/  probe.safetensors
                        trainer_state.json  manifest.json
    exported adapter/   adapter.json  adapter.safetensors  base.json  ledger/  manifest.json

Files in ledger/ are named in `remora.ledger`, the manifest in `files`, files in engine/
in `engine.shards`. Needs neither DeepSpeed nor other processes. `writer` writes and
loads checkpoints, `verify` checks them in depth.
"""

import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mora_ds.common.errors import UserError
from mora_ds.common.files import (
    MANIFEST,
    disk_errors,
    listed_files,
    read_json,
    replace_symlink,
    verify_manifest,
)
from mora_ds.common.untrusted import expanded, require_plain
from mora_ds.remora.ledger import LEDGER_FILE, Ledger, read_records

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
CHECKPOINTS = "checkpoints"
MERGED_FOLDER = "merged"
BASE_FOLDER = "base"

LATEST = "latest"
BEST = "best"

ENGINE_TAG = "engine"
"""The folder of the engine's shards."""
LEDGER_FOLDER = "ledger"
TOKENIZER_FOLDER = "tokenizer"
ADAPTER_JSON = "adapter.json"
ADAPTER_TENSORS = "adapter.safetensors"
BASE_JSON = "base.json"
PROBE_FILE = "probe.safetensors"
STATE_FILE = "trainer_state.json"

ADAPTER_PARTS = (ADAPTER_JSON, ADAPTER_TENSORS, BASE_JSON, LEDGER_FOLDER)
"""What an adapter consists of, in a checkpoint and alone."""

AUTO = "auto"
"""Value of --resume_from_checkpoint: the newest checkpoint that is intact."""

WRITING = ".writing"
OLD = ".old"
_GONE = ".gone"
"""Ends of the hidden names of folders that are written, replaced or deleted."""

_NOT_DELETED = (
    "warning: %s cannot be deleted and takes up space: %s; the next save tries again"
)

_STEP = "step-"
_STEP_NAME = re.compile(rf"{_STEP}(?:[0-9]{{6}}|[1-9][0-9]{{6,11}})")
"""The names that `step_folder` gives; a copy step-000040.bak is no checkpoint."""


def step_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint after a step, in the folder `root` of all."""
    return root / f"{_STEP}{step:06d}"


def is_step_name(name: str) -> bool:
    """Whether `step_folder` gives this name to a folder."""
    return _STEP_NAME.fullmatch(name) is not None


def step_of(folder: Path) -> int:
    """Inverse of `step_folder`. Raises `ValueError` for another name."""
    if not is_step_name(folder.name):
        raise ValueError(f"{folder.name} is not the name of a checkpoint")
    return int(folder.name.removeprefix(_STEP))


def complete_checkpoints(root: Path) -> list[Path]:
    """Step folders with their final name, oldest first."""
    named = [path for path in root.glob(f"{_STEP}*") if is_step_name(path.name)]
    return sorted(filter(Path.is_dir, named), key=step_of)


def tokenizer_of(folder: Path | None) -> Path | None:
    """The tokenizer's folder in a checkpoint, where it has one."""
    if folder is None or not (folder / TOKENIZER_FOLDER).is_dir():
        return None
    return folder / TOKENIZER_FOLDER


# -- what a path means -----------------------------------------------------------------


def adapter_folder(path: Path, marks: Sequence[str] = (ADAPTER_JSON,)) -> Path | None:
    """The folder with adapter.json (one of the files `marks`) that `path` means:
    itself, what it links to, or a run's latest checkpoint. Raises `UserError` for one
    with links in it."""
    folder = _candidate(path, marks)
    if folder is not None:
        require_plain(folder)
    return folder


def find_adapter(path: Path, flag: str = "") -> Path:
    """As `adapter_folder`; also a checkpoint whose adapter.json is missing, which its
    manifest then shows. Raises `UserError` that begins with `flag` where there is
    none."""
    folder = adapter_folder(path, (ADAPTER_JSON, MANIFEST))
    if folder is None or not (folder / ADAPTER_JSON).is_file():
        refuse_full_training(path)
    if folder is None:
        text = f"{path} is neither an adapter, nor a checkpoint, nor the output folder of a run that has one"
        if (path / "adapter_config.json").is_file():
            text += (
                "; mora-ds convert mora reads adapters of kongds's PEFT and of axolotl"
            )
        raise UserError(f"{flag}: {text}" if flag else text)
    return folder


def is_full_training(folder: Path) -> bool:
    """Whether it is a checkpoint of --adapter full, without adapter and ledger."""
    try:
        identity = read_json(folder / STATE_FILE)["identity"]
        return identity["adapter"]["kind"] == "full"
    except (UserError, LookupError, TypeError):
        return False


def refuse_full_training(path: Path) -> None:
    """Raises `UserError` that says where the model is, for one of --adapter full."""
    folder = _candidate(path, (STATE_FILE,))
    if folder is not None and is_full_training(folder):
        merged = folder.parent.parent / MERGED_FOLDER
        model = "resume the run with --export_merged, which writes"
        if merged.is_dir():
            model = f"{merged} is"
        raise UserError(
            f"{path} is of full training (--adapter full) and has no adapter to merge: {model} its model"
        )


def _candidate(path: Path, marks: Sequence[str]) -> Path | None:
    for folder in (path, path / CHECKPOINTS / LATEST, path / LATEST):
        if any((folder / name).is_file() for name in marks):
            return folder.resolve()
    return None


@dataclass(frozen=True)
class LedgerLocation:
    """Where a merge ledger lies, and what belongs to it."""

    ledger: Path
    checkpoint: Path | None
    """The checkpoint that was named, links resolved; None if it was a ledger or a
    run."""

    def open(self, hashes: bool = True) -> Ledger:
        """Raises `UserError` as `Ledger.open` does."""
        return Ledger.open(self.ledger, hashes=hashes)


def find_ledger(path: Path) -> LedgerLocation:
    """`path` is a ledger's folder, a checkpoint (or a link to one), or a run's output
    folder, whose own ledger is meant. Raises `UserError` where there is no ledger."""
    checkpoint = None
    if (path / LEDGER_FILE).is_file():
        ledger = path
    else:
        if (path / ADAPTER_JSON).is_file() or (path / MANIFEST).is_file():
            checkpoint = path.resolve()
            require_plain(checkpoint)
        ledger = (checkpoint or path) / LEDGER_FOLDER
    if not (ledger / LEDGER_FILE).is_file():
        raise UserError(
            f"{path} holds no ledger: name a ledger folder, a checkpoint, or the output folder of a run"
        )
    require_plain(ledger)
    return LedgerLocation(ledger, checkpoint)


# -- the folder of all checkpoints -----------------------------------------------------


def repair(root: Path) -> None:
    """Repairs what a killed run has left in `root`, which need not exist, and deletes
    what could not be deleted before. Only the one process that may write to `root` may
    call it."""
    if not root.is_dir():
        return
    with disk_errors(root):
        for old, final in _hidden(root, f"{OLD}{WRITING}"):
            # Killed between the two renames: this may be the only good one
            if not final.exists():
                os.rename(old, final)
        for ending in (WRITING, f"{OLD}{WRITING}", f"{_GONE}{WRITING}"):
            for partial, _ in _hidden(root, ending):
                delete(partial)
        for link in (LATEST, BEST):
            (root / f".{link}.partial").unlink(missing_ok=True)


def problems(folder: Path, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, one line a file; empty when it is intact.
    Without `hashes` its files need only exist, in their sizes: cheap, as none is
    read."""
    try:
        hashed = None if hashes else ()
        return verify_manifest(folder, hashed) or ledger_problems(folder)
    except UserError as error:
        # There is no manifest, or a damaged one
        return [str(error)]


def ledger_problems(folder: Path) -> list[str]:
    """Where a checkpoint's manifest and its ledger record different hashes.

    A cycle that was damaged while the run went on is in the manifest in its damaged
    state; the ledger has its hash from the time of the merge.
    """
    path = folder / LEDGER_FOLDER / LEDGER_FILE
    if not path.exists():
        return []
    listed = {name: facts.sha256 for name, facts in listed_files(folder).items()}
    return [
        f"{path.parent / cycle.file} is not the cycle that {path.name} has on record"
        for cycle in read_records(path.parent)
        if listed.get(f"{LEDGER_FOLDER}/{cycle.file}") != cycle.sha256
    ]


def _hidden(root: Path, ending: str) -> list[tuple[Path, Path]]:
    """(hidden folder, its checkpoint) for every name .step-NNNNNN`ending` in `root`."""
    names = [
        (path, path.name.removeprefix(".").removesuffix(ending))
        for path in root.glob(f".step-*{ending}")
    ]
    return [(path, root / name) for path, name in names if is_step_name(name)]


def delete(folder: Path) -> None:
    """Deletes as much of a folder as can be deleted, which need not exist. What cannot
    be (a file that is still open on an NFS server, a folder without permission) is only
    worth a warning: the next save tries again (`repair`)."""
    if not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        if folder.is_symlink():
            # The checkpoint itself, which the user keeps elsewhere, stays
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        logger.warning(_NOT_DELETED, folder, error)


def retire(folder: Path) -> None:
    """Deletes a checkpoint, renamed first: a half-deleted one never has a checkpoint's
    name. Where it cannot be deleted it is a warning, as in `delete`."""
    gone = folder.with_name(f".{folder.name}{_GONE}{WRITING}")
    try:
        os.rename(folder, gone)
    except OSError as error:
        logger.warning(_NOT_DELETED, folder, error)
    else:
        delete(gone)


def name_latest(root: Path, checkpoint: Path) -> None:
    """Links `latest` to the checkpoint that a run resumes from, where there is no such
    link: a run that was killed between renaming its only checkpoint and linking it
    would otherwise end without one."""
    if checkpoint.parent.resolve() == root.resolve() and not (root / LATEST).exists():
        replace_symlink(root / LATEST, checkpoint.name)


def name_best(root: Path, best: Path) -> None:
    """Links `best` to that checkpoint, if it exists."""
    if best.is_dir() and (root / BEST).resolve() != best.resolve():
        replace_symlink(root / BEST, best.name)


RESUME = "--resume_from_checkpoint"


def resume_checkpoint(wanted: str, root: Path, flag: str = RESUME) -> Path | None:
    """The verified checkpoint that `wanted`, the value of `flag`, means in `root`.

    latest: what the link names. auto: the newest intact one, from the latest backwards,
    or None where none was ever completed. Otherwise a path. Raises `UserError` when the
    one asked for is missing or damaged, or when `auto` meets damaged ones only: a run
    does not start afresh over damaged checkpoints.
    """
    if wanted == AUTO:
        return _newest_intact(root, flag)
    folder = (root / LATEST if wanted == LATEST else expanded(wanted, flag)).resolve()
    if wanted == LATEST and folder.parent != root.resolve():
        raise UserError(
            f"{flag} {LATEST}: {root / LATEST} leads to {folder}, which is no checkpoint of this "
            f"run. {flag} {AUTO} takes the newest one that is"
        )
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{flag} {wanted}: no checkpoint at {folder}")
    if damage := problems(folder):
        raise UserError(
            f"{flag} {wanted}: {folder} is damaged: {'; '.join(damage)}. Give an intact one; {RESUME} {AUTO} takes the "
            "newest one of its run"
        )
    return folder


def _newest_intact(root: Path, flag: str) -> Path | None:
    """Passes over those after `latest`, which an earlier resume has left behind."""
    latest = (root / LATEST).resolve()
    folders = complete_checkpoints(root)
    named = [
        number for number, folder in enumerate(folders, 1) if folder.resolve() == latest
    ]
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
            f"{flag} {AUTO}: no checkpoint in {root} is intact. To start afresh take another "
            "--output_dir, or --overwrite_output_dir in place of this flag:\n  "
            + "\n  ".join(skipped)
        )
    return None
