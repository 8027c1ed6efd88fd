"""The other ranks, as the rooms that must not import torch.distributed see them."""

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
    """This process among the others."""

    rank: int
    world: int
    local_rank: int
    group: Any
    """A gloo group of all ranks with a timeout of days: one rank may tokenise or download for hours meanwhile."""

    @classmethod
    def current(cls) -> Ranks:
        """Of the running process group; `LOCAL_RANK` as deepspeed, torchrun and our Slurm script set it. Collective."""
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_local_first(self) -> bool:
        """The first rank of its node: it downloads, tokenises and writes for the others."""
        return self.local_rank == 0

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def on_first(self, work: Callable[[], Result]) -> Result:
        """`work()` of rank 0, its result or its error on every rank."""
        outcome: tuple[bool, Any] | None = None
        if self.is_first:
            try:
                outcome = (True, work())
            except (UserError, RunError) as error:
                outcome = (False, error)
        done, value = self.broadcast(outcome)
        if not done:
            raise value
        return value

    @property
    def width(self) -> int:
        """How many pieces of work a call does at a time."""
        return self.world

    def __call__(self, work: Callable[[int], Any], count: int) -> list[Any]:
        """[work(0), ..., work(count - 1)] on every rank, each done by one of them. A `data.ParallelMap`."""
        mine = {number: work(number) for number in range(self.rank, count, self.world)}
        if self.world == 1:
            return [mine[number] for number in range(count)]
        everyone: list[dict[int, Any]] = [{}] * self.world
        dist.all_gather_object(everyone, mine, group=self.group)
        return [everyone[number % self.world][number] for number in range(count)]

    def agree(self, work: Callable[[], Result]) -> Result:
        """`work()` on every rank; when it is a `UserError` or `RunError` on one, it is raised on all."""
        mine: Result | None = None
        error: Exception | None = None
        try:
            mine = work()
        except (UserError, RunError) as raised:
            error = raised
        errors: list[Exception | None] = [None] * self.world
        dist.all_gather_object(errors, error, group=self.group)
        for found in errors:
            if found is not None:
                raise found
        return mine  # type: ignore[return-value]
