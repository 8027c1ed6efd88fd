"""Trackers besides metrics.jsonl: the same curves, and a run that does without one that
fails.
"""

import errno
import os
import sys
import time
from unittest import mock

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from mora_ds.train import trackers
from mora_ds.train.metrics import MetricsLog
from mora_ds.train.trackers import Tracker, check_installed
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import job, losses

CONFIG = {"seed": 1}


@pytest.fixture
def wandb(monkeypatch):
    """The package in its place, which notes how it is called."""
    package = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def logged(folder):
    """The failed calls of the tracker of a run that reports a merge and an
    evaluation."""
    failures = []
    tracker = Tracker("wandb", folder, CONFIG, 0, failures)
    log = MetricsLog(folder, 9, True, trackers=[tracker])
    log.record("merge", 1, {"cycle": 0, "loss_before": None})
    log.evaluation(1, {"old": 2.2})
    log.close()
    return failures


def test_weights_and_biases_is_called_as_it_wants(out, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "project")
    out.mkdir()
    assert logged(out) == []
    wandb.init.assert_called_once_with(
        project="project", name="out", config=CONFIG, dir=str(out), resume="allow"
    )
    run = wandb.init.return_value
    assert run.log.call_args_list == [
        mock.call({"4_merges/cycle": 0}, step=1),
        mock.call({"2_evaluation/perplexity/old": 2.2}, step=1),
    ]
    run.finish.assert_called_once_with()


@pytest.mark.parametrize("error", [ConnectionError, SystemExit])
@pytest.mark.parametrize(
    "failing", ["init", "init.return_value.log", "init.return_value.finish"]
)
def test_a_failing_tracker_is_reported_once(tmp_path, wandb, caplog, failing, error):
    wandb.configure_mock(**{f"{failing}.side_effect": error("no route to host")})
    (failure,) = logged(tmp_path)
    (record,) = caplog.records
    assert record.getMessage() == f"{failure}. Training goes on"
    assert failure.startswith("--report_to wandb ")
    assert "no route to host" in failure
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_interrupt_is_not_a_failing_tracker(tmp_path, wandb):
    tracker = Tracker("wandb", tmp_path, CONFIG, 0, [])
    wandb.init.return_value.log.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        tracker.log({"a": 1.0}, 1)


@pytest.mark.parametrize("reported", ["steps", "at the end"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_in_tensorboards_thread_does_not_end_the_run(
    tmp_path, monkeypatch, reported
):
    """The error comes with a later call. What the run itself writes on that disk fails in
    its own place.
    """
    failures = []
    tracker = Tracker("tensorboard", tmp_path, CONFIG, 0, failures)

    def write(self, *data):
        raise OSError(errno.ENOSPC, "No space left on device")

    for method in ("write", "flush"):
        monkeypatch.setattr(RecordWriter, method, write)
    for step in range(0 if reported == "at the end" else 100):
        tracker.log({"loss": 1.0}, step)
        time.sleep(0.01)
    tracker.close()
    assert len(failures) == 1


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    check_installed(["tensorboard", "none"])
    with user_error(r"pip install 'mora_ds\[wandb\]'"):
        check_installed(["wandb"])


def offline(argv):
    """A run with both trackers, offline, on this rank."""
    os.environ.update(WANDB_MODE="offline", WANDB_PROJECT="tests", WANDB_TAGS="tiny")
    job(argv)


@pytest.mark.heavy
def test_a_run_with_both_trackers_offline(user, out):
    """A service that takes no call would end the run with an exit code of its own."""
    more = "--report_to tensorboard wandb --merge_every 3 --restart_warmup_steps 1 --save_steps 4"
    run_alone(offline, user.flags(out, more))
    assert len(losses(out)) == 6
    assert (out / "tensorboard").is_dir()
    assert list((out / "wandb").rglob("*.wandb"))
