"""Linear maps of the last dimension that operators are made of: gathers, sums and rotations, without parameters.

Shape legend:  D = inputs, R = r_hat, N = blocks.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)

_SCRATCH_BYTES = 2**26
"""The most that one use of `scratch` keeps."""


def gather(x: Tensor, index: Tensor, missing: Tensor | None = None) -> Tensor:
    """x[..., index], zero at the positions `missing`. Two-dimensional inside, which is up to five times faster on a
    CPU."""
    taken = x.reshape(-1, x.shape[-1]).index_select(1, index)
    if missing is not None:
        taken = taken.index_fill_(1, missing, 0)
    return taken.view(*x.shape[:-1], len(index))


def prefers_scatter(x: Tensor) -> bool:
    """Whether groups of x are summed by scattering and not by gathering: on a CPU. On a GPU scattered sums
    are atomic, so that their order would vary."""
    return x.device.type == "cpu"


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def scratch(use: str, like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor of `like`'s dtype and device, which the next call with this `use` may write to. The same
    memory each time on a CPU, where new memory of some MiB takes longer to map than to fill. It is new on a GPU, whose
    allocator keeps memory, above 64 MiB, and where autograd records."""
    numbers = math.prod(shape)
    is_plain = type(like) in (Tensor, torch.nn.Parameter)  # and no FakeTensor
    if not (is_plain and reuses_memory(like)) or numbers * like.element_size() > _SCRATCH_BYTES:
        return like.new_empty(shape)
    memory = _kept.memory.get((use, like.dtype))
    if memory is None or memory.numel() < numbers:
        with torch.inference_mode(False):  # it may be training that takes it next
            memory = _kept.memory[use, like.dtype] = torch.empty(numbers, dtype=like.dtype)
    return memory[:numbers].view(shape)


def reuses_memory(x: Tensor) -> bool:
    """Whether results that live for one operation are written to `scratch`."""
    return prefers_scatter(x) and not torch.is_grad_enabled()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of the last dimension in half-split pairs (as in Llama): (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
