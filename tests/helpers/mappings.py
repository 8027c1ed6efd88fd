"""Which files, or memory of several processes, lie behind this process's tensors, by
Linux's /proc/self/smaps.

    Mappings.read().place_of(tensor)      "260:1 1131 @4096": device, inode and offset; None for memory of its own

Two processes of a machine read the same physical pages where their tensors have the same
place.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+)(?:.*\n)+?Anonymous: +(\d+)",
    re.MULTILINE,
)
"""start-end permissions offset device inode, and among the lines below it Anonymous, as in
proc_pid_smaps(5).
"""


class _Mapping(NamedTuple):
    """A mapped file whose bytes this process sees as other processes do."""

    start: int
    end: int
    offset: int
    file: str
    """Device and inode."""


@dataclass(frozen=True)
class Mappings:
    """The mapped files of this process by their addresses; none where there is no /proc."""

    mappings: list[_Mapping]

    @classmethod
    def read(cls):
        """The mappings as they are now."""
        mappings = []
        for mapping in _MAPPING.finditer(_SMAPS.read_text() if _SMAPS.exists() else ""):
            start, end, permissions, offset, device, inode, written = mapping.groups()
            # Of a private mapping this process has pages of its own from the first write
            # on.
            is_own = permissions[3] != "s" and written != "0"
            if inode != "0" and not is_own:
                mappings.append(
                    _Mapping(
                        int(start, 16),
                        int(end, 16),
                        int(offset, 16),
                        f"{device} {inode}",
                    )
                )
        return cls(sorted(mappings))

    def place_of(self, tensor):
        """The file of the tensor's bytes; None for a tensor on another device, in
        memory of its own, or in a mapped file that this process has written to."""
        if (
            tensor.device.type != "cpu"
            or not tensor.is_contiguous()
            or not tensor.numel()
        ):
            return None
        address = tensor.data_ptr()
        index = (
            bisect.bisect_right(
                self.mappings,
                address,
                key=lambda mapping: mapping.start,
            )
            - 1
        )
        if index < 0 or address + tensor.nbytes > (mapping := self.mappings[index]).end:
            return None
        return f"{mapping.file} @{mapping.offset + address - mapping.start}"
