"""A training step reads numbers from the device once: the sums over all processes at its
end.
"""

import pytest

from mora_ds.train.trainer import Trainer
from tests.helpers.gloo import run_ranks
from tests.helpers.host_reads import HostReads
from tests.helpers.jobs import job

TRAINER = "mora_ds/train/trainer.py"
STAGE3 = "deepspeed/runtime/zero/stage3.py"
UTILS = "deepspeed/runtime/utils.py"
"""The gradient norm of each parameter group, copied to the host (stage3.py,
`_get_norm_groups`), and looked at there. In the first three steps DeepSpeed also compares
its trace of the model between ranks."""

RUNS = {
    "mixture": ("--replay", "old={held}:0.25", "--gradient_accumulation_steps", 2),
    "sequence": ("--sequence_parallel_size", 2, "--gradient_checkpointing", "true"),
    "plain": (),
    "tensor": ("--tensor_parallel_size", 2, "--deepspeed", "configs/zero3.json"),
}
DEFAULT = ("mixture", "sequence")


def reads_of_steps(argv):
    """By file, the reads of each step but the first, which compares ranks and has no batch
    ready.
    """
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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.heavy)
        for name in RUNS
    ],
)
def test_the_host_waits_once_a_step(user, tmp_path, name):
    more = [str(flag).format(held=user.held) for flag in RUNS[name]]
    argv = user.flags(
        tmp_path, "--max_steps 5 --logging_steps 100 --eval_on_start false", *more
    )
    for steps in run_ranks(2, reads_of_steps, argv):
        *first, last, _ = steps  # the last one of all is logged
        for step in [*first, last]:
            assert {
                file: count for file, count in step.items() if file.startswith("mora_ds/")
            } == {TRAINER: 1}
        reads = {
            file: count
            for file, count in last.items()
            if not file.startswith("transformers/")
        }
        assert reads == {TRAINER: 1, STAGE3: 1, UTILS: 1}
