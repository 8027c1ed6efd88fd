"""The thread behind --async_save: one task at a time during training, which succeeds or fails on all ranks alike.

The ranks agree over a gloo group that nothing else uses, so that their messages never mix with those of training.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.errors import RunError
from mora_ds.runtime.exchange import gather_to_all, new_group

logger = logging.getLogger(__name__)


class Exchange:
    """A gloo group over which all ranks report the outcome of a task. Create it on all ranks together."""

    def __init__(self) -> None:
        self.group: Any = new_group(timeout_s=24 * 3600.0)

    def agree(self, error: BaseException | None) -> None:
        """Collective, with the error of this rank or None. Raises that error, or a `RunError` for another rank's."""
        failed = torch.tensor(int(error is not None))
        dist.all_reduce(failed, group=self.group)
        if not failed:
            return
        texts = gather_to_all(None if error is None else f"{type(error).__name__}: {error}", self.group)
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise RunError(f"rank {rank} could not write its part of the checkpoint: {text}")


@dataclass
class Background:
    """A thread for one task at a time, and its outcome."""

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
        """Waits for the task, if there is one, and raises what it raised."""
        if self.thread is None:
            return
        self.thread.join(timeout_s)
        if self.thread.is_alive():
            return
        self.thread, error, self.error = None, self.error, None
        if error is not None:
            raise error


def on_host(value: Any) -> Any:
    """A deep copy in host memory, which does not change when training continues."""
    copied = _copied(value)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copied


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        source = value.detach()
        if not source.is_cuda:
            return source.to("cpu", copy=True, memory_format=torch.contiguous_format)
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        return target.copy_(source, non_blocking=True)
    if isinstance(value, dict):
        return type(value)((key, _copied(entry)) for key, entry in value.items())
    if type(value) in (list, tuple):
        return type(value)(_copied(entry) for entry in value)
    return copy.deepcopy(value)
