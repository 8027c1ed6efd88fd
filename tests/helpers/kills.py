"""Processes that kill themselves with SIGKILL at a named moment of a run.

    killed_run(2, argv, "before_the_rename", victims=[0])      returns when the last process has ended
    run(2, argv)                                               the same command again
    assert_same_outcome(out, uninterrupted)                    every file is equal, byte for byte (outcome.py)

Each moment is patched into the process that is to die; the package itself has no hooks.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing.connection
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from deepspeed.runtime.engine import DeepSpeedEngine

import mora_ds.data.cache
import mora_ds.data.inspection
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.checkpoint import writer
from mora_ds.common import files
from mora_ds.deploy import export
from mora_ds.engine import shards, zero
from mora_ds.models.node_base import NodeBase
from mora_ds.models.tensor_files import SafetensorsWriter
from mora_ds.remora import ledger, merge
from mora_ds.remora.merge import ReMoRA
from mora_ds.train import metrics, output_folder, pretrain, run
from mora_ds.train.run import Run
from tests.helpers.gloo import start_ranks
from tests.helpers.jobs import job

Install = Callable[[], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal may take a moment to arrive; nothing else must run meanwhile


# -- ways to die -----------------------------------------------------------------------------------------------------


def at_call(
    owner: Any, name: str, nth: int, begins: Install | None = None, has_ended: Callable[..., None] | None = None
) -> None:
    """Call `begins` when the n-th call of a function begins, and `has_ended` with its arguments when it has ended."""
    original = getattr(owner, name)
    calls = itertools.count(1)

    def patched(*args: Any, **kwargs: Any) -> Any:
        is_nth = next(calls) == nth
        if is_nth and begins is not None:
            begins()
        result = original(*args, **kwargs)
        if is_nth and has_ended is not None:
            has_ended(*args, **kwargs)
        return result

    setattr(owner, name, patched)


def before(owner: Any, name: str, nth: int = 1) -> None:
    """Die when the n-th call begins."""
    at_call(owner, name, nth, begins=die)


def after(owner: Any, name: str, nth: int = 1) -> None:
    """Die when the n-th call has ended."""
    at_call(owner, name, nth, has_ended=lambda *args, **kwargs: die())


def within(owner: Any, name: str, nth: int, install: Install) -> None:
    """`install` another death when the n-th call begins."""
    at_call(owner, name, nth, begins=install)


def torn(owner: Any, name: str, path_of: Callable[..., Path], nth: int = 1) -> None:
    """Die in the middle of the n-th call, which writes the file that `path_of(*arguments)` names."""

    def tear(*args: Any, **kwargs: Any) -> None:
        path = path_of(*args, **kwargs)
        os.truncate(path, path.stat().st_size // 2)
        die()

    at_call(owner, name, nth, has_ended=tear)


def half_deleted(folder_name: str) -> None:
    """Die in the middle of `shutil.rmtree` of a folder whose name contains `folder_name`."""
    original = shutil.rmtree

    def patched(path: Any, *args: Any, **kwargs: Any) -> None:
        if folder_name in Path(path).name and Path(path).exists():
            contents = sorted(file for file in Path(path).rglob("*") if file.is_file())
            assert len(contents) > 1, f"{path} has too few files to be half deleted"
            for file in contents[: len(contents) // 2]:
                file.unlink()
            die()
        original(path, *args, **kwargs)

    shutil.rmtree = patched  # type: ignore[assignment]


def half_a_row() -> None:
    """Die in the middle of a row of metrics.jsonl."""
    write = metrics.MetricsLog._write

    def patched(log: Any, row: dict[str, Any]) -> None:
        if log.enabled and row["step"] == 4 and "loss" in row:
            log._file.write(json.dumps(row)[:40])
            log._file.flush()
            die()
        write(log, row)

    metrics.MetricsLog._write = patched  # type: ignore[method-assign]


def half_a_tokenizer() -> None:
    """Die when the tokenizer's folder lacks tokenizer.json."""
    save = transformers.PreTrainedTokenizerBase.save_pretrained

    def patched(tokenizer: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        save(tokenizer, folder, *args, **kwargs)
        (Path(folder) / "tokenizer.json").unlink()
        die()

    transformers.PreTrainedTokenizerBase.save_pretrained = patched  # type: ignore[assignment,method-assign]


def half_a_layer(nth: int) -> None:
    """Die when half of the n-th frozen weight that is written has its new numbers."""
    calls = itertools.count(1)
    write = AdaptedLinear.write

    def patched(layer: AdaptedLinear, weight: Any) -> None:
        if next(calls) == nth:
            half = len(weight) // 2
            layer.weight[:half].copy_(weight[:half])
            die()
        write(layer, weight)

    AdaptedLinear.write = patched  # type: ignore[method-assign]


def cycle_without_its_line() -> None:
    """Die when the file of the second cycle exists and ledger.json does not name it yet."""
    write = ledger.Ledger._write

    def patched(book: Any, records: Sequence[Any]) -> None:
        if len(records) == 2 and "checkpoints" not in book.folder.parts:
            die()
        write(book, records)

    ledger.Ledger._write = patched  # type: ignore[method-assign]


# -- the moments -----------------------------------------------------------------------------------------------------


class Start(Enum):
    """The content of the output folder before the run that is killed."""

    NOTHING = "nothing"
    FINISHED = "a finished run"
    UNNAMED = "a run whose last checkpoint `latest` does not name yet"
    ANOTHER = "another run, which --overwrite_output_dir deletes"


class Passes(Enum):
    """The processes that reach a moment."""

    ALL = "all"
    FIRST = "rank 0 only"


@dataclass(frozen=True)
class Moment:
    install: Install
    """Patches a process so that it dies then. The numbers of calls are those of a run with the flags `STEPS`: a
    checkpoint after every step, merges after steps 2 and 4. Before each merge, and before the last evaluation, there is
    a checkpoint more."""
    passes: Passes = Passes.FIRST
    start: Start = Start.NOTHING
    more: tuple[str | int, ...] = ()
    """Flags in addition to `STEPS`."""
    only_heavy: bool = False
    """Whether only the heavy tests try this moment."""


STEPS = (
    "--max_steps", 6, "--merge_every", 2, "--restart_warmup_steps", 1, "--save_steps", 1, "--save_total_limit", 2,
    "--mora_dropout", 0.1, "--train_norms", "true", "--export_merged", "true",
)  # fmt: skip

BEST = ("--best_by", "short:1", "--eval_steps", 1)
"""Flags for an evaluation after each step, most of which make a new best checkpoint."""

MOMENTS: dict[str, Moment] = {
    # a step
    "before_the_optimizer_step": Moment(lambda: before(DeepSpeedEngine, "step", 4), Passes.ALL),
    "after_the_optimizer_step": Moment(lambda: after(DeepSpeedEngine, "step", 4), Passes.ALL),
    "half_a_row_of_metrics": Moment(half_a_row),
    # a checkpoint
    "matrices_are_gathered": Moment(
        lambda: within(Run, "_gather", 3, lambda: before(zero, "full_fp32", 5)), Passes.ALL
    ),
    "engine_shard_half_written": Moment(
        lambda: within(
            writer.CheckpointWriter, "save", 3, lambda: torn(shards, "write_shard", lambda path, tensors: path)
        ),
        Passes.ALL,
    ),
    "after_the_shards": Moment(lambda: before(writer._Share, "of", 3), Passes.ALL),
    "adapter_half_written": Moment(
        lambda: within(run, "write_adapter", 3, lambda: after(SafetensorsWriter, "write", 4))
    ),
    "ledger_half_copied": Moment(
        lambda: within(ledger.Ledger, "copy_to", 5, lambda: before(ledger, "link_or_copy", 2))
    ),
    "before_the_manifest": Moment(lambda: before(files, "write_manifest", 3)),
    "before_the_rename": Moment(lambda: before(writer, "_replace_folder", 3)),
    "before_the_first_latest": Moment(lambda: before(files, "replace_symlink", 1)),
    "before_the_last_latest": Moment(lambda: before(files, "replace_symlink", 9)),
    "latest_made_and_not_moved": Moment(
        lambda: within(files, "replace_symlink", 3, lambda: after(Path, "symlink_to"))
    ),
    "after_the_best": Moment(lambda: after(writer, "name_best", 6), more=BEST),
    "between_the_two_renames": Moment(
        lambda: within(writer, "_replace_folder", 1, lambda: after(os, "replace")), start=Start.UNNAMED
    ),
    "retention_half_done": Moment(lambda: half_deleted("step-000003")),
    # a merge
    "before_a_merge": Moment(lambda: before(ReMoRA, "merge", 2), Passes.ALL),
    "base_half_copied_to_the_memory_of_the_node": Moment(lambda: after(NodeBase, "copy", 2), Passes.ALL),
    "a_layer_half_written": Moment(lambda: within(ReMoRA, "merge", 2, lambda: half_a_layer(2)), Passes.ALL),
    "some_layers_merged": Moment(
        lambda: within(ReMoRA, "merge", 2, lambda: after(merge, "merge_layer", 3)), Passes.ALL
    ),
    "cycle_half_written": Moment(
        lambda: within(ledger, "_write_cycle", 2, lambda: after(SafetensorsWriter, "write", 5))
    ),
    "cycle_not_in_the_ledger": Moment(cycle_without_its_line),
    "before_the_reset": Moment(lambda: before(ReMoRA, "_start_cycle", 2), Passes.ALL),
    "right_after_a_merge": Moment(lambda: after(ReMoRA, "merge", 2), Passes.ALL),
    # the end
    "before_the_summary": Moment(lambda: before(pretrain, "write_json_atomic")),
    "export_half_written": Moment(
        lambda: within(export, "write_shards", 1, lambda: after(SafetensorsWriter, "write", 5))
    ),
    "export_set_aside": Moment(
        lambda: within(export, "write_companions", 1, lambda: before(os, "rename", 2)), start=Start.FINISHED
    ),
    "export_replaced": Moment(
        lambda: within(export, "write_companions", 1, lambda: after(os, "rename", 2)), start=Start.FINISHED
    ),
    # the beginning
    "tokenizer_half_written": Moment(half_a_tokenizer),
    "corpus_index": Moment(lambda: within(mora_ds.data.inspection, "_remember", 1, lambda: before(os, "replace"))),
    "tokens_half_written": Moment(
        lambda: torn(mora_ds.data.cache, "_write", lambda *arguments: arguments[2] / "tokens.bin")
    ),
    "before_the_run_is_begun": Moment(lambda: before(output_folder.Reservation, "commit")),
    "run_file_half_written": Moment(lambda: within(pretrain, "write_run_file", 1, lambda: before(os, "replace"))),
    "old_run_half_set_aside": Moment(
        lambda: within(output_folder, "_set_aside", 1, lambda: after(Path, "rename", 3)), start=Start.ANOTHER
    ),
    "old_run_set_aside": Moment(lambda: before(output_folder.Reservation, "commit"), start=Start.ANOTHER),
    "old_run_half_deleted": Moment(lambda: half_deleted(".deleting"), start=Start.ANOTHER),
    # a resume
    "ledger_half_restored": Moment(
        lambda: within(Run, "_open_ledger", 1, lambda: before(ledger, "link_or_copy", 2)), start=Start.UNNAMED
    ),
    "before_the_replay": Moment(lambda: before(ReMoRA, "replay"), Passes.ALL, Start.UNNAMED),
    "some_layers_replayed": Moment(
        lambda: within(ReMoRA, "replay", 1, lambda: after(merge, "write_live", 3)), Passes.ALL, Start.UNNAMED,
        only_heavy=True,
    ),
    "metrics_half_trimmed": Moment(
        lambda: within(metrics, "_keep_rows", 1, lambda: before(os, "replace")), start=Start.UNNAMED
    ),
}  # fmt: skip


# -- killing ---------------------------------------------------------------------------------------------------------


def doomed_job(argv: list[str], moment: str, victims: Sequence[int]) -> None:
    """A run in which the processes with the ranks `victims` die. For `start_ranks`."""
    if dist.get_rank() in victims:
        MOMENTS[moment].install()
    job(argv)


def killed_run(world: int, argv: list[str], moment: str, victims: Sequence[int], patience_s: float = 30) -> None:
    """Run until the processes with the ranks `victims` have died; the others must then end within `patience_s`.

    With all ranks as victims, the others are killed as soon as the first has died, as when a node fails.
    """
    pipes, processes = start_ranks(world, doomed_job, argv, moment, victims)
    try:
        first = _first_death([processes[rank] for rank in victims], 120)
        if first.exitcode != -signal.SIGKILL:
            raise AssertionError(f"the run did not reach {moment}:\n{_last_words(pipes)}")
        if len(victims) == world:
            return
        deadline = time.monotonic() + patience_s
        for rank, process in enumerate(processes):
            process.join(max(0.0, deadline - time.monotonic()))
            assert not process.is_alive(), f"{moment}: rank {rank} hangs, with rank(s) {victims} dead"
    finally:
        for process in processes:
            process.kill()
            process.join()


def _first_death(processes: list[Any], timeout_s: float) -> Any:
    ready = multiprocessing.connection.wait([process.sentinel for process in processes], timeout_s)
    assert ready, "no process died"
    process = next(process for process in processes if process.sentinel in ready)
    process.join()
    return process


def _last_words(pipes: list[Any]) -> str:
    words = []
    for pipe in pipes:
        try:
            words.append(str(pipe.recv()[1])[-3000:] if pipe.poll(10) else "(nothing)")
        except EOFError:
            words.append("(dead)")
    return "\n".join(words)
