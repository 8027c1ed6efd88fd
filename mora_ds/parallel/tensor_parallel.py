"""Tensor parallelism with the base unsharded: each process computes on views of W0 and
stores a share of every M.

    split_model(model, topology)      before `deepspeed.initialize`: from here on every layer computes its part

    colwise   y[own] = (W0 x)[own] + update          own rows of W0, a view
    rowwise   y = sum over the group of W0[:, own] x[own] + update      own columns, a view; one all-reduce
    whole     y = W0 x + decompress(gather(M[own] compress(x)))         not split, but M's rows are

A process stores its share of M's rows, which ZeRO shards over the data-parallel
processes. The split layers gather M within one autograd function, in forward and in
backward, and scatter the sum of its gradient. No weight of the base is copied, gathered
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
from mora_ds.adapters.ops.linear import Compute, LayerProducts, mora_linear
from mora_ds.adapters.ops.mora import OperatorSpec, compress, decompress
from mora_ds.adapters.ops.spec import Style
from mora_ds.adapters.tp_plan import TensorPlan, plan_of
from mora_ds.common.errors import UserError
from mora_ds.parallel.limits import TENSOR, check_tensor_parallel
from mora_ds.parallel.topology import (
    Sum,
    Topology,
    all_gather,
    mark_split,
    share_of,
    sum_gradient,
)
from mora_ds.parallel.windows import Window


def split_model(model: nn.Module, topology: Topology) -> TensorPlan:
    """Split an injected model in place, so that every layer computes its part and
    stores its share of M. Returns the plan. Raises `UserError` for what cannot be
    split: dropout, LoRA, matrices with fewer rows than processes."""
    _check(model, topology.degree)
    plan = plan_of(model, topology.degree)
    layers = mora_layers(model)
    for name, layer in layers.items():
        assert isinstance(layer, MoRALinear)
        split = LayerSplit(topology, plan.styles[name])
        square_shard = nn.Parameter(split.shard(layer.square.data).clone())
        mark_split(square_shard, topology.share(layer.spec.r_hat)[0], layer.spec.r_hat)
        layer.split = split
        layer.square = square_shard
    for name, style in plan.styles.items():
        if style is not Style.WHOLE and name not in layers:
            module: Any = model.get_submodule(name)
            module.forward = partial(_split_forward, module, topology, style)
    for name in plan.blocks:
        model.get_submodule(name).register_forward_pre_hook(
            partial(_sum_gradient, topology), with_kwargs=True
        )
    _keep_equal(model, plan, topology)
    return plan


def _keep_equal(model: nn.Module, plan: TensorPlan, topology: Topology) -> None:
    """Give the other trained parameters (norms, embeddings, head) one gradient on all
    processes of a group: the sum where each saw its own heads only, else the first
    process's. The processes compute the latter alike, but not to the bit where a
    device's kernels add in any order (attention's backward on GPUs), and parameters
    that have drifted apart stay apart."""
    summed = {
        id(p) for name in plan.summed for p in model.get_submodule(name).parameters()
    }
    for parameter in model.parameters():
        if parameter.requires_grad and share_of(parameter) is None:
            agree = topology.sum_ if id(parameter) in summed else topology.first_
            parameter.register_hook(
                lambda gradient, agree=agree: agree(gradient.contiguous().clone())
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
        if (rows := layer.spec.value_shape[0]) < degree:
            raise UserError(
                f"{TENSOR} {degree}: the MoRA matrix of {name} has {rows} rows: raise `rank`, or use "
                "a smaller group"
            )


def _dropouts(model: nn.Module) -> dict[str, float]:
    """Every dropout probability above 0, by path: of dropout modules, and those that
    attention modules hand on to functions."""
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
    """How this process computes a layer, and which rows of its matrix it stores."""

    topology: Topology
    style: Style

    def sizes(self, spec: OperatorSpec) -> tuple[int, int]:
        """(inputs, outputs) of the layer that this process computes."""
        window = self._window(spec)
        return window.d_in, window.d_out

    def __call__(
        self,
        layer: MoRALinear,
        x: Tensor,
        square_shard: Tensor,
        path: Compute,
    ) -> Tensor:
        """(..., d_in) -> (..., d_out), where a rowwise layer's input and a colwise
        layer's output are this process's slices. `square_shard`: this process's share
        of M."""
        if self.style is Style.WHOLE:
            y = F.linear(x, layer.stored_weight, layer.bias)
            return y + self._unsplit_update(layer.spec, square_shard, x)
        weight, bias = _slices(
            self.topology, self.style, layer.stored_weight, layer.bias
        )
        products = WindowProducts(self._window(layer.spec), self)
        y = mora_linear(x, weight, bias, square_shard, products, path)
        return (
            y if self.style is Style.COLWISE else _summed(self.topology, y, layer.bias)
        )

    def shard(self, matrix: Tensor) -> Tensor:
        """This process's share of M (r_hat, r_hat)."""
        return matrix[slice(*self.topology.share(len(matrix)))]

    def unshard(self, square_shard: Tensor) -> Tensor:
        """M (r_hat, r_hat), from the shares of all processes of the group.
        Collective."""
        return self.topology.gather(square_shard, square_shard.shape[1])

    def _window(self, spec: OperatorSpec) -> Window:
        inputs = (0, spec.d_in)
        outputs = (0, spec.d_out)
        if self.style is Style.COLWISE:
            outputs = self.topology.share(spec.d_out)
        elif self.style is Style.ROWWISE:
            inputs = self.topology.share(spec.d_in)
        return Window(spec, inputs, outputs)

    def _unsplit_update(
        self,
        spec: OperatorSpec,
        square_shard: Tensor,
        x: Tensor,
    ) -> Tensor:
        """The layer's update from all inputs to all outputs. Backward is made of sums
        in a fixed order too, so that it is the same to the bit on all processes."""
        z = sum_gradient(compress(spec, x), self.topology)
        u = all_gather(F.linear(z, square_shard), self.topology, spec.r_hat)
        return decompress(spec, u)


def _split_forward(module: Any, topology: Topology, style: Style, x: Tensor) -> Tensor:
    """The forward of a frozen layer without a MoRA matrix, in a block that is split."""
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
    """Before a split block: its input's gradient is summed over the processes."""
    x = sum_gradient(args[0] if args else kwargs["hidden_states"], topology)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def _slices(
    topology: Topology,
    style: Style,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Views of W0 and of the bias that is added before a sum, none if rowwise."""
    if style is Style.COLWISE:
        start, stop = topology.share(weight.shape[0])
        return weight[start:stop], None if bias is None else bias[start:stop]
    start, stop = topology.share(weight.shape[1])
    return weight[:, start:stop], None


def _summed(topology: Topology, y: Tensor, bias: Tensor | None) -> Tensor:
    y = Sum.apply(y, topology)
    return y if bias is None else y + bias


# -- a window's steps ------------------------------------------------------------------


class WindowProducts(LayerProducts):
    """The steps of a window of an adapted layer: `square` is this process's share of M,
    which is gathered wherever it is used. Neither M nor anything of the size of W0 is
    saved for backward."""

    def __init__(self, window: Window, split: LayerSplit) -> None:
        super().__init__(window)
        self.split = split

    def whole(self, square: Tensor) -> Tensor:
        return self.split.unshard(square)

    def share_of_gradient(self, gradient: Tensor) -> Tensor:
        return self.split.topology.sum_scatter(gradient)
