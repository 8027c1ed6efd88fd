"""The base's files are mapped: a run whose base changes under it ends, and names the
checkpoint to go on from.
"""

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mora_ds.checkpoint.manager import complete_checkpoints
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import losses, refused, run
from tests.helpers.resume import disturb


def disturbed_job(argv, model, change):
    """A run whose base, the folder `model`, gets a `change` of its weights after step 3.
    For `run_ranks`.
    """
    disturb(
        3,
        lambda trainer: trainer.ranks.is_rank0 and change(model / "model.safetensors"),
    )
    return refused(argv)


def overwrite(weights, word):
    """The last 4,096 numbers become `word`."""
    with weights.open("r+b") as file:
        file.seek(-4096 * 4, 2)
        file.write(np.full(4096, word, np.uint32).tobytes())


def messages_of(user, argv, change):
    """The messages of two ranks; each names the changed file."""
    messages = []
    changed = "model.safetensors was changed or replaced during the run"
    for kind, message in run_ranks(2, disturbed_job, argv, user.model, change):
        assert (kind, changed in message) == ("RunError", True), message
        messages.append(message)
    return messages


@pytest.fixture
def copied_user(user, model_folder):
    """A user with a model folder of its own, to change."""
    return replace(user, model=Path(shutil.copytree(user.model, model_folder)))


@pytest.mark.parametrize("word", [0x3C000000, 0x7FC00000], ids=["small numbers", "NaN"])
def test_a_base_that_is_overwritten_ends_the_run_and_the_original_continues_it(
    user, copied_user, out, word
):
    more = "--save_steps 2 --eval_steps 0 --merge_every 5 --restart_warmup_steps 1"
    argv = copied_user.flags(out, more)
    newest = out / "checkpoints/step-000002"
    for message in messages_of(copied_user, argv, partial(overwrite, word=word)):
        assert f"Newest checkpoint: {newest}" in message
    assert complete_checkpoints(out / "checkpoints") == [newest]
    assert len(losses(out)) == 3, "found in the next step, not at a save"
    if word != 0x7FC00000:
        shutil.copy(user.model / "model.safetensors", copied_user.model)
        assert run(2, [*argv, "--resume_from_checkpoint", "auto"])["steps"] == 6


def test_a_base_that_is_cut_off_is_found_before_it_is_read(copied_user, out):
    """When a checkpoint is due: to go on would be a bus error."""
    argv = copied_user.flags(out, "--save_steps 3 --eval_steps 0")
    assert len(messages_of(copied_user, argv, partial(os.truncate, length=1000))) == 2
