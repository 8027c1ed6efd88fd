"""Copies of weights from host memory to buffers of the device, while that computes:
on CUDA, and a twin for CPUs.

    copies = copies_for(device)
    copies.pin(tensors)             lock their pages, so that copies need no help of the host
    ticket = copies.start(pairs)    begin to copy, once the arithmetic issued so far has ended
    copies.wait(ticket)             let the arithmetic issued from here on begin after it
    copies.finish()                 wait on the host until nothing is being copied

On a CPU a copy is made when it starts: one device computes and copies in turn. Not
tried on CUDA here: the ring's order of copies is tested with twins that copy as early
and as late as these promises permit.
"""

import mmap
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mora_ds.common.errors import UserError
from mora_ds.models.decoder_layers import extent

Pairs = Iterable[tuple[Tensor, Tensor]]
"""(to, from)."""


class Copies:
    """What the ring needs of a device. Here, as on a CPU, a copy is made at its
    start."""

    def pin(self, tensors: Iterable[Tensor]) -> None:
        """Lock the memory of these tensors. Raises `UserError` where it may not be."""

    def start(self, pairs: Pairs) -> Any:
        """Begin to copy. Returns a ticket."""
        for target, source in pairs:
            target.copy_(source)

    def wait(self, ticket: Any) -> None:
        """Order the device's further work after the copies of this ticket."""

    def finish(self) -> None:
        """Return when all copies are done."""


class CudaCopies(Copies):
    """Copies on a stream of their own. The tensors' pages are locked where they are, so
    that ranks that share a mapping go on sharing it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def pin(self, tensors: Iterable[Tensor]) -> None:
        library: Any = torch.cuda.cudart()
        for start, stop in page_ranges(tensors):
            error = library.cudaHostRegister(start, stop - start, 0)
            if int(error) != 0:
                raise UserError(
                    f"--base_device host: {(stop - start) / 1e9:,.2f} GB of host memory cannot be locked for copies "
                    f"({library.cudaGetErrorString(error)}): raise the limits of locked memory (ulimit -l) and of host "
                    "memory, or use --base_device device"
                )

    def start(self, pairs: Pairs) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(ticket)

    def finish(self) -> None:
        self._stream.synchronize()


def copies_for(device: torch.device) -> Copies:
    """Raises `UserError` for a kind of device that nobody has written this for."""
    if device.type == "cpu":
        return Copies()
    if device.type == "cuda":
        return CudaCopies(device)
    raise UserError(
        f"--base_device host is for CUDA devices and CPUs, not for {device.type}: use --base_device device"
    )


def page_ranges(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """(start, stop) of the tensors' memory in whole pages, in order and disjoint."""
    page = mmap.PAGESIZE
    ranges = []
    for tensor in tensors:
        if size := extent(tensor) * tensor.element_size():
            start = tensor.data_ptr() // page * page
            ranges.append((start, -(-(tensor.data_ptr() + size) // page) * page))
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged
