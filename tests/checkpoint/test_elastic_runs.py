"""A run saved by two ranks goes on at one, three, four and two, under any ZeRO stage, with
nothing lost.

The state of the engines alone: `test_elastic`.
"""

import shutil
from pathlib import Path

import pytest
import torch

from mora_ds.checkpoint.storage import local_copy
from mora_ds.deploy.export import export_merged
from mora_ds.train.trainer import Trainer
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import REPOSITORY, assert_close_losses, job, rows, run
from tests.helpers.outcome import assert_good
from tests.helpers.resume import interrupted_job
from tests.helpers.stores import stored
from tests.helpers.tables import heavy

ROWS = 12
"""Sequences a step: shared evenly by 1, 2, 3 and 4 ranks."""
RUN = "--max_steps 8 --merge_every 3 --restart_warmup_steps 1 --save_steps 2 --train_norms true"


def flags(user, out, world, *more):
    return user.flags(out, RUN, "--per_device_train_batch_size", ROWS // world, *more)


def changed_to(out, stage):
    """Flags of a run that goes on from step 4 under another ZeRO stage."""
    checkpoint = out / "checkpoints/step-000004"
    config = REPOSITORY / "configs" / f"zero{stage}.json"
    return ("--resume_from_checkpoint", checkpoint, "--deepspeed", config)


def watched(argv, last=None):
    """Runs up to optimizer step `last`, or to the end.

    (step, first global row, token ids) of every training batch of this rank.
    """
    seen = []
    forward = Trainer.nll

    def watch(trainer, batch, by_source):
        step = trainer.state.step
        size = trainer.training.per_device_train_batch_size
        index = sum(earlier == step for earlier, _, _ in seen)
        first = (index * trainer.replica.world + trainer.replica.rank) * size
        seen.append((step, first, batch.batch["input_ids"].clone()))
        return forward(trainer, batch, by_source)

    Trainer.nll = watch  # in this forked rank alone
    if last is None:
        job(argv)
    else:
        interrupted_job(argv, last)
    return seen


def in_order(ranks):
    """Step -> (ROWS, T) token ids of the global batch."""
    steps = {}
    for rank in ranks:
        for step, first, ids in rank:
            steps.setdefault(step, {})[first] = ids
    return {
        step: torch.cat([batches[first] for first in sorted(batches)])
        for step, batches in steps.items()
    }


@pytest.fixture(scope="module")
def two(user, tmp_path_factory):
    """The undisturbed run of two ranks, and its batches."""
    out = tmp_path_factory.mktemp("two") / "out"
    return out, in_order(run_ranks(2, watched, flags(user, out, 2)))


@pytest.mark.parametrize(
    "out, world, stage",
    [("memory", 1, 3), ("disk", 4, 2), heavy("disk", 1, 3), heavy("disk", 3, 3)],
    indirect=["out"],
)
def test_a_run_goes_on_at_another_size_and_back(user, two, out, tmp_path, world, stage):
    """Steps 1 to 4 at two ranks (merge after 3), 5 and 6 at another number (merge after 6),
    7 and 8 at two again.
    """
    reference, batches = two
    shutil.copytree(reference, out, symlinks=True)
    stored(out)
    middle = in_order(
        run_ranks(world, watched, flags(user, out, world, *changed_to(out, stage)), 6)
    )
    last = in_order(
        run_ranks(2, watched, flags(user, out, 2, "--resume_from_checkpoint", "auto"))
    )
    assert set(middle) >= {4, 5}
    assert set(last) >= {6, 7}  # and the batch that a save looks ahead at
    for step, ids in {**middle, **last}.items():
        assert ids.shape[0] == ROWS, f"the batch of step {step}"
        assert torch.equal(ids, batches[step]), f"the batch of step {step}"
    assert_close_losses(out, reference, rtol=0, atol=1e-5)
    assert [row["step"] for row in rows(out) if "merge" in row] == [3, 6]
    for step in (6, 8):  # saved by the other number of ranks, and by two again
        checkpoint = local_copy(out / "checkpoints" / f"step-{step:06d}")
        report = export_merged(checkpoint, tmp_path / f"merged-{step}", verify=True)
        assert report.comparison is not None
        assert report.cycles == 2
        assert_good(checkpoint, user.model)


MUON = ("--optimizer muon --learning_rate 0.02",)


@pytest.fixture(scope="module")
def muon(user, tmp_path_factory):
    """The undisturbed run of two ranks under ZeRO-3; steps 4 and 8 are inside a cycle, with
    a momentum to lose.
    """
    out = tmp_path_factory.mktemp("muon") / "out"
    run(2, flags(user, out, 2, *MUON))
    return out


@pytest.mark.parametrize("world, stage", [(3, 2), heavy(2, 1), heavy(1, 3)])
def test_muons_momentum_goes_on_at_another_size_and_stage(
    user, muon, tmp_path, world, stage
):
    out = Path(shutil.copytree(muon, tmp_path / "out", symlinks=True))
    run(world, flags(user, out, world, *MUON, *changed_to(out, stage)))
    assert_close_losses(out, muon, rtol=0, atol=1e-5)
    assert_good(out / "checkpoints/step-000008", user.model)
    # Saved as it was resumed
    back = ("--resume_from_checkpoint", out / "checkpoints/step-000006")
    run(2, flags(user, out, 2, *MUON, *back))
    assert_close_losses(out, muon, rtol=0, atol=1e-5)
