"""The operations of `mora_ds.adapters.kernels.ops` in plain torch, which CPU tensors take
once this module is imported: what the kernels are tested against.

Sums are made in fp32 (fp64 for fp64), term after term in the order of the table, and
rounded once, as in the kernels. Shape legend: `mora_ds.adapters.kernels.tables`.
"""

import torch
import torch.nn.functional as F

from mora_ds.adapters.kernels.ops import NAMES
from mora_ds.adapters.ops.index_tables import signed
from mora_ds.adapters.ops.mora import rotate


def gather_sum(
    x,
    table,
    cos,
    sin,
    back,
):
    """See `ops.gather_sum`."""
    return _sums(x, table, cos, sin, back).to(x.dtype)


def gather_add_(
    y,
    x,
    table,
    cos,
    sin,
    back,
):
    """See `ops.gather_add_`."""
    y.copy_(_sums(x, table, cos, sin, back).add_(y))


def effective_weight(
    weight,
    scales,
    mora_matrix,
    unfold,
    slots,
    members,
    cos,
    sin,
    blocks,
):
    """See `ops.effective_weight`."""
    del members
    r_hat = len(mora_matrix)
    turned_blocks = blocks if cos is None else len(cos)
    padded = F.pad(
        _wide(mora_matrix), (0, 0, 0, 1)
    )  # one more row of zeros, which index -1 is
    read = [
        padded[row_slots.where(row_slots < 0, row_slots % r_hat)] for row_slots in slots
    ]
    # (O, N * R + 1) each
    read = [
        F.pad(_unturned(rows.repeat(1, turned_blocks), cos, sin), (0, 1))
        for rows in read
    ]
    delta = torch.zeros(weight.shape, dtype=padded.dtype, device=padded.device)
    for positions in unfold:
        for row_slots, rows in zip(slots, read, strict=True):
            meets = positions // r_hat % blocks == (row_slots // r_hat).unsqueeze(1)
            delta += rows.index_select(1, positions % rows.shape[1]).where(meets, 0)
    base = (
        weight.to(delta.dtype)
        if scales is None
        else weight * scales.unsqueeze(1).to(delta.dtype)
    )
    return delta.add_(base).to(mora_matrix.dtype)


def product(c, z):
    """See `ops.product`."""
    blocks = torch.arange(z.shape[1], device=c.device) % c.shape[1]
    terms_of_c = _wide(c).index_select(1, blocks).flatten(0, 1)
    return (terms_of_c.T @ _wide(z).flatten(0, 1)).unsqueeze(0).to(c.dtype)


def sum_parts(partial_sums, dtype):
    """See `ops.sum_parts`."""
    return partial_sums.sum(dim=0).to(dtype)


def _sums(
    x,
    table,
    cos,
    sin,
    back,
):
    wide = _wide(x)
    if back:
        wide = _unturned(wide, cos, sin)
    padded = F.pad(wide, (0, 1))
    total = padded.index_select(1, table[0] % padded.shape[1])
    for row in table[1:]:
        total += padded.index_select(1, row % padded.shape[1])
    if cos is not None and sin is not None and not back:
        return rotate(
            total.view(-1, len(cos), 2 * cos.shape[1]), *signed(cos, sin)
        ).flatten(1)
    return total


def _unturned(
    rows,
    cos,
    sin,
):
    """(T, N * R), each block rotated back; itself where nothing is rotated."""
    if cos is None or sin is None:
        return rows
    return rotate(
        rows.view(-1, len(cos), 2 * cos.shape[1]), *signed(cos, sin), back=True
    ).flatten(1)


def _wide(x):
    """x in the dtype that sums are made in."""
    return x if x.dtype == torch.float64 else x.float()


_LIBRARY = torch.library.Library("mora_ds", "IMPL")
for _name in NAMES:
    _LIBRARY.impl(_name, globals()[_name], "CPU")
