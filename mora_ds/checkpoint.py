"""Save and resume a run: engine shards, ledger, live squares, random states, position; written beside and renamed.

    step-000100/  engine/  ledger/  adapter.*  base.json  tokenizer/  probe.safetensors  rng-*.safetensors
                  trainer_state.json  manifest.json (size and hash of every file)
    latest -> step-000100     moved last

A checkpoint never holds a base weight.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mora_ds import files, zero
from mora_ds.errors import RunError, UserError

ENGINE_TAG = "engine"
LATEST = "latest"
AUTO = "auto"


@dataclass
class TrainerState:
    """Where a run stands. Everything a resumed run must agree on is in `identity`."""

    step: int = 0
    tokens: int = 0
    merges: list[int] = field(default_factory=list)
    perplexity_before: dict[str, float] = field(default_factory=dict)
    perplexity_last: dict[str, float] = field(default_factory=dict)
    world_size: int = 1
    identity: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> TrainerState:
        return cls(**json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")))


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def save_checkpoint(
    root: Path,
    engine: zero.Engine,
    state: TrainerState,
    write_extras: Callable[[Path], None],
    keep: int | None = None,
) -> Path:
    """Write `root/step-N` on all ranks together; `write_extras(folder)` adds the caller's files (called on every rank,
    so that it may gather). Returns the final folder. Keeps the newest `keep` checkpoints."""
    final = step_folder(root, state.step)
    beside = root / f".{final.name}.writing"
    rank = dist.get_rank()
    with files.disk_errors(root):
        if rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(beside), tag=ENGINE_TAG, save_latest=False)
        if rank == 0:
            for script in beside.glob("zero_to_*.py"):  # DeepSpeed's, for models whose weights are in the shards
                script.unlink()
        _save_rng(beside, rank)
        write_extras(beside)
        dist.barrier()
        if rank == 0:
            files.write_json_atomic(beside / "trainer_state.json", asdict(state))
            files.write_manifest(beside)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
            files.fsync_folder(root)
            files.replace_symlink(root / LATEST, final.name)
            _retain(root, keep)
        dist.barrier()
    return final


def find_checkpoint(wanted: str, root: Path, say: Callable[[str], None]) -> Path | None:
    """The folder that `--resume_from_checkpoint` means, its files verified.

    latest: what the link names. auto: the newest that verifies, or None when there is none. Otherwise a path. Raises
    `UserError` when the one asked for is missing or damaged.
    """
    if wanted == AUTO:
        for folder in reversed(complete_checkpoints(root)):
            problems = _problems(folder)
            if not problems:
                return folder
            say(f"skipped {folder}: {'; '.join(problems)}")
        return None
    folder = (root / LATEST if wanted == LATEST else Path(wanted)).resolve()
    if not (folder / "manifest.json").is_file():
        raise UserError(f"--resume_from_checkpoint {wanted}: no checkpoint at {folder}")
    problems = _problems(folder)
    if problems:
        raise UserError(
            f"--resume_from_checkpoint {wanted}: {folder} is damaged: {'; '.join(problems)}. "
            "--resume_from_checkpoint auto takes the newest one that is whole"
        )
    return folder


def _problems(folder: Path) -> list[str]:
    try:
        return files.verify_manifest(folder)
    except UserError as error:  # no manifest, or a damaged one
        return [str(error)]


def complete_checkpoints(root: Path) -> list[Path]:
    """Renamed step folders, oldest first."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), key=lambda path: int(path.name[5:]))


def load_checkpoint(folder: Path, engine: zero.Engine, identity: dict[str, Any]) -> TrainerState:
    """Restore engine and random states from a verified folder. Raises `UserError` when the checkpoint belongs to
    another run (each difference named) or to another number of ranks."""
    state = TrainerState.read(folder)
    check_identity(folder, state.identity, identity)
    if state.world_size != dist.get_world_size():
        raise UserError(
            f"{folder} was saved by {state.world_size} ranks and this run has {dist.get_world_size()}: "
            "start as many ranks as before"
        )
    loaded, _ = engine.load_checkpoint(str(folder), tag=ENGINE_TAG)
    if loaded is None:
        raise RunError(f"DeepSpeed found nothing to load in {folder / ENGINE_TAG}")
    _load_rng(folder, dist.get_rank())
    return state


def check_identity(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """All differences at once."""
    saved, now = json.loads(json.dumps(saved)), json.loads(json.dumps(now))
    differences = [
        f"{key}: {saved.get(key)!r} there, {now.get(key)!r} here"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key)
    ]
    if differences:
        raise UserError(f"{folder} belongs to another run:\n  " + "\n  ".join(differences))


def _retain(root: Path, keep: int | None) -> None:
    if keep is None:
        return
    for folder in complete_checkpoints(root)[:-keep]:
        shutil.rmtree(folder)


def _save_rng(folder: Path, rank: int) -> None:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, str(folder / f"rng-{rank:05d}.safetensors"))


def _load_rng(folder: Path, rank: int) -> None:
    states = load_file(str(folder / f"rng-{rank:05d}.safetensors"))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
