"""Whether the store through which this process is about to meet its ranks is that of its
own run.

Rank 0 listens at MASTER_ADDR and MASTER_PORT. Where another run listens there already,
rank 0 fails at once, but the other ranks would join that run's store and wait in it.
"""

import os
import platform
import time
from contextlib import suppress
from datetime import timedelta

import psutil
import torch.distributed as dist

from mora_ds.common.errors import RunError, UserError
from mora_ds.runtime.launchers import is_slurm, other_port

_MARKED_WITHIN_S = 5.0
"""Rank 0 marks its store as soon as it listens."""


def meet(timeout: timedelta) -> dist.TCPStore | None:
    """Connect to the store of this run, and register this rank. Returns the store, to be
    kept until `torch.distributed` has connected to it; None where there is one rank, or
    where torchrun listens instead of rank 0.

    Raises `RunError` if the store belongs to another run: rank 0 has not marked it with
    this number of ranks, or another process has this rank. Raises `DistNetworkError`
    where rank 0 cannot listen (`taken_port`).
    """
    rank = int(os.environ["RANK"])
    world = os.environ["WORLD_SIZE"]
    # torch/distributed/rendezvous.py, `_torchelastic_use_agent_store`
    if world == "1" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    # With `multi_tenant`, the store that torch opens on rank 0 is the same one
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    mark = f"mora_ds, {world} processes"
    if rank == 0:
        store.set(mark, "")
    try:
        store.wait([mark], timedelta(seconds=_MARKED_WITHIN_S))
    except dist.DistStoreError as error:
        raise _other_run(
            f"which is no run of mora_ds with {world} processes"
        ) from error
    # Containers of one host may share its name, and each has a process 1
    started = time.ctime(psutil.Process().create_time())
    this_process = f"process {os.getpid()} of {platform.node()}, started {started}"
    holder = store.compare_set(f"{mark}: rank {rank}", "", this_process)
    if holder != this_process.encode():
        # Any process that reaches the port may have set any bytes
        name = holder[:300].decode(errors="replace")
        raise _other_run(f"whose rank {rank} is {name}")
    return store


def taken_port() -> Exception:
    """The error for a port in which rank 0 cannot listen. A failure under Slurm, where
    another attempt takes another port."""
    port = os.environ["MASTER_PORT"]
    users: set[str] = set()
    # Another user's processes may be hidden
    with suppress(psutil.Error, OSError):
        for socket in psutil.net_connections("tcp"):
            if socket.laddr and str(socket.laddr.port) == port and socket.pid:
                users.add(str(socket.pid))
    kind = RunError if is_slurm() else UserError
    return kind(
        f"port {port} of this machine, by which ranks find each other, is in use (process "
        f"{', '.join(sorted(users)) or 'of another user'}): if that is an earlier run of yours, end it; "
        f"otherwise {other_port()}"
    )


def _other_run(which: str) -> RunError:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return RunError(
        f"another run, {which}, listens at {address}, where rank 0 of this run should: {other_port()}"
    )
