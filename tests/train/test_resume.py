"""Interrupted and resumed: the same losses, MoRA matrices, base and logged rows, bit for
bit.
"""

import shutil
from unittest import mock

import pytest
import torch

from mora_ds.commands.pretrain import train
from mora_ds.common.errors import Stopped
from mora_ds.common.files import read_json
from mora_ds.config.arguments import parse
from mora_ds.runtime import signals
from tests.helpers.damage import another_base
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import (
    curve,
    finished_run,
    losses,
    printed,
    rows,
    run,
    validation_errors_of,
)
from tests.helpers.resume import (
    MERGING,
    assert_same_run,
    assert_same_tensors,
    checkpoint_tensors,
    interrupted_job,
    stop_and_resume,
)
from tests.helpers.snapshot import untouched
from tests.helpers.stores import OVER_STORES, shown, stored
from tests.helpers.tables import heavy


@OVER_STORES
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(user, tmp_path, out):
    more = f"{MERGING} --mora_dropout 0.2 --train_norms true"
    reference = tmp_path / "reference"
    run(2, user.flags(reference, more))
    # After a merge not saved yet, then between checkpoints
    stop_and_resume(2, user.flags(out, more), 3, 7)
    shown(reference)
    shown(out)
    assert_same_run(out, reference)
    assert [row["step"] for row in rows(out) if "eval_perplexity" in row] == [
        0,
        4,
        8,
        9,
    ]
    assert [row["step"] for row in rows(out) if "merge" in row] == [3, 6]


@pytest.fixture(scope="module")
def reference(user, tmp_path_factory):
    """An uninterrupted run with all its checkpoints."""
    return finished_run(1, user, tmp_path_factory, MERGING)


@pytest.fixture
def copied(reference, out):
    """A copy of that run, which goes on in it."""
    shutil.copytree(reference, out, symlinks=True)
    stored(out)
    return out


@pytest.mark.parametrize(
    "out, step", [("disk", 6), ("memory", 2), heavy("bucket", 2)], indirect=["out"]
)
def test_resume_from_a_path_rolls_the_ledger_back(user, copied, reference, step):
    """From before the first merge, with both merges done since, and from right after the
    second.
    """
    checkpoint = copied / "checkpoints" / f"step-{step:06d}"
    argv = user.flags(copied, MERGING, "--resume_from_checkpoint", checkpoint)
    run_alone(interrupted_job, argv, step + 1)
    ledger = read_json(copied / "ledger/ledger.json")
    assert [cycle["step"] for cycle in ledger["cycles"]] == (
        [3] if step == 2 else [3, 6]
    )
    assert len(list((copied / "ledger").glob("cycle-*"))) == len(ledger["cycles"])
    assert max(row["step"] for row in rows(copied)) == step + 1
    run(1, argv)
    shown(copied)
    assert_same_run(copied, reference)


def stopped_at_once(argv):
    """A run that is asked to stop from the start. For `run_ranks`."""
    with mock.patch.object(signals, "requested", lambda: True), pytest.raises(Stopped):
        train(parse(argv))


def test_a_run_that_stops_within_a_pending_evaluation_leaves_its_branch(user, copied):
    """Its checkpoint is the one that `auto` goes on from, not the newest one of the
    branch.
    """
    checkpoint = copied / "checkpoints/step-000004"
    argv = user.flags(copied, MERGING, "--resume_from_checkpoint", checkpoint)
    run_alone(stopped_at_once, argv)
    assert (copied / "checkpoints/latest").resolve() == checkpoint.resolve()


def test_a_resume_tells_which_settings_have_changed(user, copied, tmp_path):
    start = "changed since the run was last started: "
    longer = user.flags(copied, MERGING, "--resume_from_checkpoint auto --max_steps 10")
    flags = [*longer, "--learning_rate", "0.5", "--lr_scheduler_type", "constant"]
    output = run_alone(printed, [*flags, "--cache_dir", str(tmp_path / "cache")])
    changes = "--max_steps 9 -> 10, --learning_rate 0.01 -> 0.5, --lr_scheduler_type linear -> constant"
    assert f"{start}{changes}" in output.splitlines()
    assert start not in run_alone(printed, flags)


