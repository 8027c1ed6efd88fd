"""Updates of merged cycles that a frozen weight does not take up: they go on acting through their values.

    W x = W0 x + sum over the terms of update(x)

A *term* is a spec with its value, in the dtype of the run; it is not trained. Over activations it costs what the
current cycle's matrix costs, without that one's gradient; over the weight (`delta.add_deltas_`) a pass over W.

Shape legend:  O = d_out, D = d_in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.linear import add_input_gradient_, add_update_
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec, saved_input
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.common.errors import UserError

Term = tuple[UpdateSpec, Tensor]


def join(updates: Iterable[Term]) -> tuple[Term, ...]:
    """As few terms as have the same sum: values of equal specs are added up in their order, in fp32; LoRA's factors are
    lined up, as factors of a larger rank."""
    joined: dict[UpdateSpec, Tensor] = {}
    factors: list[tuple[LoRASpec, Tensor]] = []
    for spec, value in updates:
        value = value.float()
        if isinstance(spec, LoRASpec):
            factors.append((spec, value))
        else:
            joined[spec] = joined[spec] + value if spec in joined else value
    if factors:
        one = factors[0][0]
        wide = replace(one, rank=one.rank * len(factors), alpha=one.alpha * len(factors))
        joined[wide] = torch.cat([value for _, value in factors])
    return tuple(joined.items())


def add_terms_(y: Tensor, terms: Iterable[Term], x: Tensor) -> Tensor:
    """y (..., O) + the updates of x (..., D), in place. Without a backward."""
    for spec, value in terms:
        value = value.to(x.dtype)
        if isinstance(spec, LoRASpec):
            down, up = spec.factors(value)
            y.add_(F.linear(x, down) @ up)
        else:
            operator = _operator(spec)
            add_update_(y, operator, value, saved_input(operator, x))
    return y


def add_terms_gradient_(g_x: Tensor, terms: Iterable[Term], g: Tensor) -> Tensor:
    """g_x (..., D) + the transpose of `add_terms_`'s linear map, applied to g (..., O); in place."""
    for spec, value in terms:
        value = value.to(g.dtype)
        if isinstance(spec, LoRASpec):
            down, up = spec.factors(value)
            g_x.add_(F.linear(g, up) @ down)
        else:
            add_input_gradient_(g_x, _operator(spec), value, g)
    return g_x


def _operator(spec: UpdateSpec) -> OperatorSpec:
    if not isinstance(spec, OperatorSpec):
        raise UserError(f"--base_bits 4: merged cycles cannot act through {spec.describe()}: use another operator")
    return spec
