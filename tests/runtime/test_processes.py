"""Launchers are told from ranks and shells by their command lines, ranks by their environment."""

from __future__ import annotations

import os
import subprocess
import time
from types import SimpleNamespace

import pytest

from mora_ds.runtime import processes

LAUNCHERS = [
    "/usr/bin/python3 -u -m deepspeed.launcher.launch --world_info=x",
    "python -m deepspeed.launcher.runner --num_gpus 2",
    "python -m torch.distributed.run train.py",
    "python /venv/bin/deepspeed --num_gpus 2",
    "/venv/bin/torchrun --nnodes 2",
    "slurmstepd: [17.0]",
    "python launch/restart.py 5",
    "python /venv/bin/mora-ds restart 5",
    "python -m mora_ds restart 5",
]
OTHERS = [
    "python -u -m mora_ds --local_rank=0 pretrain",
    "python /venv/bin/mora-ds pretrain restart",
    "python restart.py 5",
    "bash -c deepspeed train.py",
    "bash launch.sh deepspeed",
    "python -u deepspeed.launcher.launch",
    "",
]


@pytest.mark.parametrize("line", [*LAUNCHERS, *OTHERS])
def test_launchers_are_known_by_their_command_lines(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    words = [line] if line.startswith("slurmstepd") else line.split()
    monkeypatch.setattr(processes.psutil, "Process", lambda process: SimpleNamespace(cmdline=lambda: words))
    assert processes.is_launcher(1) == (line in LAUNCHERS)


PARENTS = {10: 8, 11: 8, 20: 10, 8: 7, 7: 6, 6: 1}
"""1 -> shell 6 -> wrapper 7 -> launcher 8 -> ranks 10 and 11; 10 -> its worker 20."""


def test_links_go_up_to_the_last_launcher_and_down_to_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "parent_of", PARENTS.get)
    monkeypatch.setattr(processes, "children_of", lambda process: [c for c, p in PARENTS.items() if p == process])
    monkeypatch.setattr(processes, "is_launcher", lambda process: process in (7, 8))
    monkeypatch.setattr(processes, "is_rank", lambda process: process in (10, 11, 20))
    assert processes.launchers_above(10) == [(10, 8), (8, 7)] and processes.launchers_above(6) == []
    assert processes.ranks_below(6) == processes.ranks_below(8) == [10, 11] and processes.ranks_below(20) == []


def test_a_process_that_has_ended_counts_no_more_though_nobody_waited_for_it() -> None:
    child = subprocess.Popen(["sleep", "60"], env={**os.environ, "RANK": "0"})
    try:
        while not processes.is_rank(child.pid):  # until it is another program than this one
            time.sleep(0.01)
        assert processes.parent_of(child.pid) == os.getpid() and child.pid in processes.children_of(os.getpid())
        child.kill()
        while processes.parent_of(child.pid) is not None:
            time.sleep(0.01)
        assert child.pid not in processes.children_of(os.getpid()) and not processes.is_rank(child.pid)
    finally:
        child.kill()
        child.wait()
    assert processes.parent_of(child.pid) is None and processes.children_of(child.pid) == []
