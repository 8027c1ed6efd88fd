"""Failures outside of training: the run goes on to its end and its last checkpoint, and the
exit code says so.
"""

import builtins
import itertools
import os
import re
from contextlib import contextmanager
from unittest import mock

import pytest
from torch.profiler import profile

from mora_ds.checkpoint.layout import step_of
from mora_ds.checkpoint.manager import complete_checkpoints
from mora_ds.checkpoint.state import TrainerState
from mora_ds.commands.pretrain import train
from mora_ds.common.errors import NonFatalFailure, RunError
from mora_ds.common.files import read_json
from mora_ds.config.arguments import parse
from mora_ds.remora.merge import ReMoRA
from mora_ds.train import pretrain as program
from mora_ds.train import trackers
from mora_ds.train.evaluator import Evaluator
from mora_ds.train.metrics import MetricsLog
from mora_ds.train.replica import NotFinite
from mora_ds.train.tasks import TaskSuite
from mora_ds.train.trainer import Trainer
from tests.helpers.gloo import run_alone, run_ranks
from tests.helpers.jobs import finished_run, losses, rows, run
from tests.helpers.resume import assert_same_run, interrupted_job
from tests.helpers.tables import heavy
from tests.helpers.tables import rows as rows_of
from tests.helpers.tasks import task_files

FLAGS = "--max_steps 4 --eval_steps 1 --save_steps 2 --report_to none"
NO_EVALUATION = RuntimeError("no evaluation today")
TARGETS = {
    target.__name__: target for target in (Evaluator, MetricsLog, ReMoRA, Trainer)
}


@contextmanager
def failing_calls(target, method, error, calls):
    """These calls of a method, counted from 0, fail; those of the log when they have done
    their work.
    """
    real = getattr(target, method)
    call_numbers = itertools.count()

    def call(*arguments, **options):
        is_failing = next(call_numbers) in calls
        if is_failing and target is not MetricsLog:
            raise error
        result = real(*arguments, **options)
        if is_failing:
            raise error
        return result

    with mock.patch.object(target, method, call):
        yield


def failing(argv, target, method, error, calls):
    """(kind of error, its message) of a run in which these calls of a method fail on every
    rank.
    """
    with failing_calls(target, method, error, calls):
        return ended(argv)


def ended(argv):
    """(kind of error, its message) of a run, empty where it has none. For `run_ranks`."""
    try:
        train(parse(argv))
    except (NonFatalFailure, RunError, RuntimeError) as raised:
        return type(raised).__name__, str(raised)
    return "", ""


def last_state(out):
    return TrainerState.read(out / "checkpoints/step-000004")


@pytest.fixture(scope="module", params=[1, 2])
def ranks_and_reference(request, user, tmp_path_factory):
    """A number of ranks, and the output folder of their undisturbed run."""
    return request.param, finished_run(request.param, user, tmp_path_factory, FLAGS)


EVALUATIONS = """
# before a save, and at the end; twice in between
2 4
1 3
"""


@pytest.mark.parametrize("steps", [steps for (steps,) in rows_of(EVALUATIONS)])
def test_a_failed_evaluation_does_not_end_the_run(
    user, ranks_and_reference, out, steps
):
    calls = [int(step) for step in steps.split()]
    assert_goes_on(
        ranks_and_reference, out, user.flags(out, FLAGS), Evaluator, calls, steps
    )


@pytest.mark.heavy
def test_failed_tasks_do_not_end_the_run(user, tmp_path, ranks_and_reference, out):
    """Within the run and at its end."""
    tasks = task_files(tmp_path)["choices"]
    argv = user.flags(
        out, FLAGS, "--trust_remote_code --eval_tasks", tasks, "--eval_tasks_steps 2"
    )
    assert_goes_on(ranks_and_reference, out, argv, TaskSuite, [1, 2], "2 4")


def assert_goes_on(ranks_and_reference, out, argv, target, calls, steps):
    """These calls of `evaluate` fail, which are those after `steps`."""
    ranks, reference = ranks_and_reference
    for kind, message in run_ranks(
        ranks, failing, argv, target, "evaluate", NO_EVALUATION, calls
    ):
        assert kind == "NonFatalFailure"
        assert "step-000004 is its last checkpoint" in message
        failed = re.findall(
            r"after step (\d): RuntimeError: no evaluation today", message
        )
        assert failed == steps.split()
    assert losses(out).equal(losses(reference)), "training is what it would have been"
    assert last_state(out).finished
    assert (out / "summary.json").is_file()
    assert not last_state(out).evaluation_pending


