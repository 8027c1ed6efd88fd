"""Rank and world size, and named checks, at which all ranks synchronize and either
continue or fail together.

    rank 0   "output folder"  ->  "settings" ------------.
    rank 1   "output folder"  ->  "settings" -------------+->  all ranks see all outcomes; all continue or all fail
    rank 2   "output folder"  ->  an error elsewhere ----'     (`Ranks.abort`)

All methods synchronize in `Ranks._meet`, so ranks never wait in different collectives:
ranks at different checks see both names and fail, and a rank that fails between two
checks reports its error at the next one. Without errors a check is one all-reduce of
three numbers; only errors and gathered values are sent besides (`exchange`).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Thread
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import json_digest
from mora_ds.runtime.exchange import (
    broadcast,
    decode,
    encode,
    gather_to_all,
    new_group,
)

Result = TypeVar("Result")

_LONG_S = 7 * 24 * 3600.0
"""Timeout for long work. A rank that ends is detected by its closed connection."""
_REPORT_TIMEOUT_S = 15.0
"""How long a failed rank waits for the others to come to a check and get its error."""
_ANSWER_S = 2.0
"""How long ranks have after a timeout to say that they are there."""
_ABSENT = "(none)"


class _Outcome(NamedTuple):
    """The report of one rank at a check."""

    check: str | None
    """The name of the check; None: the rank failed between two checks."""
    value: Any
    error: Exception | None


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and number of ranks; all methods are collective.

    A method with a `check`, a name for messages, raises the same error on all ranks:
    the error of the first rank that has one (a `UserError` before others), a
    `UserError` if ranks are at different checks, or a `RunError` after a timeout.
    `long`: the work may take hours.
    """

    rank: int
    world: int
    local_rank: int
    group: Any
    """A gloo group of all ranks, one per process. Two ranks connect on their first
    message (`exchange.new_group`)."""
    timeout_s: float
    """Timeout in seconds of a check that is not `long`."""
    last_timeout_s: ClassVar[float | None] = None

    @classmethod
    def current(cls, timeout_s: float | None = None) -> Ranks:
        """The ranks of the default process group; LOCAL_RANK comes from the launcher.

        `timeout_s` None: the last value given in this process, or else DEEPSPEED_TIMEOUT
        (minutes), or else 30 minutes.
        """
        if timeout_s is not None:
            cls.last_timeout_s = timeout_s
        minutes = float(os.environ.get("DEEPSPEED_TIMEOUT", "30"))
        seconds = cls.last_timeout_s or 60 * minutes
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return cls(
            dist.get_rank(), dist.get_world_size(), local_rank, _group(), seconds
        )

    def separate(self) -> Ranks:
        """The same ranks with a new group, for use in another thread."""
        return replace(self, group=new_group(_LONG_S))

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def is_local_rank0(self) -> bool:
        """Whether this is local rank 0, which does shared work for its node."""
        return self.local_rank == 0

    def barrier(self, check: str, long: bool = False) -> None:
        """Wait for all ranks."""
        self._meet(check, long=long)

    def gather(self, check: str, value: Any) -> list[Any]:
        """The values of all ranks, in rank order."""
        return self._meet(check, value, gathers=True)

    def agree(
        self, check: str, work: Callable[[], Result], long: bool = False
    ) -> Result:
        """Call `work` on every rank and return this rank's result; raise on all ranks
        if any fails."""
        result: Result | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            if _is_shared(raised):
                # A check inside of `work` has raised it on all ranks
                raise
            error = raised
        self._meet(check, None, error, long)
        return result  # type: ignore[return-value]

    def run_on_rank0(
        self, check: str, work: Callable[[], Result], long: bool = False
    ) -> Result:
        """Call `work` on rank 0; return its result or raise its error on all ranks. The
        result is one that `exchange.encode` knows."""

        def work_and_text() -> tuple[Any, bytes]:
            result = work() if self.is_rank0 else None
            return result, encode(result) if self.world > 1 else b""

        result, text = self.agree(check, work_and_text, long)
        if self.world > 1:
            text = broadcast(text, self.group)
        return result if self.is_rank0 else decode(text)

    def same(self, check: str, values: Mapping[str, Any]) -> None:
        """Raise `UserError` that lists the values that differ between ranks, with the
        ranks. Values are compared as JSON."""
        mine = {
            name: json.dumps(value, sort_keys=True, default=str)
            for name, value in values.items()
        }
        # The settings of 1,000 sources, of 4,096 ranks, are a GB in each process: only a
        # digest is sent while all are equal
        if len(set(self.gather(check, json_digest(mine)))) == 1:
            return
        by_rank: list[dict[str, str]] = self.gather(check, mine)
        lines = []
        for name in dict.fromkeys(name for mapping in by_rank for name in mapping):
            ranks_with: dict[str, list[int]] = {}
            for rank, rank_values in enumerate(by_rank):
                ranks_with.setdefault(rank_values.get(name, _ABSENT), []).append(rank)
            if len(ranks_with) > 1:
                differing = [
                    f"{value} on {names_of_ranks(ranks)}"
                    for value, ranks in ranks_with.items()
                ]
                lines.append(f"\n  {name}: {'; '.join(differing)}")
        if lines:
            raise UserError(
                f"{check}: not the same on all ranks; give every rank the same{''.join(lines)}"
            )

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a CPU tensor over all ranks in place and return it. Not a check: errors
        of other ranks are not reported here."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def map(self, work: Callable[[int], Any], count: int) -> list[Any]:
        """[work(0), ..., work(count - 1)] on every rank; each item is computed by one
        rank."""
        name = "work split over all ranks"
        numbers = range(self.rank, count, self.world)
        mine = self.agree(name, lambda: [work(number) for number in numbers], long=True)
        by_rank = [mine]
        if self.world > 1:
            by_rank = gather_to_all(mine, self.group)
        return [
            by_rank[number % self.world][number // self.world]
            for number in range(count)
        ]

    def abort(self, error: Exception) -> None:
        """Report an error that only this rank may have. Call it before the rank ends.

        The other ranks raise the error at their next check. Returns when all have it,
        after 15 seconds, or immediately if all ranks raise it anyway. Raises another
        rank's error if that one was first.
        """
        if self.world == 1 or _is_shared(error):
            return
        # Report it only once
        error.is_shared = True  # type: ignore[attr-defined]
        self._meet(None, None, error)

    def _meet(
        self,
        check: str | None,
        value: Any = None,
        error: Exception | None = None,
        long: bool = False,
        gathers: bool = False,
    ) -> list[Any]:
        """Synchronize all ranks at a check. Returns the values of all ranks if it
        `gathers`. Raises an error of any rank on all ranks."""
        if self.world == 1:
            if error is not None:
                raise error
            return [value]
        is_ok = self._reduce_status(
            check, error, gathers, _LONG_S if long else self.timeout_s
        )
        if is_ok is None or (is_ok and not gathers):
            return []
        sent = error
        if error is not None and not _is_expected(error):
            sent = RunError(f"{type(error).__name__}: {error}")
        facts = None if sent is None else (type(sent).__name__, str(sent))
        gathered = gather_to_all((check, value, facts), self.group)
        outcomes = [
            _Outcome(check, value, _error(facts)) for check, value, facts in gathered
        ]
        failure = _first_failure(outcomes) or _different_checks(outcomes)
        if failure is None:
            return [outcome.value for outcome in outcomes]
        if error is not None and not _is_expected(error):
            # Keep the traceback on the rank where it was raised
            failure = error
        failure.is_shared = True  # type: ignore[attr-defined]
        raise failure from error if failure is not error else None

    def _reduce_status(
        self,
        check: str | None,
        error: Exception | None,
        gathers: bool,
        timeout_s: float,
    ) -> bool | None:
        """Wait for all ranks. Returns whether all are at this check without an error;
        None if this rank has failed and the others did not come in time."""
        since = time.monotonic()
        limit = _REPORT_TIMEOUT_S if check is None else timeout_s
        check_number = _number(f"{gathers} {check}")
        highest = torch.tensor([int(error is not None), check_number, -check_number])
        try:
            work = dist.all_reduce(
                highest,
                op=dist.ReduceOp.MAX,
                group=self.group,
                async_op=True,
            )
            work.wait(timedelta(seconds=limit))
        except RuntimeError as raised:
            if check is None:
                return None
            if time.monotonic() - since < limit:
                # No timeout: the connection was closed because a rank has ended
                raise
            raise RunError(
                f"{check}: not all ranks came within {limit:.0f} s (--collective_timeout_s); missing: "
                f"{absent_ranks() or 'some'}, which are still busy, wait for a disk or a network, or cannot be reached"
            ) from raised
        failed, most, least = highest.tolist()
        return not failed and most == -least


def balanced(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Partition the names into `count` lists of about equal total size (greedy, largest
    first)."""
    partitions: list[list[str]] = [[] for _ in range(count)]
    sums = [0] * count
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        smallest = sums.index(min(sums))
        sums[smallest] += sizes[name]
        partitions[smallest].append(name)
    return partitions


def absent_ranks() -> str:
    """The ranks that do not say within seconds that they, too, wait for others; after a
    timeout; "" where none is known. They tell each other through the store by which they
    met."""
    absent: list[int] = []
    asked = Thread(target=_ask, args=(absent,), daemon=True)
    asked.start()
    asked.join(2 * _ANSWER_S)
    if asked.is_alive():
        # The store is in rank 0's process
        absent = [0]
    return names_of_ranks(absent) if absent else ""


def _ask(absent: list[int]) -> None:
    with suppress(RuntimeError, ValueError):
        # torch/distributed/distributed_c10d.py; a ValueError where no ranks have met
        store = dist.distributed_c10d._get_default_store()
        store.set(f"mora_ds/waits/{dist.get_rank()}", "")
        time.sleep(_ANSWER_S)
        for rank in range(dist.get_world_size()):
            if not store.check([f"mora_ds/waits/{rank}"]):
                absent.append(rank)


def _number(text: str) -> int:
    """A digest of 56 bits, which fits an int64 tensor."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _error(facts: tuple[str, str] | None) -> Exception | None:
    """The error that a rank has reported, by its name and text."""
    if facts is None:
        return None
    name, text = facts
    known: list[type[Exception]] = [UserError, RunError]
    for kind in known:
        known += kind.__subclasses__()
    return next((kind for kind in known if kind.__name__ == name), RunError)(text)


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, (UserError, RunError))


def _is_shared(error: BaseException) -> bool:
    """Whether all ranks raise this error."""
    return getattr(error, "is_shared", False)


def _first_failure(outcomes: Iterable[_Outcome]) -> Exception | None:
    """The error of the first rank with a `UserError`, or else of the first rank with
    any error. The message names the rank if it is not 0."""
    failed = [
        (rank, outcome.error) for rank, outcome in enumerate(outcomes) if outcome.error
    ]
    if not failed:
        return None
    by_user = [failure for failure in failed if isinstance(failure[1], UserError)]
    rank, error = (by_user or failed)[0]
    return error if rank == 0 else type(error)(f"rank {rank}: {error}")


def _different_checks(outcomes: Iterable[_Outcome]) -> Exception | None:
    ranks_at: dict[str, list[int]] = {}
    for rank, outcome in enumerate(outcomes):
        ranks_at.setdefault(str(outcome.check), []).append(rank)
    if len(ranks_at) == 1:
        return None
    where = "; ".join(
        f"{names_of_ranks(ranks)} at {check!r}" for check, ranks in ranks_at.items()
    )
    return UserError(
        f"the ranks do different things: {where}. Do all nodes have the same files and the same packages?"
    )


def names_of_ranks(ranks: list[int]) -> str:
    """Such as "ranks 0, 1, 2"; a long list is cut after 8 ranks."""
    more = f" ... ({len(ranks)} in all)" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


_groups: dict[Any, Any] = {}
"""Default process group -> the gloo group of its ranks for checks."""


def _group() -> Any:
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()
        _groups[world] = new_group(_LONG_S)
    return _groups[world]
