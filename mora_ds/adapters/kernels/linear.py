"""An adapted layer's product, by the operations of `ops`: both paths of `ops.linear`,
in the fewest kernels.

    weight        forward    fold(x) where M is applied once, W' = W0 + delta, W' x
                  backward   W', g W', collect(g), fold(x) of several blocks, dM
    activation    forward    fold(x), M z, spread(u), += W0 x
                  backward   collect(g), c M, unfold(g_z), += g W0, fold(x) of several blocks, dM

What is added to the base's product is there before it: the product then starts from it
(`addmm_`), and no kernel reads the product again. Not so with a bias, a quantized
weight or autocast, whose product is a function of its own.

The folded input is rotated for rotate, so that M's gradient is one product for every
operator, c^T z over all tokens and blocks, summed in fp32 and rounded once. g is
collected by output blocks; where they are fewer than input blocks, each of these reads
them in turn.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.kernels import ops
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.ops.frozen import QuantizedWeight, Weight, dense
from mora_ds.adapters.ops.int8 import Int8Weight
from mora_ds.adapters.ops.linear import LayerProducts


class KernelProducts(LayerProducts):
    """These steps by the operations of `ops`."""

    def __init__(self, tables: KernelTables) -> None:
        super().__init__(tables.spec)
        self.tables = tables

    def saved_input(self, x: Tensor) -> Tensor:
        return x if self.spec.blocks > 1 else self._fold(x)

    def effective_weight(self, weight: Weight, mora_matrix: Tensor) -> Tensor:
        """As in plain torch; merges round otherwise."""
        if isinstance(weight, Int8Weight):
            values = weight.values
            scales = weight.scales
        else:
            values = dense(weight, mora_matrix.dtype)
            scales = None
        tables = self.tables
        cos, sin = tables.rotation
        maps = tables.unfold, tables.slots, tables.members
        return ops.effective_weight(
            values, scales, mora_matrix, *maps, cos, sin, tables.blocks_out
        )

    def output(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        mora_matrix: Tensor,
        saved: Tensor,
    ) -> Tensor:
        z = self._folded(saved)
        u = (z.view(-1, self.spec.r_hat) @ mora_matrix.T).view(z.shape)
        terms = u, self.tables.spread, None, None, False
        if isinstance(weight, QuantizedWeight):
            y = weight.product(x, bias)
        elif bias is None and u.dtype == x.dtype == weight.dtype:
            return _plus_product(ops.gather_sum(*terms), x, weight.T)
        else:
            # Under autocast u has another dtype than what it is made of, and an
            # addition in place casts nothing
            y = F.linear(x, weight, bias)
        ops.gather_add_(y.view(-1, y.shape[-1]), *terms)
        return y

    def collect_once(self, g: Tensor) -> Tensor:
        """(..., O) -> (T * P, R)."""
        collected: Tensor = ops.gather_sum(
            _flat(g), self.tables.collect, None, None, False
        )
        return collected.view(-1, self.spec.r_hat)

    def input_gradient(
        self,
        g: Tensor,
        weight: Weight,
        mora_matrix: Tensor,
        collected: Tensor | None,
    ) -> Tensor:
        c = self.collect_once(g) if collected is None else collected
        g_z = (c @ mora_matrix).view(-1, self.tables.collect.shape[1])
        if self.tables.blocks_read is not None:
            by_block = g_z.unflatten(1, (-1, self.spec.r_hat))
            g_z = by_block.index_select(1, self.tables.blocks_read).flatten(1)
        unfold = g_z, self.tables.unfold, *self.tables.rotation, True
        if isinstance(weight, Tensor):
            return _plus_product(ops.gather_sum(*unfold), g, weight)
        g_x = weight.input_gradient(g)
        ops.gather_add_(g_x.view(-1, g_x.shape[-1]), *unfold)
        return g_x

    def mora_matrix_gradient(
        self,
        saved: Tensor,
        g: Tensor,
        collected: Tensor | None,
        by_weight: bool,
    ) -> Tensor:
        c = self.collect_once(g) if collected is None else collected
        z = self._folded(saved).unflatten(1, (-1, self.spec.r_hat))
        c = c.view(len(z), self.tables.blocks_out, self.spec.r_hat)
        partial_sums: Tensor = ops.product(c, z)
        if len(partial_sums) == 1:
            return partial_sums[0]
        return ops.sum_parts(partial_sums, g.dtype)

    def _fold(self, x: Tensor) -> Tensor:
        """(..., D) -> (T, N * R), rotated for rotate."""
        tables = self.tables
        return ops.gather_sum(_flat(x), tables.fold, *tables.rotation, False)

    def _folded(self, saved: Tensor) -> Tensor:
        return self._fold(saved) if self.spec.blocks > 1 else saved


def _plus_product(total: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """total (T, Q) + x (..., S) times matrix (S, Q), in place: (..., Q). No view, to
    whose memory autograd would add no other gradient in place."""
    total.addmm_(_flat(x), matrix)
    return torch.ops.aten._unsafe_view(total, [*x.shape[:-1], total.shape[1]])


def _flat(x: Tensor) -> Tensor:
    """(..., D) -> (T, D), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()
