"""What fails beside training: the run goes on to its end and its last checkpoint, and says so by an exit code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.errors import FailedBeside, RunError
from mora_ds.common.files import read_json
from mora_ds.config.arguments import parse
from mora_ds.remora.merge import ReMoRA
from mora_ds.train import pretrain as program
from mora_ds.train import trackers
from mora_ds.train.evaluator import Evaluator
from mora_ds.train.loader import NotFinite
from mora_ds.train.metrics import MetricsLog
from mora_ds.train.tasks import TaskSuite
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, losses, run
from tests.helpers.resume import assert_same_run

FLAGS = ("--max_steps", 4, "--eval_steps", 1, "--save_steps", 2, "--report_to", "none")


def failing(argv: list[str], owner: str, method: str, error: Exception, calls: tuple[int, ...]) -> tuple[str, str]:
    """(kind of error, its message) of a run in which these calls of a method, counted from 0, fail on every rank."""
    target = {"evaluator": Evaluator, "tasks": TaskSuite, "program": program}[owner]
    real = getattr(target, method)
    call_numbers: list[int] = []

    def call(*arguments: Any, **options: Any) -> Any:
        call_numbers.append(len(call_numbers))
        if call_numbers[-1] in calls:
            raise error
        return real(*arguments, **options)

    with mock.patch.object(target, method, call):
        try:
            program.pretrain(parse(argv))
        except (FailedBeside, RunError, RuntimeError) as raised:
            return type(raised).__name__, str(raised)
    return "", ""


def last_state(out: Path) -> TrainerState:
    return TrainerState.read(out / "checkpoints" / "step-000004")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("calls", [(2,), (1, 3), (4,)], ids=["before a save", "twice", "at the end"])
def test_a_failed_evaluation_does_not_end_the_run(
    user: Playground, tmp_path: Path, out: Path, ranks: int, calls: tuple[int, ...]
) -> None:
    whole = tmp_path / "whole"
    run(ranks, user.flags(whole, *FLAGS))
    error = RuntimeError("no evaluation today")
    told = run_ranks(ranks, failing, user.flags(out, *FLAGS), "evaluator", "evaluate", error, calls)
    for kind, message in told:
        assert kind == "FailedBeside"
        assert "step-000004 is its end" in message
        assert [f"after step {call}: RuntimeError: no evaluation today" in message for call in calls]
    assert losses(out).equal(losses(whole)), "training is what it would have been"
    assert last_state(out).finished
    assert (out / "summary.json").is_file()
    assert not last_state(out).evaluation_pending


def test_before_the_first_step_a_failed_evaluation_ends_the_run(user: Playground, tmp_path: Path) -> None:
    error = RuntimeError("no evaluation today")
    ((kind, message),) = run_ranks(1, failing, user.flags(tmp_path, *FLAGS), "evaluator", "evaluate", error, (0,))
    assert (kind, message) == ("RuntimeError", "no evaluation today")


def test_a_model_that_is_not_finite_still_ends_the_run(user: Playground, tmp_path: Path) -> None:
    """The checkpoint of its step holds that model: the one before is named, which --save_total_limit has left."""
    error = NotFinite("the loss is nan")
    argv = user.flags(tmp_path, *FLAGS, "--save_total_limit", 1, "--resume_from_checkpoint", "auto")
    for call in (4, 0):  # at the end, and in a resumed run, which evaluates first
        ((kind, message),) = run_ranks(1, failing, argv, "evaluator", "evaluate", error, (call,))
        assert kind == "RunError"
        assert "the loss is nan" in message
        assert re.search(r"step-000004 holds this model\. Last good checkpoint: \S*step-000002\. ", message)


def test_a_failed_upload_is_told_after_the_end(user: Playground, tmp_path: Path) -> None:
    argv = user.flags(tmp_path, "--max_steps", 2, "--push_to_hub", "me/adapter", "--report_to", "none")
    error = OSError("the network is gone")
    with mock.patch.object(program, "check_repository"):
        ((kind, message),) = run_ranks(1, failing, argv, "program", "push_adapter", error, (0,))
    assert kind == "FailedBeside"
    assert "--push_to_hub me/adapter: the network is gone" in message
    assert read_json(tmp_path / "summary.json")["steps"] == 2


def ended_within(argv: list[str], owner: str, method: str, call: int) -> None:
    """A run that ends in the `call`-th call of a method, counted from 0, without another word. For `run_ranks`."""
    target = {"evaluator": Evaluator, "remora": ReMoRA, "log": MetricsLog}[owner]
    real = getattr(target, method)
    steps_made: list[int] = []

    def end(*arguments: Any, **options: Any) -> Any:
        steps_made.append(len(steps_made))
        result = real(*arguments, **options) if owner == "log" else None
        if steps_made[-1] == call:
            raise KeyboardInterrupt
        return result if owner == "log" else real(*arguments, **options)

    with mock.patch.object(target, method, end), pytest.raises(KeyboardInterrupt):
        program.pretrain(parse(argv))


@pytest.mark.parametrize(
    "owner, method, call, step",
    [
        ("evaluator", "evaluate", 1, 4),
        ("log", "evaluation", 1, 4),
        ("remora", "merge", 0, 4),
        ("remora", "_start_cycle", 0, 4),
        ("evaluator", "evaluate", 2, 6),
        ("log", "evaluation", 2, 6),
    ],
    ids=["evaluation", "after an evaluation", "merge", "half a merge", "last evaluation", "after the last evaluation"],
)
def test_a_checkpoint_that_is_due_is_there_before_what_may_fail(
    user: Playground, tmp_path: Path, out: Path, owner: str, method: str, call: int, step: int
) -> None:
    """And the run that resumes there does what was pending, once."""
    whole = tmp_path / "whole"
    flags = ("--save_steps", 4, "--eval_steps", 4, "--merge_every", 4, "--restart_warmup_steps", 1)
    run(1, user.flags(whole, *flags))
    run_ranks(1, ended_within, user.flags(out, *flags), owner, method, call)
    assert TrainerState.read(out / "checkpoints" / "latest").step == step
    run(1, user.flags(out, *flags, "--resume_from_checkpoint", "auto"))
    assert_same_run(out, whole)


class Broken:
    """A service whose every call fails."""

    run_id = "id"

    def __init__(self, *arguments: Any) -> None:
        return None

    def log(self, *arguments: Any) -> None:
        raise OSError("the service is gone")

    summary = close = log


def tracked(argv: list[str]) -> tuple[str, str]:
    """For `run_ranks`."""
    with mock.patch.dict(trackers._CLIENTS, {"wandb": Broken}), mock.patch.object(program, "check_installed"):
        try:
            program.pretrain(parse(argv))
        except FailedBeside as raised:
            return type(raised).__name__, str(raised)
    return "", ""


def test_a_failed_tracker_is_told_on_every_rank(user: Playground, tmp_path: Path) -> None:
    argv = user.flags(tmp_path, "--max_steps", 2, "--report_to", "wandb")
    for kind, message in run_ranks(2, tracked, argv):
        assert kind == "FailedBeside"
        assert "--report_to wandb" in message
