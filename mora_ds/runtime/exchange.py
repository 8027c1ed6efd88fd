"""gloo groups of all ranks, and a gather of Python objects along a binomial tree, in
which a rank connects to about log2(N) others.

    rank 0 <- 1      0 <- 2 <- 3      0 <- 4 <- 5 ...      each rank forwards all received objects in one message

gloo itself has a gather that needs N - 1 connections of rank 0, and a ring that needs
N - 1 sequential messages.
"""

import os
import pickle
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_LAZY = "TORCH_GLOO_LAZY_INIT"


def new_group(timeout_s: float) -> Any:
    """A gloo group of all ranks that connects two ranks on their first message.
    Collective.

    By default gloo connects all pairs of ranks in each new group: 1,023 sockets on each
    of 1,024 ranks. torch reads `_LAZY` in ProcessGroupGloo.cpp,
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


def gather_to_rank0(value: Any, group: Any) -> list[Any] | None:
    """The values of all ranks, in rank order, on rank 0; None on other ranks.
    Collective over `group`, a gloo group of all ranks. Only rank 0 unpickles values."""
    rank = dist.get_rank(group)
    world = dist.get_world_size(group)
    pickled_values = [pickle.dumps(value)]
    step = 1
    while step < world:
        # A rank with this bit sends everything to the rank without it, then is done.
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
    """The values of all ranks, in rank order, on every rank. Collective over `group`, a
    gloo group of all ranks."""
    message = [gather_to_rank0(value, group)]
    dist.broadcast_object_list(message, src=0, group=group)
    assert message[0] is not None
    return message[0]
