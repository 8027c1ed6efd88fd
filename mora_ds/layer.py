"""`MoRALinear`: a frozen linear layer with one trainable square beside it.

The frozen weight and bias are non-persistent *buffers*: DeepSpeed partitions parameters only, so they stay whole on
every rank and no collective ever carries them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mora_ds.compute import Compute, mora_linear
from mora_ds.operators import OperatorSpec, mora_update


class MoRALinear(nn.Module):
    """y = W0 x + b + decompress(M compress(dropout(x))), with M (r_hat, r_hat) the only parameter.

    Input (..., d_in), output (..., d_out). `weight` keeps the layout of the layer it replaces: (d_out, d_in), or
    (d_in, d_out) when `transposed` (GPT-2's Conv1D).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, base: Any, spec: OperatorSpec, dropout: float = 0.0, compute: Compute = Compute.AUTO) -> None:
        """Takes over the tensors of `base` (`nn.Linear` or `Conv1D`) without copying them."""
        super().__init__()
        self.transposed = isinstance(base, Conv1D)
        self.in_features, self.out_features = linear_shape(base)
        weight, bias = base.weight.data, None if base.bias is None else base.bias.data
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.square = nn.Parameter(torch.zeros(spec.r_hat, spec.r_hat, dtype=weight.dtype, device=weight.device))
        self.spec = spec
        self.dropout = dropout
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.T if self.transposed else self.weight
        square = self.square.to(x.dtype)
        if self.training and self.dropout:  # base and square read different inputs
            return F.linear(x, weight, self.bias) + mora_update(self.spec, square, F.dropout(x, self.dropout))
        return mora_linear(x, weight, self.bias, square, self.spec, self.compute)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r_hat={self.spec.r_hat}, "
            f"operator={self.spec.kind.value}/{self.spec.grouping.value}"
        )


def is_linear(module: nn.Module) -> bool:
    """Whether a module can take a square: `Conv1D`, `nn.Linear`, or a subclass of it that computes the same."""
    if isinstance(module, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or _computes_linear(module)


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Asked of a forward of its own: Falcon's is the same product written otherwise, a router's is something else."""
    x = torch.randn(3, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        found, expected = module(x), F.linear(x, module.weight, module.bias)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # other arguments, or a weight of another layout
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2)


def linear_shape(module: Any) -> tuple[int, int]:
    """(d_in, d_out) of an `nn.Linear` or a `Conv1D`."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
