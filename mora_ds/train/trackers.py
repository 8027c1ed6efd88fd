"""Where a run's curves go besides metrics.jsonl: OUTPUT_DIR/tensorboard, and Weights & Biases.

Both get the same curves under the same names. One that fails is reported once and left out, and the run goes on. Rank 0
alone uses this module.

Weights & Biases is set by its environment variables, such as WANDB_PROJECT, WANDB_NAME and WANDB_MODE; a resumed run
goes on in the same run there where WANDB_RUN_ID names it. OUTPUT_DIR/wandb has its files.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from torch.utils.tensorboard import SummaryWriter

from mora_ds.common.errors import BESIDE, UserError, reason
from mora_ds.common.files import JsonObject

logger = logging.getLogger(__name__)

Numbers: TypeAlias = Mapping[str, float]
"""Curve -> its value at a step."""

WANDB = "wandb"
"""The tracker, its package, the extra that has the package, and the folder of its files."""


def check_installed(names: Sequence[str]) -> None:
    """Raise `UserError` that names the extra of Weights & Biases where its package is missing."""
    if WANDB in names and importlib.util.find_spec(WANDB) is None:
        raise UserError(f"--report_to {WANDB} needs the package {WANDB}: pip install 'mora_ds[{WANDB}]'")


class Tracker:
    """TensorBoard or Weights & Biases, behind a guard."""

    def __init__(self, name: str, folder: Path, config: JsonObject, steps_done: int) -> None:
        """`folder`: of the run. `config`: its settings, as Weights & Biases shows them. `steps_done`: 0 for a run that
        begins; TensorBoard drops the points after that step."""
        self.name = name
        self.has_failed = False
        with self._guard("cannot be started"):
            if name == WANDB:
                self._log, self._close = _start_wandb(folder, config)
            else:
                self._log, self._close = _start_tensorboard(folder, steps_done)

    def log(self, numbers: Numbers, step: int) -> None:
        if not self.has_failed:
            with self._guard(f"failed at step {step}"):
                self._log(numbers, step)

    def close(self) -> None:
        if not self.has_failed:
            with self._guard("failed at the end of the run"):
                self._close()

    @contextmanager
    def _guard(self, failure: str) -> Iterator[None]:
        try:
            yield
        except BESIDE as error:  # the packages raise what they like
            self.has_failed = True
            logger.warning(
                f"--report_to {self.name} {failure}: {reason(error)}. The run goes on without it; metrics.jsonl has "
                "the curves"
            )


_Client = tuple[Callable[[Numbers, int], None], Callable[[], None]]
"""What logs the curves of a step, and what ends the tracker."""


def _start_tensorboard(folder: Path, steps_done: int) -> _Client:
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1 if steps_done else 0)

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
