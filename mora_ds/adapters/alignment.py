"""How much of a delta lies in the frozen weight's leading subspaces, from the square alone: pure functions.

    share(M) = |Uq^T D Vq|^2 / (|D|^2 + (FLOOR |W0|)^2)        D = delta_weight(M); Uq, Vq: q leading singular vectors

Neither D nor anything else of d_out x d_in numbers is formed.

    above      D x = decompress(M compress(x)), so Uq^T D Vq = sum over blocks n of C_n M B_n^T, with
               C = decompress_transpose(Uq^T) and B = compress(Vq^T), (q, N, R) each, made once a cycle
    below      a square's row is written to n_out(i) outputs and its column read from n_in(j) inputs:
               |D|^2 = sum_ij n_out(i) n_in(j) M_ij^2, and on top twice the products of columns that one input meets
               together, where inputs wrap round (`delta_energy`); subspace: <U^T U M V^T V, M>

The floor makes the share and its gradient 0 for a square of zeros, where the quotient alone has no limit; a delta of a
thousandth of the weight's norm counts half of what its direction would say, a larger one almost all of it.

Shape legend as in `operators`:  D = d_in, O = d_out, R = r_hat, N = blocks; q = vectors on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.ops import singular_vectors, subspace
from mora_ds.adapters.ops.gather import rotate
from mora_ds.adapters.ops.index_tables import rope_table, wiring
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorKind, OperatorSpec, compress, decompress_transpose, input_columns
from mora_ds.adapters.ops.subspace import SubspaceSpec
from mora_ds.adapters.ops.update import SquareSpec, UpdateSpec
from mora_ds.errors import RunError


class Alignment:
    """Of one model with squares. Make it after `inject` and before `initialize`."""

    def __init__(self, model: nn.Module, vectors: str, weight: float, rank: int) -> None:
        """`vectors`: the file of the base's singular vectors (`run_vectors`), of which `rank` a side are leading."""
        layers = mora_layers(model)
        self.weight, self.layers = weight, len(layers)
        self.share = torch.zeros(())
        """The mean over layers at the newest `loss`, which is what a curve shows."""
        self._shares: dict[str, Tensor] = {}
        self._hears = False
        for name, layer in layers.items():
            layer.register_forward_hook(_Hook(self, name, vectors, rank))

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Around a forward whose `loss` will be asked for."""
        self._shares.clear()
        self._hears = True
        try:
            yield
        finally:
            self._hears = False

    def note(self, name: str, share: Tensor) -> None:
        if self._hears:
            self._shares[name] = share

    def loss(self) -> Tensor:
        """What the newest forward adds to its loss. A layer that it did not use has no part in it. Raises `RunError`
        where there was none: in training mode, within `hearing`."""
        if not self._shares:
            raise RunError("no layer has told its share: run the model in training mode, within Alignment.hearing()")
        mean = torch.stack(list(self._shares.values())).sum() / self.layers
        self._shares.clear()
        self.share = mean.detach()
        return -self.weight * mean


def factor_bytes(model: nn.Module, rank: int) -> int:
    """What the factors of all layers take on each rank, in fp32."""
    return sum(4 * factor_numbers(layer.spec, rank) for layer in mora_layers(model).values())


class _Hook:
    """Of one layer. What it reads is made anew when a merge has wired the layer otherwise."""

    def __init__(self, heard: Alignment, name: str, vectors: str, rank: int) -> None:
        self._heard, self._name, self._vectors, self._rank = heard, name, vectors, rank
        self._factors: Factors | None = None

    def __call__(self, layer: AdaptedLinear, args: object, output: Tensor) -> Tensor:
        if not (layer.training and torch.is_grad_enabled()):
            return output
        if layer.split is not None:
            raise RunError(f"the alignment loss needs whole squares, and ranks share that of {self._name}")
        output, share = _WithShare.apply(output, layer.value, self._factors_of(layer))
        self._heard.note(self._name, share)
        return output

    def _factors_of(self, layer: AdaptedLinear) -> Factors:
        spec, value = layer.spec, layer.value
        assert not isinstance(spec, LoRASpec)
        dtype = torch.promote_types(value.dtype, torch.float32)
        held = self._factors
        if held is None or held.spec != spec or (held.left.device, held.left.dtype) != (value.device, dtype):
            held = self._factors = factors_of(spec, self._vectors, self._name, self._rank, value.device, dtype)
        return held


class _WithShare(torch.autograd.Function):
    """(output, square) -> (output, share of the square's delta)."""

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
        (square,), factors = ctx.saved_tensors, ctx.factors
        with torch.enable_grad():
            leaf = square.detach().to(factors.left.dtype).requires_grad_()
            (g_square,) = torch.autograd.grad(factors.share(leaf), leaf, g_share)
        return g_output, g_square.to(square.dtype), None


FLOOR = 1e-3
"""Of the weight's norm: what is added to the delta's, in squares."""

Grams = tuple[Tensor, Tensor]
"""(U^T U, V^T V), (R, R) each: vectors that are kept in fp32 are no more orthonormal than that."""


@dataclass(frozen=True)
class Factors:
    """What a layer's share is computed from, in one cycle, on one device."""

    spec: SquareSpec
    left: Tensor
    """C (q, N, R)."""
    right: Tensor
    """B (q, N, R)."""
    floor: float
    """(FLOOR |W0|)^2."""
    grams: Grams | None = None
    """Of the subspace operator."""

    def share(self, square: Tensor) -> Tensor:
        """A number from 0 to 1, of a square (R, R) in the factors' dtype."""
        inside = self.left.flatten(1) @ F.linear(self.right, square).flatten(1).T
        return inside.square().sum() / (delta_energy(self.spec, square, self.grams) + self.floor)


@torch.no_grad()
def factors_of(
    spec: SquareSpec, vectors: str, module: str, rank: int, device: torch.device, dtype: torch.dtype
) -> Factors:
    """`vectors`: the file that holds the base's (`singular_vectors`). Raises as `singular_vectors.read`."""
    left, right = (side.to(device, torch.float64) for side in singular_vectors.read(vectors, module, 0, rank))
    grams = None
    if isinstance(spec, SubspaceSpec):
        own_left, own_right = subspace.sides(spec, device, torch.float64)
        left, right = (left @ own_left.T).unsqueeze(1), (right @ own_right.T).unsqueeze(1)
        grams = (own_left @ own_left.T).to(dtype), (own_right @ own_right.T).to(dtype)
    else:
        left, right = decompress_transpose(spec, left), compress(spec, right)
    floor = (FLOOR * singular_vectors.norm(vectors, module)) ** 2
    return Factors(spec, left.to(dtype), right.to(dtype), floor, grams)


def factor_numbers(spec: UpdateSpec, rank: int) -> int:
    """In a layer's factors."""
    assert not isinstance(spec, LoRASpec)
    if isinstance(spec, SubspaceSpec):
        return 2 * spec.r_hat * (rank + spec.r_hat)
    return 2 * rank * spec.r_hat * (spec.blocks_in if spec.blockwise else 1)


def delta_energy(spec: SquareSpec, square: Tensor, grams: Grams | None = None) -> Tensor:
    """|delta_weight(M)|^2 of a square (R, R); of the subspace operator by its `grams`."""
    if isinstance(spec, SubspaceSpec):
        assert grams is not None
        return (grams[0] @ square @ grams[1] * square).sum()
    outputs = decompress_transpose(spec, square.new_ones(spec.d_out))  # (N, R): that a row is written to
    if spec.r_hat >= spec.d_in:  # a column an input, which together are no more than the square
        columns = _folded(spec, square) if spec.blockwise else input_columns(spec, square)
        return (outputs.T * columns.square()).sum()
    meeting = _where_blocks_meet(spec, square) if spec.blockwise else _where_groups_meet(spec, square, outputs.T)
    return (outputs.T @ _inputs(spec, square) * square.square()).sum() + 2 * meeting


def _inputs(spec: OperatorSpec, like: Tensor) -> Tensor:
    """(N, R): inputs that a column of M is read by; of a rotated block the squared length of what it is turned by,
    which is 1 but for the rounding of the table of angles to fp32."""
    if not spec.blockwise:
        return compress(spec, like.new_ones(spec.d_in))
    if spec.kind is not OperatorKind.ROTATE:
        return like.new_ones(spec.blocks_in, spec.r_hat)
    cos, sin = rope_table(spec.blocks_in, spec.r_hat, like.dtype, like.device)
    return (cos.square() + sin.square()).repeat(1, 2)


def _where_groups_meet(spec: OperatorSpec, square: Tensor, outputs: Tensor) -> Tensor:
    """Share: inputs in two groups, because the last run wraps round, sum two columns of M. `outputs`: (R, 1)."""
    tables = wiring(spec, square.device)
    if not len(tables.more_sources):
        return square.new_zeros(())
    one, other = square[:, tables.places[tables.more_sources]], square[:, tables.more_places]
    return (outputs * one * other).sum()


def _where_blocks_meet(spec: OperatorSpec, square: Tensor) -> Tensor:
    """Decouple, rotate: the last input block ends in the first inputs again; where the first output block reads both,
    the columns of M R_last at its end and of M R_0 at its beginning are summed."""
    last, wrapped = spec.blocks_in - 1, spec.blocks_in * spec.r_hat - spec.d_in
    if not wrapped or last % spec.blocks_out:
        return square.new_zeros(())
    rows = min(spec.r_hat, spec.d_out)
    first, end = (_turned(spec, square, block)[:rows] for block in (0, last))
    return (first[:, :wrapped] * end[:, spec.r_hat - wrapped :]).sum()


def _folded(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(R, D) of decouple and rotate whose one block is as long as the input, or longer: the columns that each input
    meets, summed; in the order of the permuted input."""
    places = torch.arange(spec.r_hat, device=square.device) % spec.d_in
    return square.new_zeros(spec.r_hat, spec.d_in).index_add(1, places, _turned(spec, square, 0))


def _turned(spec: OperatorSpec, square: Tensor, block: int) -> Tensor:
    """M R_i of one input block."""
    if spec.kind is not OperatorKind.ROTATE:
        return square
    cos, sin = rope_table(spec.blocks_in, spec.r_hat, square.dtype, square.device)
    return rotate(square, cos[block], -sin[block])
