"""--decay_from: a branch that decays from a checkpoint equals a run that has this decay from
its start.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.files import replace_symlink, write_json_atomic, write_manifest
from mora_ds.train import pretrain
from tests.helpers.damage import checkpoint_at
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import finished_run, losses, rows, run, validation_errors_of
from tests.helpers.mixtures import mixture_flags, write_mixture
from tests.helpers.resume import (
    assert_same_tensors,
    checkpoint_tensors,
    interrupted_job,
)
from tests.helpers.snapshot import untouched
from tests.helpers.tables import heavy

STABLE = (
    "--lr_scheduler_type wsd --merge_every 3 --restart_warmup_steps 1 --save_steps 2 "
    "--mora_dropout 0.1"
)
PARENT = f"{STABLE} --max_steps 11 --decay_ratio 0.3"
"""One step of warm-up; the learning rate decays from step 8 on. Merges after steps 3, 6 and
9.
"""

START = 4
"""The checkpoint of most branches, step-000004."""
DECAY = 5


@pytest.fixture(scope="module")
def parent(user, tmp_path_factory):
    """A finished run with all its checkpoints."""
    return finished_run(1, user, tmp_path_factory, PARENT)


def test_a_branch_equals_a_run_that_decays_from_its_start(user, parent, tmp_path):
    """Its weights and its log are equal; it was stopped and resumed, after a link to
    its parent had moved."""
    reference = tmp_path / "reference"
    ratio = DECAY / (START + DECAY - 1)  # a share of the steps after that of warm-up
    run(
        1,
        user.flags(
            reference, STABLE, "--max_steps", START + DECAY, "--decay_ratio", ratio
        ),
    )
    out = tmp_path / "branch"
    checkpoint = parent / "checkpoints/step-000004"
    latest = tmp_path / "latest"
    latest.symlink_to(checkpoint)
    branch = user.flags(
        out, STABLE, "--max_steps", DECAY, "--resume_from_checkpoint auto --decay_from"
    )
    by_link = [*branch, str(latest)]
    with untouched(parent):
        run_alone(interrupted_job, by_link, START + 3)
    later = str(checkpoint.with_name("step-000006"))
    assert "step of --decay_from: 4 there, 6 here" in validation_errors_of(
        [*branch, later]
    )
    another = shutil.copytree(checkpoint, tmp_path / "another" / checkpoint.name)
    (another / "manifest.json").write_text("{}")
    message = validation_errors_of([*branch, str(another)])
    assert "manifest of the checkpoint of --decay_from: " in message
    replace_symlink(latest, later)
    elsewhere = tmp_path / "gone"
    parent.rename(elsewhere)  # a branch that has checkpoints needs its parent's no more
    run_alone(interrupted_job, by_link, START + 4)
    run(1, [*branch, str(checkpoint)])
    elsewhere.rename(parent)
    assert_same_tensors(checkpoint_tensors(out), checkpoint_tensors(reference))
    assert torch.equal(losses(out), losses(reference)[START:])
    assert [row["step"] for row in rows(out) if "merge" in row] == [6]


@pytest.mark.parametrize("kind", ["mixture", heavy("stream"), heavy("full")])
def test_a_branch_of_every_kind_of_run(user, tmp_path, kind):
    """Its batches go on where those of its parent stopped."""
    mix = write_mixture(user, tmp_path / "mix.yaml")
    of_kind = {"mixture": "", "stream": "--streaming", "full": "--adapter full"}[kind]

    def flags(name, *more):
        every = (f"--lr_scheduler_type wsd --save_steps 2 {of_kind}", *more)
        if kind == "mixture":
            return mixture_flags(user, tmp_path / name, mix, *every)
        return user.flags(tmp_path / name, *every)

    run(1, flags("parent", "--max_steps 6 --decay_ratio 0.25"))
    # Of the 4 steps after that of warm-up
    run(1, flags("reference", "--max_steps 5 --decay_ratio 0.75"))
    start = tmp_path / "parent/checkpoints/step-000002"
    run(1, flags("branch", "--max_steps 3 --decay_from", start))
    branch, reference = (
        load_file(tmp_path / name / "checkpoints/latest/engine/rank-00000.safetensors")
        for name in ("branch", "reference")
    )
    assert_same_tensors(branch, reference)
    assert torch.equal(losses(tmp_path / "branch"), losses(tmp_path / "reference")[2:])


def test_checkpoints_without_a_branch_are_refused(user, parent, tmp_path):
    def message_of(checkpoint, *more):
        steps = ("--max_steps", DECAY, "--decay_from", checkpoint)
        return validation_errors_of(user.flags(tmp_path / "a", STABLE, *steps, *more))

    checkpoints = parent / "checkpoints"
    stable = checkpoints / "step-000004"
    with untouched(parent):
        assert "its learning rate is not at the peak" in message_of(
            checkpoints / "step-000010"
        )
        assert (
            "must be a checkpoint, such as RUN/checkpoints/step-000500"
            in message_of(parent)
        )
        message = message_of(stable, "--output_dir", parent, "--overwrite_output_dir")
        assert "lies in --output_dir: give the branch a folder of its own" in message
        assert "no checkpoint at" in message_of(checkpoints / "step-000005")
    out = shutil.copytree(parent, tmp_path / "copied", symlinks=True)
    message = message_of(stable, "--output_dir", out, "--resume_from_checkpoint auto")
    assert "step of --decay_from: None there, 4 here" in message


def test_a_branch_begins_without_its_parents_end_best_step_and_failures(tmp_path):
    checkpoint = checkpoint_at(tmp_path, START)
    state = TrainerState(START, at_peak=True, identity={"seed": 1})
    end = {"finished": True, "best_step": 2, "best_score": 0.5, "failures": ["a task"]}
    write_json_atomic(checkpoint / "trainer_state.json", vars(replace(state, **end)))
    write_manifest(checkpoint)
    branched = replace(state, identity={"seed": 1, "decay_from": START})
    start = pretrain._branch(str(checkpoint), {"decay_from": START}, tmp_path / "own")
    assert start == (checkpoint, branched)


def test_a_parent_is_at_the_peak_by_a_schedule_of_its_own(user, tmp_path, out):
    """A constant one is at its end; a linear one is not after a step below the peak."""
    for kind in ("linear", "constant"):
        steps = "--max_steps 4 --save_steps 2 --lr_scheduler_type"
        run(1, user.flags(tmp_path / kind, steps, kind))

    def branch(checkpoint):
        decay = "--lr_scheduler_type wsd --max_steps 3 --decay_from"
        return user.flags(out, decay, tmp_path / checkpoint)

    message = validation_errors_of(branch("linear/checkpoints/step-000002"))
    assert "its learning rate is not at the peak" in message
    assert run(1, branch("constant/checkpoints/latest"))["steps"] == 7
