"""Moves of the last dimension that operators are made of: linear, without parameters, made of copies and sums.

Shape legend:  D = inputs, R = r_hat, N = blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


def gather(x: Tensor, index: Tensor, missing: Tensor | None = None) -> Tensor:
    """x[..., index], zero at the places `missing`. In two dimensions, where a CPU is up to five times faster."""
    found = x.reshape(-1, x.shape[-1]).index_select(1, index)
    if missing is not None:
        found = found.index_fill_(1, missing, 0)
    return found.view(*x.shape[:-1], len(index))


def scatters(x: Tensor) -> bool:
    """Whether `sum_by` is the way to sum: on a CPU. Elsewhere its order would be left to chance (atomic additions)."""
    return x.device.type == "cpu"


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
