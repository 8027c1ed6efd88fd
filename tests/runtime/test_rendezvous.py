"""A rank that comes to the store of another run finds that out within seconds."""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from mora_ds.common.errors import RunError, UserError
from mora_ds.runtime import rendezvous
from tests.helpers.errors import run_error
from tests.helpers.gloo import free_port
from tests.helpers.jobs import REPOSITORY, environment

LIMIT = timedelta(seconds=60)

FIRST_RUN = """
import time
from datetime import timedelta
from mora_ds.runtime.rendezvous import meet
store = meet(timedelta(seconds=60))
print("met", flush=True)
time.sleep(100)
"""


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process a rank of several, by the variables of DeepSpeed's launcher."""

    def as_rank(rank, world, port):
        variables = {
            "RANK": rank,
            "CROSS_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return as_rank


def test_ranks_of_one_run_meet(as_rank, monkeypatch):
    port = free_port()
    as_rank(0, 2, port)
    listening = rendezvous.meet(LIMIT)
    as_rank(1, 2, port)
    rendezvous.meet(LIMIT)
    # A process may come again: after a failure it reports to the others
    rendezvous.meet(LIMIT)
    assert listening.num_keys() >= 3
    twin = SimpleNamespace(create_time=lambda: 0.0)
    monkeypatch.setattr(rendezvous.psutil, "Process", lambda: twin)
    # As where two containers of one name have a process 1 each
    with run_error("another run, whose rank 1 is process"):
        rendezvous.meet(LIMIT)


def test_what_a_stranger_sets_for_a_rank_is_shown_in_part(as_rank):
    port = free_port()
    as_rank(0, 2, port)
    store = rendezvous.meet(LIMIT)
    name = "mora_ds, 2 processes: rank 1"
    store.set(name, b"\xff" * 1_000_000)
    # Returns before the server has it
    store.get(name)
    as_rank(1, 2, port)
    with run_error("another run, whose rank 1 is") as caught:
        rendezvous.meet(LIMIT)
    assert len(str(caught.value)) < 1000


def test_the_store_of_another_run_is_left_at_once(as_rank):
    """The ports of two runs are the same: rank 0 of the second cannot listen, and its rank
    1, on another node, reaches the first one's store."""
    port = free_port()
    variables = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    running = []
    try:
        for rank in ("0", "1"):
            own = {**environment(), **variables, "RANK": rank}
            process = subprocess.Popen(
                [sys.executable, "-c", FIRST_RUN],
                env=own,
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
            )
            running.append(process)
        for process in running:
            assert process.stdout.readline() == b"met\n"
        began = time.monotonic()
        as_rank(1, 2, port)
        with run_error(
            f"another run, whose rank 1 is process {running[1].pid} of .*127.0.0.1:{port}.*--master_port"
        ):
            rendezvous.meet(LIMIT)
        as_rank(3, 4, port)
        with run_error("another run, which is no run of mora_ds with 4 processes"):
            rendezvous.meet(LIMIT)
        assert time.monotonic() - began < 10
    finally:
        for process in running:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_store_that_no_run_has_marked_is_left(as_rank, monkeypatch):
    monkeypatch.setattr(rendezvous, "_MARKED_WITHIN_S", 0.3)
    port = free_port()
    other = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    as_rank(1, 2, port)
    with run_error("another run, which is no run of mora_ds with 2 processes"):
        rendezvous.meet(LIMIT)
    assert other.num_keys() >= 0


def test_one_rank_and_the_store_of_torchrun_are_left_alone(as_rank, monkeypatch):
    as_rank(0, 1, 1)
    assert rendezvous.meet(LIMIT) is None
    as_rank(1, 2, 1)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert rendezvous.meet(LIMIT) is None


def test_a_taken_port_is_a_failure_where_another_attempt_takes_another(
    as_rank, monkeypatch
):
    """Code 2 would end a job of Slurm."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        as_rank(0, 2, port)
        error = rendezvous.taken_port()
        assert isinstance(error, UserError)
        assert f"port {port} of this machine" in str(error)
        assert f"process {os.getpid()}" in str(error)
        monkeypatch.delenv("CROSS_RANK")
        monkeypatch.setenv("SLURM_PROCID", "0")
        error = rendezvous.taken_port()
        assert isinstance(error, RunError)
        assert "the next attempt of launch/slurm.sbatch" in str(error)
