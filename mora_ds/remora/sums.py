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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
    tensor_checksum,
)
from mora_ds.remora.ledger import Ledger

logger = logging.getLogger(__name__)

SUMS_FOLDER = "sums"
_ROOM = 3
"""Sums are kept while the disk has space for this many more of all processes' sums: they
must not keep a checkpoint from being written."""


class MergedSums:
    """The sums in a folder. All processes read them; those of the first node write.

    open -> read, write by layer -> commit
    """

    def __init__(self, folder: Path, size: int) -> None:
        """`size`: bytes of the sums of all processes."""
        self.folder = folder
        self.size = size
        self.keep = ""
        """Head of the last checkpoint's ledger, from which a killed run goes on."""
        self._found: dict[str, tuple[Path, Any]] = {}
        """Module -> the file of its sum, and its reader."""
        self._is_merge = False
        self._shapes: Mapping[str, Shape] = {}
        """Of the sums that this process writes."""
        self._file: SafetensorsWriter | None = None

    def open(self, ledger: Ledger, shapes: Mapping[str, Shape], is_merge: bool) -> None:
        """Find the sums of all cycles of `ledger`, and begin a file of those in `shapes`:
        for a merge, or where some are missing."""
        for path in self._files():
            if _chain(path) == ledger.head:
                with suppress(UserError):
                    handle = open_safetensors(path)
                    names = set(handle.keys())
                    sums = [name for name in names if f"{name}.checksum" in names]
                    self._found.update(dict.fromkeys(sums, (path, handle)))
        with self._disk():
            self._partial.unlink(missing_ok=True)
        self._shapes = shapes
        self._is_merge = is_merge
        is_missing = not shapes.keys() <= self._found.keys()
        if shapes and (is_merge or (ledger.cycles and is_missing)):
            with self._disk():
                self._begin()

    def read(self, module: str, shape: Shape) -> Tensor | None:
        """The sum of a layer with a weight of this shape, on the CPU; None where there
        is none, or a damaged one. Do not write to it: it is the mapped file. A merge
        trusts what the run has written or checked itself, as it trusts the files of
        the base."""
        if module not in self._found:
            return None
        path, handle = self._found[module]
        # A crafted header may announce any size, which is mapped before it is compared
        if shape_dtype(handle, module) == (shape, torch.float32):
            total: Tensor = handle.get_tensor(module)
            checksum = handle.get_tensor(f"{module}.checksum").tolist()
            if self._is_merge or checksum == _checksum(total).tolist():
                return total
        logger.warning("warning: the sum of %s is damaged, and is formed again", module)
        path.unlink(missing_ok=True)
        return None

    def write(self, module: str, total: Tensor) -> None:
        """Write the sum of a layer, if it is this process's."""
        if self._file is not None and module in self._shapes:
            total = total.cpu()
            with self._disk():
                self._file.write(module, total)
                self._file.write(f"{module}.checksum", _checksum(total))

    def release(self) -> None:
        """Unmap the files."""
        self._found.clear()

    def commit(self, head: str) -> None:
        """Name the sums after the ledger's head, and delete those that neither the next
        merge nor a resume reads."""
        file = self._file
        if file is not None:
            with self._disk():
                with file:
                    # A full disk may show only when the file is closed
                    pass
                self._partial.replace(self.folder / f"{head}-{_rank_file()}")
        self._file = None
        if dist.get_rank() == 0:
            for path in self._files():
                if _chain(path) not in (head, self.keep):
                    path.unlink(missing_ok=True)
            # Killed processes of more ranks may have left files
            end = f".rank-{dist.get_world_size():05d}"
            for path in self.folder.glob(".rank-*.partial"):
                if path.name >= end:
                    path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete all sums. A longer run forms them again."""
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self) -> None:
        layout: dict[str, tuple[Shape, torch.dtype]] = {}
        for name, shape in self._shapes.items():
            layout[name] = shape, torch.float32
            layout[f"{name}.checksum"] = (1,), torch.int64
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free > _ROOM * self.size:
            self._file = SafetensorsWriter(self._partial, layout, {})

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """A context in which an error of the disk ends the file, not the run."""
        try:
            yield
        except OSError as error:
            self._file = None
            logger.warning(
                "warning: sums of merged weights are not kept, so that the next merge reads all cycles: %s", error,
            )  # fmt: skip
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        return self.folder / f".{_rank_file()}.partial"

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*-rank-*") if not path.is_symlink()]


def _chain(path: Path) -> str:
    return path.name.partition("-")[0]


def _rank_file() -> str:
    return f"rank-{dist.get_rank():05d}.safetensors"


def _checksum(total: Tensor) -> Tensor:
    unsigned = tensor_checksum(total)
    return torch.tensor([unsigned - (1 << 64) if unsigned >> 63 else unsigned])
