"""The alignment loss: how much of a delta lies in the frozen weight's leading subspaces, computed from M alone.

    share(M) = |Uq^T D Vq|^2 / (|D|^2 + (FLOOR |W0|)^2)        D = delta_weight(M); Uq, Vq: q leading singular vectors

Neither D nor any other tensor of d_out x d_in numbers is formed.

    numerator    D x = decompress(M compress(x)), so Uq^T D Vq = sum over blocks n of C_n M B_n^T, with
                 C = decompress_transpose(Uq^T) and B = compress(Vq^T), (q, N, R) each, made once a cycle
    denominator  M[i, j] acts on n_out(i) outputs and n_in(j) inputs: |D|^2 = sum_ij n_out(i) n_in(j) M_ij^2, plus twice
                 the products of columns that one input reads together where inputs wrap round (`delta_energy`)

The floor makes the share and its gradient 0 at M = 0, where the quotient alone has no limit; a delta of a thousandth of
the weight's norm counts half of what its direction would give, a larger one almost all of it.

Shape legend as in `ops.mora`:  D = d_in, O = d_out, R = r_hat, N = blocks; q = singular vectors on either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.layer import AdaptedLinear, ExpertStack, linear_shape
from mora_ds.adapters.ops.index_tables import rope_table, tables_of
from mora_ds.adapters.ops.mora import (
    OperatorSpec,
    block_squares,
    compress,
    decompress_transpose,
    input_columns,
    operator_of,
)
from mora_ds.adapters.target_modules import targets_of
from mora_ds.common.errors import RunError, UserError
from mora_ds.engine.device import current_device
from mora_ds.models.load import LoadedBase
from mora_ds.models.svd import leading_vectors
from mora_ds.runtime.ranks import Ranks

FLOOR = 1e-3
"""Share of the weight's norm whose square is added to that of the delta's norm."""

_Key = tuple[OperatorSpec, torch.device, torch.dtype]
"""What the factors of a layer are made for."""


@dataclass(frozen=True)
class Leading:
    """The leading directions of a frozen weight W0 (d_out, d_in), in fp32 on the CPU."""

    left: Tensor
    """(q, d_out): left singular vectors, one a row, the leading ones first."""
    right: Tensor
    """(q, d_in): the right ones, in the same order."""
    norm: float
    """Frobenius norm of W0."""


def leading_of_base(config: MoRAConfig, loaded: LoadedBase, rank: int, ranks: Ranks) -> dict[str, Leading]:
    """{module: its `rank` leading directions} of every layer that will be adapted, before injection. Collective.

    Rank 0 decomposes the original weights, one at a time; the others receive its bits. Nothing is stored: a resumed run
    decomposes them again, and finds the same bits on the same machine with as many threads. Raises `UserError` as
    `aligned_layers` does, and naming a weight that is not finite.
    """
    targets = aligned_layers(loaded.model, config, rank)
    device = current_device()

    def decompose() -> dict[str, Leading]:
        directions = {}
        for name, module in targets.items():
            key = loaded.keys[f"{name}.weight"]
            weight = loaded.base.read(key).to(device, torch.float64)
            if not torch.isfinite(weight).all():
                raise UserError(f"{loaded.base.folder}: {key} has NaN or infinite values, and no singular vectors")
            weight = weight.T if isinstance(module, Conv1D) else weight
            left, right = leading_vectors(weight, rank, name)
            directions[name] = Leading(left.float().cpu(), right.float().cpu(), weight.norm().item())
        return directions

    return ranks.on_first("singular vectors of the base", decompose, long=True)


class Alignment:
    """The alignment loss of a model with MoRA matrices. Construct it after `inject` and before `initialize`."""

    name = "alignment"

    def __init__(self, model: nn.Module, leading: Mapping[str, Leading], weight: float) -> None:
        """`leading`: of `leading_of_base`, the directions that span the leading subspaces."""
        layers = mora_layers(model)
        self.weight = weight
        self.layers = len(layers)
        self.value = torch.zeros(())
        """The mean share over layers at the latest `loss`, for logs."""
        self._leading = leading
        self._shares: dict[str, Tensor] = {}
        self._recording = False
        self._factors: dict[str, tuple[_Key, Factors]] = {}
        for name, layer in layers.items():
            layer.register_forward_hook(partial(self._after_forward, name))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Surrounds a forward whose `loss` is wanted."""
        self._shares.clear()
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def loss(self) -> Tensor:
        """The term that the latest forward adds to its loss; layers that it did not use contribute 0. Raises `RunError`
        where there was no forward in training mode within `recording`."""
        if not self._shares:
            raise RunError("no layer recorded its share: run the model in training mode, within Alignment.recording()")
        mean = torch.stack(list(self._shares.values())).sum() / self.layers
        self._shares.clear()
        self.value = mean.detach()
        return -self.weight * mean

    def _after_forward(
        self,
        name: str,
        layer: AdaptedLinear,
        inputs: object,
        output: Tensor,
    ) -> Tensor:
        """Forward hook of one layer, in training: notes its share."""
        if not (layer.training and torch.is_grad_enabled()):
            return output
        if layer.split is not None:
            raise RunError(f"the alignment loss needs unsharded matrices, and tensor parallelism splits {name}")
        output, share = _WithShare.apply(output, layer.value, self._factors_of(name, layer))
        if self._recording:
            self._shares[name] = share
        return output

    def _factors_of(self, name: str, layer: AdaptedLinear) -> Factors:
        """Made again when a merge has changed the layer's operator."""
        spec = _operator(layer)
        key = (spec, layer.value.device, torch.promote_types(layer.value.dtype, torch.float32))
        if name not in self._factors or self._factors[name][0] != key:
            self._factors[name] = key, factors_of(spec, self._leading[name], *key[1:])
        return self._factors[name][1]


