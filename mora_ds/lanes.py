"""Moves of the last dimension that operators are made of: linear, without parameters, made of copies and sums.

Shape legend:  D = inputs, R = r_hat, N = blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index]. In two dimensions, where `index_select` is up to five times faster on a CPU than in three."""
    return (
        x.flatten(0, -2).index_select(1, index).unflatten(0, x.shape[:-1]) if x.dim() > 1 else x.index_select(0, index)
    )


def resize(x: Tensor, size: int) -> Tensor:
    """First `size` entries of the last dimension, zero-padded when there are fewer."""
    return x[..., :size] if x.shape[-1] >= size else F.pad(x, (0, size - x.shape[-1]))


def wrap(x: Tensor, size: int) -> Tensor:
    """(..., D) -> (..., size >= D), position q holding x[q mod D]."""
    d_in = x.shape[-1]
    if size == d_in:
        return x
    copies = [x] * (size // d_in) + ([x[..., : size % d_in]] if size % d_in else [])
    return torch.cat(copies, dim=-1)


def unwrap(columns: Tensor, d_in: int) -> Tensor:
    """Transpose of `wrap` on the last dimension: what position q carries is added to column q mod D."""
    size = columns.shape[-1]
    if size == d_in:
        return columns
    total = columns[:, :d_in].clone()
    for start in range(d_in, size, d_in):
        tail = columns[:, start : start + d_in]
        total[:, : tail.shape[1]] += tail
    return total


def deal(z: Tensor, blocks_out: int) -> Tensor:
    """(..., N, R) -> (..., blocks_out, R): block p of max(N, blocks_out) goes from p mod N to p mod blocks_out."""
    blocks_in = z.shape[-2]
    if blocks_in < blocks_out:
        return wrap(z.transpose(-1, -2), blocks_out).transpose(-1, -2)
    if blocks_in == blocks_out:
        return z
    rounds = math.ceil(blocks_in / blocks_out)
    z = F.pad(z, (0, 0, 0, rounds * blocks_out - blocks_in))
    return z.unflatten(-2, (rounds, blocks_out)).sum(dim=-3)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the last dimension with half-split pairing (as in Llama): (x1, x2) -> (x1 c - x2 s, x2 c + x1 s)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
