"""Writes and loads checkpoints on all ranks (`layout` lists their files). A checkpoint
never holds a base weight.

all ranks write into .step-000100.writing, and hash what they wrote -> rank 0: layouts and hashes of all
-> renamed to step-000100 -> `latest` linked to it -> older checkpoints deleted

A rank writes one file, whatever their number, with its random states; cycles of the
merge ledger are hashed in slices over the ranks.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.checkpoint.layout import (
    BEST,
    ENGINE_TAG,
    LATEST,
    LEDGER_FOLDER,
    OLD,
    STATE_FILE,
    WRITING,
    complete_checkpoints,
    delete,
    ledger_problems,
    name_best,
    problems,
    repair,
    retire,
    step_folder,
    step_of,
)
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common import files
from mora_ds.common.errors import RunError
from mora_ds.common.files import JsonObject
from mora_ds.common.tensor_files import Tensors
from mora_ds.engine import shards, zero
from mora_ds.engine.shards import RNG, EngineShards, Layout, RankShard
from mora_ds.runtime.exchange import gather_to_first
from mora_ds.runtime.ranks import Ranks, Result

logger = logging.getLogger(__name__)

Collect = Callable[[int], Callable[[Path], None]]
"""Called on every rank with the step, so that it may gather; returns a function that
writes the result to a folder without further communication."""


Share = tuple[dict[str, JsonObject], tuple[Any, ...]]
"""What a rank brings rank 0: the files that it has recorded, its `RankShard`."""


class CheckpointWriter:
    """Writes checkpoints `root/step-N` and deletes old ones, on all ranks together.

    In the background, training waits only for the copy into host memory: each rank's
    thread writes its files, and when all have, rank 0's hashes, renames, links `latest`
    and deletes. An error of the thread (a full disk) is raised by the next `save` or
    `wait`, on all ranks; the incomplete checkpoint is deleted and earlier ones stay. A
    disk that does not answer is such an error after the time of --collective_timeout_s.
    """

    def __init__(
        self,
        root: Path,
        engine: zero.Engine,
        collect: Collect,
        ranks: Ranks,
        background: bool = False,
    ) -> None:
        """`root`: seen by all ranks."""
        self.root = root
        self.engine = engine
        self.collect = collect
        self._ranks = ranks
        self._background: Background | None = None
        if background:
            self._background = Background(ranks.timeout_s)
            self._thread_ranks = ranks.separate()

    def save(self, state: TrainerState, keep: int | None = None) -> Path:
        """Returns the final folder, which in the background does not exist yet. Keeps
        the newest `keep` checkpoints, None: all. Raises `RunError` on a full disk, and
        the error of the checkpoint before, if it had one."""
        self.wait()
        final = step_folder(self.root, state.step)
        beside = self.root / f".{final.name}{WRITING}"
        with _removed_on_failure(beside), files.disk_errors(self.root):
            if dist.get_rank() == 0:
                repair(self.root)
                if beside.exists():
                    raise RunError(
                        f"{beside} was left by a run that was killed and cannot be deleted: remove it"
                    )
                beside.mkdir(parents=True)
            dist.barrier()
            work = self._prepared(beside, final, state, keep)
            if self._background is None:
                work()
            else:
                self._background.start(work, f"checkpoint {final}")
        return final

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for the checkpoint that is being written, and raises its error."""
        if self._background is not None:
            self._background.wait(timeout_s)

    def _prepared(
        self, beside: Path, final: Path, state: TrainerState, keep: int | None
    ) -> Callable[[], None]:
        """Gathers everything, for the background into copies in host memory. Returns
        the function that writes it. No file is written while ranks gather: an error of
        one of them would leave the others waiting in collectives."""
        layout, shard, tensors = shards.shard_of(self.engine)
        tensors |= _rng_states()
        ranks = self._ranks
        if self._background is not None:
            tensors = on_host(tensors)
            ranks = self._thread_ranks
        write_extras = self.collect(state.step)
        facts = asdict(state)

        def write_own() -> None:
            shards.write_shard(beside / ENGINE_TAG / shard.file, tensors)
            write_extras(beside)

        def together(what: str, task: Callable[[], Result]) -> Result:
            named = files.disk_errors(self.root)(task)
            return ranks.agree(f"checkpoint {final.name}, {what}", named)

        def work() -> None:
            with _removed_on_failure(beside):
                together("files of each rank", write_own)
                recorded = together("hashes", lambda: _record(beside, shard))
                # Plain tuples: a class takes as long again to read, once for each rank
                everyone = gather_to_first((recorded, tuple(shard)), ranks.group)
                together(
                    "manifest",
                    lambda: self._complete(
                        beside, final, everyone, layout, facts, keep
                    ),
                )

        return work

    def _complete(
        self,
        beside: Path,
        final: Path,
        shares: list[Share] | None,
        layout: Layout,
        state: JsonObject,
        keep: int | None,
    ) -> None:
        """Rank 0, which has all `shares`, finishes the checkpoint."""
        if shares is None:
            return
        rank_shards = [RankShard(*shard) for _, shard in shares]
        common = rank_shards[0].layout
        different = [shard.rank for shard in rank_shards if shard.layout != common]
        if different:
            raise RunError(
                f"ranks {different} trained other parameters or with other settings than rank 0"
            )
        EngineShards.of(beside / ENGINE_TAG, layout, rank_shards).write_table()
        files.write_json_atomic(beside / STATE_FILE, state)
        recorded: dict[str, JsonObject] = {}
        for written, _ in shares:
            recorded.update(written)
        files.write_manifest(beside, recorded)
        # Each rank has flushed its files, so that rank 0 does not open a thousand of
        # them
        files.fsync_tree(beside, with_files=False)
        # Cycles are older than this checkpoint and may be damaged since, which the
        # manifest would record as right
        if damage := ledger_problems(beside):
            raise RunError(
                f"the ledger was damaged during the run: {damage[0]}. Resume from an older checkpoint"
            )
        _replace_folder(beside, final)
        files.fsync(self.root)
        if state["best_step"]:
            name_best(self.root, step_folder(self.root, state["best_step"]))
        files.replace_symlink(self.root / LATEST, final.name)
        _retain(self.root, state["step"], keep)


