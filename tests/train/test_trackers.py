"""Trackers besides TensorBoard: the same curves, resumed ones continued, and a run that does without a failing one."""

from __future__ import annotations

import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mora_ds.common.errors import UserError
from mora_ds.common.files import read_json
from mora_ds.train import trackers
from mora_ds.train.metrics import MetricsLog
from mora_ds.train.trackers import check_installed, shown_config, start_trackers
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, job

CONFIG = {"seed": 1, "resolved": {"deepspeed": {"bf16": True}}}


class StandIn:
    """A service that keeps what it is given, and fails from the `fails_at`-th call on."""

    made: list[StandIn]
    fails_at = 10**9
    error: type = ConnectionError

    def __init__(self, run_name: str, config: dict[str, Any], folder: Path, run_id: str | None):
        self.calls: list[Any] = []
        self.run_id = run_id or f"id-{len(self.made)}"
        self.made.append(self)
        self._note(("start", run_name, run_id))

    def _note(self, call: Any):
        if len(self.calls) >= self.fails_at:
            raise self.error("no route to host")
        self.calls.append(call)

    def log(self, numbers: dict[str, float], step: int):
        self._note((step, numbers))

    def summary(self, facts: dict[str, Any]):
        self._note(facts)

    def close(self):
        self._note("close")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    service = type("Fresh", (StandIn,), {"made": []})
    monkeypatch.setitem(trackers._CLIENTS, "wandb", service)
    return service


def logged(folder: Path, start_step: int = 0):
    """What a run reports after one step and a merge."""
    trackers = partial(start_trackers, ["wandb"], "run", CONFIG, folder)
    log = MetricsLog(folder, 9, True, start_step, trackers)
    log.record("merge", start_step + 1, {"cycle": 0, "loss_before": None})
    log.evaluation(start_step + 1, {"old": 2.2}, {"old": 2.0})
    log.summary({"steps": 1})
    log.close()


def test_a_resumed_run_continues_and_another_one_begins(tmp_path: Path, stand_in: type[StandIn]):
    logged(tmp_path)
    logged(tmp_path, start_step=1)
    logged(tmp_path)
    assert [service.calls[0][2] for service in stand_in.made] == [None, "id-0", None]
    assert read_json(tmp_path / "trackers" / "runs.json") == {"wandb": "id-2"}


@pytest.mark.parametrize("content", ['{"wandb": "id', "[]", '{"wandb": {"id": 1}}', "\xff", ""])
def test_damaged_names_of_runs_begin_new_ones(
    tmp_path: Path, stand_in: type[StandIn], caplog: pytest.LogCaptureFixture, content: str
):
    logged(tmp_path)
    path = tmp_path / "trackers" / "runs.json"
    path.write_text(content, encoding="latin-1")
    logged(tmp_path, start_step=1)
    assert [record.getMessage().startswith(str(path)) for record in caplog.records] == [True]
    assert stand_in.made[1].calls[0] == ("start", "run", None)
    assert read_json(path) == {"wandb": "id-1"}


@pytest.mark.parametrize("error", [ConnectionError, SystemExit])
@pytest.mark.parametrize("fails_at", range(5))
def test_a_failing_service_is_reported_once(
    tmp_path: Path, stand_in: type[StandIn], caplog: pytest.LogCaptureFixture, fails_at: int, error: type
):
    stand_in.fails_at = fails_at
    stand_in.error = error
    with caplog.at_level(logging.WARNING, "mora_ds"):
        logged(tmp_path)
    (record,) = caplog.records
    assert record.getMessage().startswith("--report_to wandb ")
    assert "no route to host" in record.getMessage()
    assert len(stand_in.made[0].calls) == fails_at
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "trackers" / "runs.json").exists() == (fails_at > 0), "a run that the service never began"


@pytest.mark.parametrize("start_step, names", [(0, {"mlflow": "id-0"}), (1, {"wandb": "id-0", "mlflow": "id-1"})])
def test_a_service_that_cannot_start_loses_no_name_of_a_run(
    tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch, start_step: int, names: dict[str, str]
):
    working = type("Other", (stand_in,), {"made": []})
    monkeypatch.setitem(trackers._CLIENTS, "mlflow", working)
    path = tmp_path / "trackers" / "runs.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"wandb": "id-0", "mlflow": "id-1"}))
    stand_in.fails_at = 0
    working.fails_at = 10**9
    started = start_trackers(["wandb", "mlflow"], "run", CONFIG, tmp_path, start_step)
    assert read_json(path) == names
    for tracker in started:
        tracker.log({"loss": 1.0}, start_step + 1)
    assert [service.calls for service in (*stand_in.made, *working.made)] == [
        [], [("start", "run", names["mlflow"] if start_step else None), (start_step + 1, {"loss": 1.0})]
    ]  # fmt: skip


