"""Writes and loads checkpoints on all ranks (`layout` lists their files). A checkpoint never holds a base weight.

all ranks write into .step-000100.writing -> manifest -> renamed to step-000100 -> `latest` linked to it -> older
checkpoints deleted
"""

from __future__ import annotations

import hashlib
import logging
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
from safetensors.torch import load_file
from torch import Tensor

from mora_ds import files
from mora_ds.checkpoint.async_save import Background, on_host
from mora_ds.checkpoint.folder import (
    OLD,
    WRITING,
    delete,
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
    unknown_entries,
)
from mora_ds.checkpoint.state import TrainerState, check_identity
from mora_ds.engine import shard_writer, zero
from mora_ds.engine.shard_reader import EngineShards, Layout
from mora_ds.errors import RunError
from mora_ds.models.tensor_files import write_safetensors_atomic
from mora_ds.runtime.events import Event, emit
from mora_ds.runtime.nodes import Followers
from mora_ds.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

_SMALL_FILES = 32 << 10
"""Bytes of a rank's random state, layout and DeepSpeed config; tokenizer and JSON files take as much again, twice."""
_FULL = 1 << 20
"""Free bytes below which a failed write counts as one on a full disk."""

Collect = Callable[[int], Callable[[Path], None]]
"""Called on every rank with the step, so that it may gather; returns a function that writes the result to a folder
without further communication."""