def _record(beside: Path, shard: RankShard) -> dict[str, JsonObject]:
    """Size and hash of what this rank wrote, and of its slice of the merge ledger. To
    be called when rank 0 has linked the ledger into `beside`."""
    ledger = sorted((beside / LEDGER_FOLDER).glob("*.safetensors"))
    in_slice = ledger[dist.get_rank() :: dist.get_world_size()]
    return files.record(beside, [beside / ENGINE_TAG / shard.file, *in_slice])


def load_checkpoint(folder: Path, engine: zero.Engine, state: TrainerState) -> None:
    """Restores engine and random states, saved by any number of ranks at any ZeRO
    stage.

    `state`: the folder's, of this run (`check_identity`); it gets the number of ranks.
    With the number of ranks that saved it the run continues bit for bit. With another
    one masters, moments and step counts are the same to the bit, but sums over ranks
    round differently.
    """
    ranks = Ranks.current()
    engine_folder = folder / ENGINE_TAG
    saved = ranks.on_first(
        "layouts of the checkpoint", lambda: EngineShards.open(engine_folder), long=True
    )
    saved = replace(saved, folder=engine_folder)
    shards.restore(engine, saved)
    _load_rng(saved, dist.get_rank(), state)
    state.world_size = dist.get_world_size()


def _retain(root: Path, step: int, keep: int | None) -> None:
    """Deletes all but the newest `keep` checkpoints. Later ones than `step`, which a
    resume from an earlier checkpoint has left behind, and incomplete folders are
    neither counted nor deleted. A link to a checkpoint that the user keeps elsewhere is
    counted and stays."""
    if keep is None:
        return
    known = [folder for folder in complete_checkpoints(root) if step_of(folder) <= step]
    complete = [folder for folder in known if not problems(folder, hashes=False)]
    for folder in complete[:-keep]:
        if not folder.is_symlink() and folder.resolve() != (root / BEST).resolve():
            retire(folder)


# -- the disk --------------------------------------------------------------------------


@contextmanager
def _removed_on_failure(beside: Path) -> Iterator[None]:
    """Deletes an incomplete checkpoint, which would keep a full disk full."""
    try:
        yield
    except Exception:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _replace_folder(beside: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}{OLD}{WRITING}")
    if final.exists():
        os.replace(final, old)
    os.replace(beside, final)
    delete(old)


# -- random states ---------------------------------------------------------------------


def _rng_states() -> Tensors:
    """The random states of this rank, uint8 (bytes,), by their names in its file."""
    states = {f"{RNG}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{RNG}.cuda"] = torch.cuda.get_rng_state()
    return states


def _load_rng(saved: EngineShards, rank: int, state: TrainerState) -> None:
    if rank < len(saved.files):
        with files.malformed(saved.folder):
            states = saved.random_states(rank)
            # Copies: torch reads whole words, which a mapped file does not align
            torch.set_rng_state(states["cpu"].clone())
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"].clone())
        return
    # Fewer ranks saved the checkpoint: dropout draws other masks, the same at every
    # resume.
    digest = hashlib.sha256(f"{state.identity}/{state.step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# -- in the background -----------------------------------------------------------------


@dataclass
class Background:
    """The thread behind --async_save, for one task at a time, and its outcome."""

    limit_s: float
    """Seconds that `wait` waits at most, as a disk that hangs never returns."""
    thread: threading.Thread | None = None
    error: BaseException | None = None

    def start(self, work: Callable[[], None], name: str) -> None:
        """Starts `work`, once the task before has ended. `name`: for warnings."""
        assert self.thread is None, "one at a time"

        def run() -> None:
            try:
                work()
            except BaseException as error:
                # The next `wait` raises it
                self.error = error
                if dist.get_rank() == 0:
                    logger.warning(
                        "warning: %s: %s; the next save will stop the run", name, error
                    )

        self.thread = threading.Thread(target=run, name=name, daemon=True)
        self.thread.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for the task, if there is one, and raises what it raised.

        Returns after `timeout_s`; without it, gives the task up and raises `RunError`
        after `limit_s`.
        """
        if (thread := self.thread) is None:
            return
        thread.join(self.limit_s if timeout_s is None else timeout_s)
        if thread.is_alive() and timeout_s is not None:
            return
        self.thread = None
        error = self.error
        self.error = None
        if thread.is_alive():
            raise RunError(
                f"{thread.name}: not written after {self.limit_s:.0f} s in which training waited for it "
                "(--collective_timeout_s): the disk does not answer, or needs more time"
            )
        if error is not None:
            raise error


def on_host(tensors: Tensors) -> Tensors:
    """Copies in host memory, which do not change when training continues."""
    copies = {name: _copy(tensor) for name, tensor in tensors.items()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return target.copy_(tensor, non_blocking=True)
