"""Windows concatenated, or summed, are the operator; their transposes are transposes."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mora_ds.adapters.ops.mora import OperatorSpec, adjoint, delta_weight, mora_update
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.adapters.ops.update import spec_from_dict
from mora_ds.common.errors import UserError
from mora_ds.parallel.windows import Window

SHAPES = [(24, 40, 10), (40, 24, 10), (24, 24, 8), (24, 40, 32), (17, 23, 6)]
KINDS = [
    *((kind, grouping) for kind in OperatorKind for grouping in (Grouping.PLAIN, Grouping.PERMUTED)),
    *((OperatorKind.SHARE, grouping) for grouping in (Grouping.CONTIGUOUS, Grouping.STRIDED_CONTIGUOUS)),
]
SPECS = [OperatorSpec(kind, *shape, grouping, seed=3) for kind, grouping in KINDS for shape in SHAPES]
PARTS = 3


def bounds(size: int, parts: int = PARTS) -> list[tuple[int, int]]:
    return list(pairwise(size * index // parts for index in range(parts + 1)))


def update(part: Window, square: Tensor, x: Tensor) -> Tensor:
    """As a process computes it, from the rows and columns of M that the window may use."""
    square = part.used_rows(square[slice(*part.rows), slice(*part.columns)])
    return part.spread(part.rotate(part.fold(x)) @ square.T)


def tensors(spec: OperatorSpec) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(spec.r_hat, spec.r_hat, generator=generator, dtype=torch.float64),
        torch.randn(2, 3, spec.d_in, generator=generator, dtype=torch.float64),
        torch.randn(2, 3, spec.d_out, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_windows_make_up_the_operator(spec: OperatorSpec):
    square, x, _ = tensors(spec)
    expected = mora_update(spec, square, x)
    columns = [update(Window.of(spec, outputs=span), square, x) for span in bounds(spec.d_out)]
    assert_close(torch.cat(columns, dim=-1), expected)
    rows = [update(Window.of(spec, inputs=span), square, x[..., slice(*span)]) for span in bounds(spec.d_in)]
    assert_close(torch.stack(rows).sum(0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sums_in_low_precision_are_rounded_once(dtype: torch.dtype):
    spec = OperatorSpec(OperatorKind.SHARE, 1024, 1024, 32, Grouping.PERMUTED)
    window = Window.of(spec, outputs=(0, 512))
    x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    g = torch.randn(16, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    for low, exact in ((window.fold(x), window.fold(x.double())), (window.collect(g), window.collect(g.double()))):
        assert torch.equal(low, exact.to(dtype))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_map_has_its_transpose(spec: OperatorSpec):
    _, x, g = tensors(spec)
    for window in (Window.of(spec, outputs=bounds(spec.d_out)[1]), Window.of(spec, inputs=bounds(spec.d_in)[1])):
        inside = x[..., slice(*window.inputs)]
        outside = g[..., slice(*window.outputs)]
        folded = window.fold(inside)
        collected = window.collect(outside)
        z = torch.randn_like(folded)
        u = torch.randn_like(collected)
        assert torch.isclose((folded * z).sum(), (inside * window.unfold(z)).sum())
        assert torch.isclose((collected * u).sum(), (outside * window.spread(u)).sum())
        assert_close(window.rotate(window.rotate(z), back=True), z)
    complete = Window.of(spec)
    z = complete.rotate(complete.fold(x)).flatten(0, -2)
    gradient = complete.all_rows(complete.collect(g).flatten(0, -2).T @ z)
    assert_close(gradient, adjoint(spec, g.flatten(0, -2).T @ x.flatten(0, -2)))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.blocks > 1], ids=str)
def test_gradients_of_windows_add_up(spec: OperatorSpec):
    _, x, g = tensors(spec)
    expected = adjoint(spec, g.flatten(0, -2).T @ x.flatten(0, -2))
    columns = [Window.of(spec, outputs=span) for span in bounds(spec.d_out)]
    rows = [Window.of(spec, inputs=span) for span in bounds(spec.d_in)]
    for windows in (columns, rows, [Window.of(spec)]):
        pieces = [window.gradient(x[..., slice(*window.inputs)], g[..., slice(*window.outputs)]) for window in windows]
        assert_close(torch.stack(pieces).sum(0), expected)


# -- segments ----------------------------------------------------------------------------------------------------------

SEGMENTS = 4
GROUPINGS = (Grouping.PERMUTED, Grouping.PLAIN, Grouping.CONTIGUOUS)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("shape", [(24, 40, 10), (40, 24, 10), (17, 23, 6), (24, 40, 32)])
def test_segments_confine_what_meets(shape: tuple[int, int, int], grouping: Grouping):
    """One definition for every way to compute, and a window of complete segments needs its own rows or columns only."""
    d_in, d_out, r_hat = shape
    plain = OperatorSpec(OperatorKind.SHARE, d_in, d_out, r_hat, grouping, seed=5)
    square, x, _ = tensors(plain)
    for count in (2, 4):
        lane_bounds = bounds(r_hat, count)
        outwards = replace(plain, out_segments=SEGMENTS)
        inwards = replace(plain, in_segments=SEGMENTS)
        columns = [
            update(Window.of(outwards, outputs=span, rows=lanes), square, x)
            for span, lanes in zip(bounds(d_out, count), lane_bounds, strict=True)
        ]
        rows = [
            update(Window.of(inwards, inputs=span, columns=lanes), square, x[..., slice(*span)])
            for span, lanes in zip(bounds(d_in, count), lane_bounds, strict=True)
        ]
        for spec, output in ((outwards, torch.cat(columns, dim=-1)), (inwards, torch.stack(rows).sum(0))):
            assert_close(output, mora_update(spec, square, x))
            assert_close(output, x @ delta_weight(spec, square).T)


def test_a_permutation_is_the_same_without_segments_and_new_with_every_seed():
    spec = OperatorSpec(OperatorKind.SHARE, 24, 40, 10, Grouping.PERMUTED, seed=5)
    square = tensors(spec)[0]
    segmented = replace(spec, out_segments=4)
    assert spec_from_dict(segmented.to_dict()) == segmented
    deltas = [delta_weight(replace(segmented, seed=seed), square) for seed in range(3)]
    assert not torch.equal(deltas[0], deltas[1])
    ranks = [int(torch.linalg.matrix_rank(sum(deltas[:count], torch.zeros(40, 24).double()))) for count in (1, 2, 3)]
    assert ranks[0] < ranks[1] <= ranks[2]


def test_segments_are_for_share():
    with pytest.raises(UserError, match="belong to operator 'share'"):
        OperatorSpec(OperatorKind.ROTATE, 24, 40, 10, in_segments=2)
    with pytest.raises(UserError, match="r_hat must be at least the number of segments"):
        OperatorSpec(OperatorKind.SHARE, 24, 40, 10, out_segments=11)