def failing_log_of_rank_0(argv):
    """A run on whose first rank alone the log of the evaluation after step 2 fails, when
    all ranks have evaluated.
    """
    calls = (2,) if int(os.environ["RANK"]) == 0 else ()
    error = OSError(28, "No space left on device")
    return failing(argv, MetricsLog, "evaluation", error, calls)


def test_ranks_go_on_alike_after_a_failure_of_one(user, out):
    """The others have a best step then, for which they would save without it."""
    argv = user.flags(out, FLAGS, "--best_by held:1")
    for kind, message in run_ranks(2, failing_log_of_rank_0, argv):
        assert kind == "NonFatalFailure"
        assert re.findall(r"after step (\d): OSError", message) == ["2"]
    assert last_state(out).finished


def without_room_for_traces(argv):
    """A run on a disk that is full once a trace is written. For `run_ranks`."""
    full = OSError(28, "No space left on device")
    return failing(argv, profile, "export_chrome_trace", full, range(9))


def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    user, ranks_and_reference, out
):
    ranks, reference = ranks_and_reference
    argv = user.flags(out, FLAGS, "--profile 1")
    for kind, message in run_ranks(ranks, without_room_for_traces, argv):
        assert kind == "NonFatalFailure"
        assert f"--profile: {out / 'profile'} got no complete trace: " in message
        assert "No space left on device" in message
    assert losses(out).equal(losses(reference))
    assert last_state(out).finished


def interrupted(argv):
    """A run whose evaluations fail after the steps 1 and 2, and that ends dead after step
    3. For `run_ranks`.
    """
    with failing_calls(Evaluator, "evaluate", NO_EVALUATION, (1, 2, 3)):
        interrupted_job(argv, 3)


def test_a_failed_evaluation_is_reported_at_the_end_of_a_stopped_run(user, out):
    """The evaluation after step 1 is lost, because no checkpoint has its model; the
    resumed run repeats that after step 2."""
    argv = user.flags(out, FLAGS, "--resume_from_checkpoint auto")
    run_alone(interrupted, argv)
    kind, message = run_alone(ended, argv)
    assert kind == "NonFatalFailure"
    assert re.findall(r"after step (\d)", message) == ["1"]
    assert [row["step"] for row in rows(out) if "eval_perplexity" in row] == [
        0,
        2,
        3,
        4,
    ]


FAILURES = """
Evaluator evaluate | 0 | RuntimeError | RuntimeError | 0
Evaluator evaluate | 1 | SystemExit | NonFatalFailure | 6
MetricsLog evaluation | 6 | ValueError | NonFatalFailure | 6
MetricsLog step | 4 | RuntimeError | RuntimeError | 4
MetricsLog record | 3 | RuntimeError | RuntimeError | 2
ReMoRA _start_cycle | 0 | RuntimeError | RuntimeError | 2
Trainer _reference_loss | 0 | RuntimeError | RuntimeError | 0
Trainer _reference_loss | 3 | RuntimeError | RuntimeError | 2
Trainer _reference_loss | 5 | RuntimeError | RuntimeError | 6
"""
"""A method | which of its calls fails | with what | how a run of 6 steps ends, which saves
every 2 and merges after 3 | the step of its newest checkpoint."""


def ends_of_runs(failures):
    """The kind of error of several runs, one after the other, each with a failure. For
    `run_ranks`.
    """
    return [failing(*failure)[0] for failure in failures]


def test_at_every_moment_the_newest_checkpoint_is_as_new_as_saves_are(user, tmp_path):
    """A failed evaluation does not end the run. A failure that ends it comes at most
    --save_steps after a checkpoint."""
    more = "--save_steps 2 --eval_steps 1 --merge_every 3 --restart_warmup_steps 1 --report_to none"
    failures = []
    table = rows_of(FAILURES)
    for number, (method, call, error, *_) in enumerate(table):
        owner, name = method.split()
        argv = user.flags(tmp_path / str(number), more)
        raised = getattr(builtins, error)("injected")
        failures.append((argv, TARGETS[owner], name, raised, (int(call),)))
    kinds = run_alone(ends_of_runs, failures)
    for number, (*_, kind, step) in enumerate(table):
        folders = complete_checkpoints(tmp_path / str(number) / "checkpoints")
        newest = step_of(folders[-1]) if folders else 0
        assert (kinds[number], newest) == (kind, int(step)), table[number]


