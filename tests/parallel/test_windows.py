"""Windows concatenated, or summed, are the operator: outputs, gradients and formed
weights.
"""

from itertools import pairwise, product

import pytest
import torch
from torch.testing import assert_close

from mora_ds.adapters.ops.linear import LayerProducts
from mora_ds.adapters.ops.mora import (
    OperatorSpec,
    collect,
    fold_input,
    mora_update,
)
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.parallel.windows import Window
from tests.helpers.operators import random

SHAPES = [(24, 40, 10), (40, 24, 10), (24, 24, 8), (24, 40, 32), (17, 23, 6)]
KINDS = [
    *product(OperatorKind, (Grouping.PLAIN, Grouping.PERMUTED)),
    (OperatorKind.SHARE, Grouping.CONTIGUOUS),
    (OperatorKind.SHARE, Grouping.STRIDED_CONTIGUOUS),
]
SPECS = [
    OperatorSpec(kind, *shape, grouping, seed=3)
    for kind, grouping in KINDS
    for shape in SHAPES
]
PARTS = 3


def bounds(size):
    return list(pairwise(size * index // PARTS for index in range(PARTS + 1)))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_windows_make_up_the_operator(spec):
    mora_matrix = random(spec.r_hat, spec.r_hat, seed=1).requires_grad_()
    weight = random(spec.d_out, spec.d_in, seed=2)
    x = random(6, spec.d_in, seed=3).requires_grad_()
    g = random(6, spec.d_out, seed=4)
    y = x @ weight.T + mora_update(spec, mora_matrix, x)
    g_x, g_mora_matrix = torch.autograd.grad(y, (x, mora_matrix), g)
    colwise = [Window(spec, (0, spec.d_in), span) for span in bounds(spec.d_out)]
    rowwise = [Window(spec, span, (0, spec.d_out)) for span in bounds(spec.d_in)]
    with torch.no_grad():
        formed = LayerProducts(spec).effective_weight(weight, mora_matrix)
        for windows in (colwise, rowwise):
            results = [
                computed(window, weight, mora_matrix, x, g) for window in windows
            ]
            outputs, gradients, of_m, of_m_by_weight, weights = zip(
                *results, strict=True
            )
            is_colwise = windows is colwise
            assert_close(joined(outputs, is_colwise), y)
            assert_close(joined(gradients, not is_colwise), g_x)
            assert_close(sum(of_m), g_mora_matrix)
            assert_close(sum(of_m_by_weight), g_mora_matrix)
            assert torch.equal(torch.cat(weights, dim=0 if is_colwise else 1), formed)


def computed(window, weight, mora_matrix, x, g):
    """A window's output, gradients of its inputs and of M on either path, and its
    rebuilt weight."""
    products = LayerProducts(window)
    x = x[:, slice(*window.inputs)]
    g = g[:, slice(*window.outputs)].contiguous()
    weight = weight[slice(*window.outputs), slice(*window.inputs)]
    saved = products.saved_input(x)
    collected = products.collect_once(g)
    return (
        products.output(x, weight, None, mora_matrix, saved),
        products.input_gradient(g, weight, mora_matrix, collected),
        products.mora_matrix_gradient(saved, g, collected, by_weight=False),
        products.mora_matrix_gradient(saved, g, None, by_weight=True),
        products.effective_weight(weight, mora_matrix),
    )


def joined(results, are_slices):
    return torch.cat(results, dim=-1) if are_slices else torch.stack(results).sum(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sums_in_low_precision_are_rounded_once(dtype):
    spec = OperatorSpec(OperatorKind.SHARE, 1024, 1024, 32, Grouping.PERMUTED)
    window = Window(spec, (0, 1024), (0, 512))
    x = random(16, 1024, seed=1).to(dtype)
    g = random(16, 512, seed=2).to(dtype)
    assert torch.equal(fold_input(window, x), fold_input(window, x.double()).to(dtype))
    assert torch.equal(collect(window, g), collect(window, g.double()).to(dtype))
