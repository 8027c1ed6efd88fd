"""This process among all processes of the run: its rank, and collective calls on small Python objects."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from mora_ds.errors import RunError, UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and number of processes; all methods are collective."""

    rank: int
    world: int
    local_rank: int
    group: Any
    """A gloo group of all ranks with a timeout of days: the others wait while one rank tokenises or downloads."""

    @classmethod
    def current(cls) -> Ranks:
        """Those of the running process group; `LOCAL_RANK` is set by deepspeed, torchrun and launch/slurm.sbatch."""
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_local_first(self) -> bool:
        """Whether it is the first rank of its node, which downloads, tokenises and writes for the others."""
        return self.local_rank == 0

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Calls `work` on rank 0 and returns its result, or raises its `UserError` or `RunError`, on every rank."""
        outcome: tuple[bool, Any] | None = None
        if self.is_first:
            try:
                outcome = (True, work())
            except (UserError, RunError) as error:
                outcome = (False, error)
        succeeded, value = self.broadcast(outcome)
        if not succeeded:
            raise value
        return value

    @property
    def width(self) -> int:
        """Number of work items that a call processes at a time, one on each rank."""
        return self.world

    def __call__(self, work: Callable[[int], Any], count: int) -> list[Any]:
        """[work(0), ..., work(count - 1)] on every rank, each computed by one of them: a `data.ParallelMap`."""
        mine = {number: work(number) for number in range(self.rank, count, self.world)}
        if self.world == 1:
            return list(mine.values())
        everyone: list[dict[int, Any]] = [{}] * self.world
        dist.all_gather_object(everyone, mine, group=self.group)
        return [everyone[number % self.world][number] for number in range(count)]

    def agree(self, work: Callable[[], Result]) -> Result:
        """Calls `work` on every rank; if one raises a `UserError` or `RunError`, all ranks raise it."""
        result: Result | None = None
        error: Exception | None = None
        try:
            result = work()
        except (UserError, RunError) as raised:
            error = raised
        errors: list[Exception | None] = [None] * self.world
        dist.all_gather_object(errors, error, group=self.group)
        for each in filter(None, errors):
            raise each
        return result  # type: ignore[return-value]
