"""--compute auto in whole runs: nothing that is measured decides numbers, and a resume with other sizes says so."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mora_ds.checkpoint.state import TrainerState
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, playground, printed, run
from tests.helpers.resume import assert_same_result, assert_same_tensors, merged

REMORA = ("--save_steps", 3, "--merge_every", 2, "--restart_warmup_steps", 1)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Playground:
    return playground(tmp_path_factory.mktemp("user"))


def count_for_ever() -> None:
    while True:
        pass


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [multiprocessing.get_context("spawn").Process(target=count_for_ever) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_the_same_command_gives_the_same_bits_whatever_else_the_machine_does(user: Playground, tmp_path: Path) -> None:
    run(2, user.flags(tmp_path / "idle", *REMORA))
    with busy_processes(4):
        run(2, user.flags(tmp_path / "busy", *REMORA))
    assert_same_result(tmp_path / "busy", tmp_path / "idle")
    assert_same_tensors(*(merged(tmp_path / name, tmp_path / f"{name}-merged") for name in ("busy", "idle")))


def test_a_resume_with_micro_batches_of_another_size_says_that_paths_change(user: Playground, tmp_path: Path) -> None:
    """Two rows of 8 tokens take the weight where one takes the activations."""
    short = ("--seq_len", 8, "--max_steps", 2, "--save_steps", 1)
    (told,) = run_ranks(1, printed, user.flags(tmp_path, *short, "--log_level", "debug"))
    assert "computed over (--compute): weight for 14 layers, with 16 tokens in a micro-batch" in told
    assert TrainerState.read(tmp_path / "checkpoints" / "latest").micro_batch_tokens == 16
    again = (*short, "--max_steps", 3, "--resume_from_checkpoint", "auto", "--per_device_train_batch_size", 1)
    (told,) = run_ranks(1, printed, user.flags(tmp_path, *again, "--gradient_accumulation_steps", 2))
    assert "--compute: up to the checkpoint it was weight for 14 layers, with 16 tokens in a micro-batch" in told
