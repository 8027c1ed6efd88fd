"""Where a run's curves go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

All get the same curves under the same names. TensorBoard's files are the run's own, and a full disk ends the run as it
does elsewhere. The others are services: one that cannot be reached, or fails later, is reported once and left out, and
the run goes on. Rank 0 alone uses this module.

    OUTPUT_DIR/tensorboard/             TensorBoard
    OUTPUT_DIR/trackers/runs.json       the services' names of this run, so that a resumed run continues its curves
    OUTPUT_DIR/trackers/                files of services that keep some on disk

Project, tags and server of a service are set by its environment variables, such as WANDB_PROJECT.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch.utils.tensorboard import SummaryWriter

from mora_ds.common.errors import BESIDE, UserError, reason
from mora_ds.common.files import JsonObject, disk_errors, read_json, write_json_atomic
from mora_ds.common.nested import flattened
from mora_ds.common.untrusted import typed
from mora_ds.config.tracking import EXTRAS, NONE
from mora_ds.train.run_file import Facts, without_secrets

logger = logging.getLogger(__name__)

Numbers: TypeAlias = Mapping[str, float]
"""Curve -> its value at a step."""

TRACKERS = "trackers"
"""Name of the folder in OUTPUT_DIR."""
_RUNS = "runs.json"
_PROJECT = "mora_ds"
"""W&B's project, MLflow's experiment, where its environment variable names none."""
_MOST_CHARACTERS = 500
"""Length of a parameter's value that MLflow takes from every kind of store."""


def check_installed(names: Sequence[str]) -> None:
    """Raise `UserError` that names the extra of a tracker whose package is missing."""
    for name in names:
        if name in EXTRAS and importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs the package {name}: pip install 'mora_ds[{name}]'")


def start_trackers(names: Sequence[str], run_name: str, config: Facts, folder: Path, first_step: int) -> list[Tracker]:
    """Those of --report_to for a run in `folder` that goes on with the numbers of `first_step`; 0: one that begins.

    `run_name`, `config`: how services show the run; the config without secrets (`shown_config`).
    """
    trackers: list[Tracker] = []
    known_runs = _known_runs(folder) if first_step else {}
    for name in names:
        if name == "tensorboard":
            trackers.append(TensorBoard(folder, first_step))
        elif name != NONE:
            service = Service(name, run_name, config, folder / TRACKERS, known_runs.get(name))
            trackers.append(service)
            if service.run_id is not None:
                known_runs[name] = service.run_id
    if known_runs:
        (folder / TRACKERS).mkdir(exist_ok=True)
        write_json_atomic(folder / TRACKERS / _RUNS, known_runs)
    return trackers


def _known_runs(folder: Path) -> dict[str, str]:
    """{tracker: its name of the run in `folder`}; nothing, and a warning, where the file that says so is damaged."""
    path = folder / TRACKERS / _RUNS
    try:
        runs: dict[str, str] = typed(dict[str, str], read_json(path), str(path)) if path.exists() else {}
    except UserError as error:
        logger.warning("%s. The curves go on in new runs of the services", error)
        return {}
    return runs


def shown_config(settings: Facts, resolved: Facts) -> JsonObject:
    """The settings and facts of run.yaml as services get them: without secrets, in plain types."""
    content = {**settings, "resolved": without_secrets(resolved)}
    return dict(json.loads(json.dumps(content, default=str)))


class TensorBoard:
    """Curves in OUTPUT_DIR/tensorboard. Raises `RunError` on a full disk.

    TensorBoard writes in a thread, whose error comes with a later call.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Drop the points of an earlier run from `first_step` on."""
        self._folder = folder
        with disk_errors(folder):
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, numbers: Numbers, step: int) -> None:
        with disk_errors(self._folder):
            for tag, value in numbers.items():
                self._board.add_scalar(tag, value, step)

    def summary(self, facts: Facts) -> None:
        """Nothing: summary.json lies next to the curves."""

    def close(self) -> None:
        with disk_errors(self._folder):
            self._board.close()


class Service:
    """A service behind a guard: its first error is reported, and it is not used again."""

    def __init__(self, name: str, run_name: str, config: Facts, folder: Path, run_id: str | None) -> None:
        self.name = name
        self.run_id = run_id
        self.has_failed = False
        self._client: Any = None
        try:
            self._client = _CLIENTS[name](run_name, config, folder, run_id)
            self.run_id = self._client.run_id
        except BESIDE as error:
            self._give_up("cannot be started", error)

    def log(self, numbers: Numbers, step: int) -> None:
        self._guarded(f"failed at step {step}", lambda client: client.log(numbers, step))

    def summary(self, facts: Facts) -> None:
        self._guarded("failed at the end of the run", lambda client: client.summary(facts))

    def close(self) -> None:
        self._guarded("failed at the end of the run", lambda client: client.close())

    def _guarded(self, failure: str, call: Callable[[Any], None]) -> None:
        if self._client is None:
            return
        try:
            call(self._client)
        except BESIDE as error:  # the services' own packages raise what they like
            self._give_up(failure, error)

    def _give_up(self, failure: str, error: BaseException) -> None:
        self._client = None
        self.has_failed = True
        logger.warning(
            f"--report_to {self.name} {failure}: {reason(error)}. The run goes on without it; metrics.jsonl has the "
            "curves"
        )


Tracker = TensorBoard | Service
"""What receives the curves of a run, its results, and word of its end."""


class _Wandb:
    """Weights & Biases; `WANDB_MODE=offline` writes to OUTPUT_DIR/trackers/wandb."""

    def __init__(self, run_name: str, config: Facts, folder: Path, run_id: str | None) -> None:
        import wandb

        folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", run_name),
            config=dict(config),
            dir=str(folder),
            id=run_id,
            resume="allow",
        )
        self.run_id = self._run.id

    def log(self, numbers: Numbers, step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def summary(self, facts: Facts) -> None:
        self._run.summary.update(dict(facts))

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """MLflow, at its usual place (MLFLOW_TRACKING_URI)."""

    def __init__(self, run_name: str, config: Facts, folder: Path, run_id: str | None) -> None:
        import mlflow

        del folder
        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        self.run_id = mlflow.start_run(run_id=run_id, run_name=run_name).info.run_id
        if run_id is None:  # a parameter keeps its first value
            parameters = {_plain(key): str(value)[:_MOST_CHARACTERS] for key, value in flattened(config).items()}
            mlflow.log_params(parameters)

    def log(self, numbers: Numbers, step: int) -> None:
        self._mlflow.log_metrics({_plain(name): value for name, value in numbers.items()}, step=step)

    def summary(self, facts: Facts) -> None:
        self._mlflow.log_dict(dict(facts), "summary.json")

    def close(self) -> None:
        self._mlflow.end_run()


_CLIENTS: dict[str, Any] = {"wandb": _Wandb, "mlflow": _Mlflow}


def _plain(name: str) -> str:
    """`name` in the characters that MLflow takes."""
    return re.sub(r"[^\w\-./ ]", "_", name)
