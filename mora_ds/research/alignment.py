"""The alignment loss: it draws each layer's update into the leading subspaces of the
frozen weight.

    loss -= weight * mean over layers of share
    share = |Uq^T D Vq|^2 / (|D|^2 + (OFFSET |W0|)^2)     D: the layer's delta; Uq, Vq: q leading singular vectors of W0

D is never formed: Uq^T D Vq is the update of q vectors, and |D|^2 follows from D's
factors, or from what M is for each block. The offset makes the share and its gradient 0
at M = 0, where the quotient alone has no limit; a delta of a thousandth of the weight's
norm counts half of what its direction would give, a larger one almost all of it.

    alignment = Alignment(model, weight)                  after `inject`, before `initialize`
    alignment.leading = leading_of_base(...)              or a checkpoint's (`AlignmentSection`)
    engine.backward(loss + alignment.loss())              after each forward pass of the model

Shape legend:  O = d_out, D = d_in, R = r_hat, N = blocks that M is applied to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mora_ds.adapters.layer import AdaptedLinear, mora_layers
from mora_ds.adapters.ops.mora import (
    OperatorSpec,
    block_matrices,
    decompress_transpose,
    mora_update,
    operator_of,
)
from mora_ds.adapters.ops.spec import UpdateSpec, additive
from mora_ds.checkpoint.sections import (
    CheckpointFiles,
    Gathered,
    SavedCheckpoint,
    Section,
)
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.tensor_files import Tensors
from mora_ds.config.research import ALIGNMENT_RANK
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.svd import from_base_weights, leading_vectors
from mora_ds.runtime.ranks import Ranks

OFFSET = 1e-3
"""Fraction of the weight's norm that is added to the delta's norm, both squared."""

FILE = "alignment.safetensors"
"""In a checkpoint: "<module>.left", ".right" and ".norm" of every layer."""


class Leading(NamedTuple):
    """The leading directions of a frozen weight W0 (O, D), in fp32."""

    left: Tensor
    """(q, O): left singular vectors, one a row, the leading ones first."""
    right: Tensor
    """(q, D): the right ones, in the same order."""
    norm: Tensor
    """(): Frobenius norm of W0."""


# -- the share of one layer ------------------------------------------------------------


def share_of(spec: UpdateSpec, adapter_weight: Tensor, leading: Leading) -> Tensor:
    """The share of an adapter weight, from 0 to 1, in its dtype."""
    left, right, norm = (tensor.to(adapter_weight) for tensor in leading)
    factors = additive(spec).low_rank(adapter_weight)
    if factors is None:
        operator = operator_of(spec, "the alignment loss")
        inside = mora_update(operator, adapter_weight, right) @ left.T
        energy = energy_of_blocks(operator, adapter_weight)
    else:
        down, up = factors
        inside = (left @ up) @ (down @ right.T)
        energy = ((up.T @ up) * (down @ down.T)).sum()
    return inside.square().sum() / (energy + (OFFSET * norm).square())


def energy_of_blocks(spec: OperatorSpec, mora_matrix: Tensor) -> Tensor:
    """|delta_weight(M)|^2 of M (R, R) that is applied to several blocks.

    A number of M R_n for block n stands in the delta once, where an output reads its
    row. Two of them are summed where the last block of inputs is filled up with the
    first inputs, and both blocks have the same outputs.
    """
    matrices = block_matrices(spec, mora_matrix)  # (N, R, R)
    ones = mora_matrix.new_ones(spec.d_out)
    is_read = decompress_transpose(spec, ones).unsqueeze(2)  # (N, R, 1)
    energy = (is_read * matrices.square()).sum()
    last = spec.blocks - 1
    wrapped = spec.blocks * spec.r_hat - spec.d_in
    if wrapped and last % spec.blocks_out == 0:
        first = matrices[0, :, :wrapped] * is_read[0]
        energy = energy + 2 * (first * matrices[last, :, -wrapped:]).sum()
    return energy


def leading_of_base(
    model: nn.Module,
    base: BaseCheckpoint,
    keys: Mapping[str, str],
    rank: int,
    ranks: Ranks,
) -> dict[str, Leading]:
    """{module: its `rank` leading directions} of every adapted layer. Arguments and
    errors as of `from_base_weights`; a weight that is too small is one too."""

    def shape(layer: AdaptedLinear) -> tuple[int, int]:
        return rank, layer.out_features + layer.in_features + 1

    def decompose(name: str, layer: AdaptedLinear, weight: Tensor) -> Tensor:
        if rank > min(weight.shape):
            raise UserError(
                f"{ALIGNMENT_RANK} {rank}: {name} has {min(weight.shape)} singular vectors"
            )
        norm = weight.norm().expand(rank, 1)
        return torch.cat((*leading_vectors(weight, rank, name), norm), dim=1)

    layers = mora_layers(model)
    rows = from_base_weights(layers, base, keys, ranks, shape, decompose)
    leading = {}
    for name, layer in layers.items():
        sides = rows[name].split((layer.out_features, layer.in_features, 1), dim=1)
        left, right, norm = (side.contiguous() for side in sides)
        leading[name] = Leading(left, right, norm[0, 0])
    return leading


# -- the loss of a model ---------------------------------------------------------------


class Alignment:
    """The alignment loss of a model. Layers note their shares in the forward passes of
    the model, in training, as ZeRO-3 has M unsharded only while its layer runs."""

    def __init__(self, model: nn.Module, weight: float) -> None:
        layers = mora_layers(model)
        self.weight = weight
        self.leading: dict[str, Leading] = {}
        self.value = torch.zeros(())
        """The mean share over layers at the latest `loss`, for logs."""
        self.layers = list(layers)
        self._shares: dict[str, Tensor] = {}
        self._tables_in_use: dict[str, object] = {}
        """Index tables of each layer: on a GPU the layer itself holds others."""
        self._is_recording = False
        for name, layer in layers.items():
            layer.register_forward_hook(partial(self._after_layer, name))
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def loss(self) -> Tensor:
        """The term that the latest forward pass adds to its loss; layers that it did not
        use contribute 0. Raises `RunError` where none was made in training mode."""
        if not self._shares:
            raise RunError("the alignment loss needs a forward pass in training mode")
        mean = torch.stack(list(self._shares.values())).sum() / len(self.layers)
        self._shares.clear()
        self.value = mean.detach()
        return -self.weight * mean

    def _begin(self, model: nn.Module, inputs: object) -> None:
        self._shares.clear()
        self._is_recording = True

    def _end(self, model: nn.Module, inputs: object, output: object) -> None:
        self._is_recording = False

    def _after_layer(
        self, name: str, layer: AdaptedLinear, inputs: object, output: Tensor
    ) -> Tensor:
        if not (layer.training and torch.is_grad_enabled()):
            return output
        leading = Leading(*(tensor.to(output.device) for tensor in self.leading[name]))
        self.leading[name] = leading
        self._tables_in_use[name] = additive(layer.spec).tables(output.device)
        # Gradient checkpointing runs the layer again in backward, when nothing is
        # recorded, and autograd expects the same operations there
        output, share = WithShareFunction.apply(
            output, layer.adapter_weight, layer, leading
        )
        if self._is_recording:
            self._shares[name] = share
        return output


class WithShareFunction(torch.autograd.Function):
    """(output, the layer's parameter) -> (output, share)."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        parameter: Tensor,
        layer: AdaptedLinear,
        leading: Leading,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.layer = layer
        ctx.leading = leading
        ctx.save_for_backward(parameter)
        return output.detach(), _layer_share(layer, parameter, leading)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        g_output, g_share = gradients
        if g_share is None:
            return g_output, None, None, None
        (parameter,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = parameter.detach().requires_grad_()
            share = _layer_share(ctx.layer, leaf, ctx.leading)
            (g_parameter,) = torch.autograd.grad(share, leaf, g_share)
        return g_output, g_parameter, None, None


def _layer_share(layer: AdaptedLinear, parameter: Tensor, leading: Leading) -> Tensor:
    """In fp32, or fp64 where the parameter is."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return share_of(layer.spec, layer.unshard(parameter.to(dtype)), leading)


# -- its part of a checkpoint ----------------------------------------------------------


@dataclass
class AlignmentSection(Section):
    """The leading directions, so that a resumed run has the same bits on any machine."""

    name = "alignment"
    files = (FILE,)
    required = (FILE,)

    alignment: Alignment

    def gather(self, step: int) -> Gathered:
        return Gathered(write=self._write)

    def _write(self, files: CheckpointFiles) -> None:
        tensors: Tensors = {}
        for name, leading in self.alignment.leading.items():
            for field, tensor in leading._asdict().items():
                tensors[f"{name}.{field}"] = tensor.cpu()
        files.tensors(FILE, tensors, {})

    def load(self, saved: SavedCheckpoint) -> None:
        tensors = load_file(saved.local(FILE))
        self.alignment.leading = {
            name: Leading(*(tensors[f"{name}.{field}"] for field in Leading._fields))
            for name in self.alignment.layers
        }
