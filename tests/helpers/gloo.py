"""Run a function on several real ranks over gloo.

    results = run_ranks(2, function, *arguments)      # one result a rank, in rank order

The function must be defined at the top of a test module. A fork server imports torch,
transformers and DeepSpeed once; every rank is a fork of it, so that starting one takes no
time. A rank that raises fails the test with its traceback, and the others are ended at
once.
"""

import io
import multiprocessing
import os
import secrets
import socket
import time
import traceback
from collections import deque

import torch

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.helpers.preload"])
_reservations = deque(maxlen=64)
"""The ports drawn last: by the time that a socket leaves the queue and is closed, its job
has ended or listens.
"""


class RankFailed(AssertionError):
    """A rank raised or died; carries its traceback."""


def run_ranks(world, function, *arguments, timeout_s=240):
    pipes, processes = start_ranks(world, function, *arguments)
    try:
        return collect(pipes, time.monotonic() + timeout_s)
    finally:
        end(processes, patience_s=2)


def end(processes, patience_s=0):
    """Kill what has not ended by itself within `patience_s`."""
    for process in processes:
        process.join(patience_s)
        process.kill()
        process.join()


def run_alone(function, *arguments, **options):
    """The result of a function on a single rank. `options`: of `run_ranks`."""
    return run_ranks(1, function, *arguments, **options)[0]


def start_ranks(world, function, *arguments):
    """The pipes that results come through and the processes, in rank order, for a caller
    that ends them itself.
    """
    port = free_port()
    pipes = []
    processes = []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(rank, world, port, sender, function, arguments)
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    return pipes, processes


def collect(pipes, deadline):
    """The values of all ranks, in rank order. Raises `RankFailed` if one fails, dies,
    or is late."""
    results = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = multiprocessing.connection.wait(
            list(waiting), timeout=max(0.0, deadline - time.monotonic())
        )
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting.values())} did not finish in time")
        for pipe in ready:
            rank = waiting[pipe]
            try:
                ok, payload = pipe.recv()
            except EOFError:
                raise RankFailed(f"rank {rank} died without a word") from None
            if not ok:
                raise RankFailed(f"rank {rank}:\n{payload}")
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(rank, world, port, sender, function, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        from deepspeed.accelerator import get_accelerator

        from mora_ds.engine.initialize import start_distributed
        from mora_ds.runtime.log_setup import set_up_logging

        # DeepSpeed refuses fp16 on CPUs without an instruction for it; torch computes it on
        # every one, only slower.
        get_accelerator().is_fp16_supported = lambda: True
        set_up_logging()
        start_distributed()
        buffer = io.BytesIO()
        torch.save(function(*args), buffer)
        torch.distributed.barrier()
        sender.send((True, buffer.getvalue()))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    os._exit(0)  # gloo's threads often abort at interpreter exit, after right results


def free_port():
    """A port that no process listens on, below those that Linux gives to outgoing
    connections (32768 and up).

    It stays reserved for a while, by a socket that is bound and does not listen. Another
    test process that draws the same port cannot bind it, and draws again; torch's store
    still can, since both it and the reservation then have SO_REUSEADDR.
    """
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        reservation = socket.socket()
        try:
            reservation.bind(("", port))
        except OSError:
            reservation.close()
            continue
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _reservations.append(reservation)
        return port
