"""Saves, finds, checks, restores and deletes the checkpoints of a run, on all ranks. A
checkpoint never holds a base weight.

every section gathers -> every rank writes its files under a hidden name, and hashes them -> rank 0: what follows from
all ranks, then manifest.json -> the folder gets its name -> `latest` names it -> older checkpoints are deleted

What a checkpoint holds is in `sections`, where it lies in `storage`. A rank writes one
file of tensors, whatever their number, and checks its share of the merge ledger's
cycles.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.checkpoint import storage as storages
from mora_ds.checkpoint.layout import (
    AUTO,
    BEST,
    ENGINE_TAG,
    LATEST,
    RESUME,
    is_step_name,
    step_name,
    step_of,
)
from mora_ds.checkpoint.sections import (
    CheckpointFiles,
    Gathered,
    SavedCheckpoint,
    Section,
)
from mora_ds.checkpoint.shard_table import INDEX_FILE, EngineShards, rank_file
from mora_ds.checkpoint.storage import WRITING, Storage
from mora_ds.common import files
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.fetched import local
from mora_ds.common.files import (
    MANIFEST,
    FileFacts,
    JsonObject,
    OtherFormat,
    listed_files,
    manifest_of,
    verify_manifest,
)
from mora_ds.common.object_store import StoreError
from mora_ds.common.tensor_files import Tensors
from mora_ds.engine.shards import Layout
from mora_ds.runtime.exchange import gather_to_rank0
from mora_ds.runtime.ranks import Ranks, Result

logger = logging.getLogger(__name__)

RankFacts = list[tuple[dict[str, JsonObject], list[Any]]]
"""What rank 0 gets from each rank: the files that it has written, and the facts of each
section."""


class CheckpointManager:
    """The checkpoints of a run in a storage.

    In the background, training waits only for the copy into host memory: each rank's
    thread writes its files, and when all have, rank 0's does the rest. An error of the
    thread (a full disk) is raised by the next `save` or `wait`, on all ranks; the
    incomplete checkpoint is deleted and earlier ones stay. A disk that does not answer
    is such an error after the time of --collective_timeout_s.
    """

    def __init__(
        self,
        storage: Storage,
        sections: Sequence[Section],
        ranks: Ranks,
        background: bool = False,
    ) -> None:
        """`sections`: what a checkpoint holds, in the order in which it is restored."""
        self.storage = storage
        self.sections = sections
        self._ranks = ranks
        self._background: Background | None = None
        if background:
            self._background = Background(ranks.timeout_s)
            self._thread_ranks = ranks.separate()

    # -- saving ------------------------------------------------------------------------

    def save(self, step: int, keep: int | None = None, best: int = 0) -> Path:
        """Returns where the checkpoint is found, in the background once it is written.
        Keeps the newest `keep` checkpoints, None: all, and that of step `best`.
        Collective. Raises `RunError` on a full disk, and the error of the checkpoint
        before, if it had one."""
        self.wait()
        final = step_name(step)
        written = f".{final}{WRITING}"
        clean = files.disk_errors(self.storage.root)(lambda: self._clean(written))
        with self._deleted_on_failure(written), files.disk_errors(self.storage.root):
            # To list and delete may take long in a bucket
            self._ranks.agree(f"checkpoint {final}, folder", clean, long=True)
            work = self._prepared(written, step, keep, best)
            if self._background is None:
                work()
            else:
                name = f"checkpoint {self.storage.root / final}"
                self._background.start(work, name)
        return self.storage.root / final

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for the checkpoint that is being written, and raises its error."""
        if self._background is not None:
            self._background.wait(timeout_s)

    def _clean(self, written: str) -> None:
        """Rank 0 deletes what was never committed, and what could not be deleted
        before."""
        if not self._ranks.is_rank0:
            return
        self.storage.repair()
        for folder in _step_folders(self.storage):
            if not _is_committed(self.storage, folder):
                self.storage.delete(folder)
        if written in self.storage.folders():
            raise RunError(
                f"{self.storage.root / written} was left by a run that was killed and cannot be deleted: remove it"
            )

    def _prepared(
        self, written: str, step: int, keep: int | None, best: int
    ) -> Callable[[], None]:
        """Gathers everything, for the background into copies in host memory. Returns
        the function that writes it. No file is written while ranks gather: an error of
        one of them would leave the others waiting in collectives."""
        gathered = [section.gather(step) for section in self.sections]
        tensors: Tensors = {}
        for part in gathered:
            tensors |= part.tensors
        ranks = self._ranks
        if self._background is not None:
            tensors = on_host(tensors)
            ranks = self._thread_ranks
        own = CheckpointFiles(self.storage, written)

        def together(what: str, task: Callable[[], Result]) -> Result:
            named = files.disk_errors(self.storage.root)(task)
            return ranks.agree(f"checkpoint {step_name(step)}, {what}", named)

        def work() -> None:
            with self._deleted_on_failure(written):
                together("files of each rank", lambda: _write(own, tensors, gathered))
                facts = [part.facts for part in gathered]
                of_ranks = gather_to_rank0((own.recorded, facts), ranks.group)
                together(
                    "manifest", lambda: self._finish(own, of_ranks, step, keep, best)
                )

        return work

    def _finish(
        self,
        own: CheckpointFiles,
        of_ranks: RankFacts | None,
        step: int,
        keep: int | None,
        best: int,
    ) -> None:
        """Rank 0, which has the facts of all ranks, makes a checkpoint of what was
        written, names it, and deletes others. Other ranks have None."""
        if of_ranks is None:
            return
        self._commit(own, of_ranks, step)
        name_best(self.storage, best)
        self.storage.link(LATEST, step_name(step))
        if keep is not None:
            try:
                self.retain(step, keep)
            except StoreError as error:
                # The checkpoint is complete
                logger.warning(
                    "warning: old checkpoints stay and take up space: %s; the next save tries again",
                    error,
                )

    def _commit(self, own: CheckpointFiles, of_ranks: RankFacts, step: int) -> None:
        for number, section in enumerate(self.sections):
            section.finish(own, [facts[number] for _, facts in of_ranks])
        recorded = dict(own.recorded)
        for written, _ in of_ranks:
            recorded.update(written)
        self._require_written(own.folder, recorded)
        with self.storage.write(f"{own.folder}/{MANIFEST}") as path:
            files.write_compact_json(path, manifest_of(recorded))
        self.storage.commit(own.folder, step_name(step))

    def _require_written(self, folder: str, recorded: dict[str, JsonObject]) -> None:
        """Raises `RunError` where a file is not there in its size: a file system that
        is shared by several nodes may show it late, and is waited for."""
        sizes = self.storage.sizes(folder)
        for name, facts in recorded.items():
            if sizes.get(name) != facts["size"]:
                path = self.storage.open_read(f"{folder}/{name}")
                files.await_file(path, facts["size"])

    def retain(self, step: int, keep: int) -> None:
        """Deletes all but the newest `keep` and the best. Later ones than `step`, which
        a resume from an earlier checkpoint has left behind, and incomplete ones are not
        counted; the next save deletes those without a manifest. A link to a checkpoint that the user keeps
        elsewhere is counted and stays."""
        storage = self.storage
        known = [name for name in _committed(storage) if step_of(Path(name)) <= step]
        complete = [name for name in known if has_all_files(storage, name)]
        for name in complete[:-keep]:
            if name != storage.linked(BEST):
                storage.delete(name)

    @contextmanager
    def _deleted_on_failure(self, folder: str) -> Iterator[None]:
        """Deletes an incomplete checkpoint, which would keep a full disk full."""
        try:
            yield
        except Exception:
            self.storage.delete(folder)
            raise

    # -- restoring ---------------------------------------------------------------------

    def load(self, checkpoint: Path) -> None:
        """Restore every section from a verified checkpoint of this run, which may lie
        in another storage and be of any number of ranks. Collective. Raises
        `UserError`, before anything is changed, where it has not the sections of this
        run."""
        storage = storages.storage_of(checkpoint.parent)
        name = checkpoint.name

        def local(file: str) -> Path:
            return storage.open_read(f"{name}/{file}")

        def table() -> Any:
            check_sections(checkpoint, self.sections)
            path = local(f"{ENGINE_TAG}/{INDEX_FILE}")
            shards = EngineShards.open(path.parent)
            return asdict(shards.layout), shards.files, shards.runs

        layout, names, runs = self._ranks.run_on_rank0(
            "sections of the checkpoint", table, long=True
        )
        shards = EngineShards(
            checkpoint / ENGINE_TAG,
            Layout(**layout),
            names,
            runs,
            lambda path: local(f"{ENGINE_TAG}/{path.name}"),
        )
        saved = SavedCheckpoint(checkpoint, local, shards, self._ranks)
        for section in self.sections:
            section.load(saved)

    # -- which there are ---------------------------------------------------------------

    def latest(self) -> Path | None:
        """The checkpoint that `latest` names."""
        name = self.storage.linked(LATEST)
        return None if name is None else self.storage.root / name

    def delete(self, checkpoint: Path) -> None:
        """Delete one of these checkpoints, whatever names it. A link that the user has
        put in its place stays."""
        self.storage.delete(checkpoint.name)

    @staticmethod
    def verify(checkpoint: Path) -> list[str]:
        """What is wrong with the files of a checkpoint, one line each; empty when it is
        intact. Raises `OtherFormat`."""
        folder = storages.local_copy(checkpoint)
        try:
            return verify_manifest(folder)
        except OtherFormat:
            raise
        except UserError as error:
            # The manifest is damaged
            return [str(error)]


