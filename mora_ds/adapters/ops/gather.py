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


def gather(x: Tensor, index: Tensor, use: str | None = None) -> Tensor:
    """x[..., index]. Two-dimensional inside, which is up to five times faster on a
    CPU. With `use` the result may lie in `scratch`."""
    flat = x.reshape(-1, x.shape[-1])
    memory = scratch(use, flat, len(flat), len(index)) if use and reuses_memory(flat) else None
    taken = torch.index_select(flat, 1, index, out=memory)
    return taken.view(*x.shape[:-1], len(index))


def select_rows(rows: Tensor, index: Tensor, use: str) -> Tensor:
    """rows[index], which may lie in `scratch`."""
    memory = scratch(use, rows, len(index), *rows.shape[1:]) if reuses_memory(rows) else None
    return torch.index_select(rows, 0, index, out=memory)


def on_cpu(x: Tensor) -> bool:
    """Whether x is computed with as a CPU likes it: from memory that is written again, and that stays in its cache."""
    return x.device.type == "cpu"


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}


_scratch = _Scratch()


def scratch(use: str, like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor of `like`'s dtype and device, which the next call with this `use` may write to. The same
    memory each time on a CPU, where new memory of some MiB takes longer to map than to fill. It is new on a GPU, whose
    allocator keeps memory, above 64 MiB, and where autograd records."""
    numbers = math.prod(shape)
    is_plain = type(like) in (Tensor, torch.nn.Parameter)  # and no FakeTensor
    if not (is_plain and reuses_memory(like)) or numbers * like.element_size() > _SCRATCH_BYTES:
        return like.new_empty(shape)
    memory = _scratch.memory.get((use, like.dtype))
    if memory is None or memory.numel() < numbers:
        with torch.inference_mode(False):  # it may be training that takes it next
            memory = _scratch.memory[use, like.dtype] = torch.empty(numbers, dtype=like.dtype, device=like.device)
    return memory[:numbers].view(shape)


def reuses_memory(x: Tensor) -> bool:
    """Whether results that live for one operation are written to `scratch`."""
    return on_cpu(x) and not torch.is_grad_enabled()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """RoPE of the last dimension in half-split pairs, as in Llama: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); with
    `back` the inverse. `cos` (..., 1, R / 2) and `sin` (..., 2, R / 2) of `signed`, for x (..., R). Few operations, as
    each of them costs more to start than to compute where matrices are small."""
    halves = x.unflatten(-1, (2, -1))
    turned = halves * cos
    crossed = halves.flip(-2) * sin
    return (turned.sub_(crossed) if back else turned.add_(crossed)).flatten(-2)


def add_rotated_(total: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """total (..., R) + `rotate` of x, in place, each product rounded with its sum or before it, as the CPU likes."""
    summed = total.unflatten(-1, (2, -1))
    halves = x.unflatten(-1, (2, -1))
    summed.addcmul_(halves, cos)
    summed[..., :1, :].addcmul_(halves[..., 1:, :], sin[..., :1, :])
    summed[..., 1:, :].addcmul_(halves[..., :1, :], sin[..., 1:, :])


def signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(..., R / 2) each -> what `rotate` multiplies both halves by."""
    return cos.unsqueeze(-2), torch.stack((-sin, sin), dim=-2)
