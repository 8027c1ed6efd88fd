"""A scale for each layer's update (--layerwise_scaling), measured before the first step.

    scale = RMS(W0 x) / RMS(update of x by random signs)        x: the layer's inputs over a few sequences

Adam moves every element of M by about the learning rate, whatever a layer's activations
are. With the scale a step of it moves every layer's output by a share of W0 x that the
learning rate alone decides. The scales are fixed from then on: the adapter's config has
them (`AdapterConfig.layer_scales`), and with it checkpoints, ledger and exports.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.inject import config_of
from mora_ds.adapters.layer import AdaptedLinear, MoRALinear, mora_layers
from mora_ds.adapters.ops.spec import permutation_seed
from mora_ds.common.errors import UserError
from mora_ds.data import Mixture
from mora_ds.data.packing import stack
from mora_ds.models.attention import model_inputs
from mora_ds.train.non_fatal import eval_mode

FLAG = "--layerwise_scaling"

SEQUENCES = 8
TOKENS = 1024
"""Of each sequence, at most: enough for a mean square, of long ones too."""


def measured_scales(
    model: nn.Module, data: Mixture, device: torch.device
) -> dict[str, float]:
    """Layer -> its scale, in three digits, over the first sequences of the first
    source. `model`: injected and not trained yet, on `device`. Not collective: one rank
    measures, so that all have the same bits. Raises `UserError` that names a layer
    without a scale."""
    seed = config_of(model).seed
    layers = mora_layers(model)
    energies = {name: torch.zeros(2, dtype=torch.float64) for name in layers}
    hooks = [
        layer.register_forward_hook(
            partial(_add_energies, energies[name], permutation_seed(seed, name, 0)),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    try:
        with eval_mode(model, unsplit=True):
            for index in range(SEQUENCES):
                block = data.sources[0].peek(index)
                batch = stack([{key: row[:TOKENS] for key, row in block.items()}])
                on_device = {key: tensor.to(device) for key, tensor in batch.items()}
                model(**model_inputs(model, on_device))
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            # A module of a layer on a GPU. ZeRO-3 numbers modules, and stops where ranks
            # have different ones (partitioned_param_coordinator.py, `reset_step`)
            if isinstance(layer, MoRALinear):
                layer.tables = None
    return {name: _scale(name, pair) for name, pair in energies.items()}


def _add_energies(
    energies: Tensor,
    seed: int,
    layer: AdaptedLinear,
    args: Any,
    kwargs: Any,
    output: Tensor,
) -> None:
    """Forward hook: adds the squared norms of W0 x and of the update to `energies`
    (2,)."""
    adapter_weight = layer.adapter_weight
    first = adapter_weight.data
    adapter_weight.data = _moved(first, seed)
    moved = layer.forward(*args, **kwargs)
    adapter_weight.data = first
    frozen = output if layer.bias is None else output - layer.bias
    energies += torch.stack([_energy(frozen), _energy(moved - output)])


def _moved(first: Tensor, seed: int) -> Tensor:
    """The initial weight with random signs for its zeros: all of M, and LoRA's B."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, first.shape, generator=generator) * 2 - 1
    return torch.where(first == 0, signs.to(first), first)


def _energy(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square().cpu()


def _scale(name: str, energies: Tensor) -> float:
    frozen, update = energies
    scale = (frozen / update).sqrt().item()
    if not 0 < scale < math.inf:
        raise UserError(
            f"{FLAG}: {name} has no scale, as its output in {SEQUENCES} sequences is zero or no number: leave it out "
            "of --target_modules"
        )
    return float(f"{scale:.3g}")
