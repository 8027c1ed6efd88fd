"""--alignment_weight: a loss that draws each delta towards the frozen weight's leading subspaces.

    loss - weight * mean over layers of share(M)                (`alignment_terms`)

A layer's share is computed in its forward, where ZeRO-3 has gathered the square whole, by a hook that hands the output
on together with the share: one node of autograd makes both, so its backward runs where the layer's does, with the
square whole again. A layer computed anew for its backward (gradient checkpointing) makes the node anew, but is not
heard a second time. Every rank adds the same term to every micro-batch's loss; DeepSpeed's mean over both leaves it in
the gradient once, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.alignment import Factors, factor_numbers, factors_of
from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.ops.lora import LoRASpec
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
