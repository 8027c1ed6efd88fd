"""Forming one layer's frozen weight anew: what a merge, a replay and a loaded adapter do, and what a plan measures.

    write_live(layer, original, updates)      frozen weight = original + deltas of updates, summed in fp32, rounded once

It is rounded to the run's dtype, or to 8 bits (`int8.quantize`). Either way the sum starts at the original weight, so
that rounding errors do not accumulate over merges. In 4 bits the original alone is rounded, and the updates stay
matrices beside it (`nf4`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.ops.delta import live_weight
from mora_ds.adapters.ops.frozen import dense
from mora_ds.adapters.ops.spec import UpdateSpec


class MergeNorms(NamedTuple):
    """Frobenius norms, each a scalar on the layer's device."""

    square: Tensor
    delta: Tensor
    """Of the value's delta; `weight` is that of the frozen weight before the merge."""
    weight: Tensor
    lost: Tensor
    """Of the part of the delta that rounding keeps out of the frozen weight."""


def write_live(layer: AdaptedLinear, original: Tensor, updates: Iterable[tuple[UpdateSpec, Tensor]]) -> None:
    """In place. `original`: in the layout of the layer's weight; it is not written to."""
    if layer.is_packed:
        layer.round_again(original)
        layer.keep_merged(updates)
        return
    dtype = torch.float32 if layer.weight_scales is not None else layer.weight.dtype
    layer.write(live_weight(original, updates, layer.transposed, dtype, layer.device))


@torch.no_grad()
def merge_layer(
    layer: AdaptedLinear, original: Tensor, updates: Iterable[tuple[UpdateSpec, Tensor]], square: Tensor
) -> MergeNorms:
    """`write_live` with the unsharded fp32 value `square` as the last of `updates`; returns its norms."""
    old = layer.frozen_on(layer.device, copy=True)
    if layer.is_packed:
        layer.keep_merged(updates)  # the original's 4 bits stay as they are
    else:
        write_live(layer, original, updates)
    before = _norm(dense(old, torch.float32))
    moved = None
    if layer.weight.dtype is not torch.float32:
        moved = dense(layer.frozen_on(layer.device), torch.float32).float().sub_(dense(old, torch.float32))
    del old
    delta = layer.spec.delta_weight(square)
    norms = _norm(square), _norm(delta), before
    return MergeNorms(*norms, before.new_zeros(()) if moved is None else _norm(moved.sub_(delta)))


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32)
