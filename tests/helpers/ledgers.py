"""Layers and MoRA matrices to put into a merge ledger."""

import torch

from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind, permutation_seed
from mora_ds.common import files
from mora_ds.remora.ledger import LEDGER_FILE, LayerEntry, Ledger


def entry(module, cycle=0, kind=OperatorKind.ROTATE, r_hat=6):
    spec = OperatorSpec(
        kind, 32, 32, r_hat, Grouping.PERMUTED, permutation_seed(0, module, cycle)
    )
    return LayerEntry(module, False, spec)


def layers_of(cycle, modules=("a.q", "a.v")):
    return {module: entry(module, cycle) for module in modules}


def mora_matrices_for(layers, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    sides = {name: layer.operator.r_hat for name, layer in layers.items()}
    return {
        name: scale * torch.randn(side, side, generator=generator)
        for name, side in sides.items()
    }


def shortened(folder, cycles):
    """The ledger in the folder, of which only the first cycles are left."""
    content = files.read_json(folder / LEDGER_FILE)
    for dropped in content["cycles"][cycles:]:
        (folder / dropped["file"]).unlink()
    files.write_json_atomic(
        folder / LEDGER_FILE, {**content, "cycles": content["cycles"][:cycles]}
    )
    return Ledger.open(folder)
