"""Copies from host memory: what is asked of CUDA and in which order, with a stand-in for
it, and the twin for CPUs.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from mora_ds.engine import host_copies
from mora_ds.engine.host_copies import Copies, copies_for, page_ranges
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row, parsed

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


RANGES = """
[[0, 100]] | [[0, 100]]
[[10, 100]] | [[0, 200]]
[[100, 2], [0, 0]] | [[100, 200]]
[[0, 500], [200, 10]] | [[0, 500]]
[[800, 10], [0, 100], [100, 100]] | [[0, 200], [800, 900]]
[[0, 102], [150, 10], [300, 2]] | [[0, 200], [300, 400]]
"""
"""Addresses and sizes of tensors | the ranges, each from its begin to its end."""


@each_row("tensors, ranges", RANGES)
def test_complete_pages_are_locked_once_and_in_order(tensors, ranges, monkeypatch):
    monkeypatch.setattr(host_copies.mmap, "PAGESIZE", 100)
    monkeypatch.setattr(host_copies, "extent", lambda memory: memory.nbytes // 2)
    pieces = [Memory(*tensor) for tensor in parsed(tensors)]
    assert [list(bounds) for bounds in page_ranges(pieces)] == parsed(ranges)


def test_a_cpu_copies_at_once():
    copies = copies_for(torch.device("cpu"))
    target = torch.zeros(3)
    source = torch.arange(3.0)
    assert type(copies) is Copies
    copies.pin([source])
    copies.wait(copies.start([(target, source)]))
    copies.finish()
    assert target.tolist() == [0, 1, 2]
    with user_error(
        "is for CUDA devices and CPUs, not for meta: use --base_device device"
    ):
        copies_for(torch.device("meta"))


class Cuda:
    """Stands for `torch.cuda`: what is called, in order. `answer`: of cudaHostRegister."""

    def __init__(self, answer=0):
        self.calls = []
        self.answer = answer
        self.current = "arithmetic"

    def Stream(self, device):
        return self._named("copies")

    def note(self, *words):
        self.calls.append(words)

    def Event(self):
        return SimpleNamespace(
            record=lambda stream: self.note("record", stream.name, self.current)
        )

    def _named(self, name):
        return SimpleNamespace(
            name=name,
            wait_stream=lambda stream: self.note(name, "waits for", stream.name),
            wait_event=lambda event: self.note(name, "waits for", event),
            synchronize=lambda: self.note(name, "is waited for"),
        )

    def current_stream(self, device):
        return self._named(self.current)

    @contextmanager
    def stream(self, stream):
        before = self.current
        self.current = stream.name
        yield
        self.current = before

    def cudart(self):
        return SimpleNamespace(
            cudaHostRegister=lambda *range_: self.note(*range_) or self.answer,
            cudaGetErrorString=lambda error: f"error {error}",
        )

    def is_available(self):
        return False


def test_copies_follow_the_arithmetic_so_far_and_precede_the_one_that_waits(
    monkeypatch,
):
    cuda = Cuda()
    monkeypatch.setattr(host_copies.torch, "cuda", cuda)
    copies = copies_for(torch.device("cuda"))
    target = SimpleNamespace(
        copy_=lambda source, non_blocking: cuda.note(
            cuda.current, "copy", source, non_blocking
        )
    )
    event = copies.start([(target, "a"), (target, "b")])
    copies.wait(event)
    copies.finish()
    assert cuda.calls == [
        ("copies", "waits for", "arithmetic"),
        ("copies", "copy", "a", True),
        ("copies", "copy", "b", True),
        ("record", "copies", "copies"),
        ("arithmetic", "waits for", event),
        ("copies", "is waited for"),
    ]


def test_pages_are_locked_where_the_system_permits_it(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(host_copies.torch, "cuda", cuda)
    monkeypatch.setattr(
        host_copies,
        "page_ranges",
        lambda tensors: [(PAGE, 3 * PAGE), (8 * PAGE, 9 * PAGE)],
    )
    copies = copies_for(torch.device("cuda"))
    copies.pin([])
    assert cuda.calls == [(PAGE, 2 * PAGE, 0), (8 * PAGE, PAGE, 0)]
    cuda.answer = 2
    with user_error(
        r"0\.00 GB of host memory .*\(error 2\): raise the limits .*ulimit -l"
    ):
        copies.pin([])
