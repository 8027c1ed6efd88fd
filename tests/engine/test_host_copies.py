"""Copies from host memory: what is asked of CUDA and in which order, with a stand-in for
it, and the twin for CPUs.
"""

from contextlib import contextmanager

import pytest
import torch

from mora_ds.engine import host_copies
from mora_ds.engine.host_copies import Copies, copies_for, page_ranges
from tests.helpers.errors import user_error

PAGE = 4096


class Memory:
    """A tensor of bytes at an address."""

    def __init__(self, start, nbytes):
        self.start = start
        self.nbytes = nbytes

    def data_ptr(self):
        return self.start

    def element_size(self):
        return 2


@pytest.mark.parametrize(
    "tensors, ranges",
    [
        ([(0, 100)], [(0, 100)]),
        ([(10, 100)], [(0, 200)]),
        ([(100, 2), (0, 0)], [(100, 200)]),
        ([(0, 500), (200, 10)], [(0, 500)]),
        ([(800, 10), (0, 100), (100, 100)], [(0, 200), (800, 900)]),
        ([(0, 102), (150, 10), (300, 2)], [(0, 200), (300, 400)]),
    ],
)
def test_whole_pages_once_and_in_order(tensors, ranges, monkeypatch):
    monkeypatch.setattr(host_copies.mmap, "PAGESIZE", 100)
    monkeypatch.setattr(host_copies, "extent", lambda memory: memory.nbytes // 2)
    pieces = [Memory(*tensor) for tensor in tensors]
    assert page_ranges(pieces) == ranges


def test_a_cpu_copies_at_once():
    copies = copies_for(torch.device("cpu"))
    target = torch.zeros(3)
    source = torch.arange(3.0)
    assert type(copies) is Copies
    copies.pin([source])
    copies.wait(copies.start([(target, source)]))
    copies.finish()
    assert target.tolist() == [0, 1, 2]
    with user_error("is for CUDA devices and CPUs, not for meta: use --base_device device"):
        copies_for(torch.device("meta"))


class Cuda:
    """Stands for `torch.cuda`: what is called, in order. `answer`: of cudaHostRegister."""

    def __init__(self, answer=0):
        self.calls = []
        self.answer = answer
        self.current = "arithmetic"

    def Stream(self, device):
        return self._named("copies")

    def Event(self):
        event = type("Event", (), {})()
        event.record = lambda stream: self.calls.append(
            ("record", stream.name, self.current)
        )
        return event

    def _named(self, name):
        stream = type("Stream", (), {"name": name})()
        stream.wait_stream = lambda other: self.calls.append(
            (name, "waits for", other.name)
        )
        stream.wait_event = lambda event: self.calls.append((name, "waits for", event))
        stream.synchronize = lambda: self.calls.append((name, "is waited for"))
        return stream

    def current_stream(self, device):
        return self._named(self.current)

    @contextmanager
    def stream(self, stream):
        before = self.current
        self.current = stream.name
        yield
        self.current = before

    def cudart(self):
        library = type("Library", (), {})()
        library.cudaHostRegister = lambda *given: self.calls.append(given) or self.answer
        library.cudaGetErrorString = lambda error: f"error {error}"
        return library

    def is_available(self):
        return False


class Target:
    def __init__(self, cuda):
        self.cuda = cuda

    def copy_(self, source, non_blocking):
        self.cuda.calls.append((self.cuda.current, "copy", source, non_blocking))


def test_copies_follow_the_arithmetic_so_far_and_precede_the_one_that_waits(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(host_copies.torch, "cuda", cuda)
    copies = copies_for(torch.device("cuda"))
    targets = [Target(cuda), Target(cuda)]
    ticket = copies.start(zip(targets, ("a", "b"), strict=True))
    copies.wait(ticket)
    copies.finish()
    assert cuda.calls == [
        ("copies", "waits for", "arithmetic"),
        ("copies", "copy", "a", True),
        ("copies", "copy", "b", True),
        ("record", "copies", "copies"),
        ("arithmetic", "waits for", ticket),
        ("copies", "is waited for"),
    ]


def test_pages_are_locked_where_the_system_permits_it(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(host_copies.torch, "cuda", cuda)
    monkeypatch.setattr(
        host_copies, "page_ranges", lambda tensors: [(PAGE, 3 * PAGE), (8 * PAGE, 9 * PAGE)]
    )
    copies = copies_for(torch.device("cuda"))
    copies.pin([])
    assert cuda.calls == [(PAGE, 2 * PAGE, 0), (8 * PAGE, PAGE, 0)]
    cuda.answer = 2
    with user_error(r"0\.00 GB of host memory .*\(error 2\): raise the limits .*ulimit -l"):
        copies.pin([])
