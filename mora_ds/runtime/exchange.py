"""gloo groups of all ranks, and objects between them, along a tree: a rank talks to
about log2(N) others, not to all.

    rank 0 <- 1      0 <- 2 <- 3      0 <- 4 <- 5 ...      each rank hands on what it has received, in one message

A gather in which rank 0 receives from every rank needs N - 1 connections there, and a
ring needs N - 1 messages one after the other (both are what gloo has).
"""

import os
import pickle
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_LAZY = "TORCH_GLOO_LAZY_INIT"


def new_group(timeout_s: float) -> Any:
    """A gloo group of all ranks, which connect when they first talk. Collective.

    By default gloo connects all with all when a group is made: 1,023 sockets on each of
    1,024 ranks, for each group. `_LAZY` is read by torch, ProcessGroupGloo.cpp,
    `getDefaultGlooLazyInit`.
    """
    before = os.environ.get(_LAZY)
    os.environ[_LAZY] = "1"
    try:
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    finally:
        if before is None:
            del os.environ[_LAZY]
        else:
            os.environ[_LAZY] = before


def gather_to_first(value: Any, group: Any) -> list[Any] | None:
    """The `value` of every rank, in the order of ranks, on rank 0; None on the others.
    Collective over `group`, a gloo group of all ranks. Each value is unpickled on rank
    0 alone."""
    rank = dist.get_rank(group)
    world = dist.get_world_size(group)
    pickled_values = [pickle.dumps(value)]
    step = 1
    while step < world:
        # A rank with this bit hands all that it has received on to the rank without it,
        # and is done.
        if rank & step:
            dist.send_object_list([pickled_values], dst=rank - step, group=group)
            return None
        if rank + step < world:
            message: list[Any] = [None]
            dist.recv_object_list(message, src=rank + step, group=group)
            pickled_values += message[0]
        step *= 2
    return [pickle.loads(pickled) for pickled in pickled_values]


def gather_to_all(value: Any, group: Any) -> list[Any]:
    """The `value` of every rank, in the order of ranks. Collective over `group`, a gloo
    group of all ranks."""
    everyone = [gather_to_first(value, group)]
    dist.broadcast_object_list(everyone, src=0, group=group)
    assert everyone[0] is not None
    return everyone[0]
