"""Experiment trackers in addition to metrics.jsonl: TensorBoard and Weights & Biases.

Both get the same curves under the same names. A tracker that fails is reported once and
disabled; the run continues. Only rank 0 uses this module. TensorBoard files are in
OUTPUT_DIR/tensorboard, those of Weights & Biases in OUTPUT_DIR/wandb.

Weights & Biases is configured by its environment variables, such as WANDB_PROJECT,
WANDB_NAME and WANDB_MODE. A resumed run continues the tracked run of WANDB_RUN_ID. That
one ignores points up to its last step, so points of repeated steps are only in
metrics.jsonl.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from torch.utils.tensorboard import SummaryWriter

from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject
from mora_ds.config.training import TrainingArguments
from mora_ds.deploy.hub import check_repository
from mora_ds.train.non_fatal import non_fatal

Numbers: TypeAlias = Mapping[str, float]
"""Curve -> its value at a step."""

TENSORBOARD = "tensorboard"
WANDB = "wandb"
"""Name of the tracker, of its package, of our extra for it, and of its folder."""


def check_installed(names: Sequence[str]) -> None:
    """Raise `UserError` that names the extra to install if Weights & Biases is
    missing."""
    if WANDB in names and importlib.util.find_spec(WANDB) is None:
        raise UserError(
            f"--report_to {WANDB} needs the package {WANDB}: pip install 'mora_ds[{WANDB}]'"
        )


def check_destinations(training: TrainingArguments) -> None:
    """Raise `UserError` for a tracker that is not installed, and for a repository that
    the Hub cannot have."""
    check_installed(training.report_to)
    if training.push_to_hub is not None:
        check_repository(training.push_to_hub)


class Tracker:
    """TensorBoard or Weights & Biases; disabled after the first failure."""

    def __init__(
        self,
        name: str,
        folder: Path,
        config: JsonObject,
        first_step: int,
        failures: list[str],
    ) -> None:
        """`folder`: the output folder. `config`: the run's settings, shown by Weights &
        Biases. `first_step`: TensorBoard drops older points from this step on, because
        they are logged again. `failures`: gets a line if the tracker fails."""
        self.name = name
        self._failures = failures
        self._works = False
        with non_fatal(f"--report_to {name} at the start", failures):
            if name == WANDB:
                self._log, self._close = _start_wandb(folder, config)
            else:
                self._log, self._close = _start_tensorboard(folder, first_step)
            self._works = True

    def log(self, numbers: Numbers, step: int) -> None:
        if self._works:
            self._works = False
            with non_fatal(f"--report_to {self.name} at step {step}", self._failures):
                self._log(numbers, step)
                self._works = True

    def close(self) -> None:
        if self._works:
            with non_fatal(f"--report_to {self.name} at the end", self._failures):
                self._close()


_Client = tuple[Callable[[Numbers, int], None], Callable[[], None]]
"""(function that logs the curves of a step, function that closes the tracker)"""


def _start_tensorboard(folder: Path, first_step: int) -> _Client:
    board = SummaryWriter(str(folder / TENSORBOARD), purge_step=first_step)

    def log(numbers: Numbers, step: int) -> None:
        for tag, value in numbers.items():
            board.add_scalar(tag, value, step)

    return log, board.close


def _start_wandb(folder: Path, config: JsonObject) -> _Client:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "mora_ds"),
        name=os.environ.get("WANDB_NAME", folder.resolve().name),
        config=config,
        dir=str(folder),
        resume="allow",
    )
    return lambda numbers, step: run.log(dict(numbers), step=step), run.finish