# -- which there are -------------------------------------------------------------------


def complete_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in a folder of a run, oldest first."""
    return [root / name for name in _committed(storages.storage_of(root))]


def _committed(storage: Storage) -> list[str]:
    return [name for name in _step_folders(storage) if _is_committed(storage, name)]


def _step_folders(storage: Storage) -> list[str]:
    named = filter(is_step_name, storage.folders())
    return sorted(named, key=lambda name: step_of(Path(name)))


def _is_committed(storage: Storage, folder: str) -> bool:
    """Whether it is a checkpoint: the manifest is written last."""
    return storage.exists(f"{folder}/{MANIFEST}")


def has_all_files(storage: Storage, folder: str) -> bool:
    """Whether all files are there in their sizes: none is read but the manifest."""
    try:
        listed = _listed(storage, folder)
    except UserError:
        return False
    sizes = storage.sizes(folder)
    return all(sizes.get(name) == facts.size for name, facts in listed.items())


def _listed(storage: Storage, folder: str) -> dict[str, FileFacts]:
    return listed_files(storage.open_read(f"{folder}/{MANIFEST}").parent)


def check_sections(checkpoint: Path, sections: Sequence[Section]) -> None:
    """Raises `UserError` where a checkpoint has a file of no section, or lacks a
    section."""
    manifest = checkpoint / MANIFEST
    listed = _listed(storages.storage_of(checkpoint.parent), checkpoint.name)
    entries = {name.split("/")[0] for name in listed}
    names = ", ".join(section.name for section in sections)
    foreign = entries - {name for section in sections for name in section.files}
    if foreign:
        raise UserError(
            f"{manifest} lists {min(foreign)}, which is of no section that this run has ({names}): another "
            "kind of run, or another program, has written it"
        )
    for section in sections:
        if missing := set(section.required) - entries:
            raise UserError(
                f"{manifest}: the section {section.name} is missing, it lists no {min(missing)}. This run needs {names}"
            )


def name_checkpoints(storage: Storage, checkpoint: str, best: int) -> None:
    """Links `latest` to the checkpoint that a run resumes from, where there is no such
    link, and `best`: a run that was killed before it made them would otherwise end
    without."""
    if storage.linked(LATEST) is None:
        storage.link(LATEST, checkpoint)
    name_best(storage, best)


def name_best(storage: Storage, best: int) -> None:
    """Links `best` to the checkpoint of that step, if it is there."""
    name = step_name(best)
    is_there = best > 0 and _is_committed(storage, name)
    if is_there and storage.linked(BEST) != name:
        storage.link(BEST, name)


def resume_checkpoint(wanted: str, root: Path, flag: str = RESUME) -> Path | None:
    """The verified checkpoint that `wanted`, the value of `flag`, means in `root`.

    latest: what the link names. auto: the newest intact one, from the latest backwards,
    or None where none was ever completed. Otherwise a path. Raises `UserError` when the
    one asked for is missing or damaged, or when `auto` meets damaged ones only: a run
    does not start afresh over damaged checkpoints; `OtherFormat` for one of another
    version.
    """
    if wanted == AUTO:
        return _newest_intact(root, flag)
    storage, name = _asked_for(wanted, root, flag)
    checkpoint = (storage.root / name).resolve()
    if not _is_committed(storage, name):
        text = f"{flag} {wanted}: no checkpoint at {checkpoint}"
        if name in storage.folders():
            text += f", which has no {MANIFEST}: it was never saved to the end"
        raise UserError(text)
    if damage := CheckpointManager.verify(checkpoint):
        raise UserError(
            f"{flag} {wanted}: {checkpoint} is damaged: {'; '.join(damage)}. Give an intact one; {RESUME} {AUTO} takes "
            "the newest one of its run"
        )
    return checkpoint


def _asked_for(wanted: str, root: Path, flag: str) -> tuple[Storage, str]:
    if wanted != LATEST:
        return storages.located(local(wanted, flag))
    storage = storages.storage_of(root)
    name = storage.linked(LATEST)
    if name is None:
        raise UserError(
            f"{flag} {LATEST}: {root / LATEST} names no checkpoint of this run. {flag} {AUTO} takes the newest one "
            "there is"
        )
    return storage, name


def _newest_intact(root: Path, flag: str) -> Path | None:
    """Passes over those after `latest`, which an earlier resume has left behind."""
    storage = storages.storage_of(root)
    # Those that were never committed are named as well
    names = _step_folders(storage)
    latest = storage.linked(LATEST)
    if latest in names:
        names = names[: names.index(latest) + 1]
    skipped = []
    for name in reversed(names):
        checkpoint = root / name
        damage = CheckpointManager.verify(checkpoint)
        if not damage:
            return checkpoint
        logger.warning("skipped %s: %s", checkpoint, "; ".join(damage))
        skipped.append(f"{checkpoint}: {damage[0]}")
    if skipped:
        raise UserError(
            f"{flag} {AUTO}: no checkpoint in {root} is intact. To start afresh take another "
            "--output_dir, or --overwrite_output_dir in place of this flag:\n  "
            + "\n  ".join(skipped)
        )
    return None


def _write(
    own: CheckpointFiles, tensors: Tensors, gathered: Sequence[Gathered]
) -> None:
    """A rank's files: one of tensors, and those of its sections."""
    write_rank_file(own, tensors)
    for part in gathered:
        part.check()
        if dist.get_rank() == 0:
            part.write(own)


def write_rank_file(own: CheckpointFiles, tensors: Tensors) -> None:
    own.tensors(f"{ENGINE_TAG}/{rank_file(dist.get_rank())}", tensors, {})


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
