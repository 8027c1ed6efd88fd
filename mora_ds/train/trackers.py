"""Where a run's curves go besides metrics.jsonl: TensorBoard, and Weights & Biases.

Both get the same curves under the same names. One that fails is reported once and left
out, and the run goes on. Rank 0 alone uses this module. TensorBoard reads
OUTPUT_DIR/tensorboard.

Weights & Biases is set by its environment variables, such as WANDB_PROJECT, WANDB_NAME
and WANDB_MODE; a resumed run goes on in the same run there where WANDB_RUN_ID names it.
That run takes no points of steps up to the last one that it has: of what was pending
there, metrics.jsonl has the only record. OUTPUT_DIR/wandb has its files.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from torch.utils.tensorboard import SummaryWriter

from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject
from mora_ds.train.beside import training_goes_on

Numbers: TypeAlias = Mapping[str, float]
"""Curve -> its value at a step."""

TENSORBOARD = "tensorboard"
WANDB = "wandb"
"""The tracker, its package, the extra that has the package, and the folder of its
files."""


def check_installed(names: Sequence[str]) -> None:
    """Raise `UserError` that names the extra of Weights & Biases where it is
    missing."""
    if WANDB in names and importlib.util.find_spec(WANDB) is None:
        raise UserError(
            f"--report_to {WANDB} needs the package {WANDB}: pip install 'mora_ds[{WANDB}]'"
        )


class Tracker:
    """TensorBoard or Weights & Biases, until a call of it fails."""

    def __init__(
        self,
        name: str,
        folder: Path,
        config: JsonObject,
        first_step: int,
        failures: list[str],
    ) -> None:
        """`folder`: of the run. `config`: its settings, as Weights & Biases shows them.
        `first_step`: TensorBoard drops the points from this step on, which come again.
        `failures`: gets a line where the tracker fails."""
        self.name = name
        self._failures = failures
        self._works = False
        with training_goes_on(f"--report_to {name} at the start", failures):
            if name == WANDB:
                self._log, self._close = _start_wandb(folder, config)
            else:
                self._log, self._close = _start_tensorboard(folder, first_step)
            self._works = True

    def log(self, numbers: Numbers, step: int) -> None:
        if self._works:
            self._works = False
            with training_goes_on(
                f"--report_to {self.name} at step {step}", self._failures
            ):
                self._log(numbers, step)
                self._works = True

    def close(self) -> None:
        if self._works:
            with training_goes_on(
                f"--report_to {self.name} at the end", self._failures
            ):
                self._close()


_Client = tuple[Callable[[Numbers, int], None], Callable[[], None]]
"""(function that logs the curves of a step, function that ends the tracker)"""


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
