"""Resources that the processes of a node share: control groups, ranks, pages."""

import mmap
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mora_ds.runtime import node_memory
from mora_ds.runtime.node_memory import (
    SharedMemory,
    free_bytes,
    machine,
    node_members,
    require_memory,
)
from tests.helpers.errors import run_error, user_error
from tests.helpers.mappings import Mappings


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0::/jobs/17\n", ["jobs/17", "jobs", ""]),
        ("1:name=a:b:/\n0::/\n", [""]),
        ("", []),
    ],
    ids=["a job", "in a container", "none"],
)
def test_limits_are_those_of_a_group_and_of_all_around_it(
    tmp_path, monkeypatch, text, expected
):
    (tmp_path / "cgroup").write_text(text)
    monkeypatch.setattr(node_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(node_memory, "Path", lambda name: tmp_path / Path(name).name)
    assert node_memory.cgroup_folders() == [tmp_path / folder for folder in expected]


def test_without_a_limit_it_is_the_memory_of_the_machine(monkeypatch):
    memory = mock.Mock(total=900, free=20, available=50)
    monkeypatch.setattr(node_memory, "cgroup_folders", list)
    monkeypatch.setattr(node_memory.psutil, "virtual_memory", lambda: memory)
    assert free_bytes() == 50


@pytest.mark.parametrize("free, limit", [(1000, resource.RLIM_INFINITY), (10**6, 1300)])
def test_memory_that_is_there(free, limit, monkeypatch):
    """1000 bytes are left: on the machine, or to the process, which uses 300 of its
    1300."""
    psutil = SimpleNamespace(
        virtual_memory=lambda: SimpleNamespace(available=free),
        Process=lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(vms=300)),
    )
    limits = lambda what: (limit, limit)  # noqa: E731
    monkeypatch.setattr(node_memory, "cgroup_folders", list)
    monkeypatch.setattr(node_memory, "psutil", psutil)
    monkeypatch.setattr(node_memory.resource, "getrlimit", limits)
    require_memory(1000, "a layer")
    with user_error("a layer takes"):
        require_memory(1001, "a layer")
    with user_error(r"takes 3\.000 GB of memory, and 0\.000 GB are available: buy it"):
        require_memory(3 * 10**9, "a layer", ": buy it")


def test_processes_of_a_node_are_those_that_see_each_other():
    """Nodes begin at local rank 0. The second one is the first one's machine, as in tests,
    the third has containers.
    """
    facts = [
        (int(fact[0]), fact[1])
        for fact in ["0a", "1a", "0a", "1a", "2a", "0b", "1c", "2b"]
    ]

    def members(rank):
        ranks = mock.Mock(rank=rank, gather=lambda check, value: facts)
        return node_members(ranks)

    nodes = [(0, 1), (2, 3, 4), (5, 7), (6,)]
    assert {members(rank) for rank in range(len(facts))} == set(nodes)
    assert all(rank in members(rank) for rank in range(len(facts)))


def test_a_machine_is_the_same_for_its_processes(monkeypatch):
    assert machine() == machine()
    monkeypatch.setattr(node_memory, "_BOOT_ID", Path("/nowhere"))
    assert str(os.getpid()) in machine()[1], (
        "else a process that cannot know takes part in nothing"
    )


def test_a_descriptor_that_means_another_file_is_not_mapped():
    """Example: the descriptor of a process that has ended and whose number another one
    has."""
    offer = SharedMemory.create(4096, "layout")
    os.ftruncate(offer.descriptor, 8192)
    with run_error("is not the file that local rank 0"):
        offer.map("layout")
    offer.close()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_addresses_are_found_by_file_and_offset(tmp_path):
    path = tmp_path / "numbers"
    page = mmap.PAGESIZE
    path.write_bytes(bytes(2 * page))
    one, another = (
        torch.from_file(str(path), shared=False, size=2 * page, dtype=torch.uint8)
        for _ in range(2)
    )
    mappings = Mappings.read()
    assert mappings.place_of(one) == mappings.place_of(another)
    assert mappings.place_of(one) != mappings.place_of(one[1:])
    assert mappings.place_of(one[page + 7 :]).endswith(f" @{page + 7}")
    assert str(path.stat().st_ino) in mappings.place_of(one)
    assert mappings.place_of(one[:0]) is None
    assert mappings.place_of(torch.zeros(1, device="meta")) is None
    another[page] = 1
    assert Mappings.read().place_of(another) is None, "it has pages of its own"
