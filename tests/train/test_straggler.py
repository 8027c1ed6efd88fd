"""One rank that is slow at everything: the others wait for it, and the run is the same to
the bit.
"""

import time

import pytest
import torch.distributed as dist

from mora_ds.checkpoint import manager
from mora_ds.checkpoint.manager import complete_checkpoints
from mora_ds.train.trainer import Trainer
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import job, run
from tests.helpers.resume import MERGING, assert_same_run

pytestmark = pytest.mark.heavy

SLOW = ("train_step", "_merge", "_save", "_evaluate")
DELAY_S = 0.4


def delayed(work):
    def later(*arguments, **named):
        time.sleep(DELAY_S)
        return work(*arguments, **named)

    return later


def slow_job(argv, rank):
    """A run in which one rank comes late to every step, merge, save, evaluation, and writes
    its shards late.
    """
    if dist.get_rank() == rank:
        for name in SLOW:
            setattr(Trainer, name, delayed(getattr(Trainer, name)))
        manager.write_rank_file = delayed(manager.write_rank_file)
    return job(argv)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("saving", ["--async_save false", "--async_save true"])
def test_a_straggler_changes_nothing(user, tmp_path, rank, saving):
    reference = tmp_path / "reference"
    slow = tmp_path / "slow"
    run(3, user.flags(reference, MERGING))
    run_ranks(3, slow_job, user.flags(slow, MERGING, saving), rank)
    assert_same_run(slow, reference)
    slow_steps, steps = (
        [folder.name for folder in complete_checkpoints(out / "checkpoints")]
        for out in (slow, reference)
    )
    assert slow_steps == steps
