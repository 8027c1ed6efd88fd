"""Tensor parallelism with the base whole on every rank: views of W0, a share of every square.

    split_model(model, topology)      before `deepspeed.initialize`: every layer computes its part from here on

    colwise   y[own] = (W0 x)[own] + update          own rows of W0, a view
    rowwise   y = sum over ranks of W0[:, own] x[own] + update          own columns, a view; one all-reduce
    whole     y = W0 x + decompress(gather(M[own] compress(x)))         the fallback: M's rows are shared all the same

A rank stores its share of M's rows, which ZeRO partitions over the data-parallel ranks. The split layers gather M
within one autograd function, in forward and in backward, and scatter the sum of its gradient; with an aligned grouping
(`OperatorSpec.in_segments`, `out_segments`) they need their own rows or columns only, and M is not communicated.
No weight of the base is copied, gathered or reduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.linear import Compute, choose
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.tp_plan import Style, TensorPlan, plan_of
from mora_ds.errors import UserError
from mora_ds.parallel import block_windows, windows
from mora_ds.parallel.saved_inputs import BlockInput, Keeping, Kept, TPInputs, kept_inputs, smaller_of
from mora_ds.parallel.topology import FLAG, AllLanes, OwnLanes, Sum, SumGradient, Topology, mark_split, share_of
from mora_ds.parallel.windows import Window, window


def split_model(model: nn.Module, topology: Topology, inputs: TPInputs = TPInputs.AUTO) -> TensorPlan:
    """Every layer of an injected model computes its part, and holds its share of the square. In place; returns the
    plan. Raises `UserError` for what cannot be split: dropout, LoRA, squares with fewer rows than ranks."""
    _refuse(model, topology.degree)
    plan = plan_of(model, topology.degree)
    layers, kept = mora_layers(model), kept_inputs(model, plan, inputs)
    blocks = {name: BlockInput(topology) for name in plan.blocks}
    for name, layer in layers.items():
        assert isinstance(layer, MoRALinear)
        block = blocks.get(name.rpartition(".")[0])
        aligned_inside = layer.spec.in_segments > 1
        layer.split = LayerSplit(topology, plan.styles[name], aligned_inside, kept.get(name, Kept.SMALLER), block)
        square = nn.Parameter(layer.split.own(layer.square.data).clone(memory_format=torch.contiguous_format))
        mark_split(square, topology.share(layer.spec.r_hat)[0], layer.spec.r_hat, layer.split.transposed)
        layer.square = square
    for name, style in plan.styles.items():
        if style is not Style.WHOLE and name not in layers:
            module: Any = model.get_submodule(name)
            module.forward = _PlainSplit(module, topology, style)
    for name, block in blocks.items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(_InputHook(topology, block), with_kwargs=True)
        module.register_forward_hook(lambda *given, block=block: block.leave(), always_call=True)
    _keep_equal(model, plan, topology)
    return plan


def _keep_equal(model: nn.Module, plan: TensorPlan, topology: Topology) -> None:
    """What every rank of a group trains (norms, embeddings, head) gets one gradient: the sum where each saw its heads
    alone, the first rank's otherwise. Ranks compute that alike, but not to the bit where a device's kernels add in any
    order (attention's backward on GPUs), and what has drifted apart stays so."""
    summed = {id(p) for name in plan.summed for p in model.get_submodule(name).parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad and share_of(parameter) is None:
            agree = topology.sum_ if id(parameter) in summed else topology.first_
            parameter.register_hook(lambda gradient, agree=agree: agree(gradient.contiguous().clone()))


def _refuse(model: nn.Module, degree: int) -> None:
    drops = _dropouts(model)
    if drops:
        some = ", ".join(f"{name} = {value}" for name, value in list(drops.items())[:3])
        raise UserError(
            f"{FLAG} {degree}: every rank of a group would draw other dropout masks, so that their activations would "
            f"not belong together. Set it to 0: {some}"
        )
    for name, layer in mora_layers(model).items():
        if not isinstance(layer, MoRALinear):
            others = {"square": "those of --operator subspace", "factors": "LoRA's factors (--adapter mora has none)"}
            raise UserError(f"{FLAG} {degree} splits squares: {others[layer.spec.value_name]} run at 1")
        if layer.spec.r_hat < degree:
            raise UserError(
                f"{FLAG} {degree}: the square of {name} has {layer.spec.r_hat} rows: a larger --mora_rank, or a "
                "smaller group"
            )


def _dropouts(model: nn.Module) -> dict[str, float]:
    """Every dropout that is not 0: modules of it, and the rates that attention modules hand to functions."""
    found = {}
    for path, module in model.named_modules():
        rates = {"p": module.p} if isinstance(module, nn.Dropout) else vars(module)
        for name, value in rates.items():
            if ("drop" in name or name == "p") and isinstance(value, (int, float)) and value > 0:
                found[f"{path}.{name}"] = float(value)
    return found


# -- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSplit:
    """How this rank computes one layer with a square, and which part of the square it holds."""

    topology: Topology
    style: Style
    transposed: bool
    """Whether the shares are columns of M, held as rows of its transpose: for groupings aligned on the inputs."""
    kept: Kept
    """What of its input a split layer keeps for M's gradient."""
    block: BlockInput | None
    """Of the block that the layer is split with."""

    def __call__(self, layer: MoRALinear, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out), where this rank's slice is a rowwise layer's input, a colwise one's output."""
        own = layer.square.to(x.dtype)
        if self.style is Style.WHOLE:
            return F.linear(x, layer.stored_weight, layer.bias) + self._fallback(layer.spec, own, x)
        weight, bias = _slices(self.topology, self.style, layer.stored_weight, layer.bias)
        part = self._window(layer.spec)
        y = _SplitLinear.apply(x, weight, bias, own, part, self, layer.compute, self._keeping(x, part))
        return y if self.style is Style.COLWISE else _summed(self.topology, y, layer.bias)

    def own(self, square: Tensor) -> Tensor:
        """This rank's share of M (r_hat, r_hat)."""
        start, stop = self.topology.share(len(square))
        return (square.T if self.transposed else square)[start:stop]

    def whole(self, own: Tensor) -> Tensor:
        """M (r_hat, r_hat), from the shares of all ranks of the group. Collective."""
        square = self.topology.gather(own, own.shape[1])
        return square.T.contiguous() if self.transposed else square

    def for_compute(self, own: Tensor, part: Window) -> Tensor:
        """The rows and columns of M that the window may use."""
        if self._is_aligned(part.spec):
            return own.T if self.transposed else own
        return self.whole(own)

    def gradient(self, square: Tensor, part: Window) -> Tensor:
        """From this rank's gradient of what `for_compute` gave to that of its share."""
        if self.transposed:
            square = square.T
        return square.contiguous() if self._is_aligned(part.spec) else self.topology.sum_scatter(square)

    def _keeping(self, x: Tensor, part: Window) -> Keeping:
        keeping = None
        if self.block is not None and torch.is_grad_enabled():
            keeping = self.block.keeping(self.kept, x)
        return keeping or smaller_of(part)

    def _is_aligned(self, spec: OperatorSpec) -> bool:
        segments = spec.out_segments if self.style is Style.COLWISE else spec.in_segments
        return segments > 1 and segments % self.topology.degree == 0

    def _window(self, spec: OperatorSpec) -> Window:
        lanes = self.topology.share(spec.r_hat) if self._is_aligned(spec) else None
        if self.style is Style.COLWISE:
            return window(spec, outputs=self.topology.share(spec.d_out), rows=lanes)
        return window(spec, inputs=self.topology.share(spec.d_in), columns=lanes)

    def _fallback(self, spec: OperatorSpec, own: Tensor, x: Tensor) -> Tensor:
        part = window(spec)
        z = _Compress.apply(x, part)
        if self.transposed:
            u = Sum.apply(OwnLanes.apply(z, self.topology) @ own, self.topology)
        else:
            u = AllLanes.apply(F.linear(SumGradient.apply(z, self.topology), own), self.topology, spec.r_hat)
        return _Decompress.apply(u, part)


@dataclass(frozen=True)
class _PlainSplit:
    """The forward of a frozen linear layer without a square, within a block that is split."""

    module: Any
    topology: Topology
    style: Style

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.module.weight.T if isinstance(self.module, Conv1D) else self.module.weight
        weight, bias = _slices(self.topology, self.style, weight, self.module.bias)
        y = F.linear(x, weight, bias)
        return y if self.style is Style.COLWISE else _summed(self.topology, y, self.module.bias)


@dataclass(frozen=True)
class _InputHook:
    """On the input of a split block: its ranks' gradients are parts of a sum, and its layers share what they keep."""

    topology: Topology
    block: BlockInput

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        del module
        x = SumGradient.apply(args[0] if args else kwargs["hidden_states"], self.topology)
        self.block.enter(x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def _slices(topology: Topology, style: Style, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Views of W0 (d_out, d_in) and of the bias that is added before the sum: none for a rowwise layer."""
    if style is Style.COLWISE:
        start, stop = topology.share(weight.shape[0])
        return weight[start:stop], None if bias is None else bias[start:stop]
    start, stop = topology.share(weight.shape[1])
    return weight[:, start:stop], None


def _summed(topology: Topology, y: Tensor, bias: Tensor | None) -> Tensor:
    y = Sum.apply(y, topology)
    return y if bias is None else y + bias


# -- autograd ---------------------------------------------------------------------------------------------------------


class _SplitLinear(torch.autograd.Function):
    """A window of a layer with a square: neither M nor anything of the size of W0 is kept for backward, but what
    `keeping` keeps of the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, own: Tensor, part: Window, split: LayerSplit,
        path: Compute, keeping: Keeping,
    ) -> Tensor:  # fmt: skip
        ctx.part, ctx.split, ctx.weight, ctx.keeping = part, split, weight, keeping
        ctx.by_weight = by_weight = _by_weight(part, x, path)
        square = split.for_compute(own, part)
        z = windows.fold(part, x) if keeping.folds or not by_weight else x
        ctx.save_for_backward(keeping.keep(z if keeping.folds else x), own)
        if by_weight:
            return F.linear(x, _delta(part, square).add_(weight), bias)
        update = windows.deal_out(part, F.linear(windows.turned(part, z), _used_rows(part, square)))
        return F.linear(x, weight, bias).add_(update)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), part, split = gradients, ctx.part, ctx.split
        saved, own = ctx.saved_tensors
        in_blocks = ctx.by_weight and part.spec.blockwise
        collected = g if in_blocks else windows.collect(part, g)
        g_x = g_own = None
        if ctx.needs_input_grad[0]:
            square = split.for_compute(own, part)
            if ctx.by_weight:
                g_x = g @ _delta(part, square).add_(ctx.weight)
            else:
                g_z = windows.turned(part, collected @ _used_rows(part, square), back=True)
                g_x = g @ ctx.weight + windows.unfold(part, g_z)
        if ctx.needs_input_grad[3]:
            kept = ctx.keeping.recall(saved)
            if in_blocks:
                g_square = block_windows.square_gradient(part, kept, g)
            else:
                z = windows.turned(part, kept if ctx.keeping.folds else windows.fold(part, kept))
                g_square = _all_rows(part, collected.flatten(0, -2).T @ z.flatten(0, -2))
            g_own = split.gradient(g_square, part)
        return g_x, None, None, g_own, None, None, None, None


def _by_weight(part: Window, x: Tensor, path: Compute) -> bool:
    if path is Compute.AUTO:
        path = choose(x.numel() // part.d_in, part.d_in, part.d_out, x.dtype, part.spec, split=True)
    return path is Compute.WEIGHT


def _delta(part: Window, square: Tensor) -> Tensor:
    """(w_out, w_in), from what `LayerSplit.for_compute` gives."""
    return block_windows.delta(part, square) if part.spec.blockwise else windows.delta(part, _used_rows(part, square))


def _used_rows(part: Window, square: Tensor) -> Tensor:
    used = windows.rows_used(part, square.device)
    return square if used is None else square.index_select(0, used)


def _all_rows(part: Window, gradient: Tensor) -> Tensor:
    used = windows.rows_used(part, gradient.device)
    if used is None:
        return gradient
    whole = gradient.new_zeros(part.rows[1] - part.rows[0], gradient.shape[1])
    return whole.index_copy_(0, used, gradient)


class _Compress(torch.autograd.Function):
    """`operators.compress`, of gathers alone in backward too: it comes out alike on all ranks of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Window) -> Tensor:
        ctx.part = part
        return windows.turned(part, windows.fold(part, x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return windows.unfold(ctx.part, windows.turned(ctx.part, gradients[0], back=True)), None


class _Decompress(torch.autograd.Function):
    """`operators.decompress`, likewise."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, part: Window) -> Tensor:
        ctx.part = part
        used = windows.rows_used(part, u.device)
        return windows.deal_out(part, u if used is None else u[..., used])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        collected = windows.collect(ctx.part, gradients[0])
        rows = _all_rows(ctx.part, collected.flatten(0, -2).T).T
        return rows.unflatten(0, collected.shape[:-1]), None
