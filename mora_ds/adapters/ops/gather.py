"""Moves of the last dimension that operators are made of: linear, without parameters, made of copies and sums.

Shape legend:  D = inputs, R = r_hat, N = blocks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import update_wrapper
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mora_ds.errors import UserError

FLAG = "--compile"


def compile_operators() -> None:
    """Gathers, sums of groups and W0 + delta of all layers of this process each become one compiled pass. The first
    steps compile."""
    compile_moves("inductor")


def check_compiler(device_type: str | None = None) -> None:
    """torch's inductor writes C++ for a CPU and Triton for a GPU. Raises `UserError` where what compiles it is missing.

    `device_type`: default, that of this machine.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UserError(f"{FLAG} needs a C++ compiler on a CPU: install {compiler}, or leave the flag out")
    elif find_spec("triton") is None:
        raise UserError(f"{FLAG} needs triton on this device: install it, or leave the flag out")


LOW_PRECISION = (torch.bfloat16, torch.float16)


class Move:
    """A function of tensors that `compile_moves` puts its compiled form in place of. Tables are arguments of it, so
    that layers share what was compiled, in every cycle."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.eager = self.used = function
        update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Tensor:
        if self.used is not self.eager and not torch.is_grad_enabled():  # or both kinds of input would be compiled for
            arguments = tuple(each.detach() if isinstance(each, Tensor) else each for each in arguments)
        return self.used(*arguments)


def compile_moves(backend: str | None) -> None:
    """From here on, in this process, moves run compiled by torch.compile's `backend`; None: as they are written."""
    torch._dynamo.config.recompile_limit = max(_FORMS, torch._dynamo.config.recompile_limit)
    for move in (gather, gather_sum, add_rows):
        move.used = move.eager if backend is None else torch.compile(move.eager, backend=backend, dynamic=True)


_FORMS = 32
"""Compiled forms of one move: by dtype, with and without gradient, layout, table of missing places."""


@Move
def gather(x: Tensor, index: Tensor, missing: Tensor | None = None) -> Tensor:
    """x[..., index], zero at the places `missing`. In two dimensions, where a CPU is up to five times faster."""
    found = x.reshape(-1, x.shape[-1]).index_select(1, index)
    if missing is not None:
        found = found.index_fill_(1, missing, 0)
    return found.view(*x.shape[:-1], len(index))


@Move
def gather_sum(x: Tensor, index: Tensor, missing: Tensor | None, rows: int) -> Tensor:
    """(..., D), (rows * R,) -> (..., 1, R): what was gathered, summed over rows."""
    return gather.eager(x, index, missing).unflatten(-1, (rows, -1)).sum(dim=-2, keepdim=True)


@Move
def add_rows(weight: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """weight (O, D) + rows[slots]."""
    return rows.index_select(0, slots).add_(weight)


def scatters(x: Tensor) -> bool:
    """Whether `sum_by` is the way to sum: on a CPU. Elsewhere its order would be left to chance (atomic additions), and
    compiled a `gather_sum` is one pass."""
    return x.device.type == "cpu" and gather_sum.used is gather_sum.eager


def sum_by(x: Tensor, slots: Tensor, size: int) -> Tensor:
    """(..., D) -> (..., size): entry j is added to place slots[j].

    In low precision by a product with `one_hot`: CPUs multiply such numbers faster than they can move one by one, and
    sum them in fp32.
    """
    flat = x.reshape(-1, x.shape[-1])
    if x.dtype in LOW_PRECISION:
        total = flat @ one_hot(slots, size, x.dtype)
    else:
        total = flat.new_zeros(len(flat), size).scatter_add_(1, slots.expand(len(flat), -1), flat)
    return total.view(*x.shape[:-1], size)


def one_hot(slots: Tensor, size: int, dtype: torch.dtype, *more: Tensor) -> Tensor:
    """(D, size): 1 at (j, slots[j]), unless slots[j] is `size`; and at `more` pairs (rows, columns)."""
    width = size + 1
    zeros = torch.zeros(len(slots), width, dtype=dtype, device=slots.device)
    ones = torch.arange(0, zeros.numel(), width, device=slots.device) + slots
    zeros.view(-1).index_fill_(0, ones, 1)
    if more:
        rows, columns = more
        zeros.view(-1).index_fill_(0, rows * width + columns, 1)
    return zeros[:, :size]


def deal(z: Tensor, blocks_out: int) -> Tensor:
    """(..., N, R) -> (..., blocks_out, R): block p of max(N, blocks_out) goes from p mod N to p mod blocks_out."""
    blocks_in = z.shape[-2]
    if blocks_in == blocks_out:
        return z
    if blocks_in < blocks_out:
        turns, rest = divmod(blocks_out, blocks_in)
        return torch.cat([z] * turns + [z[..., :rest, :]], dim=-2)
    total = z[..., :blocks_out, :].clone()
    for start in range(blocks_out, blocks_in, blocks_out):
        chunk = z[..., start : start + blocks_out, :]
        total[..., : chunk.shape[-2], :] += chunk
    return total


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the last dimension with half-split pairing (as in Llama): (x1, x2) -> (x1 c - x2 s, x2 c + x1 s)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
