"""--init_adapter: a run with domains starts from the squares of an earlier one, in place of zero.

The shared squares are taken as they are, those of domains by the domain's name; a domain that is new begins at zero.
The earlier run must have the same base, layers and operators, and have merged nothing: a merged square is in its base.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mora_ds.adapters.domains import OWN, DomainLinear, domain_layers, domains_of
from mora_ds.checkpoint.adapter_files import AdapterFile, AdapterTensors, BaseReference
from mora_ds.checkpoint.layout import find_adapter
from mora_ds.deploy.adapter_io import open_adapter
from mora_ds.engine import zero
from mora_ds.errors import UserError

FLAG = "--init_adapter"


@dataclass(frozen=True)
class InitialAdapter:
    """An adapter that fits a model. Make it with `InitialAdapter.open`."""

    folder: Path
    facts: AdapterFile
    tensors: AdapterTensors

    @classmethod
    def open(cls, path: Path, model: nn.Module, fingerprint: str) -> InitialAdapter:
        """Raises `UserError` naming what does not fit. `fingerprint`: of the model's base."""
        folder = find_adapter(path.expanduser())
        facts, ledger = open_adapter(folder)
        if ledger.cycles:
            raise UserError(
                f"{FLAG} {path}: {ledger.cycles} merged cycle(s) are in the base of that run and not in its squares: "
                "start from what tools/export_hf.py --domain shared makes of it"
            )
        if facts.trainables:
            raise UserError(
                f"{FLAG} {path}: that run trained {facts.trainables[0]} beside its squares, which would be left out: "
                "start from the model that tools/export_hf.py makes of it"
            )
        if (found := BaseReference.read(folder).fingerprint) != fingerprint:
            raise UserError(f"{FLAG} {path} is an adapter of another base: fingerprint {found}, not {fingerprint}")
        layers, names = domain_layers(model), domains_of(model).names
        there = () if facts.domains is None else facts.domains.names
        if set(names).isdisjoint(there) and any(OWN in layer.frozen_values for layer in layers.values()):
            raise UserError(
                f"{FLAG} {path}: --freeze domains would keep the squares of {', '.join(names)} at zero: that run has "
                + (f"those of {', '.join(there)}" if there else "no domains")
            )
        if different := sorted(set(layers) ^ set(facts.layers)):
            raise UserError(f"{FLAG} {path} adapts other layers (--target_modules), e.g. {different[0]}")
        for name, layer in layers.items():
            own = layer.own_spec if facts.domains is None else facts.domains.operators.get(name)
            if (facts.layers[name].operator, own) != (layer.spec, layer.own_spec):
                raise UserError(
                    f"{FLAG} {path}: the square of {name} means something else there (--mora_rank, --operator, "
                    f"--grouping, --seed): {facts.layers[name].operator}, not {layer.spec}"
                )
        return cls(folder, facts, AdapterTensors.open(folder, facts))

    def put(self, engine: zero.Engine) -> str:
        """Into the engine's model: masters and every copy. Returns what to say."""
        domains = domains_of(engine.module).names
        for name, layer in domain_layers(engine.module).items():
            _set(engine, layer, "square", self.tensors.square(name))
            _set(engine, layer, "domain_squares", self._own(name, layer, domains))
        known = () if self.facts.domains is None else self.facts.domains.names
        found, new = ([name for name in domains if (name in known) is there] for there in (True, False))
        begins = f"; {', '.join(new)}: from zero" if new else ""
        return f"squares of {self.folder}: the shared ones{''.join(f', {name}' for name in found)}{begins}"

    def _own(self, module: str, layer: DomainLinear, domains: tuple[str, ...]) -> Tensor:
        own = self.facts.domains
        shape = layer.own_spec.r_hat, layer.own_spec.r_hat
        return torch.stack(
            [
                self.tensors.domain_square(module, name)
                if own is not None and name in own.names
                else torch.zeros(shape)
                for name in domains
            ]
        )


def _set(engine: zero.Engine, layer: DomainLinear, name: str, value: Tensor) -> None:
    if name in layer.frozen_values:
        layer.get_buffer(name).copy_(value)
    else:
        zero.set_fp32(engine, layer.get_parameter(name), value)
