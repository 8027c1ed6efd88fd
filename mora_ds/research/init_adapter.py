"""`research.init_adapter`: a run with domains starts from the MoRA matrices of an earlier run, in place of zero.

The shared matrices are taken as they are, those of domains by the domain's name; a new domain begins at zero. The
earlier run must have the same base, layers and operators, and no merged cycle: what is merged is part of its base.
"""

from pathlib import Path

import torch
from torch import nn

from mora_ds.adapters.domains import OWN, domain_layers, domains_of
from mora_ds.checkpoint.adapter_files import Adapter
from mora_ds.checkpoint.layout import ADAPTER_JSON, ADAPTER_TENSORS, find_adapter
from mora_ds.common.errors import UserError
from mora_ds.common.files import sha256_file
from mora_ds.common.untrusted import expanded
from mora_ds.engine import zero
from mora_ds.runtime.ranks import Ranks

FLAG = "research.init_adapter"


def check_same_files(path: Path, ranks: Ranks) -> None:
    """Raise `UserError` where there is no adapter, or not the same one on all ranks. Collective."""

    def digests() -> dict[str, str | None]:
        files = [find_adapter(expanded(path, FLAG)) / name for name in (ADAPTER_JSON, ADAPTER_TENSORS)]
        return {f"sha256 of {file.name}": sha256_file(file) if file.is_file() else None for file in files}

    ranks.same(FLAG, ranks.agree(f"files of {FLAG}", digests))


def open_initial(path: Path, model: nn.Module, fingerprint: str) -> Adapter:
    """The adapter at `path`. Raises `UserError` naming what does not fit the injected model, whose base has the
    `fingerprint`."""
    adapter = Adapter.open(find_adapter(expanded(path, FLAG)))
    if adapter.ledger.cycles:
        raise UserError(
            f"{FLAG} {path}: {adapter.ledger.cycles} merged cycle(s) are in the base of that run, not in its MoRA "
            "matrices: start from what mora-ds export --domain shared makes of it"
        )
    if adapter.file.trainables:
        raise UserError(
            f"{FLAG} {path}: that run also trained {adapter.file.trainables[0]}, which would be left out: start from "
            "the model that mora-ds export makes of it"
        )
    if adapter.reference.fingerprint != fingerprint:
        raise UserError(
            f"{FLAG} {path} is an adapter of another base: fingerprint {adapter.reference.fingerprint}, not "
            f"{fingerprint}"
        )
    layers = domain_layers(model)
    names = domains_of(model).names
    saved = adapter.file.domains
    saved_names = () if saved is None else saved.names
    if set(names).isdisjoint(saved_names) and any(OWN in layer.frozen_values for layer in layers.values()):
        raise UserError(
            f"{FLAG} {path}: research.freeze domains would keep the MoRA matrices of {', '.join(names)} at zero: "
            + (f"that run has those of {', '.join(saved_names)}" if saved_names else "that run has no domains")
        )
    if different := sorted(set(layers) ^ set(adapter.file.layers)):
        raise UserError(f"{FLAG} {path} adapts other layers (--target_modules), e.g. {different[0]}")
    for name, layer in layers.items():
        operator = adapter.file.layers[name].operator
        of_domains = layer.own_spec if saved is None else saved.operators.get(name)
        if (operator, of_domains) != (layer.spec, layer.own_spec):
            raise UserError(
                f"{FLAG} {path}: the MoRA matrix of {name} means something else there (--mora_rank, "
                f"--r_hat_multiple, --operator, --grouping, --seed): {operator}, not {layer.spec}"
            )
    return adapter


def put_initial(adapter: Adapter, engine: zero.Engine) -> str:
    """Copy the matrices into the engine's model, fp32 masters included. Returns a line for the log."""
    names = domains_of(engine.module).names
    saved = adapter.file.domains
    known = [name for name in names if saved is not None and name in saved.names]
    for module, layer in domain_layers(engine.module).items():
        zeros = torch.zeros(layer.own_spec.r_hat, layer.own_spec.r_hat)
        of_domains = [adapter.tensors.domain_square(module, name) if name in known else zeros for name in names]
        for value, tensor in {"square": adapter.tensors.square(module), OWN: torch.stack(of_domains)}.items():
            if value in layer.frozen_values:
                layer.get_buffer(value).copy_(tensor)
            else:
                zero.set_fp32(engine, layer.get_parameter(value), tensor)
    new = [name for name in names if name not in known]
    begins = f"; {', '.join(new)}: from zero" if new else ""
    return f"MoRA matrices of {adapter.folder}: the shared ones{''.join(f', {name}' for name in known)}{begins}"
