"""Portable adapters for tests and benchmarks, written from random MoRA matrices by the
project's own writers: no training.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from mora_ds.adapters.layer import linear_shape
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.target_modules import match_targets
from mora_ds.checkpoint.adapter_files import (
    AdapterFile,
    BaseReference,
    DomainMatrices,
    write_adapter,
)
from mora_ds.checkpoint.layout import LEDGER_FOLDER
from mora_ds.common import files
from mora_ds.models.base import BaseCheckpoint, map_model
from mora_ds.remora.ledger import LayerEntry, Ledger

Updates = dict[str, list[tuple[UpdateSpec, Tensor]]]
"""Module name -> (operator, MoRA matrix) of every cycle, the running one last."""


class Maker:
    """Writes adapters of one base."""

    def __init__(self, model, folder, dtype="float32"):
        """`model`: of transformers, which is saved to `folder` as the base where none lies
        there. `dtype`: of the live model."""
        if not (folder / "config.json").exists():
            model.save_pretrained(folder)
        self.model, self.folder, self.weights = model, folder, originals(model)
        base = BaseCheckpoint.open(folder)
        self.keys = map_model(
            base, model, dict(model.named_parameters(remove_duplicate=False))
        )
        self.reference = BaseReference(
            str(folder.resolve()), base.fingerprint(), self.keys, dtype
        )

    def layers(self, config, cycle):
        """The layers of a cycle: every layer that the config targets."""
        entries = {}
        for name, module in match_targets(self.model, config.target_modules).items():
            spec = config.operator_for(name, *linear_shape(module), cycle)
            entries[name] = LayerEntry(name, not isinstance(module, nn.Linear), spec)
        return entries

    def write(
        self,
        folder,
        config,
        cycles=0,
        scale=0.02,
        trained=None,
        dtype="float32",
        layers_of=None,
        facts=None,
        domains=(),
        **reference,
    ):
        """An adapter after `cycles` merges, with random MoRA matrices drawn from the
        config's seed; what is in it.

        `trained`: other trained tensors. `layers_of`: the layers of a cycle, in place of
        the config's. `facts`: of adapter.json. `domains`: each has a copy of the MoRA
        matrices. `reference`: other facts for base.json.
        """
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(config.seed)
        about = replace(self.reference, **reference)
        ledger = Ledger.create(folder / LEDGER_FOLDER, about.fingerprint)
        updates = {}
        for cycle in range(cycles + 1):
            layers = (
                self.layers(config, cycle) if layers_of is None else layers_of(cycle)
            )
            mora_matrices = {}
            for name, entry in layers.items():
                mora_matrices[name] = scale * torch.randn(
                    entry.operator.adapter_weight_shape, generator=generator
                )
                updates.setdefault(name, []).append(
                    (entry.operator, mora_matrices[name])
                )
            if cycle < cycles:
                ledger.append(cycle + 1, layers, mora_matrices.items())
        extra = dict(trained or {})
        operators = {name: entry.operator for name, entry in layers.items()}
        adapter = AdapterFile(
            layers=layers,
            config=config,
            dtype=dtype,
            cycle=cycles,
            step=7,
            trainables=tuple(extra),
            facts=dict(facts or {}),
            domains=DomainMatrices(domains, operators) if domains else None,
        )
        domain_mora_matrices = {
            name: mora_matrix.expand(len(domains), -1, -1)
            for name, mora_matrix in mora_matrices.items()
            if domains
        }
        write_adapter(folder, adapter, mora_matrices, extra, domain_mora_matrices)
        about.write(folder)
        files.write_manifest(folder)
        return updates


@torch.no_grad()
def summed(original, updates, transposed, dtype):
    """The merged weight to the bit, by complete deltas: the original in fp32, plus the
    delta of each update in turn, rounded to `dtype` once."""
    total = (original.T if transposed else original).float()
    for spec, adapter_weight in updates:
        total = total + spec.delta_weight(adapter_weight.float())
    return (total.T if transposed else total).to(dtype)


@torch.no_grad()
def merge(model, originals, updates):
    """Weights of `model` = originals with the updates merged, in place. `originals`: by
    name of the weight.
    """
    for name, cycles in updates.items():
        module = model.get_submodule(name)
        transposed = not isinstance(module, nn.Linear)
        original = originals[f"{name}.weight"]
        module.weight.copy_(summed(original, cycles, transposed, original.dtype))


def originals(model):
    """A copy of every weight, for `merge`."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
