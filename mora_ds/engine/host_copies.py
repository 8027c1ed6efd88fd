"""Asynchronous copies of weights from host memory to device buffers: on CUDA, and a
synchronous version for CPUs.

    copies = copies_for(device)
    copies.pin(tensors)             lock the pages, so that copies are asynchronous
    event = copies.start(pairs)     queue copies that start after all kernels queued so far
    copies.wait(event)              make all kernels queued later wait for these copies
    copies.finish()                 block the host until all copies are done

On a CPU `start` copies immediately. The order of copies is tested with implementations
that copy as early and as late as this interface permits.
"""

import mmap
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mora_ds.common.errors import UserError
from mora_ds.models.decoder_layers import extent

Pairs = Iterable[tuple[Tensor, Tensor]]
"""(target, source) of each copy."""


class Copies:
    """The interface for all devices, and the implementation for CPUs, which copies in
    `start`."""

    def pin(self, tensors: Iterable[Tensor]) -> None:
        """Lock the memory of these tensors. Raises `UserError` if that is not
        permitted."""

    def start(self, pairs: Pairs) -> Any:
        """Queue copies. Returns their event."""
        for target, source in pairs:
            target.copy_(source)

    def wait(self, event: Any) -> None:
        """Make further work of the device wait for the copies of this event."""

    def finish(self) -> None:
        """Block until all copies are done."""


class CudaCopies(Copies):
    """Copies on a separate CUDA stream. Pages are locked in place, so that ranks that
    share a mapping still share it."""

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

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def finish(self) -> None:
        self._stream.synchronize()


def copies_for(device: torch.device) -> Copies:
    """The copies for a device. Raises `UserError` for an unsupported device type."""
    if device.type == "cpu":
        return Copies()
    if device.type == "cuda":
        return CudaCopies(device)
    raise UserError(
        f"--base_device host is for CUDA devices and CPUs, not for {device.type}: use --base_device device"
    )


def page_ranges(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """(start, stop) addresses of the pages of the tensors, sorted and disjoint."""
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
