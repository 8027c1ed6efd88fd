"""The fp32 sum of each adapted weight after the last merge, on disk: with it a merge and
a resume form one cycle, however many the ledger has.

    folder/<chain>-rank-00000.safetensors    "<module name>" -> the sum, in the layout of the weight
                                             "<module name>.checksum" -> int64 (1,)

`chain` is `Ledger.head` of the cycles in the sum. A sum is derived: one that is missing,
damaged or of other cycles is formed again from the ledger, with the same bits. So a full
disk costs time alone, and nothing waits until a sum is safely on disk.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.common.errors import UserError
from mora_ds.common.tensor_files import (
    SafetensorsWriter,
    Shape,
    open_safetensors,
    shape_dtype,
    tensor_nbytes,
)
from mora_ds.models.base import tensor_checksum
from mora_ds.remora.ledger import Ledger

logger = logging.getLogger(__name__)

SUMS_FOLDER = "sums"
_ROOM = 3
"""Sums are kept while the disk has room for so many more of them: they must not keep a
checkpoint from being written."""


class MergedSums:
    """The sums in a folder. All processes read them; those of the first node write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keep = ""
        """Head of the last checkpoint's ledger, from which a killed run goes on."""
        self._found: dict[str, tuple[int, Any]] = {}

    def open(self, ledger: Ledger) -> None:
        """Find the newest sum of each layer that is of cycles of `ledger`."""
        self.release()
        cycles = {record.chain: record.cycle + 1 for record in ledger.records}
        known = [path for path in self._files() if _chain(path) in cycles]
        for path in sorted(known, key=lambda path: cycles[_chain(path)]):
            with suppress(UserError):
                handle = open_safetensors(path)
                found = cycles[_chain(path)], handle
                self._found.update(dict.fromkeys(handle.keys(), found))

    def read(self, module: str, shape: Shape) -> tuple[Tensor, int] | None:
        """(sum on the CPU, number of its cycles) of a layer; None where there is none, or
        a damaged one. Do not write to it: it is the mapped file."""
        if module not in self._found:
            return None
        cycles, handle = self._found[module]
        if shape_dtype(handle, module) != (shape, torch.float32):
            return None
        total: Tensor = handle.get_tensor(module)
        if not torch.equal(handle.get_tensor(_checksum_name(module)), _checksum(total)):
            logger.warning(
                "warning: the sum of %s is damaged, and is formed again", module
            )
            return None
        return total, cycles

    def release(self) -> None:
        """Unmap the files."""
        self._found.clear()

    def writer(self, shapes: Mapping[str, Shape], cycles: int) -> SumWriter:
        """Writes sums of these layers, of a number of cycles, to a file that `commit`
        names; nothing where they are all there."""
        if all(self._cycles_of(name) == cycles for name in shapes):
            shapes = {}
        return SumWriter(self.folder / f".{_rank_file()}.partial", shapes)

    def commit(self, writer: SumWriter, head: str) -> None:
        """Name the sums after the ledger's new head, and delete those that neither the
        next merge nor a resume reads."""
        if writer.finish():
            writer.path.replace(self.folder / f"{head}-{_rank_file()}")
        if dist.get_rank() == 0:
            for path in self._files():
                if _chain(path) not in (head, self.keep):
                    path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete all sums. A longer run forms them again."""
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _cycles_of(self, module: str) -> int:
        return self._found[module][0] if module in self._found else 0

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*-rank-*") if not path.is_symlink()]


class SumWriter:
    """A file of sums that is being written. An error of the disk ends it, not the
    run."""

    def __init__(self, path: Path, shapes: Mapping[str, Shape]) -> None:
        self.path = path
        self._file: SafetensorsWriter | None = None
        self._names = set(shapes)
        layout: dict[str, tuple[Shape, torch.dtype]] = {}
        for name, shape in shapes.items():
            layout[name] = shape, torch.float32
            layout[_checksum_name(name)] = (1,), torch.int64
        size = sum(tensor_nbytes(shape, torch.float32) for shape in shapes.values())
        if not layout:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if shutil.disk_usage(path.parent).free > _ROOM * size:
                self._file = SafetensorsWriter(path, layout, {})
        except OSError as error:
            self._give_up(error)

    def write(self, module: str, total: Tensor) -> None:
        """Write a layer's sum, if it is one of this file's."""
        if self._file is None or module not in self._names:
            return
        total = total.cpu()
        try:
            self._file.write(module, total)
            self._file.write(_checksum_name(module), _checksum(total))
        except OSError as error:
            self._give_up(error)

    def finish(self) -> bool:
        """Close the file. Returns whether it has every sum."""
        if self._file is None:
            return False
        try:
            with self._file:
                return True
        except OSError as error:
            self._give_up(error)
        return False

    def _give_up(self, error: OSError) -> None:
        logger.warning(
            "warning: sums of merged weights cannot be kept, so that the next merge reads all cycles: %s", error,
        )  # fmt: skip
        self._file = None
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def _chain(path: Path) -> str:
    return path.name.partition("-")[0]


def _rank_file() -> str:
    return f"rank-{dist.get_rank():05d}.safetensors"


def _checksum_name(module: str) -> str:
    return f"{module}.checksum"


def _checksum(total: Tensor) -> Tensor:
    unsigned = tensor_checksum(total)
    return torch.tensor([unsigned - (1 << 64) if unsigned >> 63 else unsigned])
