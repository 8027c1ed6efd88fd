"""gloo groups of all ranks, and values that ranks tell each other: JSON of bounded size.
Nothing is unpickled, as a process that joins in place of a rank could run code so.

A gather goes along a binomial tree, in which a rank connects to about log2(N) others:

    rank 0 <- 1      0 <- 2 <- 3      0 <- 4 <- 5 ...      each rank forwards all received values in one message

gloo itself has a gather that needs N - 1 connections of rank 0, and a ring that needs
N - 1 sequential messages.
"""

import json
import os
from base64 import b64decode, b64encode
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.common.errors import RunError
from mora_ds.common.untrusted import parse_json, shown

MAX_BYTES = 256 * 2**20
"""The most that a rank takes at once, besides `BYTES_OF_EACH` for every rank of the run.
The table of a checkpoint of thousands of ranks takes some MiB."""
BYTES_OF_EACH = 8 * 2**20
"""The tokens of a streamed batch (`data.readers.BATCH_CHARACTERS`) take 5.6 MiB at most."""
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
    rank = dist.get_rank(group)
    world = dist.get_world_size(group)
    text = encode(value)
    step = 1
    while step < world:
        # A rank with this bit sends everything to the rank without it, then is done.
        if rank & step:
            dist.send(torch.tensor([len(text)]), rank - step, group)
            dist.send(_tensor(text), rank - step, group)
            return None
        if rank + step < world:
            size = torch.zeros(1, dtype=torch.int64)
            dist.recv(size, rank + step, group)
            data = _room(size, world, len(text))
            dist.recv(data, rank + step, group)
            text += b"," + data.numpy().tobytes()
        step *= 2
    values: list[Any] = decode(b"[" + text + b"]")
    if len(values) != world:
        raise RunError(f"{world} ranks have sent {len(values)} values")
    return values


def gather_to_all(value: Any, group: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank; else as
    `gather_to_rank0`."""
    values = gather_to_rank0(value, group)
    everywhere: list[Any] = decode(broadcast(encode(values), group))
    return everywhere


def broadcast(text: bytes, group: Any) -> bytes:
    """Rank 0's text on every rank. Collective over `group`."""
    is_rank0 = dist.get_rank(group) == 0
    size = torch.tensor([len(text)])
    dist.broadcast(size, src=0, group=group)
    data = _tensor(text) if is_rank0 else _room(size, dist.get_world_size(group))
    dist.broadcast(data, src=0, group=group)
    return data.numpy().tobytes()


def _room(size: Tensor, ranks: int, held: int = 0) -> Tensor:
    """Memory for a message of this size, besides the bytes that are held already."""
    announced = int(size)
    if not 0 <= announced <= MAX_BYTES + ranks * BYTES_OF_EACH - held:
        raise RunError(
            f"another rank announces a message of {announced:,} bytes: does another program use the port of this run?"
        )
    return torch.empty(announced, dtype=torch.uint8)


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


# -- values as JSON --------------------------------------------------------------------

_ARRAY = "__array__"
_BYTES = "__bytes__"
_PATH = "__path__"


def encode(value: Any) -> bytes:
    """A value as JSON, which makes lists of tuples, and texts of keys; it may have
    paths, bytes and arrays of numbers. Raises `TypeError` for others."""
    return json.dumps(value, default=_as_json).encode()


def decode(text: bytes) -> Any:
    """Inverse of `encode`. Raises `RunError`."""
    try:
        return parse_json(text.decode(), object_hook=_from_json)
    except (ValueError, TypeError, LookupError) as error:
        raise RunError(
            f"another rank sent what no rank of this run sends ({shown(error)}): does another program use its port?"
        ) from error


def _as_json(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # As text, each token of a stream would be a Python object on every rank
        text = b64encode(value.tobytes()).decode()
        return {_ARRAY: text, "dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return {_BYTES: b64encode(value).decode()}
    if isinstance(value, PurePath):
        return {_PATH: str(value)}
    raise TypeError(f"ranks do not exchange values of {type(value).__name__}")


def _from_json(content: dict[str, Any]) -> Any:
    if _ARRAY in content:
        # numpy refuses other than plain types, and shapes of another size
        data = bytearray(b64decode(content[_ARRAY]))
        return np.frombuffer(data, content["dtype"]).reshape(content["shape"])
    if _BYTES in content:
        return b64decode(content[_BYTES])
    return Path(content[_PATH]) if _PATH in content else content