def test_an_interrupt_is_not_a_failing_service(tmp_path: Path, stand_in: type[StandIn]):
    service = start_trackers(["wandb"], "run", CONFIG, tmp_path, 0)[0]
    stand_in.log = mock.Mock(side_effect=KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        service.log({"a": 1.0}, 1)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    check_installed(["tensorboard", "none"])
    with pytest.raises(UserError, match=r"pip install 'mora_ds\[mlflow\]'"):
        check_installed(["mlflow"])


def test_services_see_no_secrets():
    deepspeed = {"comet": {"api_key": "secret"}, "bf16": {"enabled": True}}
    shown = shown_config({"seed": 1, "path": Path("x")}, {"deepspeed": deepspeed})
    assert "secret" not in json.dumps(shown)
    assert shown["resolved"]["deepspeed"]["bf16"] == {"enabled": True}
    assert shown["path"] == "x"


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, mock.MagicMock]:
    """Packages of services in their places, which note how they are called."""
    stand_ins = {name: mock.MagicMock() for name in ("wandb", "mlflow")}
    stand_ins["wandb"].init.return_value = mock.MagicMock(id="w1", summary={})
    stand_ins["wandb"].init.side_effect = lambda **told: mock.DEFAULT if Path(told["dir"]).is_dir() else 1 / 0
    stand_ins["mlflow"].start_run.return_value.info.run_id = "m1"
    for name, package in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, package)
    return stand_ins


def test_services_are_called_as_their_packages_want_it(
    tmp_path: Path, packages: dict[str, mock.MagicMock], monkeypatch: pytest.MonkeyPatch
):
    """And again when the run goes on: by the names that the services gave it, without what can be said only once."""
    wandb, mlflow = packages.values()
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(variable, "project")
    config = {**CONFIG, "long": "x" * 600, "mixture": {"a+b": 0.5}}
    for start_step in (0, 2):
        for service in start_trackers(list(packages), "run", config, tmp_path, start_step):
            service.log({"8_sources/a+b/loss": 2.5}, start_step + 1)
            service.summary({"steps": 3, "name": "x", "perplexity": {"held": 2.0}})
            service.close()
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert (first["project"], first["name"], first["id"]) == ("project", "run", None)
    assert first["dir"] == str(tmp_path / "trackers")
    assert first["config"] == config
    assert (second["id"], second["resume"]) == ("w1", "allow")
    run = wandb.init.return_value
    assert [call.kwargs["step"] for call in run.log.call_args_list] == [1, 3]
    assert run.finish.call_count == 2
    assert run.summary["steps"] == 3

    mlflow.set_experiment.assert_called_with("project")
    first, second = (call.kwargs for call in mlflow.start_run.call_args_list)
    assert first == {"run_id": None, "run_name": "run"}
    assert second["run_id"] == "m1"
    (parameters,) = mlflow.log_params.call_args.args
    assert mlflow.log_params.call_count == 1, "a parameter keeps its first value"
    plain = {"seed": "1", "resolved.deepspeed.bf16": "True", "long": "x" * 500, "mixture.a_b": "0.5"}
    assert parameters == plain, "in the characters that MLflow takes"
    assert [call.kwargs["step"] for call in mlflow.log_metrics.call_args_list] == [1, 3]
    assert mlflow.log_metrics.call_args.args == ({"8_sources/a_b/loss": 2.5},)
    assert mlflow.log_dict.call_args.args[1] == "summary.json"
    assert mlflow.end_run.call_count == 2

    known = read_json(tmp_path / "trackers" / "runs.json")
    assert known == {"wandb": "w1", "mlflow": "m1"}


def offline(argv: list[str], root: str):
    """A run with every service, offline, on this rank."""
    os.environ.update(WANDB_MODE="offline", MLFLOW_TRACKING_URI=f"file:{root}/mlflow")
    os.environ.update(WANDB_PROJECT="tests", WANDB_TAGS="tiny", MLFLOW_EXPERIMENT_NAME="tests")
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    job(argv)


@pytest.mark.heavy
def test_a_run_with_every_service_offline(user: Playground, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    """A service that takes no call would end the run with an exit code of its own."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    flags = user.flags(
        out, "--report_to", "tensorboard", "wandb", "mlflow", "--merge_every", 3,
        "--restart_warmup_steps", 1, "--save_steps", 4,
    )  # fmt: skip
    run_ranks(1, offline, flags, str(tmp_path))
    losses = [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert len(losses) == 6
    assert (out / "tensorboard").is_dir()

    mlflow.set_tracking_uri(f"file:{tmp_path}/mlflow")
    (run,) = mlflow.search_runs(experiment_names=["tests"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "1_loss/training")
    assert [point.value for point in sorted(history, key=lambda point: point.step)] == pytest.approx(losses)
    assert run.data.params["mora_rank"] == "2"
    assert run.info.run_name == "out"

    assert list((out / "trackers").rglob("*.wandb"))
