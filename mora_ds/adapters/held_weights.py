"""W0 + delta, formed once in place of once for every product: the same numbers, quicker, for as much memory as the
adapted weights have in the dtype of the run.

    hold_weights(model)         from forward to backward of a micro-batch
    with weights_held(model):   and over all micro-batches of a step
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.linear import HeldWeight


def hold_weights(model: nn.Module) -> None:
    """Has each layer that forms W0 + delta keep it for backward. After `inject`."""
    for layer in mora_layers(model).values():
        if isinstance(layer, MoRALinear):
            layer.holds_weight = True


@contextmanager
def weights_held(model: nn.Module) -> Iterator[None]:
    """Within it neither M nor W0 may change. The layers that `hold_weights` has marked form W0 + delta once, with
    activation checkpointing too."""
    layers = [each for each in model.modules() if isinstance(each, MoRALinear) and each.holds_weight]
    for layer in layers:
        layer.held = HeldWeight()
    try:
        yield
    finally:
        for layer in layers:
            layer.held = None
