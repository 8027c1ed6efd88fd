"""Save and resume a run: engine shards, ledger, live squares, random states, position; written beside and renamed.

    step-000100/  engine/  ledger/  adapter.*  base.json  tokenizer/  probe.safetensors  rng-*.safetensors
                  trainer_state.json  manifest.json (size and hash of every file)
    latest -> step-000100     moved last

A checkpoint never holds a base weight.
"""

from __future__ import annotations

import hashlib
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

from mora_ds import files, partitions, zero
from mora_ds.errors import RunError, UserError
from mora_ds.shards import EngineShards

ENGINE_TAG = "engine"
LATEST = "latest"
AUTO = "auto"
_WRITING = ".writing"
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
    beside = root / f".{final.name}{_WRITING}"
    rank = dist.get_rank()
    with _disk_errors(root, beside):
        if rank == 0:
            _clear_partial(root)
            beside.mkdir(parents=True)
        dist.barrier()
        _check_space(root, engine)
        partitions.write_layout(beside / ENGINE_TAG, partitions.save_shards(engine, beside, ENGINE_TAG))
        _save_rng(beside, rank)
        write_extras(beside)
        dist.barrier()
        if rank == 0:
            files.write_json_atomic(beside / "trainer_state.json", asdict(state))
            files.write_manifest(beside)
            _replace_folder(beside, final)
            files.fsync_folder(root)
            files.replace_symlink(root / LATEST, final.name)
            _retain(root, state.step, keep)
        dist.barrier()
    return final


def find_checkpoint(wanted: str, root: Path, say: Callable[[str], None]) -> Path | None:
    """The folder that `--resume_from_checkpoint` means, its files verified.

    latest: what the link names. auto: the newest that verifies, from that one backwards, or None when there is none.
    Otherwise a path. Raises `UserError` when the one asked for is missing or damaged.
    """
    if wanted == AUTO:
        for folder in _newest_first(root):
            problems = _problems(folder)
            if not problems:
                return folder
            say(f"skipped {folder}: {'; '.join(problems)}")
        return None
    folder = (root / LATEST if wanted == LATEST else Path(wanted).expanduser()).resolve()
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
    return sorted((path for path in root.glob("step-*") if path.is_dir()), key=_step)


def _newest_first(root: Path) -> list[Path]:
    """Those of the branch that `latest` is on: later ones are what a resume from an earlier checkpoint left behind."""
    folders = complete_checkpoints(root)
    latest = (root / LATEST).resolve()
    return [folder for folder in reversed(folders) if latest not in folders or _step(folder) <= _step(latest)]


def check_world_size(folder: Path, world: int) -> None:
    """Raises `UserError` when so many ranks cannot go on with the checkpoint: its batch must divide by them."""
    rows = TrainerState.read(folder).identity.get("global_batch_size")
    if isinstance(rows, int) and rows % world:
        able = [str(number) for number in range(1, rows + 1) if rows % number == 0]
        raise UserError(
            f"{folder} belongs to a run of {rows} sequences a step, which {world} ranks cannot share evenly: "
            f"start {', '.join(able[:-1]) + ' or ' if able[:-1] else ''}{able[-1]} of them"
        )


def load_checkpoint(folder: Path, engine: zero.Engine, identity: dict[str, Any]) -> TrainerState:
    """Restore engine and random states from a verified folder, saved by any number of ranks under any ZeRO stage.

    At the number of ranks that saved it the run goes on bit for bit; at another one masters, moments and step counts
    are the same to the bit, and sums over ranks round otherwise. Raises `UserError` when the checkpoint belongs to
    another run (each difference named).
    """
    state = TrainerState.read(folder)
    check_identity(folder, state.identity, identity)
    partitions.restore(engine, EngineShards.open(folder / ENGINE_TAG))
    _load_rng(folder, dist.get_rank(), state)
    state.world_size = dist.get_world_size()
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
    "tokens": "tokens of the training text (--train_files, --dataset_name and the tokenizer)",
    "adapter.kind": "--adapter",
    "adapter.rank": "--mora_rank",
    "adapter.dropout": "--mora_dropout",
    "global_batch_size": "sequences a step, over all ranks (--per_device_train_batch_size and so on)",
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
        shutil.rmtree(folder)


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
    old = final.with_name(f".{final.name}.old{_WRITING}")
    if final.exists():
        os.replace(final, old)
    os.replace(beside, final)
    shutil.rmtree(old, ignore_errors=True)


def _clear_partial(root: Path) -> None:
    """What killed runs have left."""
    for partial in root.glob(f".step-*{_WRITING}"):
        shutil.rmtree(partial, ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


# -- random states ---------------------------------------------------------------------------------------------------


def _save_rng(folder: Path, rank: int) -> None:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, str(folder / f"rng-{rank:05d}.safetensors"))


def _load_rng(folder: Path, rank: int, state: TrainerState) -> None:
    path = folder / f"rng-{rank:05d}.safetensors"
    if not path.exists():  # fewer ranks saved the checkpoint: a state of this rank's own, the same at every resume
        torch.manual_seed(_seed_of(state, rank))
        return
    states = load_file(str(path))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _seed_of(state: TrainerState, rank: int) -> int:
    """From the run's seed, the step and the rank. Dropout then draws other masks than with the old number of ranks."""
    seed = state.identity.get("seed", state.identity.get("adapter", {}).get("seed", 0))
    return int.from_bytes(hashlib.sha256(f"{seed}/{state.step}/{rank}".encode()).digest()[:8], "big") >> 1
