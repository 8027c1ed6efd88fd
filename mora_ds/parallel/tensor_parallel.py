"""Tensor parallelism with an unsharded base: each rank computes with views of W0 and
stores a shard of every MoRA matrix M.

    split_model(model, topology)      call before `deepspeed.initialize`; then every layer computes this rank's part

    colwise   y[own] = (W0 x)[own] + update          a view of this rank's rows of W0
    rowwise   y = sum over the group of W0[:, own] x[own] + update      a view of its columns; one all-reduce
    full      y = W0 x + decompress(gather(M[own] compress(x)))         only M is sharded

A rank stores a shard of M's rows, which ZeRO shards further over the data-parallel
group. Colwise and rowwise layers gather M within one autograd function, in forward and
in backward, and reduce-scatter its gradient. No weight of the base is copied, gathered
or reduced.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.inject import config_of, mora_layers
from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.linear import LayerProducts, mora_linear
from mora_ds.adapters.ops.mora import OperatorSpec, compress, decompress
from mora_ds.adapters.ops.spec import Style
from mora_ds.common.errors import UserError
from mora_ds.parallel.limits import TENSOR, check_tensor_parallel
from mora_ds.parallel.topology import (
    Sum,
    Topology,
    all_gather,
    mark_split,
    shard_info,
    sum_gradient,
)
from mora_ds.parallel.tp_plan import TensorPlan, tp_plan_of
from mora_ds.parallel.windows import Window


def split_model(model: nn.Module, topology: Topology) -> TensorPlan:
    """Split an injected model in place: every layer then computes this rank's part and
    stores this rank's shard of M. Returns the plan. Raises `UserError` for dropout,
    LoRA, and matrices with fewer rows than ranks."""
    _check(model, topology.degree)
    plan = tp_plan_of(model, topology.degree)
    layers = mora_layers(model)
    for name, layer in layers.items():
        assert isinstance(layer, MoRALinear)
        split = LayerSplit(topology, plan.styles[name])
        mora_matrix_shard = nn.Parameter(split.shard(layer.mora_matrix.data).clone())
        r_hat = layer.spec.r_hat
        mark_split(mora_matrix_shard, topology.shard_range(r_hat)[0], r_hat)
        layer.split = split
        layer.mora_matrix = mora_matrix_shard
    for name, style in plan.styles.items():
        if style is not Style.FULL and name not in layers:
            module: Any = model.get_submodule(name)
            module.forward = partial(_split_forward, module, topology, style)
    for name in plan.blocks:
        model.get_submodule(name).register_forward_pre_hook(
            partial(_sum_gradient, topology), with_kwargs=True
        )
    _synchronize_gradients(model, plan, topology)
    return plan


def _synchronize_gradients(
    model: nn.Module, plan: TensorPlan, topology: Topology
) -> None:
    """Give the other trained parameters (norms, embeddings, head) equal gradients on
    all ranks of a group: the sum if each rank sees only its heads, else that of the
    first rank. In the latter case gradients are equal up to rounding, but kernels with
    a random order of sums (attention's backward on GPUs) would let parameters drift
    apart."""
    summed = {
        id(p) for name in plan.summed for p in model.get_submodule(name).parameters()
    }
    for parameter in model.parameters():
        if parameter.requires_grad and shard_info(parameter) is None:
            reduce = topology.sum_ if id(parameter) in summed else topology.broadcast_
            parameter.register_hook(
                lambda gradient, reduce=reduce: reduce(gradient.contiguous().clone())
            )


def _check(model: nn.Module, degree: int) -> None:
    config = config_of(model)
    layers = mora_layers(model)
    check_tensor_parallel(
        degree,
        adapter=config.adapter,
        dropout=_dropouts(model),
        domains=bool(getattr(config, "domains", ())),
        experts=any(len(layer.spec.weight_shape) > 2 for layer in layers.values()),
    )
    for name, layer in layers.items():
        if (rows := layer.spec.adapter_weight_shape[0]) < degree:
            raise UserError(
                f"{TENSOR} {degree}: the MoRA matrix of {name} has {rows} rows: raise `rank`, or use "
                "a smaller group"
            )


def _dropouts(model: nn.Module) -> dict[str, float]:
    """Every dropout probability above 0, by path: of dropout modules, and attributes
    that attention modules pass to functions."""
    dropouts = {}
    for path, module in model.named_modules():
        values = {"p": module.p} if isinstance(module, nn.Dropout) else vars(module)
        for name, value in values.items():
            is_dropout = "drop" in name or name == "p"
            if is_dropout and type(value) in (int, float) and value > 0:
                dropouts[f"{path}.{name}"] = float(value)
    return dropouts


# -- layers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSplit:
    """This rank's part of a layer: its inputs and outputs, and its shard of M."""

    topology: Topology
    style: Style

    def __call__(
        self,
        layer: MoRALinear,
        x: Tensor,
        mora_matrix_shard: Tensor,
    ) -> Tensor:
        """(..., d_in) -> (..., d_out), where a rowwise layer's input and a colwise
        layer's output are this rank's slices. `mora_matrix_shard`: this rank's shard of
        M."""
        if self.style is Style.FULL:
            y = F.linear(x, layer.stored_weight, layer.bias)
            return y + self._unsplit_update(layer.spec, mora_matrix_shard, x)
        weight, bias = _slices(
            self.topology, self.style, layer.stored_weight, layer.bias
        )
        products = WindowProducts(self._window(layer.spec), self)
        y = mora_linear(x, weight, bias, mora_matrix_shard, products, layer.compute)
        return (
            y if self.style is Style.COLWISE else _summed(self.topology, y, layer.bias)
        )

    def shard(self, matrix: Tensor) -> Tensor:
        """This rank's shard of M (r_hat, r_hat)."""
        return matrix[slice(*self.topology.shard_range(len(matrix)))]

    def unshard(self, mora_matrix_shard: Tensor) -> Tensor:
        """M (r_hat, r_hat), gathered from all ranks of the group. Collective."""
        return self.topology.gather(mora_matrix_shard, mora_matrix_shard.shape[1])

    def _window(self, spec: OperatorSpec) -> Window:
        inputs = (0, spec.d_in)
        outputs = (0, spec.d_out)
        if self.style is Style.COLWISE:
            outputs = self.topology.shard_range(spec.d_out)
        elif self.style is Style.ROWWISE:
            inputs = self.topology.shard_range(spec.d_in)
        return Window(spec, inputs, outputs)

    def _unsplit_update(
        self,
        spec: OperatorSpec,
        mora_matrix_shard: Tensor,
        x: Tensor,
    ) -> Tensor:
        """The update from all inputs to all outputs. Forward and backward sum in a fixed
        order, so all ranks get identical bits."""
        z = sum_gradient(compress(spec, x), self.topology)
        u = all_gather(F.linear(z, mora_matrix_shard), self.topology, spec.r_hat)
        return decompress(spec, u)


def _split_forward(module: Any, topology: Topology, style: Style, x: Tensor) -> Tensor:
    """The forward of a frozen layer without a MoRA matrix, in a split block."""
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    weight, bias = _slices(topology, style, weight, module.bias)
    y = F.linear(x, weight, bias)
    return y if style is Style.COLWISE else _summed(topology, y, module.bias)


def _sum_gradient(
    topology: Topology,
    module: nn.Module,
    args: Any,
    kwargs: Any,
) -> tuple[Any, Any]:
    """Forward pre-hook of a split block: sums its input's gradient over the group."""
    x = sum_gradient(args[0] if args else kwargs["hidden_states"], topology)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def _slices(
    topology: Topology,
    style: Style,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """This rank's views of W0 and of the bias; no bias if rowwise, as it is added after
    the sum over the group."""
    if style is Style.COLWISE:
        start, stop = topology.shard_range(weight.shape[0])
        return weight[start:stop], None if bias is None else bias[start:stop]
    start, stop = topology.shard_range(weight.shape[1])
    return weight[:, start:stop], None


def _summed(topology: Topology, y: Tensor, bias: Tensor | None) -> Tensor:
    y = Sum.apply(y, topology)
    return y if bias is None else y + bias


# -- products of a window --------------------------------------------------------------


class WindowProducts(LayerProducts):
    """The products of a window of an adapted layer. `mora_matrix` is this rank's shard of M,
    gathered for each use. Neither M nor anything of the size of W0 is saved for
    backward."""

    def __init__(self, window: Window, split: LayerSplit) -> None:
        super().__init__(window)
        self.split = split

    def full(self, mora_matrix: Tensor) -> Tensor:
        return self.split.unshard(mora_matrix)

    def share_of_gradient(self, gradient: Tensor) -> Tensor:
        return self.split.topology.sum_scatter(gradient)
