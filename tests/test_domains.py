"""A square for every domain beside the shared one: sums over rows, sharding, merges, files, runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mora_ds.config import Freeze, MoRAConfig
from mora_ds.domain_layer import domain_layers, domains_of
from mora_ds.domain_squares import apply_per_row
from mora_ds.errors import RunError, UserError
from mora_ds.injection import inject, mora_layers, set_cycle
from mora_ds.operators import OperatorKind, mora_update
from tests.models import tiny_model, tokens

NAMES = ("law", "code", "news", "prose")
KINDS = tuple(kind.value for kind in OperatorKind)


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


def row_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(rows,) summed next-token losses."""
    logits = model(input_ids=ids, use_cache=False).logits
    nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return nll.view(len(ids), -1).sum(dim=1)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain_of(model: Any, operator: str, family: str, cycle: int, domain: int) -> Any:
    """An ordinary model of one domain: a shared square, and where its wiring is the same, M + M_k in it."""
    plain = tiny_model(family)
    inject(plain, MoRAConfig(rank=4, operator=operator, compute="activation"))
    for name, layer in mora_layers(plain).items():
        both = domain_layers(model)[name]
        assert both.own_spec == layer.spec == both.spec or cycle
        layer.square.data = both.square.data + both.domain_squares.data[domain]
    return plain


ROWS = ("code", "law", "prose", "code", "news", "law", "law", "prose")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("operator", KINDS)
def test_a_mixed_batch_is_what_one_model_a_domain_makes_of_its_rows(operator: str, family: str) -> None:
    """Losses of every row and gradients of every square against ordinary squares M + M_k, one model a domain."""
    model, ids = domain_model(operator, family), tokens(len(ROWS), 12)
    domains_of(model).set(ROWS)
    found = row_losses(model, ids)
    found.sum().backward()
    mine = gradients(model)
    shared = {name: torch.zeros_like(layer.square) for name, layer in domain_layers(model).items()}
    for index, domain in enumerate(NAMES):
        chosen = torch.tensor([name == domain for name in ROWS])
        plain = plain_of(model, operator, family, 0, index)
        losses = row_losses(plain, ids[chosen])
        losses.sum().backward()
        assert torch.allclose(found[chosen], losses, rtol=1e-6)
        for name, layer in mora_layers(plain).items():
            own = mine[f"{name}.domain_squares"][index]
            assert torch.allclose(own, layer.square.grad, rtol=1e-5, atol=1e-6), (name, domain)
            shared[name] += layer.square.grad
    for name, total in shared.items():
        assert torch.allclose(mine[f"{name}.square"], total, rtol=1e-5, atol=1e-6)
        assert total.abs().max() > 1e-3