def test_a_model_that_is_not_finite_still_ends_the_run(user, tmp_path):
    """The checkpoint of its step holds that model: --save_total_limit has left the one
    before.
    """
    error = NotFinite("the loss is nan")
    argv = user.flags(
        tmp_path, FLAGS, "--save_total_limit 1 --resume_from_checkpoint auto"
    )
    for call in (4, 0):  # at the end, and in a resumed run, which evaluates first
        kind, message = run_alone(failing, argv, Evaluator, "evaluate", error, (call,))
        assert kind == "RunError"
        assert "the loss is nan" in message
        assert "Newest checkpoint: " in message
    folders = complete_checkpoints(tmp_path / "checkpoints")
    assert [step_of(folder) for folder in folders] == [2, 4]


def failing_upload(argv, error):
    """`ended` of a run whose upload fails. For `run_ranks`."""
    with mock.patch.object(program, "push_adapter", side_effect=error):
        return ended(argv)


@pytest.mark.parametrize(
    "error, ranks", [(OSError("no way out"), 1), (SystemExit("no way out"), 2)]
)
def test_a_failed_upload_is_reported_after_the_end(user, tmp_path, error, ranks):
    argv = user.flags(
        tmp_path, "--max_steps 2 --push_to_hub me/adapter --report_to none"
    )
    for kind, message in run_ranks(ranks, failing_upload, argv, error):
        assert kind == "NonFatalFailure"
        assert "the upload to the Hub: no way out" in message
    assert read_json(tmp_path / "summary.json")["steps"] == 2


def ended_within(argv, target, method, call):
    """A run that ends in the `call`-th call of a method, counted from 0, without another
    word. For `run_ranks`.
    """
    with (
        failing_calls(target, method, KeyboardInterrupt(), (call,)),
        pytest.raises(KeyboardInterrupt),
    ):
        train(parse(argv))


DUE = "--save_steps 4 --eval_steps 4 --merge_every 4 --restart_warmup_steps 1"


@pytest.fixture(scope="module")
def reference(user, tmp_path_factory):
    """A run in whose fourth step a checkpoint, an evaluation and a merge are due."""
    return finished_run(1, user, tmp_path_factory, DUE)


IN_A_CALL = """
MetricsLog evaluation | 1 | 4
# half a merge; the probe after one
ReMoRA _start_cycle | 0 | 4
Trainer _reference_loss | 2 | 4
Evaluator evaluate | 2 | 6
"""
ALSO_IN_A_CALL = """
Trainer _reference_loss | 1 | 4
Evaluator evaluate | 1 | 4
ReMoRA merge | 0 | 4
MetricsLog evaluation | 2 | 6
"""
"""A method | in which of its calls the run ends | the step of the newest checkpoint."""


@pytest.mark.parametrize(
    "method, call, step",
    [*rows_of(IN_A_CALL), *(heavy(*row) for row in rows_of(ALSO_IN_A_CALL))],
)
def test_a_checkpoint_that_is_due_is_there_before_what_may_fail(
    user, reference, out, method, call, step
):
    """And the run that resumes there does what was pending, once."""
    owner, name = method.split()
    run_alone(ended_within, user.flags(out, DUE), TARGETS[owner], name, int(call))
    assert TrainerState.read(out / "checkpoints/latest").step == int(step)
    run(1, user.flags(out, DUE, "--resume_from_checkpoint auto"))
    assert_same_run(out, reference)
    merged = TrainerState.read(out / "checkpoints/step-000004")
    assert not merged.merge_pending


def failing_tracker(argv):
    """`ended` of a run whose tracker fails. For `run_ranks`."""
    broken = mock.Mock(side_effect=OSError("the service is gone"))
    with (
        mock.patch.object(trackers, "_start_wandb", broken),
        mock.patch.object(program, "check_destinations"),
    ):
        return ended(argv)


def test_a_failed_tracker_is_reported_on_every_rank(user, tmp_path):
    argv = user.flags(tmp_path, "--max_steps 2 --report_to wandb")
    for kind, message in run_ranks(2, failing_tracker, argv):
        assert kind == "NonFatalFailure"
        assert "--report_to wandb" in message
