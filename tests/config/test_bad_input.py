"""Mistakes that one launch alone does not show: on several ranks, in folders of other runs,
while running.

test_bad_launches.py has all others.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds.checkpoint.manager import complete_checkpoints
from mora_ds.common.files import verify_manifest
from mora_ds.data import train_sentencepiece
from tests.helpers.gloo import run_alone, run_ranks
from tests.helpers.jobs import (
    finished_run,
    held_folder,
    launch,
    refused,
    refused_each,
    run,
    validation_errors_of,
)
from tests.helpers.models import tiny_model
from tests.helpers.snapshot import untouched


def assert_user_errors(cases, phrases):
    """Each run of `cases` is refused with a message that has all of its `parts`."""
    results = run_alone(refused_each, cases)
    for argv, expected, (kind, message) in zip(cases, phrases, results, strict=True):
        assert kind == "UserError", (argv, message)
        assert all(phrase in message for phrase in expected), (argv, message)


# -- files -----------------------------------------------------------------------------


def test_all_ranks_agree_on_a_broken_file(user, tmp_path, out):
    (tmp_path / "late.txt").write_bytes(b"fine\n" * 400_000 + b"\xff\n")
    argv = user.flags(out, "--train_files", tmp_path / "late.txt")
    for kind, message in run_ranks(2, refused, argv, timeout_s=60):
        assert kind == "UserError"
        assert "late.txt, line 400001" in message


# -- models and tokenizers -------------------------------------------------------------


def test_documents_that_would_see_each_other(user, tmp_path, out):
    shutil.copytree(user.model, tmp_path / "bloom")
    bloom = AutoConfig.for_model(
        "bloom", vocab_size=400, hidden_size=32, n_layer=2, n_head=4
    )
    AutoModelForCausalLM.from_config(bloom).save_pretrained(tmp_path / "bloom")
    argv = user.flags(out, "--model_name_or_path", tmp_path / "bloom")
    assert "--no_document_mask" in validation_errors_of(argv)
    assert not out.exists()
    assert run(1, [*argv, "--no_document_mask"])["steps"] == 6


def test_a_tokenizer_beyond_the_models_vocabulary(user, tmp_path, out):
    path = train_sentencepiece(user.texts(), 450, tmp_path)
    cases = [user.flags(out, "--tokenizer_name", name) for name in (path, user.train)]
    assert_user_errors(
        cases,
        [
            ["--tokenizer_name", "449", "0 to 399"],
            ["--tokenizer_name", str(user.train)],
        ],
    )


def test_a_tokenizer_that_would_come_back_as_another_one(
    user, tmp_path, model_folder, out
):
    """A Qwen2 folder makes transformers read any tokenizer next to it as Qwen2's own."""
    shutil.copytree(user.model, model_folder)
    tiny_model("qwen2", vocab_size=400).save_pretrained(model_folder)
    path = train_sentencepiece(user.texts(), 380, tmp_path)
    argv = user.flags(
        out,
        "--model_name_or_path",
        model_folder,
        "--tokenizer_name",
        path,
    )
    message = validation_errors_of(argv)
    assert "--tokenizer_name" in message
    assert "qwen2" in message


# -- output folders --------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_run(user, tmp_path_factory):
    return finished_run(1, user, tmp_path_factory)


def test_another_run_is_not_touched(user, other_run, tmp_path, out):
    mistaken = ["--overwrite_output_dir", "true"]
    checkpoint = other_run / "checkpoints/latest"
    elsewhere = (
        shutil.copytree(
            other_run / "checkpoints", tmp_path / "elsewhere", symlinks=True
        )
        / "latest"
    )
    cases = {
        "holds another run": user.flags(other_run),
        f"{other_run} holds another run": user.flags(
            other_run, "--resume_from_checkpoint", elsewhere
        ),
        "no file matches": user.flags(
            other_run, *mistaken, "--train_files", tmp_path / "*.txt"
        ),
        "q_prj": user.flags(other_run, *mistaken, "--target_modules q_prj"),
        "--warmup_steps": user.flags(
            other_run, *mistaken, "--max_steps -1 --warmup_steps 5000"
        ),
        "--mora_rank: 2": user.flags(
            out, "--resume_from_checkpoint", checkpoint, "--mora_rank 4"
        ),
        "is a file": user.flags(other_run / "run.yaml"),
    }
    with untouched(other_run):
        assert_user_errors(list(cases.values()), [[phrase] for phrase in cases])
    assert not out.exists()


def test_a_folder_that_a_run_is_still_writing_to(user, other_run, tmp_path):
    """Its launcher was killed, and it is resumed or overwritten while the ranks live on."""
    out = Path(shutil.copytree(other_run, tmp_path / "out", symlinks=True))
    cases = [
        user.flags(out, "--resume_from_checkpoint auto"),
        user.flags(out, "--overwrite_output_dir"),
    ]
    with untouched(out), held_folder(out):
        assert_user_errors(cases, [[f"--output_dir {out}", "are still alive"]] * 2)
    assert run(1, user.flags(out, "--resume_from_checkpoint auto"))["steps"] == 6


# -- while running ---------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_step_and_checkpoint(user, tmp_path, out):
    """The learning rate makes the first steps diverge; a checkpoint from before is
    named.
    """
    argv = user.flags(
        out,
        "--learning_rate 1e25 --warmup_steps 0 --save_steps 1 --eval_files",
        user.held,
    )
    for kind, message in run_ranks(2, refused, argv):
        assert kind == "RunError"
        assert "after step 1" in message
        assert "none was written" in message
    assert not complete_checkpoints(out / "checkpoints"), (
        "MoRA matrices with NaN are not saved"
    )
    good = tmp_path / "good"
    run(1, user.flags(good, "--save_steps 2 --max_steps 4"))
    more = ["--learning_rate", "1e25", "--save_steps", 2, "--max_steps", 8]
    argv = user.flags(
        good, *more, "--resume_from_checkpoint", good / "checkpoints/step-000002"
    )
    kind, message = run_alone(refused, argv)
    assert kind == "RunError"
    assert "step 4" in message
    assert str(good / "checkpoints/step-000002") in message
    assert all(
        verify_manifest(folder) == []
        for folder in complete_checkpoints(good / "checkpoints")
    )


def test_a_model_with_an_infinite_weight(user, model_folder, out):
    shutil.copytree(user.model, model_folder)
    tensors = load_file(model_folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, model_folder / "model.safetensors", {"format": "pt"})
    argv = user.flags(out, "--model_name_or_path", model_folder)
    cases = [argv, [*argv, "--no_eval_on_start", "--overwrite_output_dir"]]
    (kind, message), (later, at_step) = run_alone(refused_each, cases)
    assert kind == later == "RunError"
    assert "before any training" in message
    assert "at step 1" in at_step
    assert "none was written" in at_step


# -- the real launcher -----------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(
    "more, code, words",
    [
        ("--target_modules q_prj", 2, "--target_modules 'q_prj'"),
        ("--learning_rate 1e25", 1, "Newest checkpoint: none was written"),
    ],
)
def test_the_launcher_says_it_once(user, tmp_path, out, more, code, words):
    done = launch(2, user.flags("out", more), tmp_path, timeout_s=180)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.count(words) == 1
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert out.exists() == (code == 1)
