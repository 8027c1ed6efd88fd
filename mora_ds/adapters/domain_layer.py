"""A frozen linear layer with a shared square and one for every domain (`domain_squares`).

    y_b = W0 x_b + b + decompress(M compress(x_b)) + decompress(M_k compress(x_b))

Squares of domains are never merged while a run goes on, so they stay wired as in cycle 0. As long as the shared one is
wired likewise, M + M_k is one square a row, and both cost one product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.config import AdapterConfig, MoRAConfig
from mora_ds.adapters.domain_names import Freeze
from mora_ds.adapters.domains import Domains, squares_of_rows, update_rows
from mora_ds.adapters.layer import AdaptedLinear, MoRALinear, adapt
from mora_ds.adapters.ops.int8 import check_floating, frozen_linear
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.update import UpdateSpec, describe, value_name
from mora_ds.errors import RunError, UserError

OWN = "domain_squares"
"""Name of the parameter (K, r_hat, r_hat), here and in files."""


class DomainLinear(MoRALinear):
    """`MoRALinear`, and in `domain_squares` (K, r_hat, r_hat) what each domain has learned beside the others."""

    domain_squares: Tensor
    own_spec: OperatorSpec
    """What `domain_squares` mean; `spec` is the shared square's."""

    def __init__(
        self, base: Any, spec: OperatorSpec, domains: Domains, dropout: float = 0.0, freeze: Freeze = Freeze.NONE
    ) -> None:
        """Squares are zero at first. What is frozen is a buffer, in fp32 and out of DeepSpeed's sight."""
        super().__init__(base, spec, dropout, Compute.ACTIVATION)
        self.domains, self.own_spec = domains, spec
        own = self.square.data.new_zeros(len(domains.names), *self.square.shape)
        self.register_parameter(OWN, nn.Parameter(own))
        if freeze is not Freeze.NONE:
            name = "square" if freeze is Freeze.SHARED else OWN
            value = self._parameters.pop(name)
            assert value is not None
            self.register_buffer(name, value.data.float(), persistent=False)
            self.frozen_values = (name,)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters(recurse=False)).dtype

    def forward(self, x: Tensor) -> Tensor:
        choice = self.domains.choice(x)
        if choice is None:
            if self.training:
                raise RunError("rows to train on need a domain each: mora_ds.domains_of(model).set([...]) before")
            return super().forward(x)
        own = squares_of_rows(self.domain_squares.to(x.dtype), choice)
        rows = x.reshape(len(choice), -1, self.in_features)
        if self.training and self.dropout:
            rows = nn.functional.dropout(rows, self.dropout)
        if self.spec != self.own_spec:  # since the first merge
            return super().forward(x) + update_rows(self.own_spec, own, rows).view(*x.shape[:-1], -1)
        frozen = self.frozen
        check_floating(x, frozen)
        update = update_rows(self.spec, self.square.to(x.dtype) + own, rows)
        return frozen_linear(x, frozen, self.bias) + update.view(*x.shape[:-1], -1)


def layer_for(config: AdapterConfig, base: Any, spec: UpdateSpec, name: str, domains: Domains | None) -> AdaptedLinear:
    """The layer that takes the place of `base`, called `name` in its model, in cycle 0; with squares of domains, if
    there are any. Raises `UserError` for an update that rows cannot have of their own."""
    if domains is not None:
        if not (isinstance(config, MoRAConfig) and isinstance(spec, OperatorSpec)):
            raise UserError(
                f"--domain_adapters is for --operator truncate, share, decouple or rotate: {name} would get "
                f"{describe(spec)}"
            )
        return DomainLinear(base, spec, domains, config.dropout, Freeze(config.freeze))
    compute = Compute(config.compute) if isinstance(config, MoRAConfig) else Compute.ACTIVATION
    return adapt(base, spec, config.dropout, compute, config.first_seed(name, cycle=0))


def domain_layers(model: nn.Module) -> dict[str, DomainLinear]:
    """Module name -> layer with squares of domains, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DomainLinear)}


def domains_of(model: nn.Module) -> Domains:
    """Where the domains of rows are said. Without names for a model that has no domains."""
    return next((layer.domains for layer in domain_layers(model).values()), Domains(()))


def frozen_values(model: nn.Module) -> dict[str, Tensor]:
    """Name -> square, or squares of all domains, that are not trained: fp32."""
    layers = domain_layers(model).items()
    return {f"{name}.{value}": layer.get_buffer(value) for name, layer in layers for value in layer.frozen_values}


def told_of_domains(model: nn.Module) -> str:
    """For the report of an injection; empty where there are none."""
    layers = list(domain_layers(model).values())
    if not layers:
        return ""
    names, numel = layers[0].domains.names, sum(layer.domain_squares.numel() for layer in layers)
    kept = {"square": "; the shared squares are frozen", OWN: "; these are frozen"}
    frozen = "".join(kept[value] for value in layers[0].frozen_values)
    return (
        f"{len(names)} domains ({', '.join(names)}) with a square of their own in every layer: {numel:,} "
        f"parameters{frozen}. Once the shared square is wired anew, after a merge, a row has two products"
    )


def set_values(layer: AdaptedLinear, square: Tensor, own: Tensor | None, dtype: torch.dtype) -> None:
    """A layer's squares from fp32 ones, in `dtype` but for those that are frozen. Not where DeepSpeed holds them."""
    values = {value_name(layer.spec): square} if own is None else {value_name(layer.spec): square, OWN: own}
    for name, value in values.items():
        getattr(layer, name).data = value.to(torch.float32 if name in layer.frozen_values else dtype)


def restore_frozen(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """The squares that are not trained, from fp32 tensors by their names in the model."""
    for name, value in frozen_values(model).items():
        value.copy_(values[name])
