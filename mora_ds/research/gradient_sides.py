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
from functools import partial
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


class Sketch:
    """The sketch of one layer's gradient."""

    def __init__(self, layer: AdaptedLinear, seed: int) -> None:
        self.layer = layer
        self.sides = layer.in_features, layer.out_features
        self.count = min(layer.spec.size + OVERSAMPLED, *self.sides)
        self.seed = seed
        self.start_pass(self.first)

    @property
    def first(self) -> Tensor:
        """The random directions of the first pass, in fp32 on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.count, sum(self.sides), generator=generator)

    def start_pass(self, directions: Tensor) -> None:
        """Sketches with these `directions` [A | B] (K, D + O) from now on."""
        self.directions = directions.to(self.layer.device)
        self.sums = torch.zeros_like(self.directions)

    def add(self, x: Tensor, g: Tensor) -> None:
        """Adds the tokens x (T, D) and g (T, O), in fp32."""
        of_inputs, of_outputs = self.directions.split(self.sides, dim=1)
        right = (of_outputs @ g.T) @ x
        left = (of_inputs @ x.T) @ g
        self.sums += torch.cat((right, left), dim=1)

    def leading(self, count: int) -> Tensor:
        """[V^T | U^T] (count, D + O) of the sketch, on the layer's device."""
        of_inputs, of_outputs = self.sums.split(self.sides, dim=1)
        near_inputs, near_outputs = self.first.to(self.sums).split(self.sides, dim=1)
        right = leading_rows(of_inputs, count, near_inputs)
        left = leading_rows(of_outputs, count, near_outputs)
        return torch.cat((right, left), dim=1)


def leading_rows(matrix: Tensor, count: int, near: Tensor) -> Tensor:
    """`count` orthonormal rows that span the leading right singular vectors of `matrix`
    (K, N). Of all such rows they are the closest ones to the first rows of `near`.

    Singular vectors themselves jump where singular values are close, and would leave
    most of the gradient on M's diagonal, while Adam moves all of M alike.
    """
    vectors = torch.linalg.svd(matrix, full_matrices=False).Vh[:count]
    left, _, right = torch.linalg.svd(near[:count] @ vectors.T)
    return left @ right @ vectors


def gradient_sides(
    model: nn.Module,
    losses: Callable[[], Iterable[Tensor]],
    seed: int,
    ranks: Ranks,
) -> Tensors:
    """{module: [V^T | U^T] (R, D + O)} of every adapted layer, in fp32 on the CPU, the
    same bits on all ranks. The adapter weights must be zero. Collective.

    `losses`: this rank's part of the sequences, forward passes of `model` with a graph,
    as many on every rank. Raises `RunError` for a gradient that is not finite.
    """
    sketches = {
        name: Sketch(layer, permutation_seed(seed, f"sides/{name}", 0))
        for name, layer in mora_layers(model).items()
    }
    for _ in range(PASSES - 1):
        oversampled = _pass(sketches, losses, lambda sketch: sketch.count, ranks)
        for name, directions in oversampled.items():
            sketches[name].start_pass(directions)
    return _pass(sketches, losses, lambda sketch: sketch.layer.spec.size, ranks)


def _pass(
    sketches: dict[str, Sketch],
    losses: Callable[[], Iterable[Tensor]],
    count: Callable[[Sketch], int],
    ranks: Ranks,
) -> Tensors:
    """{module: `leading` of the sketch of all ranks' sequences, `count` rows}."""
    _sketch(sketches, losses)
    shapes = {}
    for name, sketch in sketches.items():
        sketch.sums = ranks.sum(sketch.sums.cpu()).to(sketch.layer.device)
        shapes[name] = (count(sketch), sum(sketch.sides))

    def leading(name: str) -> Tensor:
        return _finite(name, sketches[name]).leading(count(sketches[name]))

    return on_one_rank(shapes, leading, ranks)


def _finite(name: str, sketch: Sketch) -> Sketch:
    if not sketch.sums.isfinite().all():
        raise RunError(
            f"{name}: the gradient for research.sides is NaN or infinite: the model itself is broken, or needs another "
            "dtype"
        )
    return sketch


def _sketch(
    sketches: dict[str, Sketch], losses: Callable[[], Iterable[Tensor]]
) -> None:
    """Adds the gradients of all `losses` to the sketches."""
    # The only tensor that is differentiated by: no trained one gets a gradient
    leaf = torch.zeros((), requires_grad=True)
    hooks = [
        sketch.layer.register_forward_hook(partial(_after_layer, sketch, leaf))
        for sketch in sketches.values()
    ]
    try:
        for loss in losses():
            torch.autograd.grad(loss, leaf)
    finally:
        for hook in hooks:
            hook.remove()


def _after_layer(
    sketch: Sketch, leaf: Tensor, layer: nn.Module, inputs: Any, output: Tensor
) -> Tensor:
    return _SketchFunction.apply(output, leaf, inputs[0], sketch)


class _SketchFunction(torch.autograd.Function):
    """A layer's output, whose backward adds to the layer's sketch."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, leaf: Tensor, x: Tensor, sketch: Sketch
    ) -> Tensor:
        ctx.sketch = sketch
        ctx.save_for_backward(leaf, x)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        leaf, x = ctx.saved_tensors
        ctx.sketch.add(x.flatten(0, -2).float(), g.flatten(0, -2).float())
        return g, torch.zeros_like(leaf), None, None
