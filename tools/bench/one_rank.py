"""One rank among N without the others: torch's fake process group, and the exchanges of
values answered.

Everything that this rank does by itself is the real code. Collectives reach nobody
(torch's backend "fake"), and a gather gives this rank's part as that of each other one.
Values are gathered likewise, encoded and decoded as `runtime.exchange` does it. What
stands for other ranks and for the network is outside of the clock: the collectives
themselves, what other ranks would have given, what rank 0 would broadcast.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mora_ds.checkpoint import manager
from mora_ds.common.object_store import ObjectStore
from mora_ds.runtime import exchange, ranks

COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "broadcast",
    "reduce", "barrier", "all_to_all_single",
)  # fmt: skip


@dataclass
class Spent:
    """What one phase took on this rank."""

    cpu_s: float = 0.0
    """CPU seconds of all threads."""
    files: int = 0
    """Distinct files under the watched folder that were opened."""
    requests: int = 0
    """Of object stores."""
    nbytes: int = 0
    """Sent to object stores, and read from them."""


@dataclass
class OneRank:
    """Rank `rank` of `world`. Make it before anything else of DeepSpeed runs in the
    process; there is one a process."""

    rank: int
    world: int
    folder: Path
    relabel: Callable[[Any, int], Any] = lambda value, rank: value
    """What another rank would have given in place of this rank's value."""
    gathered: Any = None
    """What this rank has last handed to rank 0."""
    _files: set[str] = field(default_factory=set)
    _paused: float = 0.0

    def __post_init__(self) -> None:
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world),
            LOCAL_RANK=str(self.rank % 8),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="1",
        )
        dist.init_process_group(
            "fake",
            rank=self.rank,
            world_size=self.world,
            store=FakeStore(),
        )
        self._barrier = dist.barrier
        for name in COLLECTIVES:
            setattr(dist, name, self._unclocked(getattr(dist, name)))
        for module in (exchange, ranks):
            module.new_group = lambda timeout_s: dist.group.WORLD  # type: ignore[attr-defined]
        for module in (exchange, manager):
            module.gather_to_rank0 = self._gather_to_rank0  # type: ignore[attr-defined]
        for module in (exchange, ranks):
            module.gather_to_all = self._gather_to_all  # type: ignore[attr-defined]
        ranks.Ranks.run_on_rank0 = self._run_on_rank0  # type: ignore[method-assign, assignment]
        # Compared with what rank 0 broadcasts
        lengths: Any = sys.modules["deepspeed.runtime.zero.utils"]
        lengths.get_lst_from_rank0 = lambda value: value
        lengths.assert_lst_len_same_as_other_ranks = lambda value: None
        sys.addaudithook(self._audit)
        self._counted = Spent()
        self._call = ObjectStore._call
        ObjectStore._call = self._counting()  # type: ignore[method-assign]

    @contextmanager
    def phase(self) -> Iterator[Spent]:
        """Measures what runs inside."""
        spent = Spent()
        self._paused = 0.0
        self._files.clear()
        self._counted = spent
        began = time.process_time()
        yield spent
        self._counted = Spent()
        spent.cpu_s = time.process_time() - began - self._paused
        spent.files = len(self._files)

    def _counting(self) -> Callable[..., Any]:
        """`ObjectStore._call`, counted as S3 would: a page of a listing has 1,000
        names."""

        def call(store: ObjectStore, method: str, *arguments: Any, **more: Any) -> Any:
            counted = self._counted
            counted.requests += 1
            result = self._call(store, method, *arguments, **more)
            requests = 1
            nbytes = 0
            if method == "get":
                sizes = [os.path.getsize(path) for path in arguments[1]]
                requests = len(sizes)
                nbytes = sum(sizes)
            elif method == "find":
                requests = -(-len(result) // 1000) or 1
            elif method == "put_file":
                nbytes = os.path.getsize(arguments[0])
            elif method == "pipe_file":
                nbytes = len(arguments[1])
            elif method == "cat_file":
                nbytes = len(result)
            counted.requests += requests - 1
            counted.nbytes += nbytes
            return result

        return call

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(str(self.folder)):
            self._files.add(str(arguments[0]))

    @contextmanager
    def outside_of_the_clock(self) -> Iterator[None]:
        """Stops the clock."""
        began = time.process_time()
        yield
        self._paused += time.process_time() - began

    def _unclocked(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.outside_of_the_clock():
                tensors = [
                    value
                    for value in (*arguments, *options.values())
                    if isinstance(value, torch.Tensor)
                ]
                if collective.__name__.startswith("all_gather") and len(tensors) == 2:
                    # The fake backend makes a tensor for each rank: thousands of them
                    # leave nothing else in the caches, and what is measured next would
                    # take twice as long.
                    if tensors[1].numel():
                        tensors[0].view(-1, tensors[1].numel()).copy_(
                            tensors[1].clone().view(1, -1)
                        )
                    return self._barrier(async_op=options.get("async_op", False))
                return collective(*arguments, **options)

        return call

    def _everyone(self, text: bytes) -> list[Any]:
        """Every rank's value, decoded as rank 0 does it."""
        with self.outside_of_the_clock():
            message = b"[" + b",".join([text] * self.world) + b"]"
        values = exchange.decode(message)
        with self.outside_of_the_clock():
            return [self.relabel(value, rank) for rank, value in enumerate(values)]

    def _gather_to_rank0(self, value: Any, group: Any) -> list[Any] | None:
        self.gathered = value
        text = exchange.encode(value)
        return self._everyone(text) if self.rank == 0 else None

    def _gather_to_all(self, value: Any, group: Any) -> list[Any]:
        values = self._everyone(exchange.encode(value))
        # Rank 0 tells the others, and decodes it as they do
        if self.rank == 0:
            values = exchange.decode(exchange.encode(values))
        return values

    def _run_on_rank0(
        self, check: str, work: Callable[[], Any], long: bool = False
    ) -> Any:
        if self.rank == 0:
            result = work()
            exchange.encode(result)
            return result
        with self.outside_of_the_clock():
            files = set(self._files)
            counted = self._counted
            self._counted = Spent()
            text = exchange.encode(work())
            self._counted = counted
            self._files &= files
        return exchange.decode(text)