def test_resume_into_a_new_folder(user, reference, tmp_path):
    out = tmp_path / "elsewhere"
    checkpoint = reference / "checkpoints/step-000006"
    run(1, user.flags(out, MERGING, "--resume_from_checkpoint", checkpoint))
    assert_same_tensors(checkpoint_tensors(out), checkpoint_tensors(reference))
    assert torch.equal(losses(out), losses(reference)[6:])


def test_resume_of_a_finished_run_trains_nothing_and_can_still_export(user, copied):
    before = curve(copied)
    names = ("checkpoints/latest/manifest.json", "summary.json")
    written = [(copied / name).read_bytes() for name in names]
    again = "--resume_from_checkpoint auto --export_merged true"
    summary = run(1, user.flags(copied, MERGING, again))
    assert curve(copied) == before
    assert [(copied / name).read_bytes() for name in names] == written
    assert (summary["steps"], summary["merges"]) == (9, 2)
    assert (copied / "merged/model.safetensors").is_file()


def test_a_larger_number_of_steps_extends_a_run_and_says_what_that_does(
    user, copied, reference
):
    again = user.flags(copied, MERGING, "--resume_from_checkpoint auto --max_steps")
    output = run_alone(printed, [*again, "12"])
    assert "its length was 9 steps and is 12 now" in output
    assert torch.equal(losses(copied)[:9], losses(reference))
    assert len(losses(copied)) == 12
    message = validation_errors_of([*again, "7"])
    assert "--max_steps" in message
    assert "step-000012" in message


def test_auto_without_a_checkpoint_starts_afresh(user, tmp_path, out):
    """Also over the files of a run that was killed before its first checkpoint, with
    merges."""
    reference = tmp_path / "reference"
    more = f"{MERGING} --save_steps 0 --resume_from_checkpoint auto"
    run(1, user.flags(reference, more))
    run_alone(interrupted_job, user.flags(out, more, "--learning_rate 0.5"), 7)
    run(1, user.flags(out, more))
    assert_same_run(out, reference)


def test_a_checkpoint_of_another_run_is_refused_with_every_difference(
    user, copied, tmp_path
):
    def differing(*more):
        resume = "--resume_from_checkpoint latest"
        return validation_errors_of(user.flags(copied, MERGING, resume, *more))

    with untouched(copied):
        message = differing(
            "--mora_rank 4 --operator share --seq_len 16 --bf16 true --seed 7 --merge_every 4",
            "--no_document_mask --attn_implementation sdpa --gradient_accumulation_steps 2",
        )
        for words in (
            "--mora_rank: 2 there, 4",
            "--operator: 'auto' there",
            "--seq_len: 32 there, 16 here",
            "--bf16",
            "--seed: 42 there, 7 here",
            "--merge_every: 3 there, 4 here",
            "--document_mask: True there, False here",
            "(--attn_implementation): 'documents' there, 'dense' here",
            "--gradient_accumulation_steps, ranks): 2 there, 4 here",
        ):
            assert words in message
        full = "--adapter full --merge_every 0 --restart_warmup_steps 10"
        assert "--adapter: " in differing(full)
        elsewhere = another_base(user.model, tmp_path / "other")
        assert "weights of --model_name_or_path" in differing(
            "--model_name_or_path", elsewhere
        )
        assert "--train_files" in differing("--train_files", user.held)


def test_ranks_that_cannot_share_the_batch_are_refused(user, reference):
    flags = user.flags(
        reference,
        MERGING,
        "--resume_from_checkpoint auto --per_device_train_batch_size 1",
    )
    message = validation_errors_of(flags, ranks=3)
    assert "2 sequences a step, which 3 ranks cannot share" in message
    assert "start a number of them that divides 2" in message
