"""Layers and MoRA matrices to put into a merge ledger."""

from __future__ import annotations

import torch

from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind, permutation_seed
from mora_ds.remora.ledger import LayerEntry


def entry(module: str, cycle: int = 0, kind: OperatorKind = OperatorKind.ROTATE, r_hat: int = 6) -> LayerEntry:
    spec = OperatorSpec(kind, 32, 32, r_hat, Grouping.PERMUTED, permutation_seed(0, module, cycle))
    return LayerEntry(module, f"{module}.weight", False, spec)


def layers_of(cycle: int, modules: tuple[str, ...] = ("a.q", "a.v")) -> dict[str, LayerEntry]:
    return {module: entry(module, cycle) for module in modules}


def squares_for(layers: dict[str, LayerEntry], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = {name: each.operator.r_hat for name, each in layers.items()}
    return {name: torch.randn(side, side, generator=generator) for name, side in sides.items()}
