"""Applies a function to a stream of items in several processes, keeping the order."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

from mora_ds.common.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any] | None = None
"""The function of this worker process. It is sent once, because it may contain a
tokenizer."""


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], num_proc: int
) -> Iterator[Result]:
    """`map(work, items)` in `num_proc` processes, or in this process if that is 1.

    Unlike `Pool.imap` it is never more than a few items per process ahead of its
    consumer, so `items` may be far larger than memory. Workers are spawned, not forked,
    because the caller may have CUDA contexts and threads. Raises the error of `work`,
    and `RunError` if a worker is killed.
    """
    if num_proc <= 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(
        num_proc,
        mp_context=get_context("spawn"),
        initializer=_install,
        initargs=(work,),
    )
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) >= 4 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a data worker process was killed, perhaps because memory ran out; lower --preprocessing_workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _install(work: Callable[[Any], Any]) -> None:
    global _work
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # already parallel by processes
    _work = work


def _exit_with_parent() -> None:
    """End this process when the caller is killed. Otherwise the pool's worker would wait
    forever for its next item (Python 3.11)."""
    parent = parent_process()
    assert parent is not None, "called in worker processes only"
    wait([parent.sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    assert _work is not None
    return _work(item)
