"""--decay_from: a branch that decays from a checkpoint is the run that was told so from the beginning."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, finished_run, losses, refusal, rows, run
from tests.helpers.resume import assert_same_tensors, checkpoint_tensors, interrupted_job
from tests.helpers.snapshot import untouched

STABLE = (
    "--lr_scheduler_type", "wsd", "--merge_every", 3, "--restart_warmup_steps", 1, "--save_steps", 2,
    "--mora_dropout", 0.1,
)  # fmt: skip
PARENT = (*STABLE, "--max_steps", 11, "--decay_ratio", 0.3)
"""One step of warm-up; the learning rate decays from step 8 on. Merges after steps 3, 6 and 9."""

START = 4
DECAY = 5
WARMUP = 1


@pytest.fixture(scope="module")
def parent(user: Playground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all its checkpoints."""
    return finished_run(1, user, tmp_path_factory, *PARENT)


def test_a_branch_is_the_run_that_was_told_from_the_beginning(user: Playground, parent: Path, tmp_path: Path):
    """In its weights, and in what it has logged; ended in between and resumed by the same command."""
    whole = tmp_path / "whole"
    ratio = DECAY / (START + DECAY - WARMUP)
    run(1, user.flags(whole, *STABLE, "--max_steps", START + DECAY, "--decay_ratio", ratio))
    out = tmp_path / "branch"
    checkpoint = parent / "checkpoints" / f"step-{START:06d}"
    branch = ("--max_steps", DECAY, "--decay_from", str(checkpoint), "--resume_from_checkpoint", "auto")
    with untouched(parent):
        run_ranks(1, interrupted_job, user.flags(out, *STABLE, *branch), START + 3)
    elsewhere = tmp_path / "gone"
    parent.rename(elsewhere)  # a branch that has checkpoints needs its parent's no more
    run(1, user.flags(out, *STABLE, *branch))
    elsewhere.rename(parent)
    assert_same_tensors(checkpoint_tensors(out), checkpoint_tensors(whole))
    assert torch.equal(losses(out), losses(whole)[START:])
    rates = [row["learning_rate"] for row in rows(out) if "learning_rate" in row]
    assert rates[0] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-2 / DECAY)
    assert [row["step"] for row in rows(out) if "merge" in row] == [6]


def test_what_is_no_branch_is_refused(user: Playground, parent: Path, tmp_path: Path):
    def told(checkpoint: Path, out: Path, *more: str | int) -> str:
        return refusal(user.flags(out, *STABLE, "--max_steps", DECAY, "--decay_from", str(checkpoint), *more))

    checkpoints = parent / "checkpoints"
    with untouched(parent):
        assert "its learning rate is not at the peak" in told(checkpoints / "step-000010", tmp_path / "a")
        assert "must be a checkpoint, such as RUN/checkpoints/step-000500" in told(parent, tmp_path / "a")
        assert "holds another run: choose another folder" in told(checkpoints / "step-000004", parent)
        assert "no checkpoint at" in told(checkpoints / "step-000005", tmp_path / "a")
    out = Path(shutil.copytree(parent, tmp_path / "copied", symlinks=True))
    message = told(checkpoints / "step-000004", out, "--resume_from_checkpoint", "auto")
    assert "step of --decay_from: None there, 4 here" in message


def test_a_run_with_another_schedule_has_no_stable_checkpoint(user: Playground, tmp_path: Path):
    linear = tmp_path / "linear"
    run(1, user.flags(linear, "--max_steps", 4, "--save_steps", 2))
    flags = ("--lr_scheduler_type", "wsd", "--max_steps", 2, "--decay_from", linear / "checkpoints" / "step-000002")
    assert "its learning rate is not at the peak" in refusal(user.flags(tmp_path / "out", *map(str, flags)))


def test_a_branch_of_a_constant_run_may_begin_at_its_end(user: Playground, tmp_path: Path):
    constant = tmp_path / "constant"
    run(1, user.flags(constant, "--max_steps", 4, "--lr_scheduler_type", "constant"))
    flags = ("--lr_scheduler_type", "wsd", "--max_steps", 3, "--decay_from", constant / "checkpoints" / "latest")
    summary = run(1, user.flags(tmp_path / "out", *map(str, flags)))
    assert summary["steps"] == 7
