"""Applies a function to a stream of items in several processes, keeping the order."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import cycle
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

from mora_ds.common.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any] | None = None
"""The function of this worker process. It is sent once, because it may contain a
tokenizer."""
_failed: Any = None
"""A flag in shared memory: the caller has failed, so that no item needs to be begun."""


def ordered_map(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    num_proc: int,
    place: Callable[[Item], object],
) -> Iterator[Result]:
    """`map(work, items)` in `num_proc` processes, or in this process if that is 1.

    Unlike `Pool.imap` it is never more than a few items per process ahead of its
    consumer, so `items` may be far larger than memory. Workers are spawned, not forked,
    because the caller may have CUDA contexts and threads. Raises the error of `work`
    when the items that other workers have begun are done, and `RunError` with the
    `place` of its item if a worker is killed.
    """
    if num_proc <= 1:
        yield from map(work, items)
        return
    context = get_context("spawn")
    # Not an event: a worker that is killed may hold its lock
    failed = context.RawValue("b")
    # A pool has one worker: the first item that it does not return killed it
    pools = [
        ProcessPoolExecutor(
            1, mp_context=context, initializer=_install, initargs=(work, failed)
        )
        for _ in range(num_proc)
    ]
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item, pool in zip(items, cycle(pools)):
            waiting.append((item, pool.submit(_call, item)))
            if len(waiting) >= 4 * num_proc:
                yield waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
    except BrokenProcessPool as error:
        failed.value = True
        lost = next((item for item, future in waiting if _is_lost(future)), item)
        raise RunError(
            f"a data worker process was killed at {place(lost)}, perhaps because memory ran out; lower "
            "--preprocessing_workers"
        ) from error
    finally:
        failed.value = True
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


def _is_lost(future: Future[Any]) -> bool:
    return isinstance(future.exception(), BrokenProcessPool)


def _install(work: Callable[[Any], Any], failed: Any) -> None:
    global _work, _failed
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # already parallel by processes
    _work = work
    _failed = failed


def _exit_with_parent() -> None:
    """End this process when the caller is killed. Otherwise the pool's worker would wait
    forever for its next item (Python 3.11)."""
    parent = parent_process()
    assert parent is not None, "called in worker processes only"
    wait([parent.sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    assert _work is not None
    return None if _failed.value else _work(item)
