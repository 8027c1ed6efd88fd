"""An adapted layer's product, by the operations of `ops`: both paths of `ops.linear`, in the fewest kernels.

    weight        forward    fold(x) where M is applied once, W' = W0 + delta, W' x
                  backward   W', g W', collect(g), fold(x) of several blocks, dM
    activation    forward    fold(x) where M is applied once, W0 x, fold(x) of several blocks, M z, += deal(u)
                  backward   collect(g), g W0, c M, += unfold(g_z), fold(x) of several blocks, dM

The folded input is rotated for rotate, so that M's gradient is one product for every operator, c^T z over all tokens
and blocks, summed in fp32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mora_ds.adapters.kernels import ops
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.ops.frozen import Weight, dense
from mora_ds.adapters.ops.int8 import Int8Weight
from mora_ds.adapters.ops.linear import Compute, linear_by


def kernel_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, square: Tensor, tables: KernelTables, path: Compute
) -> Tensor:
    """`ops.linear.mora_linear` by kernels: (..., D) -> (..., O)."""
    return linear_by(KernelProducts(tables), x, weight, bias, square, path)


def form_weight(weight: Weight, square: Tensor, tables: KernelTables) -> Tensor:
    """W0 + delta (O, D), contiguous, in the dtype of M. Not for merges: these round otherwise."""
    spec = tables.spec
    if isinstance(weight, Int8Weight):
        values = weight.values
        scales = weight.scales
    else:
        values = dense(weight, square.dtype)
        scales = None
    cos, sin = tables.rotation
    blocks = (spec.blocks_in, spec.blocks_out) if spec.blocks > 1 else (1, 1)
    formed: Tensor = ops.form(values, scales, square, tables.unfold, tables.deal, tables.members, cos, sin, *blocks)
    return formed


@dataclass(frozen=True)
class KernelProducts:
    """`LayerProducts` of the operations of `ops`."""

    tables: KernelTables

    def saved_input(self, x: Tensor) -> Tensor:
        return x if self.tables.spec.blocks > 1 else self._fold(x)

    def form(self, weight: Weight, square: Tensor) -> Tensor:
        return form_weight(weight, square, self.tables)

    def add_update_(self, y: Tensor, square: Tensor, saved: Tensor) -> None:
        z = self._folded(saved)
        u = z.view(-1, self.tables.spec.r_hat) @ square.T
        ops.gather_add_(y.view(-1, y.shape[-1]), u.view(z.shape), self.tables.deal, None, None, False)

    def collect_once(self, g: Tensor) -> Tensor:
        """(..., O) -> (T * N, R)."""
        collected: Tensor = ops.gather_sum(_flat(g), self.tables.collect, None, None, False)
        return collected.view(-1, self.tables.spec.r_hat)

    def add_input_gradient_(self, g_x: Tensor, square: Tensor, g: Tensor, collected: Tensor | None) -> None:
        c = self.collect_once(g) if collected is None else collected
        g_z = (c @ square).view(-1, self.tables.fold.shape[1])
        ops.gather_add_(g_x.view(-1, g_x.shape[-1]), g_z, self.tables.unfold, *self.tables.rotation, True)

    def square_gradient(self, saved: Tensor, g: Tensor, collected: Tensor | None, by_weight: bool) -> Tensor:
        c = self.collect_once(g) if collected is None else collected
        gradient: Tensor = ops.sum_parts(ops.product(c, self._folded(saved).view(c.shape)), g.dtype)
        return gradient

    def _fold(self, x: Tensor) -> Tensor:
        """(..., D) -> (T, N * R), rotated for rotate."""
        folded: Tensor = ops.gather_sum(_flat(x), self.tables.fold, *self.tables.rotation, False)
        return folded

    def _folded(self, saved: Tensor) -> Tensor:
        return self._fold(saved) if self.tables.spec.blocks > 1 else saved


def _flat(x: Tensor) -> Tensor:
    """(..., D) -> (T, D), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()