def _operator(layer: AdaptedLinear) -> OperatorSpec:
    """The layer's operator."""
    return operator_of(layer.spec, "a layer with the alignment loss")


def aligned_layers(model: nn.Module, config: MoRAConfig, rank: int) -> dict[str, Any]:
    """{name: layer} of all that will be adapted, before injection; a planned model will do. Raises `UserError` naming
    experts, and a layer with fewer singular vectors than `rank`."""
    targets = targets_of(model, config)
    for name, module in targets.items():
        if isinstance(module, ExpertStack):
            raise UserError(
                f"--target_modules includes {name}, experts, which research.alignment_weight does not align"
            )
        d_in, d_out = linear_shape(module)
        if rank > min(d_in, d_out):
            raise UserError(
                f"research.alignment_rank {rank}: {name} is {d_out} x {d_in}, so it has {min(d_in, d_out)} singular "
                "vectors: take fewer, or leave it out of --target_modules"
            )
    return targets


def factor_bytes(model: nn.Module, rank: int) -> int:
    """Bytes of the `Factors` of all layers on each rank, in fp32."""
    numbers = 0
    for layer in mora_layers(model).values():
        spec = _operator(layer)
        numbers += 2 * rank * spec.blocks * spec.r_hat
    return 4 * numbers


class _WithShare(torch.autograd.Function):
    """(output, M) -> (output, share of M's delta)."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, square: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.factors = factors
        ctx.save_for_backward(square)
        return output.detach(), factors.share(square.to(factors.left.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        g_output, g_share = gradients
        if g_share is None or not ctx.needs_input_grad[1]:
            return g_output, None, None
        (square,) = ctx.saved_tensors
        factors = ctx.factors
        with torch.enable_grad():
            leaf = square.detach().to(factors.left.dtype).requires_grad_()
            (g_square,) = torch.autograd.grad(factors.share(leaf), leaf, g_share)
        return g_output, g_square.to(square.dtype), None


@dataclass(frozen=True)
class Factors:
    """What a layer's share is computed from, in one cycle, on one device."""

    left: Tensor
    """C (q, N, R)."""
    right: Tensor
    """B (q, N, R)."""
    floor: float
    """(FLOOR |W0|)^2."""
    spec: OperatorSpec

    def share(self, square: Tensor) -> Tensor:
        """The share of M (R, R), given in the factors' dtype: a number from 0 to 1."""
        inside = self.left.flatten(1) @ F.linear(self.right, square).flatten(1).T
        return inside.square().sum() / (delta_energy(self.spec, square) + self.floor)


@torch.no_grad()
def factors_of(
    spec: OperatorSpec,
    leading: Leading,
    device: torch.device,
    dtype: torch.dtype,
) -> Factors:
    """The factors of one layer."""
    left = decompress_transpose(spec, leading.left.to(device, torch.float64))
    right = compress(spec, leading.right.to(device, torch.float64))
    return Factors(left.to(dtype), right.to(dtype), (FLOOR * leading.norm) ** 2, spec)


def delta_energy(spec: OperatorSpec, square: Tensor) -> Tensor:
    """|delta_weight(M)|^2 of M (R, R)."""
    outputs = decompress_transpose(spec, square.new_ones(spec.d_out))  # (N, R): how many outputs read each row
    if spec.r_hat >= spec.d_in:  # one column for each input: together no more numbers than M has
        return (outputs.T * input_columns(spec, square).square()).sum()
    meeting = _where_blocks_meet(spec, square) if spec.blocks > 1 else _where_groups_meet(spec, square, outputs.T)
    return (outputs.T @ _inputs(spec, square) * square.square()).sum() + 2 * meeting


def _inputs(spec: OperatorSpec, like: Tensor) -> Tensor:
    """(N, R): how many inputs read each column; for rotate the squared length of what a column is rotated by, which is
    1 except for the rounding of the angles' table to fp32."""
    if spec.blocks == 1:
        return compress(spec, like.new_ones(spec.d_in))
    if not spec.rotates:
        return like.new_ones(spec.blocks_in, spec.r_hat)
    cos, sin = rope_table(spec.blocks_in, spec.r_hat, like.dtype, like.device)
    return (cos.square() + sin.square()).repeat(1, 2)


def _where_groups_meet(spec: OperatorSpec, square: Tensor, outputs: Tensor) -> Tensor:
    """Share: an input in two groups, because the last run wraps round, reads the sum of two columns of M. `outputs`:
    (R, 1)."""
    first, *later = tables_of(spec, square.device).unfold.table
    if not later:
        return square.new_zeros(())
    meets = later[0] >= 0
    first_columns = square[:, first[meets]]
    later_columns = square[:, later[0][meets]]
    return (outputs * first_columns * later_columns).sum()


def _where_blocks_meet(spec: OperatorSpec, square: Tensor) -> Tensor:
    """Decouple, rotate: the last input block is filled up with the first inputs; where the first output block reads
    both blocks, the last columns of M R_last and the first ones of M R_0 are summed."""
    last = spec.blocks_in - 1
    wrapped = spec.blocks_in * spec.r_hat - spec.d_in
    if not wrapped or last % spec.blocks_out:
        return square.new_zeros(())
    rows = min(spec.r_hat, spec.d_out)
    squares = block_squares(spec, square)[:, :rows]
    return (squares[0, :, :wrapped] * squares[last, :, spec.r_hat - wrapped :]).sum()
