"""Save and resume a run: engine shards, ledger, live squares, random states, position; written beside and renamed.

    step-000100/  engine/  ledger/  adapter.*  base.json  tokenizer/  probe.safetensors  rng-*.safetensors
                  trainer_state.json  manifest.json (size and hash of every file)
    latest -> step-000100     moved last

A checkpoint never holds a base weight.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mora_ds import files
from mora_ds.checkpoint.async_save import Background, Exchange, on_host
from mora_ds.checkpoint.folder import (
    OLD,
    WRITING,
    is_complete,
    ledger_problems,
    name_best,
    retire,
    settle,
    sync_folders,
)
from mora_ds.checkpoint.layout import (
    BEST,
    ENGINE_TAG,
    LATEST,
    STATE_FILE,
    complete_checkpoints,
    rng_file,
    step_folder,
    step_of,
)
from mora_ds.checkpoint.state import TrainerState, check_identity
from mora_ds.engine import shard_writer, zero
from mora_ds.engine.shard_reader import EngineShards, Layout
from mora_ds.errors import RunError
from mora_ds.runtime.events import Event, emit
from mora_ds.runtime.nodes import Followers

_EACH = 32 << 10
"""Bytes of random state, layout and DeepSpeed's config, a rank; tokenizer and JSON files are two more of it."""
_NOTHING_LEFT = 1 << 20
"""Bytes: with less than this free, a write that failed has failed for lack of space."""


Collect = Callable[[int], Callable[[Path], None]]
"""Called on every rank with the step, so that it may gather; what it returns writes that into a folder, alone."""


