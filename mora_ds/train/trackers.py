"""Where a run's curves go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, trackio.

All get the same curves under the same names. TensorBoard's files are the run's own, and a full disk ends the run as it
does elsewhere. The others are services: one that cannot be reached, or fails later, is reported once and left out, and
the run goes on. Rank 0 alone uses this module.

    OUTPUT_DIR/tensorboard/             TensorBoard
    OUTPUT_DIR/trackers/runs.json       the services' names of this run, so that a resumed run continues its curves
    OUTPUT_DIR/trackers/                files of services that keep some on disk
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from mora_ds.common.errors import UserError, reason
from mora_ds.common.files import disk_errors, read_json, write_json_atomic
from mora_ds.common.untrusted import typed
from mora_ds.config.tracking import EXTRAS, NONE
from mora_ds.train.run_file import without_secrets

logger = logging.getLogger(__name__)

TRACKERS = "trackers"
"""Name of the folder in OUTPUT_DIR."""
_RUNS = "runs.json"
_MOST_CHARACTERS = 500
"""Length of a parameter's value that MLflow takes from every kind of store."""


class Tracker(Protocol):
    """What receives the curves of a run."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Add one point to each named curve."""

    def event(self, step: int, title: str, text: str) -> None:
        """Record something that happened after `step`, such as a merge."""

    def summary(self, facts: Mapping[str, Any]) -> None:
        """Record the results of a run that has ended."""

    def close(self) -> None:
        """Write what is left."""


@dataclass(frozen=True)
class Label:
    """How services show the run."""

    project: str
    """W&B's and trackio's project, MLflow's experiment."""
    name: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    """The resolved settings, without secrets."""


def check_installed(names: Sequence[str]) -> None:
    """Raise `UserError` that names the extra of a tracker whose package is missing."""
    for name in names:
        if name in EXTRAS and importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs the package {name}: pip install 'mora_ds[{name}]'")


def start_trackers(names: Sequence[str], label: Label, folder: Path, start_step: int) -> list[Tracker]:
    """Those of --report_to for a run in `folder` that goes on after `start_step`; 0: one that begins."""
    trackers: list[Tracker] = []
    known = _known_runs(folder) if start_step else {}
    for name in names:
        if name == "tensorboard":
            trackers.append(TensorBoard(folder, start_step))
        elif name != NONE:
            service = _Service(name, label, folder / TRACKERS, known.get(name))
            trackers.append(service)
            if service.run_id is not None:
                known[name] = service.run_id
    if known:
        (folder / TRACKERS).mkdir(exist_ok=True)
        write_json_atomic(folder / TRACKERS / _RUNS, known)
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


def shown_config(settings: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and facts of run.yaml as services get them: without secrets, in plain types."""
    content = {**settings, "resolved": without_secrets(resolved)}
    return dict(json.loads(json.dumps(content, default=str)))


class TensorBoard:
    """Curves in OUTPUT_DIR/tensorboard. Raises `RunError` on a full disk.

    TensorBoard writes in a thread, whose error comes with a later call.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder = folder
        with disk_errors(folder):
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else 0)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        with disk_errors(self._folder):
            for tag, value in numbers.items():
                self._board.add_scalar(tag, value, step)

    def event(self, step: int, title: str, text: str) -> None:
        with disk_errors(self._folder):
            self._board.add_text(title, text, step)

    def summary(self, facts: Mapping[str, Any]) -> None:
        """Nothing: summary.json lies next to the curves."""

    def close(self) -> None:
        with disk_errors(self._folder):
            self._board.close()


class _Service:
    """A service behind one guard: its first error is reported, and it is not used again."""

    def __init__(self, name: str, label: Label, folder: Path, run_id: str | None) -> None:
        self.name = name
        self.run_id = run_id
        self._service: Any = None
        with _Reported(self, "cannot be started"):
            self._service = _SERVICES[name](label, folder, run_id)
            self.run_id = self._service.run_id

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        if self._service is not None:
            with _Reported(self, f"failed at step {step}"):
                self._service.log(numbers, step)

    def event(self, step: int, title: str, text: str) -> None:
        if self._service is not None:
            with _Reported(self, f"failed at step {step}"):
                self._service.event(step, title, text)

    def summary(self, facts: Mapping[str, Any]) -> None:
        if self._service is not None:
            with _Reported(self, "failed at the end of the run"):
                self._service.summary(facts)

    def close(self) -> None:
        if self._service is not None:
            with _Reported(self, "failed at the end of the run"):
                self._service.close()

    def drop(self, what: str, error: Exception) -> None:
        """Report the error and use the service no more."""
        self._service = None
        logger.warning(
            f"--report_to {self.name} {what}: {reason(error)}. The run goes on without it; metrics.jsonl has the curves"
        )


class _Reported:
    """A context that hands an exception to `_Service.drop`. Interrupts pass."""

    def __init__(self, service: _Service, what: str) -> None:
        self._service, self._what = service, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self._service.drop(self._what, error)
        return True


class _Wandb:
    """Weights & Biases; `WANDB_MODE=offline` writes to OUTPUT_DIR/trackers/wandb."""

    def __init__(self, label: Label, folder: Path, run_id: str | None) -> None:
        import wandb

        folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=label.project, name=label.name, tags=label.tags, config=dict(label.config), dir=str(folder),
            id=run_id, resume="allow",
        )  # fmt: skip
        self.run_id = self._run.id

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def event(self, step: int, title: str, text: str) -> None:
        before = self._run.summary.get(title) or []  # of a resumed run, which may come to a step again
        self._run.summary[title] = list(dict.fromkeys([*before, f"step {step}: {text}"]))

    def summary(self, facts: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(facts))

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """MLflow, at its usual place (MLFLOW_TRACKING_URI)."""

    def __init__(self, label: Label, folder: Path, run_id: str | None) -> None:
        import mlflow

        del folder
        self._mlflow = mlflow
        mlflow.set_experiment(label.project)
        tags = {"tags": ", ".join(label.tags)} if label.tags else None
        self.run_id = mlflow.start_run(run_id=run_id, run_name=label.name, tags=tags).info.run_id
        if run_id is None:  # a parameter keeps its first value
            mlflow.log_params({_plain(key): str(value)[:_MOST_CHARACTERS] for key, value in _flat(label.config)})

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics({_plain(name): value for name, value in numbers.items()}, step=step)

    def event(self, step: int, title: str, text: str) -> None:
        self._mlflow.set_tag(_plain(f"{title}.{step:06d}"), text)

    def summary(self, facts: Mapping[str, Any]) -> None:
        self._mlflow.log_dict(dict(facts), "summary.json")

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    """trackio, in its folder of this machine (TRACKIO_DIR) or in a Space (TRACKIO_SPACE_ID). A run is known by name."""

    def __init__(self, label: Label, folder: Path, run_id: str | None) -> None:
        import trackio

        del folder
        self.run_id = run_id or label.name
        config = {**label.config, "tags": list(label.tags)}
        self._run = trackio.init(project=label.project, name=self.run_id, config=config, resume="allow")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def event(self, step: int, title: str, text: str) -> None:
        self._run.alert(title=title, text=f"step {step}: {text}")

    def summary(self, facts: Mapping[str, Any]) -> None:
        self._run.log({f"summary/{key}": value for key, value in _flat(facts) if isinstance(value, (int, float))})

    def close(self) -> None:
        self._run.finish()


_SERVICES: dict[str, Any] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("resolved.deepspeed.bf16.enabled", True), ..."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(name: str) -> str:
    """`name` in the characters that MLflow takes."""
    return re.sub(r"[^\w\-./ ]", "_", name)
