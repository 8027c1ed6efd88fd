"""The long haul: 300 short steps, 5 merges, 6 kills at random moments; memory and file
descriptors stay flat.

    pytest tests/train/test_long_haul.py -m heavy                          two ranks; 2 minutes
    LONG_HAUL_STEPS=2000 pytest tests/train/test_long_haul.py -m heavy     10 minutes: 39 merges, 20 kills

The moments of the kills come from a seed (`LONG_HAUL_SEED`), so that a failure can be
repeated.
"""

import os
import random
import time
from pathlib import Path

import pytest

from mora_ds.train.trainer import Trainer
from tests.helpers.gloo import run_ranks, start_ranks
from tests.helpers.jobs import job, rows
from tests.helpers.outcome import assert_same_outcome

RANKS = 2
STEPS = int(os.environ.get("LONG_HAUL_STEPS", "300"))
MERGE_EVERY = 50

KILLS = max(6, STEPS // 100)
SEED = int(os.environ.get("LONG_HAUL_SEED", "0"))
LOOK_EVERY = 10
GROWTH = 0.02

FLAGS = (
    f"--max_steps {STEPS} --merge_every {MERGE_EVERY} --restart_warmup_steps 5 "
    "--save_steps 20 --save_total_limit 3 --mora_dropout 0.1 --resume_from_checkpoint auto"
)


def watched_job(argv):
    """A run; (step, resident bytes, open file descriptors) of this rank every few steps.
    For `run_ranks`.
    """
    seen = []
    after_step = Trainer.after_step

    def look(trainer):
        after_step(trainer)
        if trainer.state.step % LOOK_EVERY == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident = pages * os.sysconf("SC_PAGE_SIZE")
            seen.append(
                (trainer.state.step, resident, len(os.listdir("/proc/self/fd")))
            )

    Trainer.after_step = look  # in this forked rank alone
    job(argv)
    return seen


def assert_flat(seen, rank):
    """The last tenth against the second one, when every buffer has its size: the most
    memory, and the fewest descriptors, as another thread may have a file open at the moment
    of a look."""
    tenth = len(seen) // 10
    early = seen[tenth : 2 * tenth]
    late = seen[-tenth:]
    for what, column, extreme, growth in (
        ("resident bytes", 1, max, GROWTH),
        ("open file descriptors", 2, min, 0.0),
    ):
        before, now = (
            extreme(row[column] for row in period) for period in (early, late)
        )
        print(f"rank {rank}: {what} {before:,} -> {now:,} ({now / before - 1:+.2%})")
        assert now <= before * (1 + growth), (
            f"rank {rank}: {what} grew from {before:,} to {now:,}"
        )


def killed_while(argv, out, until, delay_s, victims):
    """Runs until the step `until` is logged and `delay_s` have passed, then kills
    `victims`, and the rest as a launcher does. Returns whether the run had not come to its
    end by itself."""
    pipes, processes = start_ranks(RANKS, job, argv)
    try:
        deadline = time.monotonic() + 600
        while _last_step(out) < until and all(
            process.is_alive() for process in processes
        ):
            assert time.monotonic() < deadline, f"the run did not get to step {until}"
            time.sleep(0.02)
        time.sleep(delay_s)
        running = all(process.is_alive() for process in processes)
        for rank in victims:
            processes[rank].kill()
        return running
    finally:
        time.sleep(0.2)  # what a survivor does meanwhile must be harmless
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _last_step(out):
    path = out / "metrics.jsonl"
    if not path.exists():
        return 0
    last = path.read_bytes()[-600:].decode(errors="replace").rpartition('"step": ')[2]
    digits = last.split(",")[0].split("}")[0]
    return int(digits) if digits.isdigit() else 0


@pytest.mark.heavy(seconds=110)
@pytest.mark.timeout(3 * STEPS)
def test_a_long_run_with_kills_equals_an_uninterrupted_one(user, tmp_path, out):
    reference = tmp_path / "reference"

    def flags(folder):
        return user.flags(folder, FLAGS, "--eval_files", f"short={user.other}")

    for rank, seen in enumerate(
        run_ranks(RANKS, watched_job, flags(reference), timeout_s=3600)
    ):
        assert_flat(seen, rank)
    dice = random.Random(SEED)
    done = 0
    steps = sorted(dice.sample(range(5, STEPS - 5), KILLS))
    for step in steps:
        victims = dice.choice([[0], [1], [0, 1]])
        done += killed_while(flags(out), out, step, dice.random() * 0.3, victims)
    print(f"{done} kills of {KILLS} met a running job, at or after steps {steps}")
    assert done >= 0.8 * KILLS
    run_ranks(RANKS, job, flags(out), timeout_s=3600)
    assert_same_outcome(out, reference)
    assert sum("merge" in row for row in rows(out)) == STEPS // MERGE_EVERY - 1
