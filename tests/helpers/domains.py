"""A tiny model with domain adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.domains import domain_layers
from mora_ds.adapters.inject import inject, set_cycle
from tests.helpers.models import tiny_model

NAMES = ("law", "code", "news", "prose")


def filled(model: nn.Module, seed: int = 0) -> None:
    """Squares that are not zero, so that every path carries a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for layer in domain_layers(model).values():
        for value in (layer.square, layer.domain_squares):
            value.data = 0.02 * torch.randn(value.shape, generator=generator)


def domain_model(operator: str, family: str = "llama", cycle: int = 0, names: Any = NAMES, **config: Any) -> Any:
    model = tiny_model(family)
    wanted = MoRAConfig(rank=4, operator=operator, domains=names, **config)
    inject(model, wanted)
    set_cycle(model, wanted, cycle)
    filled(model)
    return model
