"""Writes safetensors files tensor by tensor, reads them lazily, and checksums tensors.

The file format (github.com/huggingface/safetensors, README): an 8-byte little-endian
length, a JSON header with dtype, shape and byte range of every tensor, then the bytes.
The header needs only shapes, so a file larger than memory can be written while its
tensors are computed. The library needs all tensors in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mora_ds.common.errors import UserError, unknown
from mora_ds.common.files import JsonObject, atomic_path

COMPUTE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Name in config.json -> dtype, for the dtypes of training and export."""

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Dtype -> its code in the file format."""

DTYPES = {code: dtype for dtype, code in CODES.items()}

Shape: TypeAlias = tuple[int, ...]
"""The shape of a tensor."""

Tensors: TypeAlias = dict[str, Tensor]
"""Name -> tensor."""


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in config.json, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(name: str) -> torch.dtype:
    """The dtype with this name. Raises `UserError` for unsupported names."""
    if name not in COMPUTE_DTYPES:
        raise UserError(unknown("dtype", name, COMPUTE_DTYPES))
    return COMPUTE_DTYPES[name]


def tensor_nbytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor."""
    return dtype.itemsize * math.prod(shape)


class SafetensorsWriter:
    """Writes a safetensors file: the header with all shapes, then tensors in any order.

    `layout`: name -> (shape, dtype). Wide dtypes are first in the file, so that every
    tensor is aligned to its element size. Leaving the `with` block raises `ValueError`
    if a tensor was not written.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[Shape, torch.dtype]],
        metadata: Mapping[str, str],
    ) -> None:
        self.layout = dict(layout)
        self._missing = set(layout)
        header: JsonObject = {"__metadata__": {"format": "pt", **metadata}}
        self._offsets: dict[str, int] = {}
        end = 0
        # `sorted` is stable: tensors of equal width keep their order
        for name in sorted(layout, key=lambda name: -layout[name][1].itemsize):
            shape, dtype = layout[name]
            start = end
            end += tensor_nbytes(shape, dtype)
            self._offsets[name] = start
            header[name] = {
                "dtype": CODES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Raises `ValueError` if it is not in the layout."""
        if name not in self._missing:
            raise ValueError(f"{name!r} is not in the layout, or was already written")
        if (tuple(tensor.shape), tensor.dtype) != self.layout[name]:
            raise ValueError(
                f"{name!r} is {tuple(tensor.shape)} {tensor.dtype}, in the layout {self.layout[name]}"
            )
        self._file.seek(self._start + self._offsets[name])
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(raw.numpy().data)
        self._missing.remove(name)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"not written: {', '.join(sorted(self._missing))}")


def write_safetensors(
    path: Path, tensors: Tensors, metadata: Mapping[str, str]
) -> None:
    """Write `tensors` to one file."""
    layout = {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    with SafetensorsWriter(path, layout, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def write_safetensors_atomic(
    path: Path, tensors: Tensors, metadata: Mapping[str, str]
) -> None:
    """Writes `tensors` to one file, atomically. Raises `RunError` on a full disk."""
    with atomic_path(path) as temporary:
        write_safetensors(temporary, tensors, metadata)


def open_safetensors(path: Path) -> Any:
    """A lazy, memory-mapped reader (`keys`, `metadata`, `get_tensor`, `get_slice`).

    Raises `UserError` that names the file if it is missing, truncated or not a
    safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged: {error}") from error


def shape_dtype(handle: Any, name: str) -> tuple[Shape, torch.dtype]:
    """Shape and dtype of a tensor, read from the header."""
    view = handle.get_slice(name)
    if view.get_dtype() not in DTYPES:
        raise UserError(
            f"tensor {name!r} has dtype {view.get_dtype()}, which is not supported"
        )
    return tuple(view.get_shape()), DTYPES[view.get_dtype()]


# -- checksum --------------------------------------------------------------------------

_CHUNK = 1 << 15
"""64-bit words per chunk: 256 KiB, which fit into a core's cache."""

_CHUNKS_PER_KERNEL = 256
"""Chunks hashed at a time on a GPU: 64 MiB, to reduce the overhead of kernel
launches."""

_MULTIPLIER = -7046029254386353131
"""2**64 divided by the golden ratio. It is odd, so multiplying by it is a bijection."""


def tensor_checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of a tensor's bytes in order, the same on every device.

    Per chunk: the sum of mix(word) * odd(position) mod 2**64, where mix is a bijection
    and the odd factors are pseudo-random. A change of one word always changes the sum;
    a swap of two words changes it except with a probability of about 2**-32. The sums
    of all chunks are hashed in order. Not secure against an adversary.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    factors = _factors(raw.device)
    sums = []
    chunks = 1 if raw.device.type == "cpu" else _CHUNKS_PER_KERNEL
    for part in raw.split(chunks * _CHUNK * 8):
        padding = -part.numel() % (_CHUNK * 8)
        words = (
            F.pad(part, (0, padding)).view(torch.int64).view(-1, _CHUNK) * _MULTIPLIER
        )
        # Masked, because the shift of a signed word copies its sign bit
        high_halves = (words >> 32).bitwise_and_(0xFFFFFFFF)
        sums.append(words.bitwise_xor_(high_halves).mul_(factors).sum(dim=1))
    digest = hashlib.blake2b(str(raw.numel()).encode(), digest_size=8)
    if raw.numel():
        digest.update(torch.cat(sums).cpu().numpy().astype("<i8").tobytes())
    return int.from_bytes(digest.digest(), "little")


@lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    """(_CHUNK,) odd numbers: splitmix64 of the position (Steele, Lea & Flood 2014)."""
    z = np.arange(1, _CHUNK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    with torch.inference_mode(False):
        return torch.from_numpy(z.view(np.int64)).to(device)
