"""A branch: a run in another folder that resumes a checkpoint of a stable one, and decays."""

from pathlib import Path

import pytest
import torch

from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, finished_run, losses, rows, run
from tests.helpers.resume import assert_same_tensors, checkpoint_tensors, interrupted_job
from tests.helpers.snapshot import untouched

STABLE = ("--merge_every", 3, "--restart_warmup_steps", 1, "--save_steps", 2, "--mora_dropout", 0.1)
DECAYING = (*STABLE, "--lr_scheduler_type", "wsd", "--max_steps", 9, "--decay_ratio", 5 / 8)
"""One step of warm-up; of the other eight, the last five decay."""


def test_a_branch_is_the_run_that_was_told_from_the_beginning(
    user: Playground, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    """In its weights, and in what it has logged; ended in between and resumed."""
    parent = finished_run(1, user, tmp_path_factory, *STABLE, "--lr_scheduler_type", "constant", "--max_steps", 6)
    whole = tmp_path / "whole"
    run(1, user.flags(whole, *DECAYING))
    out = tmp_path / "branch"
    branch = user.flags(out, *DECAYING, "--resume_from_checkpoint")
    with untouched(parent):
        run_ranks(1, interrupted_job, [*branch, str(parent / "checkpoints" / "step-000004")], 7)
        run(1, [*branch, "auto"])
    assert_same_tensors(checkpoint_tensors(out), checkpoint_tensors(whole))
    assert torch.equal(losses(out), losses(whole)[4:])
    assert [row["step"] for row in rows(out) if "merge" in row] == [6]
