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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mora_ds import files, zero
from mora_ds.checkpoint_care import LATEST, OLD, WRITING, ledger_problems, problems, retire, settle, sync_folders
from mora_ds.errors import RunError, UserError

ENGINE_TAG = "engine"
AUTO = "auto"
_NOTHING_LEFT = 1 << 20
"""Bytes: with less than this free, a write that failed has failed for lack of space."""


@dataclass
class TrainerState:
    """Where a run stands. Everything a resumed run must agree on is in `identity`."""

    step: int = 0
    tokens: int = 0
    merges: list[int] = field(default_factory=list)
    perplexity_before: dict[str, float] = field(default_factory=dict)
    perplexity_last: dict[str, float] = field(default_factory=dict)
    total_steps: int = 0
    """Optimizer steps that the run was to have: the schedule hangs on them."""
    finished: bool = False
    """Whether all of them are done, with what follows the last one."""
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
    so that it may gather). Returns the final folder. Keeps the newest `keep` checkpoints.

    Raises `RunError` when the disk is full; the checkpoints before are then untouched, and half of one goes.
    """
    final = step_folder(root, state.step)
    beside = root / f".{final.name}{WRITING}"
    rank = dist.get_rank()
    with _disk_errors(root, beside):
        if rank == 0:
            settle(root)
            beside.mkdir(parents=True)
        dist.barrier()
        _check_space(root, engine)
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
            sync_folders(beside)
            _stop_if_unsound(beside)
            _replace_folder(beside, final)
            files.fsync_folder(root)
            files.replace_symlink(root / LATEST, final.name)
            _retain(root, state.step, keep)
        dist.barrier()
    return final


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


def complete_checkpoints(root: Path) -> list[Path]:
    """Renamed step folders, oldest first."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), key=_step)


def _newest_first(root: Path) -> list[Path]:
    """Those of the branch that `latest` is on: later ones are what a resume from an earlier checkpoint left behind."""
    folders = complete_checkpoints(root)
    latest = (root / LATEST).resolve()
    return [folder for folder in reversed(folders) if latest not in folders or _step(folder) <= _step(latest)]


def check_world_size(folder: Path, world: int) -> None:
    """Raises `UserError` unless so many ranks saved the checkpoint."""
    saved = TrainerState.read(folder).world_size
    if saved != world:
        raise UserError(f"{folder} was saved by {saved} ranks and this run has {world}: start as many ranks as before")


def load_checkpoint(folder: Path, engine: zero.Engine, identity: dict[str, Any]) -> TrainerState:
    """Restore engine and random states from a verified folder. Raises `UserError` when the checkpoint belongs to
    another run (each difference named) or to another number of ranks."""
    state = TrainerState.read(folder)
    check_world_size(folder, dist.get_world_size())
    check_identity(folder, state.identity, identity)
    loaded, _ = engine.load_checkpoint(str(folder), tag=ENGINE_TAG)
    if loaded is None:
        raise RunError(f"DeepSpeed found nothing to load in {folder / ENGINE_TAG}")
    _load_rng(folder, dist.get_rank())
    return state


def check_identity(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises one `UserError` that names everything in which the checkpoint's run differs from this one."""
    there, here = (_flat(json.loads(json.dumps(identity))) for identity in (saved, now))
    differences = [
        f"{_MEANING.get(key, key)}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise UserError(f"{folder} belongs to another run:\n  " + "\n  ".join(differences))


_MEANING = {
    "base": "weights of --model_name_or_path",
    "model_config": "config.json of --model_name_or_path",
    "tokens": "tokens of the training text (--train_files, --dataset_name and the tokenizer)",
    "adapter.kind": "--adapter",
    "adapter.rank": "--mora_rank",
    "adapter.dropout": "--mora_dropout",
    "global_batch_size": "sequences a step, over all ranks (--per_device_train_batch_size and so on)",
    "zero_stage": "ZeRO stage (--deepspeed)",
    "dtype": "compute dtype (--bf16, --fp16)",
}


def _flat(identity: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _retain(root: Path, step: int, keep: int | None) -> None:
    """Later checkpoints than this one, of a branch that was left, neither count nor go."""
    if keep is None:
        return
    for folder in [folder for folder in complete_checkpoints(root) if _step(folder) <= step][:-keep]:
        retire(folder)


# -- the disk --------------------------------------------------------------------------------------------------------


@contextmanager
def _disk_errors(root: Path, beside: Path) -> Iterator[None]:
    """`files.disk_errors` for torch and safetensors too, which report a full disk in words of their own. What was
    written so far goes, which leaves the disk as it was."""
    try:
        with files.disk_errors(root):
            yield
    except (RunError, RuntimeError, SafetensorError) as error:
        full = "No space left" in str(error) or (root.exists() and shutil.disk_usage(root).free < _NOTHING_LEFT)
        shutil.rmtree(beside, ignore_errors=True)
        if full and not isinstance(error, RunError):
            raise RunError(f"the disk that holds {root} is full: {str(error).splitlines()[0]}") from error
        raise


def _check_space(root: Path, engine: zero.Engine) -> None:
    """What is written is known beforehand, roughly: master and two moments in fp32, the whole tensors in fp32, a copy
    in the compute dtype. Raises `RunError` on all ranks alike."""
    numel = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    needed, free = 20 * numel, shutil.disk_usage(root).free
    missing = torch.tensor(needed - free, dtype=torch.int64, device=engine.device)
    dist.all_reduce(missing, op=dist.ReduceOp.MAX)
    if missing.item() > 0:
        raise RunError(
            f"the disk that holds {root} is full: a checkpoint needs about {needed / 2**20:,.1f} MiB, "
            f"{free / 2**20:,.1f} MiB are left. Older checkpoints can go by --save_total_limit"
        )


def _replace_folder(beside: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}{OLD}{WRITING}")
    if final.exists():
        os.replace(final, old)
    os.replace(beside, final)
    shutil.rmtree(old, ignore_errors=True)


def _stop_if_unsound(beside: Path) -> None:
    """The files are those just written; the ledger's cycles are older, and merges have read them since."""
    if found := ledger_problems(beside):
        raise RunError(f"the ledger was damaged while the run went on: {found[0]}. Resume from an older checkpoint")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


# -- random states ---------------------------------------------------------------------------------------------------


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
