"""Processes that kill themselves with SIGKILL at a named moment of a run.

    killed_run(2, argv, "before_the_rename", victims=[0])      returns when the last process has ended
    run(2, argv)                                               the same command again
    assert_same_outcome(out, uninterrupted)                    every file is equal, byte for byte (outcome.py)

Each moment is patched into the process that is to die; the package itself has no hooks.
"""

import itertools
import json
import multiprocessing.connection
import os
import pkgutil
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch.distributed as dist
import transformers

import mora_ds.data.cache
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.checkpoint import manager
from mora_ds.checkpoint.shard_table import rank_file
from mora_ds.checkpoint.storage import LocalStorage, ObjectStorage
from mora_ds.remora import ledger
from mora_ds.train import metrics
from tests.helpers.gloo import start_ranks
from tests.helpers.jobs import job, output_of
from tests.helpers.stores import store_of
from tests.helpers.tables import rows

Install = Callable[[], None]


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    # The signal may take a moment to arrive; nothing else must run meanwhile
    time.sleep(60)


# -- ways to die -----------------------------------------------------------------------


def at_call(owner, name, nth, begins=None, has_ended=None):
    """Call `begins` when the n-th call of a function begins, and `has_ended` with its
    arguments when it has ended.
    """
    original = getattr(owner, name)
    calls = itertools.count(1)

    def patched(*args, **kwargs):
        is_nth = next(calls) == nth
        if is_nth and begins is not None:
            begins()
        result = original(*args, **kwargs)
        if is_nth and has_ended is not None:
            has_ended(*args, **kwargs)
        return result

    setattr(owner, name, patched)


def before(owner, name, nth=1):
    """Die when the n-th call begins."""
    at_call(owner, name, nth, begins=die)


def after(owner, name, nth=1):
    """Die when the n-th call has ended."""
    at_call(owner, name, nth, has_ended=lambda *args, **kwargs: die())


def within(owner, name, nth, install):
    """`install` another death when the n-th call begins."""
    at_call(owner, name, nth, begins=install)


