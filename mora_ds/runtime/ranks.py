"""This process among all processes of the run: its rank, and how all ranks go through
the checks of a start together.

    every check has a name, and all ranks meet at it:

    rank 0   "output folder"  ->  "settings" ------------.
    rank 1   "output folder"  ->  "settings" -------------+->  all have the outcomes of all, and go on or fail alike
    rank 2   "output folder"  ->  an error elsewhere ----'     (`Ranks.leave`)

There is one way to meet, `Ranks._meet`, so no rank waits in one collective while
another one waits in a different one: ranks at different checks see both names and fail,
and a rank that fails between two checks reports it at the next. Where all is well a
check is one all-reduce of three numbers; only errors, and values that are asked for,
are exchanged one by one (`exchange`).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from mora_ds.common.errors import RunError, UserError
from mora_ds.runtime.exchange import gather_to_all, new_group

Result = TypeVar("Result")

_LONG_S = 7 * 24 * 3600.0
"""For long work: a rank that has ended is noticed by its closed connection."""
_LEAVING_S = 15.0
"""How long a rank that has failed waits for the others to come to a check and see
why."""
_ABSENT = "(none)"


class _Outcome(NamedTuple):
    """What one rank reports to the others at a check."""

    check: str | None
    """None: the rank has failed between two checks."""
    value: Any
    error: Exception | None


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and number of processes; all methods are collective.

    Every method that takes a `check`, the name of what happens there for messages,
    raises on all ranks alike: the error of the first rank that has one (a `UserError`
    before others), a `UserError` when the ranks are at different checks, or a
    `RunError` when a rank does not come in time. `long` marks work that may take hours.
    """

    rank: int
    world: int
    local_rank: int
    group: Any
    """A gloo group of all ranks, the same one for the whole process. It connects two
    ranks when they first exchange something (`exchange.new_group`)."""
    timeout_s: float
    """Seconds that ranks wait for each other at a check that is not `long`."""
    last_timeout_s: ClassVar[float | None] = None

    @classmethod
    def current(cls, timeout_s: float | None = None) -> Ranks:
        """Those of the running process group, and LOCAL_RANK of the launcher.

        `timeout_s` None: as it was given last in this process; DEEPSPEED_TIMEOUT
        (minutes), or 30 minutes, where it never was.
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
        """The same ranks in another group, for another thread than the main one."""
        return replace(self, group=new_group(_LONG_S))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_local_first(self) -> bool:
        """Whether it is the first of its node, which works for the others."""
        return self.local_rank == 0

    def barrier(self, check: str, long: bool = False) -> None:
        """Wait until all ranks are here."""
        self._meet(check, long=long)

    def gather(self, check: str, value: Any) -> list[Any]:
        """The `value` of every rank, in the order of ranks."""
        return self._meet(check, value, gathers=True)

    def agree(
        self, check: str, work: Callable[[], Result], long: bool = False
    ) -> Result:
        """Call `work` on every rank and return this one's result, or fail on all."""
        result: Result | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            if _is_shared(raised):
                # All ranks have it, by a check inside of `work`
                raise
            error = raised
        self._meet(check, None, error, long)
        return result  # type: ignore[return-value]

    def on_first(
        self, check: str, work: Callable[[], Result], long: bool = False
    ) -> Result:
        """Call `work` on rank 0; return its result, or raise its error, on all
        ranks."""
        result = [self.agree(check, work if self.is_first else lambda: None, long)]
        if self.world > 1:
            dist.broadcast_object_list(result, src=0, group=self.group)
        return result[0]  # type: ignore[return-value]

    def same(self, check: str, values: Mapping[str, Any]) -> None:
        """Raise `UserError` that lists what differs between ranks, and on which ranks.

        The values are compared as JSON.
        """
        mine = {
            name: json.dumps(value, sort_keys=True, default=str)
            for name, value in values.items()
        }
        # One text a rank: thousands of ranks are compared at once where all are alike
        text = json.dumps(mine)
        texts: list[str] = self.gather(check, text)
        if all(other == text for other in texts):
            return
        everyone: list[dict[str, str]] = [json.loads(other) for other in texts]
        lines = []
        for name in dict.fromkeys(name for mapping in everyone for name in mapping):
            holders: dict[str, list[int]] = {}
            for rank, rank_values in enumerate(everyone):
                holders.setdefault(rank_values.get(name, _ABSENT), []).append(rank)
            if len(holders) > 1:
                values_at = [
                    f"{value} on {names_of_ranks(at)}" for value, at in holders.items()
                ]
                lines.append(f"\n  {name}: {'; '.join(values_at)}")
        if lines:
            raise UserError(
                f"{check}: not the same on all ranks; give every rank the same{''.join(lines)}"
            )

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor on the CPU. Not a check: all ranks must come to it."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def __call__(self, work: Callable[[int], Any], count: int) -> list[Any]:
        """[work(0), ..., work(count - 1)] on every rank, each computed by one of
        them."""
        name = "work shared by all ranks"
        numbers = range(self.rank, count, self.world)
        mine = self.agree(
            name, lambda: {number: work(number) for number in numbers}, long=True
        )
        everyone = [mine]
        if self.world > 1:
            everyone = gather_to_all(mine, self.group)
        return [everyone[number % self.world][number] for number in range(count)]

    def leave(self, error: Exception) -> None:
        """Report an error that this rank alone may have, to be called before it ends.

        The other ranks raise it at the check that they come to next. Returns after all
        have seen it, or after 15 seconds, and at once for an error that all ranks have
        already. Raises another rank's error where that one comes first.
        """
        if self.world == 1 or _is_shared(error):
            return
        # So that it is reported once
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
        """Come to a check. Where it `gathers`: every rank's value. An error of one rank
        is raised on all of them."""
        if self.world == 1:
            if error is not None:
                raise error
            return [value]
        is_well = self._arrive(
            check, error, gathers, _LONG_S if long else self.timeout_s
        )
        if is_well is None or (is_well and not gathers):
            return []
        sent = error
        if error is not None and not _is_expected(error):
            sent = RunError(f"{type(error).__name__}: {error}")
        outcomes: list[_Outcome] = gather_to_all(
            _Outcome(check, value, sent), self.group
        )
        failure = _first_failure(outcomes) or _different_checks(outcomes)
        if failure is None:
            return [outcome.value for outcome in outcomes]
        if error is not None and not _is_expected(error):
            # On the rank that has raised it, it keeps its traceback
            failure = error
        failure.is_shared = True  # type: ignore[attr-defined]
        raise failure from error if failure is not error else None

    def _arrive(
        self,
        check: str | None,
        error: Exception | None,
        gathers: bool,
        timeout_s: float,
    ) -> bool | None:
        """Wait for all ranks. Whether all are at this check without an error; None when
        a rank that has failed waits in vain."""
        since = time.monotonic()
        limit = _LEAVING_S if check is None else timeout_s
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
                # A rank has ended: the connection to it was closed before the limit
                raise
            raise RunError(
                f"{check}: not all ranks came within {limit:.0f} s (--collective_timeout_s); those that are missing "
                "still do something else, wait for a disk or a network, or cannot be reached"
            ) from raised
        failed, most, least = highest.tolist()
        return not failed and most == -least


def balanced(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """The names in `count` parts of about equal sizes, the largest ones first."""
    names_in: list[list[str]] = [[] for _ in range(count)]
    sums = [0] * count
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        smallest = sums.index(min(sums))
        sums[smallest] += sizes[name]
        names_in[smallest].append(name)
    return names_in


def _number(text: str) -> int:
    """A digest of 56 bits, which a tensor can hold."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, (UserError, RunError))


def _is_shared(error: BaseException) -> bool:
    """Whether all ranks raise this error."""
    return getattr(error, "is_shared", False)


def _first_failure(outcomes: Iterable[_Outcome]) -> Exception | None:
    """The error of the first rank that has a `UserError`, or else any error; its
    message names a rank other than 0."""
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
    """Such as "ranks 0, 1, 2": of many the first ones, and how many there are."""
    more = f" ... ({len(ranks)} in all)" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


_groups: dict[Any, Any] = {}
"""The default group -> the one gloo group of its ranks, where they all meet."""


def _group() -> Any:
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()
        _groups[world] = new_group(_LONG_S)
    return _groups[world]