class CheckpointWriter:
    """Writes `root/step-N` on all ranks together, and keeps the newest `keep`. Make it, and call it, on all ranks.

    In the background, training waits for the copy into host memory only: each rank's thread writes its files, and
    when all have, rank 0's hashes, renames, moves `latest` and deletes. An error there, a full disk say, is raised by
    the next `save` or `wait`, on all ranks; the checkpoints before are untouched, and half of one goes.
    """

    def __init__(
        self, root: Path, engine: zero.Engine, collect: Collect, background: bool = False,
        followers: Followers | None = None,
    ) -> None:  # fmt: skip
        """`root` is on rank 0's node; on `followers` a folder of their own, for what is on its way there."""
        self.root, self.engine, self.collect, self.followers = root, engine, collect, followers
        self._background = Background() if background else None
        self._exchange = Exchange() if background else None

    def save(self, state: TrainerState, keep: int | None = None) -> Path:
        """Returns the final folder, which in the background is not there yet. Raises `RunError` on a full disk, or
        for what befell the checkpoint before."""
        self.wait()
        final = step_folder(self.root, state.step)
        beside = self.root / f".{final.name}{WRITING}"
        with _disk_errors(self.root, beside):
            if dist.get_rank() == 0:
                settle(self.root)
                beside.mkdir(parents=True)
            elif self.followers is not None and self.followers.leads:
                beside.mkdir(parents=True)
            dist.barrier()
            _check_space(self.root, self.engine)
            if self._background is None:
                layout = shard_writer.save_shards(self.engine, beside, ENGINE_TAG)
                self._write(beside, layout, _rng_states(), self.collect(state.step))
                dist.barrier()
                if self.followers is not None:
                    self.followers.gather(beside, self.followers.ranks.group)
                self._complete(beside, final, asdict(state), keep)
                dist.barrier()
            else:
                self._background.start(self._copied(beside, final, state, keep), f"checkpoint {final.name}")
        return final

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the checkpoint that is being written is there. Raises what went wrong with it."""
        if self._background is not None:
            self._background.wait(timeout_s)

    def _copied(self, beside: Path, final: Path, state: TrainerState, keep: int | None) -> Callable[[], None]:
        """Everything in host memory, and what the thread is to do with it."""
        pending: list[tuple[Path, Any]] = []
        layout = shard_writer.save_shards(
            self.engine, beside, ENGINE_TAG, lambda path, content: pending.append((path, on_host(content)))
        )
        rng, write_extras, facts = _rng_states(), self.collect(state.step), asdict(state)
        exchange = self._exchange
        assert exchange is not None

        def write_own() -> None:
            for path, content in pending:
                shard_writer.write_now(path, content)
            self._write(beside, layout, rng, write_extras)

        def work() -> None:
            with _disk_errors(self.root, beside):
                exchange.agree(_error_of(write_own))
                if self.followers is not None:
                    followers = self.followers
                    exchange.agree(_error_of(lambda: followers.gather(beside, exchange.group)))
                exchange.agree(_error_of(lambda: self._complete(beside, final, facts, keep)))

        return work

    def _write(
        self, beside: Path, layout: Layout, rng: dict[str, Tensor], write_extras: Callable[[Path], None]
    ) -> None:
        """This rank's files; DeepSpeed's are there already."""
        shard_writer.write_layout(beside / ENGINE_TAG, layout)
        save_file(rng, str(beside / rng_file(dist.get_rank())))
        write_extras(beside)

    def _complete(self, beside: Path, final: Path, state: dict[str, Any], keep: int | None) -> None:
        """What follows when all ranks have written."""
        if dist.get_rank() != 0:
            return
        files.write_json_atomic(beside / STATE_FILE, state)
        files.write_manifest(beside)
        sync_folders(beside)
        _stop_if_unsound(beside)
        _replace_folder(beside, final)
        files.fsync(self.root)
        if state["best_step"]:
            name_best(self.root, step_folder(self.root, state["best_step"]))
        files.replace_symlink(self.root / LATEST, final.name)
        emit(Event.SAVED, state["step"])
        _retain(self.root, state["step"], keep)


def _error_of(work: Callable[[], None]) -> BaseException | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def save_checkpoint(
    root: Path,
    engine: zero.Engine,
    state: TrainerState,
    write_extras: Callable[[Path], None],
    keep: int | None = None,
) -> Path:
    """One checkpoint, at once; `write_extras(folder)` adds the caller's files (called on every rank, so that it may
    gather). As `CheckpointWriter.save`."""
    return CheckpointWriter(root, engine, lambda step: write_extras).save(state, keep)


def load_checkpoint(folder: Path, engine: zero.Engine, identity: dict[str, Any]) -> TrainerState:
    """Restore engine and random states from a verified folder, saved by any number of ranks under any ZeRO stage.

    At the number of ranks that saved it the run goes on bit for bit; at another one masters, moments and step counts
    are the same to the bit, and sums over ranks round otherwise. Raises `UserError` when the checkpoint belongs to
    another run (each difference named).
    """
    state = TrainerState.read(folder)
    check_identity(folder, state.identity, identity)
    shard_writer.restore(engine, EngineShards.open(folder / ENGINE_TAG))
    _load_rng(folder, dist.get_rank(), state)
    state.world_size = dist.get_world_size()
    return state


def _retain(root: Path, step: int, keep: int | None) -> None:
    """Later checkpoints than this one, of a branch that was left, neither count nor go; nor do folders that are not
    whole: they are no checkpoints of this run's, or evidence. What goes is renamed first: half of one never counts."""
    if keep is None:
        return
    whole = [folder for folder in complete_checkpoints(root) if step_of(folder) <= step and is_complete(folder)]
    for folder in whole[:-keep]:
        if folder.resolve() != (root / BEST).resolve():
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
    """What is written is known beforehand, roughly: master and two moments in fp32, the whole tensors in fp32, and
    what every rank, tensor and checkpoint has beside them. Raises `RunError` on all ranks alike."""
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters()]
    if engine.mpu is not None:  # the other ranks of a tensor-parallel group hold as much of the squares
        sizes = [size * engine.mpu.get_tensor_model_parallel_world_size() for size in sizes]
    needed = 16 * sum(sizes) + 2048 * len(sizes) + _EACH * (2 + dist.get_world_size())
    free = shutil.disk_usage(root).free
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


# -- random states ---------------------------------------------------------------------------------------------------


def _rng_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _load_rng(folder: Path, rank: int, state: TrainerState) -> None:
    path = folder / rng_file(rank)
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
