"""One piece of work at a time beside training, on every rank: all have done it, or all know who has not.

The ranks talk over a gloo group that nothing else uses, so that their messages never meet training's.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.errors import RunError


class Exchange:
    """A gloo group of all ranks and what they tell each other. Made by all ranks together."""

    def __init__(self) -> None:
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def agree(self, error: BaseException | None) -> None:
        """Every rank calls it with what went wrong there. Raises it there and a `RunError` elsewhere, if anything."""
        told: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}", group=self.group)
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text is not None:
                raise RunError(f"rank {rank} could not write its part of the checkpoint: {text}")


@dataclass
class Background:
    """A thread for the work, and its outcome for whoever asks next."""

    thread: threading.Thread | None = None
    error: BaseException | None = None

    def start(self, work: Callable[[], None], what: str) -> None:
        """Begins `work`; the one before must have been waited for."""
        assert self.thread is None, "one at a time"

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.error = error  # raised by the next `wait`
                if dist.get_rank() == 0:
                    print(f"warning: {what}: {error}; the next save will stop the run", file=sys.stderr, flush=True)

        self.thread = threading.Thread(target=run, name=what, daemon=True)
        self.thread.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the work is done, if there is any. Raises what it raised."""
        if self.thread is None:
            return
        self.thread.join(timeout_s)
        if self.thread.is_alive():
            return
        self.thread, error, self.error = None, self.error, None
        if error is not None:
            raise error


def on_host(value: Any) -> Any:
    """A copy in host memory of all that DeepSpeed hands over: nothing in it changes when training goes on."""
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
