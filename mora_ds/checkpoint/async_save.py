"""The thread behind --async_save: one task at a time during training, and how long training waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.common.errors import RunError

logger = logging.getLogger(__name__)


@dataclass
class Background:
    """A thread for one task at a time, and its outcome."""

    limit_s: float
    """Seconds that `wait` waits for a task at most: on a disk that hangs, a write never returns."""
    thread: threading.Thread | None = None
    error: BaseException | None = None

    def start(self, work: Callable[[], None], name: str) -> None:
        """Starts `work`; the task before must have been waited for. `name` is used in warnings."""
        assert self.thread is None, "one at a time"

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.error = error  # raised by the next `wait`
                if dist.get_rank() == 0:
                    logger.warning("warning: %s: %s; the next save will stop the run", name, error)

        self.thread = threading.Thread(target=run, name=name, daemon=True)
        self.thread.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for the task, if there is one, and raises what it raised.

        Returns after `timeout_s`; without it, gives the task up and raises `RunError` after `limit_s`.
        """
        if (thread := self.thread) is None:
            return
        thread.join(self.limit_s if timeout_s is None else timeout_s)
        if thread.is_alive() and timeout_s is not None:
            return
        self.thread = None
        error = self.error
        self.error = None
        if thread.is_alive():
            raise RunError(
                f"{thread.name}: not written after {self.limit_s:.0f} s in which training waited for it "
                "(--collective_timeout_s): the disk does not answer, or needs more time"
            )
        if error is not None:
            raise error


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, which do not change when training continues."""
    copies = {name: _copy(tensor) for name, tensor in tensors.items()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return target.copy_(tensor, non_blocking=True)
