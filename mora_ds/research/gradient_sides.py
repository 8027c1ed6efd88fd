"""Sides of the adapter `subspace` from the gradient (`research.sides: gradient`): the
leading singular vectors of the mean gradient G of each adapted weight.

    G = sum over tokens of g x^T          x (D,): the layer's input; g (O,): the gradient of its output
    sketch = [B G | A G^T]                A (K, D), B (K, O): directions, K a little above r_hat

G is never formed: B G = (B g^T) x, and A G^T = (A x^T) g, which each layer's backward
adds. The first directions are random; the next ones span the rows of the sketch, so that
a few passes are a subspace iteration (Halko, Martinsson & Tropp 2011). Ranks exchange
sketches only.

Shape legend:  D = d_in, O = d_out, R = r_hat, K = directions, T = tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.layer import AdaptedLinear, mora_layers
from mora_ds.adapters.ops.spec import permutation_seed
from mora_ds.common.errors import RunError
from mora_ds.common.tensor_files import Tensors
from mora_ds.models.svd import OVERSAMPLED, on_one_rank
from mora_ds.runtime.ranks import Ranks

SEQUENCES = 16
"""Number of sequences whose mean gradient is sketched."""

PASSES = 4
"""Over the sequences. In each pass the sketch holds the leading vectors better."""


_LEAF = torch.zeros((), requires_grad=True)
"""What all outputs depend on, and the only tensor that losses are differentiated by: no
trained one gets a gradient."""


class Sketch:
    """The sketch of one layer's gradient."""

    def __init__(self, name: str, layer: AdaptedLinear, seed: int) -> None:
        self.name = name
        self.layer = layer
        self.sides = layer.in_features, layer.out_features
        generator = torch.Generator().manual_seed(permutation_seed(seed, name, 0))
        shape = self.shape(OVERSAMPLED)
        self.start_pass(torch.randn(shape, generator=generator))

    def shape(self, oversampled: int) -> tuple[int, int]:
        count = min(self.layer.spec.size + oversampled, *self.sides)
        return count, sum(self.sides)

    def start_pass(self, directions: Tensor) -> None:
        """Sketches with these `directions` [A | B] (K, D + O) from now on."""
        self.directions = directions.to(self.layer.device)
        self.sums = torch.zeros_like(self.directions)

    def after_layer(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The layer's forward hook."""
        return _SketchFunction.apply(output, _LEAF, inputs[0], self)

    def leading(self, oversampled: int) -> Tensor:
        """[V^T | U^T] (K, D + O) of the sketch. Raises `RunError` for a gradient that is
        not finite."""
        if not self.sums.isfinite().all():
            raise RunError(
                f"{self.name}: the gradient for research.sides is NaN or infinite"
            )
        count, _ = self.shape(oversampled)
        pairs = zip(self._split(self.sums), self._split(self.directions), strict=True)
        return torch.cat([leading_rows(rows, near[:count]) for rows, near in pairs], 1)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.sides, dim=1)


def leading_rows(matrix: Tensor, near: Tensor) -> Tensor:
    """Orthonormal rows that span the leading right singular vectors of `matrix` (K, N):
    as many as `near` has, and of all such rows the closest ones to those.

    Singular vectors themselves jump where singular values are close, and would leave
    most of the gradient on M's diagonal, while Adam moves all of M alike.
    """
    vectors = torch.linalg.svd(matrix, full_matrices=False).Vh[: len(near)]
    left, _, right = torch.linalg.svd(near @ vectors.T)
    return left @ right @ vectors


def gradient_sides(
    model: nn.Module, losses: Callable[[], Iterable[Tensor]], seed: int, ranks: Ranks
) -> Tensors:
    """{module: [V^T | U^T] (R, D + O)} of every adapted layer, in fp32 on the CPU, the
    same bits on all ranks. The adapter weights must be zero. Collective.

    `losses`: this rank's part of the sequences, forward passes of `model` with a graph,
    as many on every rank. Raises what `Sketch.leading` does.
    """
    sketches = {
        name: Sketch(name, layer, seed) for name, layer in mora_layers(model).items()
    }
    hooks = [
        sketch.layer.register_forward_hook(sketch.after_layer)
        for sketch in sketches.values()
    ]
    try:
        for _ in range(PASSES - 1):
            directions = _leading(sketches, losses, ranks, OVERSAMPLED)
            for name, sketch in sketches.items():
                sketch.start_pass(directions[name])
        return _leading(sketches, losses, ranks, 0)
    finally:
        for hook in hooks:
            hook.remove()


def _leading(
    sketches: dict[str, Sketch],
    losses: Callable[[], Iterable[Tensor]],
    ranks: Ranks,
    oversampled: int,
) -> Tensors:
    """What `leading` returns after another pass."""
    for loss in losses():
        torch.autograd.grad(loss, _LEAF)
    for sketch in sketches.values():
        sketch.sums = ranks.sum(sketch.sums.cpu()).to(sketch.layer.device)
    return on_one_rank(
        {name: sketch.shape(oversampled) for name, sketch in sketches.items()},
        lambda name: sketches[name].leading(oversampled),
        ranks,
    )


class _SketchFunction(torch.autograd.Function):
    """A layer's output, whose backward adds to the layer's sketch."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, leaf: Tensor, x: Tensor, sketch: Any) -> Any:
        ctx.sketch = sketch
        ctx.save_for_backward(x)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (output_gradient,) = gradients
        (saved,) = ctx.saved_tensors
        x = saved.flatten(0, -2).float()
        g = output_gradient.flatten(0, -2).float()
        of_inputs, of_outputs = ctx.sketch.directions.split(ctx.sketch.sides, dim=1)
        ctx.sketch.sums += torch.cat(
            ((of_outputs @ g.T) @ x, (of_inputs @ x.T) @ g), dim=1
        )
        return output_gradient, torch.zeros_like(_LEAF), None, None