class CheckpointWriter:
    """Writes checkpoints `root/step-N` and deletes old ones. Create it, and call it, on all ranks together.

    In the background, training waits only for the copy into host memory: each rank's thread writes its files, and when
    all have, rank 0's hashes, renames, links `latest` and deletes. An error of the thread (a full disk) is raised by
    the next `save` or `wait`, on all ranks; the incomplete checkpoint is deleted and earlier ones stay. A disk that
    does not answer is such an error after the time of --collective_timeout_s.
    """

    def __init__(
        self, root: Path, engine: zero.Engine, collect: Collect, background: bool = False,
        followers: Followers | None = None,
    ) -> None:  # fmt: skip
        """`root` is on rank 0's node; `followers` are nodes that do not see it and send their files there."""
        self.root, self.engine, self.collect, self.followers = root, engine, collect, followers
        self._background, self._thread_ranks = None, None
        if background:
            ranks = Ranks.current() if followers is None else followers.ranks
            self._background, self._thread_ranks = Background(ranks.timeout_s), ranks.separate()
        self._named: set[str] = set()
        """Entries of `root` that are not the run's, and have been named in the log."""

    def save(self, state: TrainerState, keep: int | None = None) -> Path:
        """Returns the final folder, which in the background does not exist yet. Keeps the newest `keep` checkpoints,
        None: all. Raises `RunError` on a full disk, and the error of the checkpoint before, if it had one."""
        self.wait()
        final = step_folder(self.root, state.step)
        beside = self.root / f".{final.name}{WRITING}"
        with _removed_on_failure(beside), _disk_errors(self.root):
            if dist.get_rank() == 0:
                settle(self.root)
                self._name_unknown()
            if dist.get_rank() == 0 or (self.followers is not None and self.followers.leads):
                if beside.exists():
                    raise RunError(f"{beside} was left by a run that was killed and cannot be deleted: remove it")
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
                self._background.start(self._copied(beside, final, state, keep), f"checkpoint {final}")
        return final

    def _name_unknown(self) -> None:
        """Says once of each file and folder beside the checkpoints that it is left alone."""
        unknown = [name for name in unknown_entries(self.root) if name not in self._named] if self.root.is_dir() else []
        if unknown:
            logger.info("%s: left alone, as no checkpoint has such a name: %s", self.root, ", ".join(unknown))
            self._named.update(unknown)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for the checkpoint that is being written, and raises its error."""
        if self._background is not None:
            self._background.wait(timeout_s)

    def _copied(self, beside: Path, final: Path, state: TrainerState, keep: int | None) -> Callable[[], None]:
        """Copies everything into host memory; returns the task for the thread."""
        pending: list[tuple[Path, Any]] = []
        layout = shard_writer.save_shards(
            self.engine, beside, ENGINE_TAG, lambda path, content: pending.append((path, on_host(content)))
        )
        rng, write_extras, facts = _rng_states(), self.collect(state.step), asdict(state)
        ranks, followers = self._thread_ranks, self.followers
        assert ranks is not None

        def write_own() -> None:
            for path, content in pending:
                shard_writer.write_now(path, content)
            self._write(beside, layout, rng, write_extras)

        def together(what: str, task: Callable[[], None]) -> None:
            ranks.agree(f"checkpoint {final}, {what}", _disk_errors(self.root)(task))

        def work() -> None:
            with _removed_on_failure(beside):
                together("files of each rank", write_own)
                if followers is not None:
                    together("files of other nodes", lambda: followers.gather(beside, ranks.group))
                together("manifest", lambda: self._complete(beside, final, facts, keep))

        return work

    def _write(
        self, beside: Path, layout: Layout, rng: dict[str, Tensor], write_extras: Callable[[Path], None]
    ) -> None:
        """Writes this rank's files except DeepSpeed's shards."""
        shard_writer.write_layout(beside / ENGINE_TAG, layout)
        write_safetensors_atomic(beside / rng_file(dist.get_rank()), rng, {})
        write_extras(beside)

    def _complete(self, beside: Path, final: Path, state: dict[str, Any], keep: int | None) -> None:
        """Rank 0 finishes the checkpoint that all ranks have written."""
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


def load_checkpoint(folder: Path, engine: zero.Engine, identity: dict[str, Any]) -> TrainerState:
    """Restores engine and random states from a verified folder, saved by any number of ranks under any ZeRO stage.

    With the number of ranks that saved it the run continues bit for bit. With another one masters, moments and step
    counts are the same to the bit, but sums over ranks round differently. Raises `UserError` that names each
    difference when the checkpoint belongs to another run.
    """
    state = TrainerState.read(folder)
    check_identity(folder, state.identity, identity)
    shard_writer.restore(engine, EngineShards.open(folder / ENGINE_TAG))
    _load_rng(folder, dist.get_rank(), state)
    state.world_size = dist.get_world_size()
    return state


def _retain(root: Path, step: int, keep: int | None) -> None:
    """Deletes all but the newest `keep` checkpoints. Later ones than `step`, which a resume from an earlier checkpoint
    has left behind, and incomplete folders are neither counted nor deleted. A link to a checkpoint that the user keeps
    elsewhere is counted and stays."""
    if keep is None:
        return
    complete = [folder for folder in complete_checkpoints(root) if step_of(folder) <= step and is_complete(folder)]
    for folder in complete[:-keep]:
        if not folder.is_symlink() and folder.resolve() != (root / BEST).resolve():
            retire(folder)


# -- the disk --------------------------------------------------------------------------------------------------------


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    """As `files.disk_errors`, also for torch and safetensors, which report a full disk as other errors."""
    try:
        with files.disk_errors(root):
            yield
    except (RuntimeError, SafetensorError) as error:
        full = "No space left" in str(error) or (root.exists() and shutil.disk_usage(root).free < _FULL)
        if full and not isinstance(error, RunError):
            raise RunError(f"the disk that holds {root} is full: {str(error).splitlines()[0]}") from error
        raise


@contextmanager
def _removed_on_failure(beside: Path) -> Iterator[None]:
    """Deletes the incomplete checkpoint `beside` where writing it fails: it would keep a full disk full."""
    try:
        yield
    except (RuntimeError, SafetensorError):
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _check_space(root: Path, engine: zero.Engine) -> None:
    """Estimates what will be written: master and two moments in fp32, the adapter in fp32, and small files a rank, a
    tensor and a checkpoint. Raises `RunError` on all ranks alike where less is free."""
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters()]
    if engine.mpu is not None:  # the other ranks of a tensor-parallel group hold as much of the matrices
        sizes = [size * engine.mpu.get_tensor_model_parallel_world_size() for size in sizes]
    needed = 16 * sum(sizes) + 2048 * len(sizes) + _SMALL_FILES * (2 + dist.get_world_size())
    free = shutil.disk_usage(root).free
    missing = torch.tensor(needed - free, dtype=torch.int64, device=engine.device)
    dist.all_reduce(missing, op=dist.ReduceOp.MAX)
    if missing.item() > 0:
        raise RunError(
            f"the disk that holds {root} is full: a checkpoint needs about {needed / 2**20:,.1f} MiB, "
            f"{free / 2**20:,.1f} MiB are left. --save_total_limit deletes older checkpoints"
        )


def _replace_folder(beside: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}{OLD}{WRITING}")
    if final.exists():
        os.replace(final, old)
    os.replace(beside, final)
    delete(old)


def _stop_if_unsound(beside: Path) -> None:
    """The ledger's cycles are older than the other files, and later merges and exports read them."""
    if problems := ledger_problems(beside):
        raise RunError(f"the ledger was damaged during the run: {problems[0]}. Resume from an older checkpoint")


# -- random states ---------------------------------------------------------------------------------------------------


def _rng_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _load_rng(folder: Path, rank: int, state: TrainerState) -> None:
    path = folder / rng_file(rank)
    if not path.exists():  # fewer ranks saved the checkpoint: dropout draws other masks, the same at every resume
        seed = state.identity.get("seed", state.identity.get("adapter", {}).get("seed", 0))
        digest = hashlib.sha256(f"{seed}/{state.step}/{rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return
    states = load_file(str(path))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
