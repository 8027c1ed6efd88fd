"""--async_save: the same checkpoints, written while training goes on; errors are reported by
the next save, everywhere.
"""

import errno
import threading
import time

import pytest
import torch

from mora_ds.checkpoint import manager as checkpoints
from mora_ds.checkpoint.manager import Background, complete_checkpoints
from mora_ds.common.errors import RunError
from mora_ds.train.trainer import Trainer
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import finished_run, job, refused
from tests.helpers.outcome import assert_good, assert_same_outcome
from tests.helpers.stores import OVER_STORES, shown

LAST_STEP = 7
MORE = (
    f"--max_steps {LAST_STEP} --merge_every 3 --restart_warmup_steps 1 --save_steps 2",
    "--train_norms true --mora_dropout 0.1",
)


@pytest.fixture(scope="module")
def full(user, tmp_path_factory):
    """A run that writes its checkpoints at once."""
    return finished_run(2, user, tmp_path_factory, *MORE)


def slow_job(argv):
    """No shard is written before a step has been done since its save, the last one's apart:
    a save that waited for the disk would wait for ever. (shards that were written while_training
    training, summary)."""
    write = checkpoints.write_rank_file
    after_step = Trainer.after_step
    save = checkpoints.CheckpointManager.save
    stepped, while_training = threading.Event(), 0

    def slowly(own, tensors):
        nonlocal while_training
        while_training += not stepped.is_set()
        if not stepped.wait(60):
            raise RunError("training did not go on")
        write(own, tensors)

    def counted(manager, step, *args):
        manager.wait()
        if step < LAST_STEP:
            stepped.clear()
        return save(manager, step, *args)

    def step(trainer):
        stepped.set()
        after_step(trainer)

    checkpoints.write_rank_file = slowly
    Trainer.after_step = step
    checkpoints.CheckpointManager.save = counted
    summary = job(argv)
    return while_training, summary


@OVER_STORES
def test_the_same_checkpoints_while_training_goes_on(user, full, out):
    """Merges fall into writes; every checkpoint is as of its own step, and the run is the
    other one bit for bit.
    """
    for while_training, summary in run_ranks(
        2, slow_job, user.flags(out, *MORE, "--async_save true")
    ):
        assert while_training >= 1, "a shard was written while a step was done"
        assert summary["steps"] == LAST_STEP
    shown(out)
    assert_same_outcome(out, full)


def faulty_job(argv, fault):
    """The disk of rank 1 has a fault from the second checkpoint on."""
    write = checkpoints.write_rank_file
    written = []

    def write_or_fail(own, tensors):
        written.append(own.folder)
        if torch.distributed.get_rank() == 1 and "step-000004" in own.folder:
            fault()
        write(own, tensors)

    checkpoints.write_rank_file = write_or_fail
    kind, message = refused(argv)
    assert not any("step-000006" in folder for folder in written), (
        "the next save is the boundary"
    )
    return kind, message


def be_full():
    raise OSError(errno.ENOSPC, "No space left on device")


def give_no_answer():
    threading.Event().wait()


@OVER_STORES
def test_what_went_wrong_is_raised_on_all_ranks_and_the_checkpoint_before_stays(
    user, out
):
    reported = run_ranks(
        2, faulty_job, user.flags(out, *MORE, "--async_save true"), be_full
    )
    assert [kind for kind, _ in reported] == ["RunError", "RunError"]
    assert f"the disk that holds {out / 'checkpoints'} is full" in reported[1][1]
    assert reported[0][1].startswith("rank 1: ")
    shown(out)
    root = out / "checkpoints"
    assert [folder.name for folder in complete_checkpoints(root)] == ["step-000002"]
    assert (root / "latest").resolve().name == "step-000002"
    assert not list(root.glob(".step*")), "half a checkpoint would keep the disk full"
    assert_good(out)


def test_a_disk_that_does_not_answer_ends_the_run_on_all_ranks(user, out):
    argv = user.flags(out, *MORE, "--async_save true --collective_timeout_s 8")
    for kind, message in run_ranks(2, faulty_job, argv, give_no_answer, timeout_s=100):
        assert kind == "RunError", message
        assert "step-000004" in message, message
        assert "8 s" in message
        assert "--collective_timeout_s" in message
    assert (out / "checkpoints/latest").resolve().name == "step-000002"


# -- the parts -------------------------------------------------------------------------


def test_background_work_is_waited_for_and_its_error_raised_once():
    background = Background(limit_s=60)
    background.wait()
    done = []
    background.start(lambda: (time.sleep(0.2), done.append(1))[0], "work")
    background.wait(0.01)
    assert not done
    background.wait()
    assert done == [1]
