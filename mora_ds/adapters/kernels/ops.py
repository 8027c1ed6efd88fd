"""The operations that the GPU's path of a layer is made of, as `torch.ops.mora_ds`.
Each call starts one kernel.

    gather_sum(x, table, cos, sin, back)         (T, S), (K, Q) -> (T, Q)   out[t, q] = sum over k of x[t, table[k, q]]
    gather_add_(y, x, table, cos, sin, back)     the same, added to y (T, Q) in place
    form(...)                                    (O, D): the frozen weight plus the delta of M
    product(c, z)                                (T, P, R), (T, N, R) -> (parts, R, R): c^T z over all tokens and
                                                 blocks; block b of z meets block b mod P of c. In the dtype of c
                                                 where it is one part, else in fp32
    sum_parts(partial_sums, dtype)               (parts, R, R) -> (R, R)

Index -1 of a table stands for zero. With cosines and sines (N, R / 2), both given for
rotate only, `gather_sum` rotates each of the N blocks of the result (`back` False) or
rotates each block of x back before it gathers (`back` True).

`effective_weight`: weight (O, D) of any strides, in the dtype of M or, with scales (O,) fp32, int8;
M (R, R); `unfold`, `slots`, `blocks_out` and, for share, `members` of `tables`. The
result is contiguous, in the dtype of M.

Sums are made in fp32 (fp64 for fp64) and rounded once. Nothing here has a gradient of
its own: `linear` has it. CUDA runs `triton_ops`. Meta tensors have shapes only; a plan
or a count sees one operation, as on CUDA. On a CPU layers do not call them, and only
tests define them (tests/helpers/plain_kernels.py).
"""

from importlib.util import find_spec
from typing import Any

import torch

from mora_ds.adapters.kernels.tables import empty_product

NAMES = ("gather_sum", "gather_add_", "effective_weight", "product", "sum_parts")

_LIBRARY = torch.library.Library("mora_ds", "DEF")
_ROTATION = "Tensor? cos, Tensor? sin, bool back"
_LIBRARY.define(f"gather_sum(Tensor x, Tensor table, {_ROTATION}) -> Tensor")
_LIBRARY.define(f"gather_add_(Tensor(a!) y, Tensor x, Tensor table, {_ROTATION}) -> ()")
_LIBRARY.define(
    "effective_weight(Tensor weight, Tensor? scales, Tensor mora_matrix, Tensor unfold, Tensor slots, Tensor? members, "
    "Tensor? cos, Tensor? sin, int blocks) -> Tensor"
)
_LIBRARY.define("product(Tensor c, Tensor z) -> Tensor")
_LIBRARY.define("sum_parts(Tensor partial_sums, ScalarType dtype) -> Tensor")

_PROGRAMS_ON_META = 256
"""Programs that a device runs at once, where there is no device to ask."""

KERNEL_DEVICES: tuple[str, ...] = () if find_spec("triton") is None else ("cuda",)
"""Types of devices that have kernels for these operations."""

_ON_META: dict[str, Any] = {
    "gather_sum": lambda x, table, *_: x.new_empty(len(x), table.shape[1]),
    "gather_add_": lambda *_: None,
    "effective_weight": lambda weight, scales, mora_matrix, *_: mora_matrix.new_empty(
        weight.shape
    ),
    "product": lambda c, z: empty_product(c, z, _PROGRAMS_ON_META),
    "sum_parts": lambda partial_sums, dtype: partial_sums.new_empty(
        partial_sums.shape[1:], dtype=dtype
    ),
}


def _in_triton(name: str) -> Any:
    def call(*arguments: Any) -> Any:
        # Imported at the first call, as triton is an optional dependency
        from mora_ds.adapters.kernels import triton_ops

        return getattr(triton_ops, name)(*arguments)

    return call


for _name in NAMES:
    _LIBRARY.impl(_name, _ON_META[_name], "Meta")
    _LIBRARY.impl(_name, _in_triton(_name), "CUDA")

gather_sum = torch.ops.mora_ds.gather_sum.default
gather_add_ = torch.ops.mora_ds.gather_add_.default
effective_weight = torch.ops.mora_ds.effective_weight.default
product = torch.ops.mora_ds.product.default
sum_parts = torch.ops.mora_ds.sum_parts.default
