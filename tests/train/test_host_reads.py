"""A training step reads numbers from the device once: the sums over all processes at its
end.
"""

import pytest

from mora_ds.train.trainer import Trainer
from tests.helpers.gloo import run_ranks
from tests.helpers.host_reads import HostReads
from tests.helpers.jobs import job
from tests.helpers.tables import heavy

TRAINER = "mora_ds/train/trainer.py"
STAGE3 = "deepspeed/runtime/zero/stage3.py"
UTILS = "deepspeed/runtime/utils.py"
"""The gradient norm of each parameter group, copied to the host (stage3.py,
`_get_norm_groups`), and looked at there. In the first three steps DeepSpeed also compares
its trace of the model between ranks."""

RUNS = (
    "--replay old={held}:0.25 --gradient_accumulation_steps 2",
    "--sequence_parallel_size 2 --gradient_checkpointing true",
)
MORE = ("", "--tensor_parallel_size 2")


def reads_of_steps(argv):
    """Host reads of each step by file. The first step is left out: it compares ranks
    and has no batch ready."""
    counts = []
    original = Trainer.train_step

    def step(trainer):
        if trainer.state.step == 0:
            original(trainer)
            return
        with HostReads() as reads:
            original(trainer)
        counts.append(dict(reads.places))

    Trainer.train_step = step
    job(argv)
    return counts


@pytest.mark.parametrize("more", [*RUNS, *map(heavy, MORE)])
def test_the_host_waits_once_a_step(user, tmp_path, more):
    steps = "--max_steps 5 --logging_steps 100 --eval_on_start false"
    argv = user.flags(tmp_path, f"{steps} {more.format(held=user.held)}")
    for reads in run_ranks(2, reads_of_steps, argv):
        *first, last, _ = reads  # the last one of all is logged
        for step in [*first, last]:
            assert own_reads(step, "mora_ds/") == {TRAINER: 1}
        theirs = own_reads(last, "transformers/")
        assert last == {TRAINER: 1, STAGE3: 1, UTILS: 1, **theirs}


def own_reads(reads, package):
    return {file: count for file, count in reads.items() if file.startswith(package)}
