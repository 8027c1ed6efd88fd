"""The base's files are mapped: a run whose base changes under it ends, and names the checkpoint to go on from."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mora_ds.checkpoint.layout import complete_checkpoints
from mora_ds.train.trainer import Trainer
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, refused, rows, run


def overwritten_job(argv: list[str], word: int) -> tuple[str, str]:
    """A run in whose base the last 4,096 numbers become `word` after step 3. For `run_ranks`."""
    after_step = Trainer._after_step

    def patched(trainer: Trainer) -> None:
        if trainer.state.step == 3 and trainer.ranks.is_first:
            path = Path(argv[argv.index("--model_name_or_path") + 1]) / "model.safetensors"
            with path.open("r+b") as file:
                file.seek(-4096 * 4, 2)
                file.write(np.full(4096, word, np.uint32).tobytes())
        after_step(trainer)

    Trainer._after_step = patched  # type: ignore[method-assign]  # in this forked rank alone
    return refused(argv)


@pytest.mark.parametrize("word", [0x3C000000, 0x7FC00000], ids=["small numbers", "NaN"])
def test_a_base_that_is_overwritten_ends_the_run_and_the_original_continues_it(
    user: Playground, tmp_path: Path, out: Path, word: int
) -> None:
    copied_user = replace(user, model=Path(shutil.copytree(user.model, tmp_path / "model")))
    argv = copied_user.flags(out, "--save_steps", 2, "--eval_steps", 0, "--merge_every", 5, "--restart_warmup_steps", 1)
    for kind, message in run_ranks(2, overwritten_job, argv, word):
        assert kind == "RunError", message
        assert "model.safetensors was changed or replaced during the run" in message, message
        assert f"Last good checkpoint: {out / 'checkpoints' / 'step-000002'}" in message
    assert [folder.name for folder in complete_checkpoints(out / "checkpoints")] == ["step-000002"]
    assert [row["step"] for row in rows(out) if "loss" in row] == [1, 2, 3], "found in the next step, not at a save"
    if word != 0x7FC00000:
        shutil.copy(user.model / "model.safetensors", copied_user.model)
        assert run(2, [*argv, "--resume_from_checkpoint", "auto"])["steps"] == 6


def shortened_job(argv: list[str]) -> tuple[str, str]:
    """A run whose base is cut off after step 3, when a checkpoint is due: to go on would be a bus error."""
    after_step = Trainer._after_step

    def patched(trainer: Trainer) -> None:
        if trainer.state.step == 3 and trainer.ranks.is_first:
            os.truncate(Path(argv[argv.index("--model_name_or_path") + 1]) / "model.safetensors", 1000)
        after_step(trainer)

    Trainer._after_step = patched  # type: ignore[method-assign]  # in this forked rank alone
    return refused(argv)


def test_a_base_that_is_cut_off_is_found_before_it_is_read(user: Playground, tmp_path: Path, out: Path) -> None:
    copied_user = replace(user, model=Path(shutil.copytree(user.model, tmp_path / "model")))
    for kind, message in run_ranks(2, shortened_job, copied_user.flags(out, "--save_steps", 3, "--eval_steps", 0)):
        assert kind == "RunError", message
        assert "model.safetensors was changed or replaced during the run" in message, message
