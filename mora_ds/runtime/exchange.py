"""gloo groups of all ranks, and values that ranks tell each other: JSON with bytes and
arrays beside it, of bounded size. Nothing is unpickled, as a process that joins in place
of a rank could run code so.

A gather goes along a binomial tree, in which a rank connects to about log2(N) others:

    rank 0 <- 1      0 <- 2 <- 3      0 <- 4 <- 5 ...      each rank forwards all received values in one message

gloo itself has a gather that needs N - 1 connections of rank 0, and a ring that needs
N - 1 sequential messages.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.common.errors import RunError
from mora_ds.common.untrusted import parse_json, shown

MAX_BYTES = 256 * 2**20
"""The most that one rank may tell at once. The table of a checkpoint of thousands of
ranks takes some MiB."""
_LAZY = "TORCH_GLOO_LAZY_INIT"


def new_group(timeout_s: float) -> Any:
    """A gloo group of all ranks that connects two ranks on their first message.
    Collective.

    By default gloo connects all pairs of ranks in each new group: 1,023 sockets on each
    of 1,024 ranks. torch reads `_LAZY` in ProcessGroupGloo.cpp,
    `getDefaultGlooLazyInit`.
    """
    before = os.environ.get(_LAZY)
    os.environ[_LAZY] = "1"
    try:
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    finally:
        if before is None:
            del os.environ[_LAZY]
        else:
            os.environ[_LAZY] = before


def gather_to_rank0(value: Any, group: Any) -> list[Any] | None:
    """The values of all ranks, in rank order, on rank 0; None on other ranks.
    Collective over `group`, a gloo group of all ranks. Only rank 0 decodes values.

    Raises `TypeError` for a value that `encode` does not know, and `RunError` for a
    message that no rank of a run sends.
    """
    parts = _gathered(value, group)
    return None if parts is None else [decode(part) for part in parts]


def gather_to_all(value: Any, group: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank; else as
    `gather_to_rank0`."""
    parts = _gathered(value, group)
    message = broadcast(b"" if parts is None else _joined(parts), group)
    with from_a_rank():
        parts = _split(message)
    return [decode(part) for part in parts]


def broadcast(message: bytes, group: Any) -> bytes:
    """Rank 0's message on every rank. Collective over `group`."""
    is_rank0 = dist.get_rank(group) == 0
    size = torch.tensor([len(message)])
    dist.broadcast(size, src=0, group=group)
    data = _room(size, dist.get_world_size(group))
    if is_rank0:
        data = _tensor(message)
    dist.broadcast(data, src=0, group=group)
    return message if is_rank0 else data.numpy().tobytes()


def _gathered(value: Any, group: Any) -> list[bytes] | None:
    """The encoded values of all ranks on rank 0; None on other ranks."""
    rank = dist.get_rank(group)
    world = dist.get_world_size(group)
    parts = [encode(value)]
    step = 1
    while step < world:
        # A rank with this bit sends everything to the rank without it, then is done.
        if rank & step:
            message = _joined(parts)
            dist.send(torch.tensor([len(message)]), rank - step, group)
            dist.send(_tensor(message), rank - step, group)
            return None
        if rank + step < world:
            parts += _received(rank + step, min(step, world - rank - step), group)
        step *= 2
    return parts


def _received(sender: int, ranks: int, group: Any) -> list[bytes]:
    """The encoded values of as many ranks, from one of them."""
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, sender, group)
    data = _room(size, ranks)
    dist.recv(data, sender, group)
    with from_a_rank():
        parts = _split(data.numpy().tobytes())
    if len(parts) != ranks:
        raise RunError(f"rank {sender} sent {len(parts)} values instead of {ranks}")
    return parts


def _room(size: Tensor, ranks: int) -> Tensor:
    """Memory for a message of this size, which holds the values of so many ranks."""
    announced = int(size)
    if not 0 <= announced <= MAX_BYTES * ranks:
        raise RunError(
            f"another rank announces a message of {announced:,} bytes, more than {MAX_BYTES * ranks:,}: does another "
            "program use the port of this run?"
        )
    return torch.empty(announced, dtype=torch.uint8)


def _tensor(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


# -- values as bytes -------------------------------------------------------------------


def encode(value: Any) -> bytes:
    """A value of None, bools, numbers, strings, bytes, paths and arrays of numbers, in
    lists, tuples and dicts. Raises `TypeError` for others."""
    blobs: list[bytes] = []
    text = json.dumps(_tagged(value, blobs))
    return _joined([text.encode(), *blobs])


def decode(message: bytes) -> Any:
    """Inverse of `encode`. Raises `RunError`."""
    with from_a_rank():
        text, *blobs = _split(message)
        return _untagged(parse_json(text.decode()), blobs)


@contextmanager
def from_a_rank() -> Iterator[None]:
    """A context that turns errors of reading what a rank has sent into a
    `RunError`."""
    try:
        yield
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise RunError(
            f"another rank sent what no rank of this run sends ({shown(error)}): does another program use its port?"
        ) from error


def _tagged(value: Any, blobs: list[bytes]) -> Any:
    """The value as JSON; its bytes are added to `blobs`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list):
        return [_tagged(item, blobs) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_tagged(item, blobs) for item in value]}
    if isinstance(value, dict):
        pairs = [[_tagged(item, blobs) for item in pair] for pair in value.items()]
        return {"dict": pairs}
    if isinstance(value, PurePath):
        return {"path": str(value)}
    if isinstance(value, bytes):
        blobs.append(value)
        return {"bytes": len(blobs) - 1}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        blobs.append(value.tobytes())
        return {"array": [value.dtype.str, list(value.shape), len(blobs) - 1]}
    is_plain = value is None or isinstance(value, (bool, int, float, str))
    if not is_plain or isinstance(value, Enum):
        raise TypeError(f"ranks do not exchange values of {type(value).__name__}")
    return value


def _untagged(content: Any, blobs: list[bytes]) -> Any:
    if isinstance(content, list):
        return [_untagged(item, blobs) for item in content]
    if not isinstance(content, dict):
        return content
    ((tag, inner),) = content.items()
    if tag == "tuple":
        return tuple(_untagged(inner, blobs))
    if tag == "dict":
        return dict(_untagged(inner, blobs))
    if tag == "path":
        return Path(inner)
    if tag == "bytes":
        return blobs[inner]
    if tag != "array":
        raise ValueError(f"unknown tag {tag!r}")
    dtype, shape, index = inner
    return np.frombuffer(blobs[index], np.dtype(dtype)).reshape(shape).copy()


def _joined(parts: list[bytes]) -> bytes:
    """Number of parts, their sizes, and the parts."""
    sizes = np.array([len(parts), *map(len, parts)], "<i8")
    return b"".join([sizes.tobytes(), *parts])


def _split(message: bytes) -> list[bytes]:
    """Inverse of `_joined`. Raises `ValueError`."""
    count = int(np.frombuffer(message, "<i8", 1)[0])
    sizes = np.frombuffer(message, "<i8", max(count, 0), 8).tolist()
    parts = []
    start = 8 + 8 * len(sizes)
    for size in sizes:
        if not 0 <= size <= len(message) - start:
            raise ValueError(f"a part of {size} bytes")
        parts.append(message[start : start + size])
        start += size
    return parts