def torn(owner, name, path_of):
    """Die in the middle of the first call, which writes the file that `path_of(*arguments)`
    names.
    """

    def tear(*args, **kwargs):
        path = path_of(*args, **kwargs)
        os.truncate(path, path.stat().st_size // 2)
        die()

    at_call(owner, name, 1, has_ended=tear)


def path_of_shard(own):
    """Where this rank's file of a checkpoint that is being written lies."""
    file = f"{own.folder}/engine/{rank_file(dist.get_rank())}"
    return own.storage.open_read(file)


def half_deleted(folder_name):
    """Die in the middle of `shutil.rmtree` of a folder whose name contains
    `folder_name`.
    """
    original = shutil.rmtree

    def patched(path, *args, **kwargs):
        if folder_name in Path(path).name and Path(path).exists():
            contents = sorted(file for file in Path(path).rglob("*") if file.is_file())
            assert len(contents) > 1, f"{path} has too few files to be half deleted"
            for file in contents[: len(contents) // 2]:
                file.unlink()
            die()
        original(path, *args, **kwargs)

    shutil.rmtree = patched


def half_a_row():
    """Die in the middle of a row of metrics.jsonl."""
    record = metrics.MetricsLog.step

    def patched(log, row):
        if log.enabled and row["step"] == 4 and "loss" in row:
            log._file.write(json.dumps(row)[:40].encode())
            die()
        record(log, row)

    metrics.MetricsLog.step = patched


def half_a_tokenizer():
    """Die when the tokenizer's folder lacks tokenizer.json."""
    save = transformers.PreTrainedTokenizerBase.save_pretrained

    def patched(tokenizer, folder, *args, **kwargs):
        save(tokenizer, folder, *args, **kwargs)
        (Path(folder) / "tokenizer.json").unlink()
        die()

    transformers.PreTrainedTokenizerBase.save_pretrained = patched


def half_a_layer(nth):
    """Die when half of the n-th frozen weight that is written has its new numbers."""
    calls = itertools.count(1)
    rebuild_weight = AdaptedLinear.rebuild_weight

    def patched(layer, original, *args):
        before = layer.weight.clone()
        rebuild_weight(layer, original, *args)
        if next(calls) == nth:
            half = len(before) // 2
            layer.weight[half:].copy_(before[half:])
            die()

    AdaptedLinear.rebuild_weight = patched


def cycle_without_its_line():
    """Die when the file of the second cycle exists and ledger.json does not name it yet."""
    write = ledger.Ledger._write

    def patched(book, records):
        if len(records) == 2 and "checkpoints" not in book.folder.parts:
            die()
        write(book, records)

    ledger.Ledger._write = patched


# -- the moments -----------------------------------------------------------------------


class RunStart(Enum):
    """The content of the output folder before the run that is killed."""

    NOTHING = "nothing"
    FINISHED = "a finished run"
    UNNAMED = "a run whose last checkpoint `latest` does not name yet"
    ANOTHER = "another run, which --overwrite_output_dir deletes"


class Passes(Enum):
    """The processes that reach a moment."""

    ALL = "all"
    FIRST = "rank 0 only"


@dataclass
class Moment:
    install: Install
    """Patches a process so that it dies then."""
    passes: Passes
    start: RunStart
    more: tuple[str, ...] = ()
    """Flags in addition to `STEPS`."""
    only_heavy: bool = False
    """Whether only the heavy tests try this moment."""


STEPS = (
    "--max_steps 6 --merge_every 2 --restart_warmup_steps 1 --save_steps 1 "
    "--save_total_limit 2 --mora_dropout 0.1 --train_norms true --export_merged true"
)

BEST = ("--best_by", "short:1", "--eval_steps", 1)
"""Flags for an evaluation after each step, most of which make a new best checkpoint."""

UNUSUAL = {
    "half a row": half_a_row,
    "half a tokenizer": half_a_tokenizer,
    "half a layer": lambda: half_a_layer(2),
    "half a shard": lambda: torn(
        manager, "write_rank_file", lambda own, tensors: path_of_shard(own)
    ),
    "half of the tokens": lambda: torn(
        mora_ds.data.cache, "_write", lambda *arguments: arguments[2] / "tokens.bin"
    ),
    "half of step 3 deleted": lambda: half_deleted("step-000003"),
    "half of a run deleted": lambda: half_deleted(".deleting"),
    "cycle without its line": cycle_without_its_line,
}
"""Deaths that are neither right before nor right after a call."""

TABLE = """
# a step
before_the_optimizer_step | all | nothing | - | before deepspeed.runtime.engine.DeepSpeedEngine.step 4
after_the_optimizer_step | all | nothing | - | after deepspeed.runtime.engine.DeepSpeedEngine.step 4
half_a_row_of_metrics | first | nothing | - | half a row
# a checkpoint
matrices_are_gathered | all | nothing | .checkpoint.sections.AdapterSection.gather 3 | before .engine.zero.full_fp32 5
engine_shard_half_written | all | nothing | .checkpoint.manager.CheckpointManager.save 3 | half a shard
after_the_shards | all | nothing | - | before .checkpoint.manager.gather_to_rank0 3
adapter_half_written | first | nothing | .checkpoint.sections.adapter_tensors 3 | \
after .common.tensor_files.SafetensorsWriter.write 4
ledger_half_copied | first | nothing | .checkpoint.sections._write_ledger 5 | \
before .checkpoint.sections.CheckpointFiles.put 2
before_the_manifest | first | nothing | - | before .checkpoint.manager.manifest_of 3
before_the_rename | first | nothing | - | before .checkpoint.storage.LocalStorage.commit 3
before_the_first_latest | first | nothing | - | before .checkpoint.storage.LocalStorage.link 1
before_the_last_latest | first | nothing | - | before .checkpoint.storage.LocalStorage.link 9
latest_made_and_not_moved | first | nothing | .checkpoint.storage.LocalStorage.link 3 | after pathlib.Path.symlink_to 1
after_the_best | first | nothing | - | after .checkpoint.manager.name_best 6
between_the_two_renames | first | unnamed | .checkpoint.storage.LocalStorage.commit 1 | after os.replace 1
retention_half_done | first | nothing | - | half of step 3 deleted
# a merge
before_a_merge | all | nothing | - | before .remora.merge.ReMoRA.merge 2
a_layer_half_written | all | nothing | .remora.merge.ReMoRA.merge 2 | half a layer
some_layers_merged | all | nothing | .remora.merge.ReMoRA.merge 2 | after .adapters.layer.AdaptedLinear.merge 3
cycle_half_written | first | nothing | .remora.ledger._write_cycle 2 | \
after .common.tensor_files.SafetensorsWriter.write 5
cycle_not_in_the_ledger | first | nothing | - | cycle without its line
sums_half_written | first | nothing | .remora.merge.ReMoRA.merge 2 | before .remora.sums.MergedSums.write 5
sums_without_a_name | first | nothing | - | before .remora.sums.MergedSums.commit 2
before_the_reset | all | nothing | - | before .remora.merge.ReMoRA._start_cycle 2
right_after_a_merge | all | nothing | - | after .remora.merge.ReMoRA.merge 2
# the end
before_the_summary | first | nothing | - | before .train.pretrain.write_json_atomic 1
export_half_written | first | nothing | .deploy.export.write_shards 1 | \
after .common.tensor_files.SafetensorsWriter.write 5
export_set_aside | first | finished | .deploy.export.write_companions 1 | before os.rename 2
export_replaced | first | finished | .deploy.export.write_companions 1 | after os.rename 2
# the beginning
tokenizer_half_written | first | nothing | - | half a tokenizer
corpus_index | first | nothing | .data.content_index._write_entry 1 | before os.replace 1
tokens_half_written | first | nothing | - | half of the tokens
before_the_run_is_begun | first | nothing | - | before .train.output_folder.Reservation.commit 1
run_file_half_written | first | nothing | .train.pretrain.write_run_file 1 | before os.replace 1
old_run_half_set_aside | first | another | .train.output_folder.Reservation.prepare 1 | after pathlib.Path.rename 3
old_run_set_aside | first | another | - | before .train.output_folder.Reservation.commit 1
old_run_half_deleted | first | another | - | half of a run deleted
# a resume
ledger_half_restored | first | unnamed | .checkpoint.sections.LedgerSection.load 1 | \
before .remora.ledger.link_or_copy 2
before_the_rebuild | all | unnamed | - | before .remora.merge.ReMoRA.rebuild 1
layers_rebuilt | all | unnamed | .remora.merge.ReMoRA.rebuild 1 | after .adapters.layer.AdaptedLinear.rebuild_weight 3
metrics_half_trimmed | first | unnamed | .train.metrics._keep_rows 1 | before os.replace 1
"""
"""Moment | processes that reach it | content of the output folder at the start | call in
which they die | death.

Before or after the call of a function with that number; names that begin with a dot are of
`mora_ds`. The numbers are those of a run with the flags `STEPS`: a checkpoint after every
step, merges after steps 2 and 4. Before each merge, and before the last evaluation, there
is a checkpoint more."""


def call_of(text):
    """(owner, function, number of the call)."""
    name, number = text.split()
    owner, _, function = name.rpartition(".")
    found = pkgutil.resolve_name(f"mora_ds{owner}" if owner.startswith(".") else owner)
    return (STORAGE if found is LocalStorage else found), function, int(number)


STORAGE = LocalStorage
"""The storage of the run that is killed."""


def calls_named():
    """The calls in which, before which and after which processes die."""
    for *_, outer, death in rows(TABLE):
        if outer != "-":
            yield outer
        if death not in UNUSUAL:
            yield death.partition(" ")[2]


def installer(outer, death):
    """The patch with which a process dies, in the call `outer` unless that is "-"."""

    def install():
        when, _, call = death.partition(" ")
        if death in UNUSUAL:
            UNUSUAL[death]()
        else:
            {"before": before, "after": after}[when](*call_of(call))

    return install if outer == "-" else lambda: within(*call_of(outer), install)


MOMENTS = {
    name: Moment(
        installer(outer, death), Passes[passes.upper()], RunStart[start.upper()]
    )
    for name, passes, start, outer, death in rows(TABLE)
}
MOMENTS["after_the_best"].more = BEST
MOMENTS["layers_rebuilt"].only_heavy = True


# -- killing ---------------------------------------------------------------------------


def doomed_job(argv, moment, victims):
    """A run in which the processes with the ranks `victims` die. For `start_ranks`."""
    global STORAGE
    STORAGE = type(store_of(output_of(argv)))
    if any("://" in word for word in argv):
        STORAGE = ObjectStorage
    if dist.get_rank() in victims:
        MOMENTS[moment].install()
    job(argv)


def killed_run(world, argv, moment, victims):
    """Run until the processes with the ranks `victims` have died; the others must then end
    within 30 s.

    With all ranks as victims, the others are killed as soon as the first has died, as when
    a node fails.
    """
    pipes, processes = start_ranks(world, doomed_job, argv, moment, victims)
    try:
        first = _first_death([processes[rank] for rank in victims], 120)
        if first.exitcode != -signal.SIGKILL:
            raise AssertionError(
                f"the run did not reach {moment}:\n{_last_words(pipes)}"
            )
        if len(victims) == world:
            return
        deadline = time.monotonic() + 30
        for rank, process in enumerate(processes):
            process.join(max(0.0, deadline - time.monotonic()))
            assert not process.is_alive(), (
                f"{moment}: rank {rank} hangs, with rank(s) {victims} dead"
            )
    finally:
        for process in processes:
            process.kill()
            process.join()


def _first_death(processes, timeout_s):
    ready = multiprocessing.connection.wait(
        [process.sentinel for process in processes], timeout_s
    )
    assert ready, "no process died"
    process = next(process for process in processes if process.sentinel in ready)
    process.join()
    return process


def _last_words(pipes):
    words = []
    for pipe in pipes:
        try:
            words.append(str(pipe.recv()[1])[-3000:] if pipe.poll(10) else "(nothing)")
        except EOFError:
            words.append("(dead)")
    return "\n".join(words)
