"""Ranks that stay up from one test to the next, for functions that need a group of ranks
and nothing else.

    results = run_pooled(2, function, *arguments)     # as `run_ranks`, but for the start

What a call may leave behind is put back: environment, working directory, random states,
torch's settings, the groups that DeepSpeed remembers, and how long ranks wait. A function that patches something
for good, starts a run of the main job (which holds its output folder until the process
ends), or ends its process, takes `run_ranks`.
"""

import atexit
import gc
import io
import os
import random
import time
import traceback
from contextlib import contextmanager

import deepspeed.utils.groups
import numpy as np
import torch
import torch.distributed as dist

from mora_ds.runtime.ranks import Ranks
from tests.helpers import gloo

_pools = {}
"""Number of ranks -> the connections to them and their processes, of those that wait for
work.
"""


def run_pooled(world, function, *arguments, timeout_s=240):
    """The results of all ranks. Raises `RankFailed` where one of them fails, and throws the
    pool away.
    """
    connections, processes = _pools.pop(world, None) or _start(world)
    try:
        for connection in connections:
            connection.send((function, arguments))
        results = gloo.collect(connections, time.monotonic() + timeout_s)
    except BaseException:
        gloo.end(processes)
        raise
    _pools[world] = connections, processes
    return results


def _start(world):
    pairs = [gloo.context.Pipe() for _ in range(world)]
    _, processes = gloo.start_ranks(world, _serve, [theirs for _, theirs in pairs])
    for _, theirs in pairs:
        theirs.close()  # so that a rank that dies is noticed
    return [ours for ours, _ in pairs], processes


@atexit.register
def _end_all():
    for _, processes in _pools.values():
        gloo.end(processes)


def _serve(connections):
    """On a rank: calls what arrives, until nobody asks any more."""
    connection = connections[dist.get_rank()]
    for other in connections:
        if other is not connection:
            other.close()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            with _as_before():
                buffer = io.BytesIO()
                torch.save(function(*arguments), buffer)
            dist.barrier()
            connection.send((True, buffer.getvalue()))
        except BaseException:
            connection.send((False, traceback.format_exc()))


@contextmanager
def _as_before():
    """Puts back what a call may change of its process."""
    environment = dict(os.environ)
    folder = os.getcwd()
    random_states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    dtype = torch.get_default_dtype()
    groups = dict(vars(deepspeed.utils.groups))
    timeout_s = Ranks.last_timeout_s
    yield
    Ranks.last_timeout_s = timeout_s
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    random.setstate(random_states[0])
    np.random.set_state(random_states[1])
    torch.set_rng_state(random_states[2])
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)
    vars(deepspeed.utils.groups).update(groups)
    gc.collect()  # engines have cycles
