"""One layer's frozen weight, formed anew: what a merge, a replay and a loaded adapter do, and a plan measures.

    write_live(layer, original, updates)      frozen weight = original + deltas of updates, summed in fp32, rounded once

Rounded to the run's dtype, or to 8 bits (`eight_bits.quantize`): either way the sum begins with the original, so that
no merge is made of what another one has rounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.ops.delta import live_weight
from mora_ds.adapters.ops.int8 import Weight, dense
from mora_ds.adapters.ops.spec import UpdateSpec


class MergeNorms(NamedTuple):
    """Frobenius norms, each a number on the layer's device."""

    square: Tensor
    delta: Tensor
    """Of what the square stands for; `weight` is that of the frozen weight before."""
    weight: Tensor
    lost: Tensor
    """Of what rounding keeps the frozen weight from taking up."""


def write_live(layer: AdaptedLinear, original: Tensor, updates: Iterable[tuple[UpdateSpec, Tensor]]) -> None:
    """In place. `original`: in the layout of the layer's weight; it is not written to."""
    dtype = torch.float32 if layer.weight_scales is not None else layer.weight.dtype
    layer.write(live_weight(original, updates, layer.transposed, dtype, layer.weight.device))


@torch.no_grad()
def merge_layer(
    layer: AdaptedLinear, original: Tensor, updates: Iterable[tuple[UpdateSpec, Tensor]], square: Tensor
) -> MergeNorms:
    """`write_live` with `square`, fp32 and whole, as the last of `updates`; and what that did."""
    old = layer.frozen_copy()
    write_live(layer, original, updates)
    before = _norm(dense(old, torch.float32))
    moved = None if layer.weight.dtype is torch.float32 else _moved(layer, old)
    del old
    delta = layer.spec.delta_weight(square)
    norms = _norm(square), _norm(delta), before
    return MergeNorms(*norms, before.new_zeros(()) if moved is None else _norm(moved.sub_(delta)))


def _moved(layer: AdaptedLinear, old: Weight) -> Tensor:
    """(d_out, d_in) fp32, a new tensor: by how much the frozen weight is another one than `old`."""
    now = dense(layer.frozen, torch.float32)
    return (now.float() if now.dtype is not torch.float32 else now).sub_(dense(old, torch.float32))


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32)
